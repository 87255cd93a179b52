"""Carries out commands on mail that waits in the replicated queue: it is in nobody's spool.

Contract. Inside a transaction of the caller's. A command of QUEUE_SPOOL is done when this returns: recipients that
wait, or are held, are cancelled in queue and ledger, with an event; those that are being sent, have ended, or are
another account's count as too late. Commands that somebody else carries out are passed over. Nothing but cancelling
by message comes here.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from controlplane.adapters.postgres.queue_reports import LOCK, release
from controlplane.adapters.postgres.session import Connection
from dataplane.core.queue import EventType, State, Verb

QUEUE_SPOOL = UUID(int=0)
_AT_ONCE = 100
_SENDING, _CANCELLED = int(State.SENDING), int(State.CANCELLED)

_COMMANDS = f"""
SELECT command, account, message_ids FROM postroad.commands
WHERE spool = $1 AND done_time IS NULL AND verb = {int(Verb.CANCEL)} LIMIT {_AT_ONCE} FOR UPDATE SKIP LOCKED
"""
_CANCEL = f"""
UPDATE postroad.queue_recipients AS r SET state = {_CANCELLED}
FROM postroad.replicated_queue AS q
WHERE q.message_id = ANY ($1) AND q.account = $2 AND r.message_id = q.message_id AND r.state <> {_SENDING}
RETURNING r.message_id, r.recipient_index
"""
_COUNT_SENDING = f"""
SELECT count(*) FROM postroad.queue_recipients AS r JOIN postroad.replicated_queue AS q USING (message_id)
WHERE q.message_id = ANY ($1) AND q.account = $2 AND r.state = {_SENDING}
"""
_CANCEL_IN_LEDGER = f"""
UPDATE postroad.recipients AS r SET state = {_CANCELLED}, next_attempt_time = NULL, update_time = $3
FROM unnest($1::uuid[], $2::integer[]) AS u (m, i)
WHERE r.message_id = u.m AND r.recipient_index = u.i AND r.message_id BETWEEN $4 AND $5
"""
_TELL = f"""
INSERT INTO postroad.delivery_events (message_id, recipient_index, account, type, event_time, node, spool)
SELECT m, i, $3, {int(EventType.CANCELLED)}, $4, '', $5 FROM unnest($1::uuid[], $2::integer[]) AS u (m, i)
"""
_DONE = """
UPDATE postroad.commands SET done_time = $2, update_time = $2, changed_count = $3, too_late_count = $4
WHERE command = $1
"""


async def run_commands(connection: Connection, now: datetime) -> None:
    """Carry out what is asked of the queue."""
    commands = await connection.fetch(_COMMANDS, QUEUE_SPOOL)
    for command in commands:
        await _cancel(connection, command, now)
    if commands:
        await connection.execute("SELECT pg_notify('postroad_ledger', '')")


async def _cancel(connection: Connection, command: Any, now: datetime) -> None:
    message_ids, account = command["message_ids"], command["account"]
    await connection.execute(LOCK, message_ids)
    found = await connection.fetch(_CANCEL, message_ids, account)
    too_late: int = await connection.fetchval(_COUNT_SENDING, message_ids, account)
    if found:
        keys = ([row["message_id"] for row in found], [row["recipient_index"] for row in found])
        await connection.execute(_CANCEL_IN_LEDGER, *keys, now, min(keys[0]), max(keys[0]))
        await connection.execute(_TELL, *keys, account, now, QUEUE_SPOOL)
        await release(connection, message_ids)
    elif not too_late:
        too_late = 1
    await connection.execute(_DONE, command["command"], now, len(found), too_late)
