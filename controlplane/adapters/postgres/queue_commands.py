"""Carries out commands on mail that waits in the replicated queue: it is in nobody's spool.

Contract. Inside a transaction of the caller's, which changes AT_ONCE messages and RECIPIENTS_AT_ONCE recipients at
most: what is changed in the queue, what the ledger shows of it, its events and the count are one transaction, as a
spool's are. A command with a filter
goes on where it stood; one that somebody else carries out is passed over. What verbs do is `dataplane.core.commands`,
but that a hold needs no number of its own here: who claims locks the row.

What is being sent is too late where its message was named, and is not counted for a filter, for the spool that sends it
is asked as well. A message that is gone, or is another account's, is one that is too late. What is held ends with its
lifetime, as in a spool.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg

from controlplane.adapters.postgres.book_entries import BY_DAY, Entered, enter_queue
from controlplane.adapters.postgres.fleet_database import FleetDatabase
from controlplane.adapters.postgres.queue_reports import LOCK, at_once, release
from controlplane.adapters.postgres.session import Connection
from controlplane.domain.messages import EVERY_ACCOUNT, first_id_at
from dataplane.core.config import RetryPolicy
from dataplane.core.queue import TERMINAL, EventType, State, Verb

# Not the one of zeros: that is nobody's (NO_SPOOL).
QUEUE_SPOOL = UUID(int=1)
AT_ONCE = 500
WALKED = 5_000
_NOTHING = UUID(int=0)
_SCHEDULED, _QUEUED, _SENDING, _DEFERRED, _HELD = (
    int(state) for state in (State.SCHEDULED, State.QUEUED, State.SENDING, State.DEFERRED, State.HELD)
)
_TERMINAL = [int(state) for state in TERMINAL]
_BOUNCED_TEXT = "given up by a command"
_EXPIRED_TEXT = "held until its lifetime was over"


class _Rule(NamedTuple):
    """What a verb sets, and of whom; $3 is now, $4 the provider of a reroute."""

    event: EventType
    sets: str
    of: str


_WAITS = f"r.state <> {_SENDING}"
_RULES = {
    Verb.CANCEL: _Rule(EventType.CANCELLED, f"state = {int(State.CANCELLED)}", _WAITS),
    Verb.BOUNCE: _Rule(EventType.FAILED, f"state = {int(State.FAILED)}", _WAITS),
    Verb.HOLD: _Rule(EventType.HELD, f"state = {_HELD}", f"r.state IN ({_SCHEDULED}, {_QUEUED}, {_DEFERRED})"),
    Verb.RELEASE: _Rule(EventType.RELEASED, f"state = {_QUEUED}, due_time = $3", f"r.state = {_HELD}"),
    Verb.RETRY: _Rule(
        EventType.RETRIED,
        f"state = {_QUEUED}, due_time = $3",
        f"(r.state = {_SCHEDULED} OR r.state IN ({_QUEUED}, {_DEFERRED}) AND r.due_time > $3)",
    ),
    Verb.REROUTE: _Rule(
        EventType.REROUTED, "next_hop = $4, pinned = true", f"{_WAITS} AND NOT (r.pinned AND r.next_hop = $4)"
    ),
}
_OPEN = """
SELECT command, account, verb, message_ids, provider, accepted_before, filter_provider, filter_recipient_domain,
    filter_states, position
FROM postroad.commands
WHERE spool = $1 AND done_time IS NULL ORDER BY create_time, command LIMIT 1 FOR UPDATE SKIP LOCKED
"""
# All that lies next in the queue, whoever's it is: the walk for an account with little mail is bounded, too.
WALK = f"""
SELECT message_id, $3 IN (account, '{EVERY_ACCOUNT}') AS is_meant FROM postroad.replicated_queue
WHERE message_id > $1 AND message_id < $2 ORDER BY message_id LIMIT {WALKED}
"""
# What a verb does not need is asked for all the same, so that each statement has the same arguments.
_CHANGE = f"""
UPDATE postroad.queue_recipients AS r SET {{rule.sets}}
FROM postroad.replicated_queue AS q
WHERE q.message_id = ANY ($1) AND $2 IN (q.account, '{EVERY_ACCOUNT}') AND r.message_id = q.message_id
    AND $3::timestamptz IS NOT NULL AND $4::text IS NOT NULL AND {{rule.of}}
    AND $5 IN ('', r.next_hop) AND ($6::smallint[] = '{{{{}}}}' OR r.state = ANY ($6))
    AND ($7::text = '' OR EXISTS (
        SELECT FROM postroad.recipients AS l
        WHERE l.message_id = r.message_id AND l.recipient_index = r.recipient_index AND l.message_id BETWEEN $8 AND $9
            AND right(l.address, length($7) + 1) = '@' || $7
    ))
