"""Ends what waited in spools that were given up: their disks will not come back.

Contract. Inside a transaction of the caller's, which looks at so many recipients that wait, in order of message and
index, and remembers how far it came. What waited in the spool has failed then, with an event, and is entered into its
books; with the last of it the books are closed and their findings over. Nothing is added meanwhile: records of a spool
that was given up are refused. Commands that wait for such a spool are done: it changes nothing any more.
"""

from __future__ import annotations

from controlplane.adapters.postgres.book_entries import ENTER, Entered
from controlplane.adapters.postgres.ends import end_waiting
from controlplane.adapters.postgres.session import Connection
from dataplane.core.queue import EventType, State

_TEXT = "the disk it waited on was given up"

_END_COMMANDS = """
UPDATE postroad.commands AS c
SET done_time = transaction_timestamp(), update_time = transaction_timestamp(), error = 'the spool was given up'
FROM postroad.given_up_spools AS g WHERE c.spool = g.spool AND c.done_time IS NULL
"""
_NEXT_SPOOL = """
SELECT spool, position, position_index FROM postroad.given_up_spools
WHERE end_time IS NULL ORDER BY create_time, spool LIMIT 1 FOR UPDATE
"""
_WALK = """
SELECT r.message_id, r.recipient_index, r.account, EXISTS (
    SELECT FROM postroad.messages AS m WHERE m.message_id = r.message_id AND m.spool = $1 AND NOT m.replicated
) AS is_meant
FROM (
    SELECT message_id, recipient_index, account FROM postroad.recipients
    WHERE state < 6 AND message_id >= $2 AND (message_id, recipient_index) > ($2, $3)
    ORDER BY message_id, recipient_index LIMIT $4
) AS r
ORDER BY r.message_id, r.recipient_index
"""
_OUTCOME = (State.FAILED, EventType.FAILED, "5.3.0")
_MOVE_ON = f"""
WITH entered AS ({ENTER})
UPDATE postroad.given_up_spools SET position = $2, position_index = $3, end_time = $4 WHERE spool = $1
"""
_RESOLVE = """
UPDATE postroad.book_findings SET resolve_time = transaction_timestamp() WHERE spool = $1 AND resolve_time IS NULL
"""


async def end_given_up(connection: Connection, limit: int) -> int:
    """Look at the next recipients that wait, at most `limit`, for one spool that was given up; returns how many."""
    await connection.execute(_END_COMMANDS)
    given_up = await connection.fetchrow(_NEXT_SPOOL)
    if given_up is None:
        return 0
    spool, place = given_up["spool"], (given_up["position"], given_up["position_index"])
    rows = await connection.fetch(_WALK, spool, *place, limit)
    now = await connection.fetchval("SELECT transaction_timestamp()")
    entered = Entered()
    if meant := [row for row in rows if row["is_meant"]]:
        entered.changed(await end_waiting(connection, spool, meant, _OUTCOME, _TEXT, now))
    if rows:
        place = (rows[-1]["message_id"], rows[-1]["recipient_index"])
    is_over = len(rows) < limit
    await connection.execute(_MOVE_ON, spool, *place, now if is_over else None, *entered.columns())
    if is_over:
        for table in ("books", "book_comparisons"):
            await connection.execute(f"DELETE FROM postroad.{table} WHERE spool = $1", spool)
        await connection.execute(_RESOLVE, spool)
    await connection.execute("SELECT pg_notify('postroad_ledger', '')")
    return len(rows)
