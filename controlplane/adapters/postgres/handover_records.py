"""Mail that changes hands, as the records of spools tell of it: one gives it up, another one has taken it over.

Contract. All of this happens in the transaction that stores the records, and with it moves the cursor. A message that
was given up is nobody's: its row in `messages` names NO_SPOOL, its mail lies in `handovers`. It is its taker's from the
record on that says so. `store_given` raises ValueError for a content that is not whole, `store_taken` NotAssignedError
for a message that was not given to this spool. Books are told of both, so that a recipient waits in one book at most.

Commands that a spool had not ended when it gave mail up follow the mail: those for one message change their spool with
it; those with a filter are given to the taker as well, from the first message on that it took. The same goes for
commands with a filter that were asked for in between, and that no spool could carry out for this mail.
"""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from controlplane.adapters.ledger_records import GivenRow, PieceRow, columns
from controlplane.adapters.postgres.book_entries import BY_DAY, Entered
from controlplane.adapters.postgres.session import Connection
from controlplane.ports_queue import NO_SPOOL

_STORE_PIECES = """
INSERT INTO postroad.handover_contents (message_id, piece, data)
SELECT * FROM unnest($1::uuid[], $2::integer[], $3::bytea[])
ON CONFLICT (message_id, piece) DO UPDATE SET data = excluded.data, create_time = excluded.create_time
"""
_COUNT_PIECES = """
SELECT message_id, count(*) AS pieces, sum(length(data)) AS bytes FROM postroad.handover_contents
WHERE message_id = ANY ($1::uuid[]) GROUP BY message_id
"""
_STORE_GIVEN = """
INSERT INTO postroad.handovers (message_id, account, node_pool, from_spool, drain, what, content_bytes, operations)
SELECT u.m, u.a, n.node_pool, $5, n.drain, u.w, u.b, ARRAY(
    SELECT DISTINCT c.operation FROM postroad.commands AS c
    WHERE c.spool = $5 AND c.done_time IS NULL AND c.accepted_before IS NOT NULL
)
FROM unnest($1::uuid[], $2::text[], $3::bytea[], $4::bigint[]) AS u (m, a, w, b), postroad.nodes AS n WHERE n.node = $6
"""
_CHANGE_OWNER = f"""
WITH moved AS (
    UPDATE postroad.messages SET spool = $4
    WHERE message_id = ANY ($1::uuid[]) AND message_id BETWEEN $2 AND $3
    RETURNING message_id
), written AS (
    SELECT r.tableoid AS partition, r.account, r.state
    FROM postroad.recipients AS r JOIN moved USING (message_id)
    WHERE r.state < 6 AND r.message_id BETWEEN $2 AND $3
)
{BY_DAY}
"""
_TAKE = """
DELETE FROM postroad.handovers AS h USING unnest($1::uuid[], $2::text[]) AS u (m, a)
WHERE h.message_id = u.m AND h.account = u.a AND (h.spool = $3 OR h.spool IS NULL)
RETURNING h.message_id, h.drain, h.operations, h.create_time
"""
_COUNT_WAITING = """
SELECT message_id, count(*) AS recipients FROM postroad.recipients
WHERE message_id = ANY ($1::uuid[]) AND message_id BETWEEN $2 AND $3 AND state < 6 GROUP BY message_id
"""
_COUNT_TARGETS = """
INSERT INTO postroad.drain_targets AS t (drain, node, message_count, recipient_count)
SELECT d, $2, count(*), sum(r) FROM unnest($1::uuid[], $3::bigint[]) AS u (d, r) GROUP BY d
ON CONFLICT (drain, node) DO UPDATE
SET message_count = t.message_count + excluded.message_count,
    recipient_count = t.recipient_count + excluded.recipient_count
"""
_MOVE_COMMANDS = """
UPDATE postroad.commands SET spool = $3
WHERE spool = $2 AND done_time IS NULL AND accepted_before IS NULL AND message_ids && $1::uuid[]
"""
_REPEAT_COMMANDS = """
INSERT INTO postroad.commands (
    operation, account, verb, spool, message_ids, provider, accepted_before, filter_provider, filter_recipient_domain,
    filter_states, position, create_time
)
SELECT DISTINCT ON (operation) operation, account, verb, $3, '{}', provider, accepted_before, filter_provider,
    filter_recipient_domain, filter_states, $4, create_time
FROM postroad.commands
WHERE accepted_before IS NOT NULL AND (operation = ANY ($1::uuid[]) OR create_time >= $2)
"""


class NotAssignedError(Exception):
    """A spool says that it took what it was not given."""


async def store_pieces(connection: Connection, rows: Sequence[PieceRow]) -> None:
    """Keep pieces of contents; a piece that comes again takes the place of the former one."""
    # A statement cannot write a row twice.
    pieces = {(row.message_id, row.piece): row.data for row in rows}
    await connection.execute(_STORE_PIECES, *columns([(*key, data) for key, data in pieces.items()], 3))


async def store_given(
    connection: Connection, node_id: str, spool: UUID, rows: Sequence[GivenRow], entered: Entered
) -> None:
    """A spool gave these up."""
    message_ids = [row.message_id for row in rows]
    found = await connection.fetch(_COUNT_PIECES, message_ids)
    whole = {row["message_id"]: (row["pieces"], row["bytes"]) for row in found}
    for row in rows:
        if whole.get(row.message_id, (0, 0)) != (row.piece_count, row.content_bytes):
            raise ValueError("the content of what was handed over is not whole")
    given = [(row.message_id, row.account, row.what, row.content_bytes) for row in rows]
    await connection.execute(_STORE_GIVEN, *columns(given, 4), spool, node_id)
    written = await connection.fetch(_CHANGE_OWNER, message_ids, min(message_ids), max(message_ids), NO_SPOOL)
    entered.moved(written, -1)
    await connection.execute(_MOVE_COMMANDS, message_ids, spool, NO_SPOOL)


async def store_taken(
    connection: Connection, node_id: str, spool: UUID, rows: Sequence[tuple[UUID, str]], entered: Entered
) -> None:
    """A spool has these now."""
    message_ids = [message_id for message_id, _ in rows]
    taken = await connection.fetch(_TAKE, *columns(rows, 2), spool)
    if len(taken) < len(rows):
        raise NotAssignedError("a message was not handed over to this spool")
    await connection.execute("DELETE FROM postroad.handover_contents WHERE message_id = ANY ($1::uuid[])", message_ids)
    bounds = (min(message_ids), max(message_ids))
    entered.moved(await connection.fetch(_CHANGE_OWNER, message_ids, *bounds, spool), 1)
    counts = {
        row["message_id"]: row["recipients"] for row in await connection.fetch(_COUNT_WAITING, message_ids, *bounds)
    }
    drained = [(row["drain"], counts.get(row["message_id"], 0)) for row in taken if row["drain"] is not None]
    if drained:
        drains, recipients = columns(drained, 2)
        await connection.execute(_COUNT_TARGETS, drains, node_id, recipients)
    await connection.execute(_MOVE_COMMANDS, message_ids, NO_SPOOL, spool)
    operations = list({operation for row in taken for operation in row["operations"]})
    since = min(row["create_time"] for row in taken)
    before = UUID(int=min(message_ids).int - 1)
    await connection.execute(_REPEAT_COMMANDS, operations, since, spool, before)
    # Whoever has commands now must hear of them; without any the others find nothing.
    await connection.execute("SELECT pg_notify('postroad_commands', $1)", node_id)