RETURNING r.message_id, r.recipient_index, q.account, r.state
"""
_CHANGES = {verb: _CHANGE.format(rule=rule) for verb, rule in _RULES.items()}
_COUNT_SENDING = f"""
SELECT count(*) FROM postroad.queue_recipients AS r JOIN postroad.replicated_queue AS q USING (message_id)
WHERE q.message_id = ANY ($1) AND q.account = $2 AND r.state = {_SENDING}
"""
_KNOWN = "SELECT count(*) FROM postroad.replicated_queue WHERE message_id = ANY ($1) AND account = $2"
_CHANGE_IN_LEDGER = f"""
WITH written AS (
UPDATE postroad.recipients AS r
SET state = u.s, update_time = $4, next_attempt_time = CASE WHEN u.s = {_QUEUED} THEN $4::timestamptz END,
    enhanced_code = CASE WHEN $5 <> '' THEN $5 ELSE r.enhanced_code END,
    reply_text = CASE WHEN $6 <> '' THEN $6 ELSE r.reply_text END,
    reply_code = CASE WHEN $6 <> '' THEN 0 ELSE r.reply_code END
FROM unnest($1::uuid[], $2::integer[], $3::smallint[]) AS u (m, i, s)
WHERE r.message_id = u.m AND r.recipient_index = u.i AND r.message_id BETWEEN $7 AND $8
    AND r.state <> ALL ($9::smallint[])
RETURNING r.tableoid AS partition, r.account, r.state
)
{BY_DAY}
"""
TELL = """
INSERT INTO postroad.delivery_events (
    message_id, recipient_index, account, type, event_time, provider, enhanced_code, reply_text, node, spool
)
SELECT m, i, a, $4, $5, $6, $7, $8, '', $9 FROM unnest($1::uuid[], $2::integer[], $3::text[]) AS u (m, i, a)
"""
_DUE = f"""
UPDATE postroad.replicated_queue AS q
SET due_time = (
    SELECT min(CASE WHEN r.state = {_HELD} THEN timestamptz 'infinity' ELSE r.due_time END)
    FROM postroad.queue_recipients AS r WHERE r.message_id = q.message_id
)
WHERE q.message_id = ANY ($1) AND q.epoch IS NULL
"""
_COUNT = """
UPDATE postroad.commands SET update_time = $2, changed_count = changed_count + $3, too_late_count = too_late_count + $4,
    position = coalesce($5, position), done_time = CASE WHEN $6 THEN $2::timestamptz END
WHERE command = $1
"""


_EXPIRED = f"""
SELECT r.message_id, r.recipient_index, q.account
FROM postroad.queue_recipients AS r
JOIN postroad.replicated_queue AS q ON q.message_id = r.message_id
JOIN postroad.accounts AS a ON a.account = q.account
JOIN postroad.messages AS m ON m.message_id = q.message_id
WHERE r.state = {_HELD}
    AND coalesce(m.send_time, m.accept_time) + coalesce(a.retry_lifetime_s, $2) * interval '1 s' <= $1
