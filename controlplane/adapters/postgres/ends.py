"""Ends recipients of LOCAL mail by the control plane's word: their spool has them no more.

Contract. Inside a transaction of the caller's, who holds the spool's row or knows that no record of it is stored any
more. `end_waiting` ends those that wait still, each with an event, and answers the rows that `Entered.changed` wants.

`end_lost` is for commands that a spool has answered: CANCEL and BOUNCE of a message end as well what the books name as
`missing_in_spool` of it. All that the spool had to say of the message came before its answer, and is stored: what waits
in the ledger now waits nowhere else. It answers how many recipients each command has ended so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from uuid import UUID

import asyncpg

from controlplane.adapters.postgres.book_entries import BY_DAY, Entered
from controlplane.adapters.postgres.queue_commands import TELL
from controlplane.adapters.postgres.session import Connection
from controlplane.domain.books import FindingKind
from dataplane.core.queue import EventType, State, Verb

_LOST_TEXT = "its spool had lost it"
_END = f"""
WITH written AS (
UPDATE postroad.recipients AS r
SET state = $3, next_attempt_time = NULL, update_time = $4, reply_code = 0, enhanced_code = $5, reply_text = $6
FROM unnest($1::uuid[], $2::integer[]) AS u (m, i)
WHERE r.message_id = u.m AND r.recipient_index = u.i AND r.message_id BETWEEN $7 AND $8 AND r.state < 6
RETURNING r.tableoid AS partition, r.account, r.state
)
{BY_DAY}
"""
_LOST = f"""
SELECT c.command, c.verb, r.message_id, r.recipient_index, r.account
FROM postroad.commands AS c
JOIN postroad.messages AS m ON m.message_id = ANY (c.message_ids) AND m.account = c.account AND m.spool = c.spool
JOIN postroad.recipients AS r ON r.message_id = m.message_id
JOIN postroad.book_findings AS f ON f.account = r.account AND f.spool = c.spool AND f.message_id = r.message_id
    AND f.recipient_index = r.recipient_index
WHERE c.command = ANY ($1::uuid[]) AND c.spool = $2 AND c.done_time IS NULL AND NOT m.replicated AND r.state < 6
    AND c.verb IN ({int(Verb.CANCEL)}, {int(Verb.BOUNCE)})
    AND f.kind = {int(FindingKind.MISSING_IN_SPOOL)} AND f.resolve_time IS NULL
ORDER BY r.message_id, r.recipient_index
"""
_OUTCOMES = {
    Verb.CANCEL: (State.CANCELLED, EventType.CANCELLED, ""),
    Verb.BOUNCE: (State.FAILED, EventType.FAILED, "5.7.0"),
}


async def end_waiting(
    connection: Connection,
    spool: UUID,
    rows: Sequence[asyncpg.Record],
    outcome: tuple[State, EventType, str],
    text: str,
    now: datetime,
) -> list[asyncpg.Record]:
    """See the module; `rows` have message id, index and account, the outcome an enhanced status code."""
    message_ids, indexes, accounts = (
        [row[name] for row in rows] for name in ("message_id", "recipient_index", "account")
    )
    state, event, code = outcome
    bounds = (min(message_ids), max(message_ids))
    written = await connection.fetch(_END, message_ids, indexes, int(state), now, code, text, *bounds)
    await connection.execute(TELL, message_ids, indexes, accounts, int(event), now, "", code, text, spool)
    return written


async def end_lost(
    connection: Connection, spool: UUID, commands: Iterable[str], now: datetime, entered: Entered
) -> Counter[str]:
    """See the module; `commands` have been answered to their end."""
    found = await connection.fetch(_LOST, list(commands), spool)
    # Two commands may name one message: one of them ends it.
    rows = {(row["message_id"], row["recipient_index"]): row for row in found}.values()
    for verb, outcome in _OUTCOMES.items():
        meant = [row for row in rows if row["verb"] == verb]
        if meant:
            entered.changed(await end_waiting(connection, spool, meant, outcome, _LOST_TEXT, now))
    return Counter(str(row["command"]) for row in rows)
