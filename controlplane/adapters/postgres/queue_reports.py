"""What changes rows of the replicated queue that a lease holds: reports of the spool, and the end of the lease.

Contract. Both run inside a transaction of the caller's. A report counts only while the queue says that the report's
epoch holds the message and the attempt is the recipient's present one; another one changes nothing, whatever it says,
but for one: an end that a former lease tells is the ledger's, and what the ledger has as ended waits no more. A message
without recipients leaves the queue with its content; one of which nothing is being sent is nobody's any more and waits.
Rows are locked in order of message id, or not at all where somebody has them locked.

    what is said of a recipient     becomes
    terminal                        gone
    deferred, queued                waits for as long as was said, by the clock of the database
    uncertain                       the same, or held, as its account chose
    nothing, the lease ended        uncertain, due at once, or held, with an event; not begun where the claim was not
                                    confirmed
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from controlplane.adapters.ledger_records import QueueReport, columns
from controlplane.adapters.postgres.session import Connection
from dataplane.core.queue import TERMINAL, EventType, State

UNCONFIRMED_S = 60
# Messages that one transaction returns to the queue; what is left over comes with the next one.
RETURNED_ROWS = 1_000
# What one transaction changes, or one claim gives out, has at most so many recipients, or is one message.
RECIPIENTS_AT_ONCE = 2_000
_QUEUED, _SENDING, _HELD = int(State.QUEUED), int(State.SENDING), int(State.HELD)
_TERMINAL = [int(state) for state in TERMINAL]
_HOLD = 2
_GONE = "the node that was sending it is gone"

# Each message is looked at in turn, no further than to the recipient that is one too many.
_ONE_TOO_MANY = """
SELECT r.message_id FROM unnest($1::uuid[]) AS u (m)
CROSS JOIN LATERAL (SELECT q.message_id FROM postroad.queue_recipients AS q WHERE q.message_id = u.m LIMIT $2 + 1) AS r
OFFSET $2 LIMIT 1
"""
LOCK = "SELECT 1 FROM postroad.replicated_queue WHERE message_id = ANY ($1) ORDER BY message_id FOR UPDATE"
_APPLY = f"""
UPDATE postroad.queue_recipients AS r
SET state = CASE WHEN u.h AND a.uncertain_policy = {_HOLD} THEN {_HELD} ELSE u.s END,
    attempt = u.n,
    due_time = transaction_timestamp() + interval '1 ms' * u.d,
    next_hop = CASE WHEN u.p = '' OR r.pinned THEN r.next_hop ELSE u.p END
FROM unnest(
    $2::uuid[], $3::integer[], $4::bigint[], $5::smallint[], $6::integer[], $7::bigint[], $8::boolean[], $9::text[]
) AS u (m, i, e, s, n, d, h, p)
JOIN postroad.replicated_queue AS q ON q.message_id = u.m AND q.epoch = u.e AND q.claim_id IS NULL
JOIN postroad.node_leases AS l ON l.epoch = u.e AND l.spool = $1
LEFT JOIN postroad.accounts AS a ON a.account = q.account
WHERE r.message_id = u.m AND r.recipient_index = u.i AND r.state = {_SENDING}
    AND (r.attempt = u.n OR u.s = {_QUEUED} AND r.attempt = u.n + 1)
RETURNING r.message_id, r.recipient_index, r.state
"""
# What the ledger has as ended, by the word of a former lease that came late, need not go again.
_END_KNOWN = f"""
UPDATE postroad.queue_recipients AS r SET state = l.state
FROM postroad.recipients AS l
WHERE r.message_id = ANY ($1) AND r.state <> {_SENDING} AND l.message_id BETWEEN $2 AND $3
    AND l.message_id = r.message_id AND l.recipient_index = r.recipient_index AND l.state = ANY ($4::smallint[])
"""
_HOLD_IN_LEDGER = f"""
UPDATE postroad.recipients AS r SET state = {_HELD}, next_attempt_time = NULL
FROM unnest($1::uuid[], $2::integer[]) AS u (m, i)
WHERE r.message_id = u.m AND r.recipient_index = u.i AND r.message_id BETWEEN $3 AND $4
    AND r.state <> ALL ($5::smallint[])
"""
_DELETE_ENDED = "DELETE FROM postroad.queue_recipients WHERE message_id = ANY ($1) AND state = ANY ($2::smallint[])"
_DELETE_MESSAGES = """
WITH gone AS (
    DELETE FROM postroad.replicated_queue AS q
    WHERE q.message_id = ANY ($1)
        AND NOT EXISTS (SELECT FROM postroad.queue_recipients AS r WHERE r.message_id = q.message_id)
    RETURNING q.message_id
)
DELETE FROM postroad.queue_contents AS c USING gone WHERE c.message_id = gone.message_id
"""
_RELEASE = f"""
UPDATE postroad.replicated_queue AS q
SET epoch = NULL, claim_id = NULL, claim_time = NULL,
    due_time = (
        SELECT min(CASE WHEN r.state = {_HELD} THEN timestamptz 'infinity' ELSE r.due_time END)
        FROM postroad.queue_recipients AS r WHERE r.message_id = q.message_id
    )