ORDER BY r.message_id LIMIT $3 FOR UPDATE OF q SKIP LOCKED
"""
_END = f"""
UPDATE postroad.queue_recipients AS r SET state = {int(State.EXPIRED)}
FROM unnest($1::uuid[], $2::integer[]) AS u (m, i)
WHERE r.message_id = u.m AND r.recipient_index = u.i AND r.state = {_HELD}
"""


async def expire_held(connection: Connection, now: datetime, limit: int) -> int:
    """End mail that is held when its lifetime is over, for at most `limit` recipients; for how many."""
    found = await connection.fetch(_EXPIRED, now, RetryPolicy().lifetime_s, limit)
    if not found:
        return 0
    message_ids, indexes, accounts = (
        [row[name] for row in found] for name in ("message_id", "recipient_index", "account")
    )
    states = [int(State.EXPIRED)] * len(found)
    said = ("", _EXPIRED_TEXT)
    bounds = (min(message_ids), max(message_ids))
    await connection.execute(_END, message_ids, indexes)
    await _change_in_ledger(connection, message_ids, indexes, states, now, *said, *bounds)
    await connection.execute(TELL, message_ids, indexes, accounts, int(EventType.EXPIRED), now, "", *said, QUEUE_SPOOL)
    await release(connection, message_ids)
    await connection.execute(_DUE, message_ids)
    return len(found)


async def run_commands(database: FleetDatabase, limit: int, now: datetime | None = None) -> int:
    """Carry out what is asked of the queue, in at most `limit` transactions; in how many of them there was something.

    `now` is the database's clock unless it is given.
    """
    for count in range(limit):
        async with database.transaction("queue_command") as connection:
            clock = now or await connection.fetchval("SELECT transaction_timestamp()")
            if not await run_command(connection, clock):
                return count
    return limit


async def run_command(connection: Connection, now: datetime) -> bool:
    """Carry out a part of what is asked of the queue; whether there may be more."""
    command = await connection.fetchrow(_OPEN, QUEUE_SPOOL)
    if command is None:
        return False
    if command["accepted_before"] is None:
        message_ids, position, is_done = command["message_ids"], None, True
    else:
        message_ids, position, is_done = await _next_messages(connection, command)
    changed = await _change(connection, command, message_ids, now) if message_ids else 0
    too_late = 0
    if command["accepted_before"] is None:
        too_late = await _count_late(connection, command, message_ids, changed)
    await connection.execute(_COUNT, command["command"], now, changed, too_late, position, is_done)
    await connection.execute("SELECT pg_notify('postroad_ledger', '')")
    return True


async def _next_messages(connection: Connection, command: asyncpg.Record) -> tuple[list[UUID], UUID | None, bool]:
    """What the filter may mean of the next messages, how far that is, and whether it is all."""
    after = command["position"] or _NOTHING
    before = UUID(first_id_at(command["accepted_before"]))
    rows = await connection.fetch(WALK, after, before, command["account"])
    meant = [row["message_id"] for row in rows if row["is_meant"]]
    count = await at_once(connection, meant[:AT_ONCE])
    if len(meant) > count:
        return meant[:count], meant[count - 1], False
    return meant, rows[-1]["message_id"] if rows else None, len(rows) < WALKED


async def _change(connection: Connection, command: asyncpg.Record, message_ids: Sequence[UUID], now: datetime) -> int:
    """Change recipients in queue and ledger, with their events; how many."""
    verb = Verb(command["verb"])
    rule, provider = _RULES[verb], command["provider"]
    await connection.execute(LOCK, message_ids)
    bounds = (min(message_ids), max(message_ids))
    found = await connection.fetch(
        _CHANGES[verb],
        *(message_ids, command["account"], now, provider),
        *(command["filter_provider"], command["filter_states"], command["filter_recipient_domain"], *bounds),
    )
    if not found:
        return 0
    ids, indexes = [row["message_id"] for row in found], [row["recipient_index"] for row in found]
    said = ("5.7.0", _BOUNCED_TEXT) if verb is Verb.BOUNCE else ("", "")
    if verb is not Verb.REROUTE:
        states = [row["state"] for row in found]
        await _change_in_ledger(connection, ids, indexes, states, now, *said, *bounds)
    accounts = [row["account"] for row in found]
    await connection.execute(TELL, ids, indexes, accounts, int(rule.event), now, provider, *said, QUEUE_SPOOL)
    await release(connection, list(message_ids))
    await connection.execute(_DUE, message_ids)
    return len(found)


async def _change_in_ledger(connection: Connection, *arguments: Any) -> None:
    """Show new states, and enter those that are ends."""
    entered = Entered()
    entered.changed(await connection.fetch(_CHANGE_IN_LEDGER, *arguments, _TERMINAL))
    await enter_queue(connection, QUEUE_SPOOL, entered)


async def _count_late(
    connection: Connection, command: asyncpg.Record, message_ids: Sequence[UUID], changed: int
) -> int:
    """How many recipients of messages that were named it is too late for."""
    if command["verb"] != int(Verb.RELEASE):
        sending: int = await connection.fetchval(_COUNT_SENDING, message_ids, command["account"])
        if sending:
            return sending
    if changed or await connection.fetchval(_KNOWN, message_ids, command["account"]):
        return 0
    return 1