WHERE q.message_id = ANY ($1) AND q.epoch IS NOT NULL AND NOT EXISTS (
    SELECT FROM postroad.queue_recipients AS r WHERE r.message_id = q.message_id AND r.state = {_SENDING}
)
"""
_ENDED = "SELECT epoch FROM postroad.node_leases WHERE NOT closed AND lease_until <= $1"
LOCK_ENDED = f"""
SELECT message_id, claim_id IS NOT NULL AS unconfirmed FROM postroad.replicated_queue WHERE epoch = ANY ($1)
LIMIT {RETURNED_ROWS} FOR UPDATE SKIP LOCKED
"""
LOCK_UNCONFIRMED = f"""
SELECT message_id FROM postroad.replicated_queue
WHERE claim_id IS NOT NULL AND claim_time <= $1::timestamptz - interval '{UNCONFIRMED_S} s'
LIMIT {RETURNED_ROWS} FOR UPDATE SKIP LOCKED
"""
_NOT_BEGUN = f"""
UPDATE postroad.queue_recipients SET state = {_QUEUED}, attempt = attempt - 1
WHERE message_id = ANY ($1) AND state = {_SENDING}
"""
_UNCERTAIN = f"""
UPDATE postroad.queue_recipients AS r
SET state = CASE WHEN a.uncertain_policy = {_HOLD} THEN {_HELD} ELSE {_QUEUED} END, due_time = $2
FROM postroad.replicated_queue AS q
JOIN postroad.node_leases AS l ON l.epoch = q.epoch
LEFT JOIN postroad.accounts AS a ON a.account = q.account
WHERE q.message_id = ANY ($1) AND r.message_id = q.message_id AND r.state = {_SENDING}
RETURNING r.message_id, r.recipient_index, r.state, r.attempt, q.account, l.node, l.spool
"""
_TELL = f"""
INSERT INTO postroad.delivery_events (
    message_id, recipient_index, account, type, event_time, attempt, reply_text, node, spool
)
SELECT m, i, c, {int(EventType.UNCERTAIN)}, $8, n, '{_GONE}', o, s
FROM unnest($1::uuid[], $2::integer[], $3::smallint[], $4::integer[], $5::text[], $6::text[], $7::uuid[])
    AS u (m, i, t, n, c, o, s)
"""
_TELL_STATES = """
UPDATE postroad.recipients AS r
SET state = u.t, attempts = u.n, update_time = $5, next_attempt_time = NULL
FROM unnest($1::uuid[], $2::integer[], $3::smallint[], $4::integer[]) AS u (m, i, t, n)
WHERE r.message_id = u.m AND r.recipient_index = u.i AND r.message_id BETWEEN $6 AND $7
    AND r.state <> ALL ($8::smallint[]) AND r.attempts <= u.n
"""
# Not forgotten: who held it may tell of its mail later.
_CLOSE_LEASES = """
UPDATE postroad.node_leases AS l SET closed = true
WHERE NOT l.closed AND l.lease_until < $1::timestamptz - interval '1 hour'
    AND NOT EXISTS (SELECT FROM postroad.replicated_queue AS q WHERE q.epoch = l.epoch)
"""


async def at_once(connection: Connection, message_ids: Sequence[UUID]) -> int:
    """How many of these messages, from the first on, have RECIPIENTS_AT_ONCE in all; the first one in any case."""
    too_much = await connection.fetchval(_ONE_TOO_MANY, message_ids, RECIPIENTS_AT_ONCE)
    return len(message_ids) if too_much is None else max(message_ids.index(too_much), 1)


async def apply_reports(connection: Connection, spool: UUID, reports: Sequence[QueueReport]) -> None:
    """Take over what a spool says of mail that it holds."""
    message_ids = list({report.message_id for report in reports})
    await connection.execute(LOCK, message_ids)
    found = await connection.fetch(_APPLY, spool, *columns(reports, 8))
    held = [(row["message_id"], row["recipient_index"]) for row in found if row["state"] == _HELD]
    if held:
        bounds = (min(message_ids), max(message_ids))
        await connection.execute(_HOLD_IN_LEDGER, *columns(held, 2), *bounds, _TERMINAL)
    late = [report.message_id for report in reports if report.state in _TERMINAL] if len(found) < len(reports) else []
    changed = list({*(row["message_id"] for row in found), *late})
    if changed:
        await release(connection, changed)


async def release(connection: Connection, message_ids: list[Any]) -> None:
    """Forget what ended of these messages, and let those wait of which nothing is being sent."""
    await connection.execute(_END_KNOWN, message_ids, min(message_ids), max(message_ids), _TERMINAL)
    await connection.execute(_DELETE_ENDED, message_ids, _TERMINAL)
    await connection.execute(_DELETE_MESSAGES, message_ids)
    await connection.execute(_RELEASE, message_ids)


async def return_ended(connection: Connection, now: datetime, *, adopt: bool) -> tuple[int, int]:
    """Return claims that nobody confirmed and, with `adopt`, what ended leases held.

    How many messages, and how many recipients became uncertain by it.
    """
    unconfirmed = [row["message_id"] for row in await connection.fetch(LOCK_UNCONFIRMED, now)]
    unconfirmed = unconfirmed[: await at_once(connection, unconfirmed)]
    begun: list[UUID] = []
    epochs = [row["epoch"] for row in await connection.fetch(_ENDED, now)] if adopt else []
    if epochs:
        held = await connection.fetch(LOCK_ENDED, epochs)
        for row in held[: await at_once(connection, [row["message_id"] for row in held])]:
            (unconfirmed if row["unconfirmed"] else begun).append(row["message_id"])
        await connection.execute(_CLOSE_LEASES, now)
    if unconfirmed:
        await connection.execute(_NOT_BEGUN, unconfirmed)
    uncertain = await connection.fetch(_UNCERTAIN, begun, now) if begun else []
    if uncertain:
        told = columns([tuple(row) for row in uncertain], 7)
        await connection.execute(_TELL, *told, now)
        bounds = (min(told[0]), max(told[0]))
        await connection.execute(_TELL_STATES, *told[:4], now, *bounds, _TERMINAL)
    returned = list({*unconfirmed, *begun})
    if returned:
        await release(connection, returned)
    return len(returned), len(uncertain)
