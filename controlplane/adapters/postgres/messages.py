"""The ledger as callers read it, and the commands they give.

Contract. Implements `controlplane.ports.Messages`. Every query names the account beside row-level security. Lists walk
ids downwards and touch only the partitions of the range asked for. Events are read in the order (transaction, number),
and only below the oldest transaction that is still open, so that nothing can appear before a position given out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import Any

import asyncpg

from controlplane.adapters.postgres.nodes import COMMANDS_CHANNEL
from controlplane.adapters.postgres.queue_commands import QUEUE_SPOOL
from controlplane.adapters.postgres.session import Session
from controlplane.domain import names
from controlplane.domain.errors import FailedPreconditionError, NotFoundError, Reason
from controlplane.domain.messages import (
    EVERY_ACCOUNT,
    LEAST_ID,
    Command,
    CommandOrder,
    Event,
    Message,
    MessageFilter,
    MessageQuery,
    Position,
    Recipient,
    SpoolProgress,
)
from controlplane.domain.resources import NodeState
from dataplane.core.queue import EventType, State, Verb

# What one answer may hold in memory and in a message: 1,000 messages can have a million recipients.
MAX_PAGE_RECIPIENTS = 10_000
MAX_TIMELINE = 5_000
_GREATEST_ID = "ffffffff-ffff-ffff-ffff-ffffffffffff"

_RECIPIENTS = """
SELECT * FROM postroad.recipients WHERE account = $1 AND message_id = ANY($2::uuid[])
ORDER BY message_id, recipient_index
"""
_RECIPIENT_COUNTS = """
SELECT message_id, count(*) FROM postroad.recipients WHERE account = $1 AND message_id = ANY($2::uuid[])
GROUP BY message_id
"""
_EVENTS = """
SELECT e.message_id, e.account, e.change_xid::text AS transaction, e.position, e.recipient_index, r.address, e.type,
    e.event_time, e.node, e.spool, e.attempt, e.bundle_revision, e.rule, e.provider, e.remote_host, e.tls,
    e.reply_code, e.enhanced_code, e.reply_text, e.queued_ms, e.waiting_ms, e.connecting_ms, e.transferring_ms
FROM postroad.delivery_events e
LEFT JOIN postroad.recipients r ON r.message_id = e.message_id AND r.recipient_index = e.recipient_index
"""
_ACCEPTED = """
SELECT m.message_id, m.account, m.change_xid::text AS transaction, m.position, NULL::integer AS recipient_index,
    NULL AS address, 1::smallint AS type, m.accept_time AS event_time, m.node, m.spool, 0 AS attempt,
    0::bigint AS bundle_revision, '' AS rule, '' AS provider, '' AS remote_host, '' AS tls, 0::smallint AS reply_code,
    '' AS enhanced_code, '' AS reply_text, 0::bigint AS queued_ms, 0::bigint AS waiting_ms, 0::bigint AS connecting_ms,
    0::bigint AS transferring_ms
FROM postroad.messages m
"""


_COMMANDS = "SELECT c.*, s.node FROM postroad.commands c LEFT JOIN postroad.spools s USING (spool)"


class MessagesRepository:
    """`controlplane.ports.Messages`."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def get(self, account: str, message_id: str, since_id: str) -> Message:
        """As the port says."""
        row = await self._session.row(
            "message_get",
            "SELECT * FROM postroad.messages WHERE account = $1 AND message_id = $2 AND message_id >= $3",
            *(account, message_id, since_id),
        )
        if row is None:
            raise NotFoundError(names.format_name(names.MESSAGE, account, message_id))
        recipients = await self._session.rows("message_recipients", _RECIPIENTS, account, [message_id])
        events = await self._session.rows(
            "message_events",
            f"{_ACCEPTED} WHERE m.account = $1 AND m.message_id = $2 "
            f"UNION ALL {_EVENTS} WHERE e.account = $1 AND e.message_id = $2 "
            "ORDER BY event_time DESC, position DESC LIMIT $3",
            *(account, message_id, MAX_TIMELINE),
        )
        return _message(row, [_recipient(one) for one in recipients], [_event(one) for one in reversed(events)])

    async def list_page(self, query: MessageQuery) -> tuple[list[Message], bool]:
        """As the port says."""
        conditions = ""
        extra: list[object] = []
        if query.recipient:
            extra.append(query.recipient)
            conditions += f" AND r.address = ${4 + len(extra)}"
        if query.state is not None:
            extra.append(query.state)
            conditions += f" AND r.state = ${4 + len(extra)}"
        if conditions:
            conditions = (
                " AND EXISTS (SELECT FROM postroad.recipients r"
                f" WHERE r.message_id = m.message_id AND r.account = $1{conditions})"
            )
        if query.tag:
            extra.append([query.tag])
            conditions += f" AND m.tags @> ${4 + len(extra)}::text[]"
        before = min(query.before_id or _GREATEST_ID, query.to_id or _GREATEST_ID)
        rows = await self._session.rows(
            "message_list",
            "SELECT * FROM postroad.messages m WHERE account = $1 AND message_id >= $2 AND message_id < $3"
            f"{conditions} ORDER BY message_id DESC LIMIT $4",
            *(query.account, query.from_id or LEAST_ID, before, query.limit + 1, *extra),
        )
        fitting = await self._fitting(query.account, [row["message_id"] for row in rows[: query.limit]])
        more = len(rows) > fitting
        rows = rows[:fitting]
        ids = [row["message_id"] for row in rows]
        recipients: dict[Any, list[Recipient]] = {one: [] for one in ids}
        for row in await self._session.rows("message_recipients", _RECIPIENTS, query.account, ids):
            recipients[row["message_id"]].append(_recipient(row))
        return [_message(row, recipients[row["message_id"]], []) for row in rows], more

    async def _fitting(self, account: str, ids: list[Any]) -> int:
        """How many of these messages have no more recipients together than a page may hold; at least one."""
        rows = await self._session.rows("message_recipient_counts", _RECIPIENT_COUNTS, account, ids)
        counts: dict[Any, int] = {row["message_id"]: row["count"] for row in rows}
        totals = accumulate(counts.get(one, 0) for one in ids)
        return max(sum(total <= MAX_PAGE_RECIPIENTS for total in totals), min(len(ids), 1))

    async def newest_position(self, account: str) -> Position:
        """As the port says."""
        # Not the snapshot's own xmin: numbers that no commit used are given again after a crash of PostgreSQL.
        newest = """
            SELECT change_xid, position FROM postroad.{table}
            WHERE account = $1 AND change_xid < pg_snapshot_xmin(pg_current_snapshot())
            ORDER BY change_xid DESC, position DESC LIMIT 1
        """
        rows = await self._session.rows(
            "event_newest",
            f"SELECT change_xid::text AS transaction, position FROM (({newest.format(table='messages')}) "
            f"UNION ALL ({newest.format(table='delivery_events')})) AS found "
            "ORDER BY change_xid DESC, position DESC LIMIT 1",
            account,
        )
        return Position(int(rows[0]["transaction"]), rows[0]["position"]) if rows else Position(0, 0)

    async def has_reached(self, position: Position) -> bool:
        """As the port says."""
        reached: bool = await self._session.value(
            "position_reached",
            "SELECT $1::text::xid8 < pg_snapshot_xmin(pg_current_snapshot())",
            str(position.transaction),
        )
        return reached

    async def events(self, account: str, after: Position, limit: int, message_id: str | None) -> list[Event]:
        """As the port says."""
        bounds = """
            {alias}.account = $1 AND {alias}.change_xid < pg_snapshot_xmin(pg_current_snapshot())
            AND ({alias}.change_xid, {alias}.position) > ($2::text::xid8, $3)
            AND ($5::uuid IS NULL OR {alias}.message_id = $5)
            ORDER BY {alias}.change_xid, {alias}.position LIMIT $4
        """
        rows = await self._session.rows(
            "event_list",
            "SELECT found.*, coalesce(n.tags, '{}') AS tags, coalesce(n.metadata, '{}') AS metadata FROM ("
            f"SELECT * FROM (({_ACCEPTED} WHERE {bounds.format(alias='m')}) "
            f"UNION ALL ({_EVENTS} WHERE {bounds.format(alias='e')})) AS every "
            "ORDER BY length(transaction), transaction, position LIMIT $4"
            ") AS found LEFT JOIN postroad.messages n ON n.message_id = found.message_id "
            "ORDER BY length(transaction), transaction, position",
            *(account, str(after.transaction), after.number, limit, message_id),
        )
        return [_event(row, **_noted(row)) for row in rows]

    async def add_command(self, order: CommandOrder, message: Message) -> Command:
        """As the port says."""
        spool, node = (QUEUE_SPOOL, "") if message.replicated else (message.spool, message.node)
        row = await self._session.row(
            "command_insert",
            """
            INSERT INTO postroad.commands (account, verb, spool, message_ids, provider)
            VALUES ($1, $2, $3, ARRAY[$4::uuid], $5) RETURNING *, $6::text AS node
            """,
            *(order.account, order.verb, spool, message.message_id, order.provider, node),
        )
        assert row is not None  # noqa: S101 - INSERT … RETURNING of one row
        await self._session.run("notify", "SELECT pg_notify($1, $2)", COMMANDS_CHANNEL, node)
        return _command([row])

    async def count_filter_commands(self, account: str) -> int:
        """As the port says."""
        count: int = await self._session.value(
            "command_count_filters",
            "SELECT count(DISTINCT operation) FROM postroad.commands WHERE account = $1 AND done_time IS NULL"
            " AND operation IS NOT NULL",
            account,
        )
        return count

    async def add_filter_command(self, order: CommandOrder, since_id: str) -> Command:
        """As the port says."""
        wanted = order.filter or MessageFilter()
        rows = await self._session.rows(
            "command_insert_for_spools",
            """
            WITH operation AS MATERIALIZED (SELECT gen_random_uuid() AS operation), inserted AS (
                INSERT INTO postroad.commands (
                    operation, account, verb, spool, message_ids, provider, accepted_before, filter_provider,
                    filter_recipient_domain, filter_states, position
                )
                SELECT o.operation, $1, $2, s.spool, '{}', $3, transaction_timestamp() - $4::interval, $5, $6, $7, $8
                FROM operation o, (
                    SELECT p.spool FROM postroad.spools p WHERE NOT EXISTS (
                        SELECT FROM postroad.nodes n WHERE n.node = p.node AND n.state = $11
                    ) OR EXISTS (
                        SELECT FROM postroad.recipients r JOIN postroad.messages m USING (message_id)
                        WHERE r.state < 6 AND NOT m.replicated AND m.spool = p.spool AND r.message_id > $8
                    )
                    UNION ALL
                    SELECT $9::uuid WHERE EXISTS (
                        SELECT FROM postroad.replicated_queue q
                        WHERE ($1 = $10 OR q.account = $1) AND q.message_id > $8
                    )
                ) AS s
                RETURNING *
            )
            SELECT i.*, s.node FROM inserted AS i LEFT JOIN postroad.spools s USING (spool) ORDER BY i.spool
            """,
            *(order.account, order.verb, order.provider, wanted.min_age, wanted.provider, wanted.recipient_domain),
            *(list(wanted.states), since_id, QUEUE_SPOOL, EVERY_ACCOUNT, NodeState.REVOKED),
        )
        if not rows:
            name = names.format_name(names.ACCOUNT, order.account)
            raise FailedPreconditionError(Reason.SPOOL_MISSING, "no node has a spool yet", subject=name)
        await self._session.run("notify", "SELECT pg_notify($1, '')", COMMANDS_CHANNEL)
        return _command(rows)

    async def get_command(self, account: str, command: str) -> Command:
        """As the port says."""
        rows = await self._session.rows(
            "command_get",
            f"{_COMMANDS} WHERE c.account = $1 AND coalesce(c.operation, c.command) = $2 ORDER BY c.spool",
            *(account, command),
        )
        if not rows:
            raise NotFoundError(names.format_name(names.OPERATION, account, command))
        return _command(rows)

    async def list_commands(self, account: str, after: str, limit: int) -> list[Command]:
        """As the port says."""
        rows = await self._session.rows(
            "command_list",
            f"""
            {_COMMANDS} WHERE c.account = $1 AND coalesce(c.operation, c.command) IN (
                SELECT DISTINCT coalesce(operation, command) AS shown FROM postroad.commands
                WHERE account = $1 AND coalesce(operation, command) > $2 ORDER BY shown LIMIT $3
            )
            ORDER BY coalesce(c.operation, c.command), c.spool
            """,
            *(account, after or LEAST_ID, limit),
        )
        return [_command(list(found)) for _, found in groupby(rows, _shown_id)]


def _message(row: asyncpg.Record, recipients: list[Recipient], events: list[Event]) -> Message:
    return Message(
        message_id=str(row["message_id"]),
        account=row["account"],
        accept_time=row["accept_time"],
        sender=row["sender"],
        header_message_id=row["header_message_id"],
        subject=row["subject"],
        size_bytes=row["size_bytes"],
        credential=row["credential"],
        client_address=row["client_address"],
        client_helo=row["client_helo"],
        client_tls=row["client_tls"],
        session=row["session"],
        node=row["node"],
        spool=str(row["spool"]),
        send_time=row["send_time"],
        priority=row["priority"],
        replicated=row["replicated"],
        recipients=tuple(recipients),
        events=tuple(events),
        duplicate_of="" if row["duplicate_of"] is None else str(row["duplicate_of"]),
        **_noted(row),
    )


def _noted(row: asyncpg.Record) -> dict[str, Any]:
    """What the sender noted of a message."""
    return {"tags": tuple(row["tags"]), "metadata": json.loads(row["metadata"])}


def _recipient(row: asyncpg.Record) -> Recipient:
    return Recipient(
        index=row["recipient_index"],
        address=row["address"],
        state=State(row["state"]),
        attempts=row["attempts"],
        next_attempt_time=row["next_attempt_time"],
        update_time=row["update_time"],
        reply_code=row["reply_code"],
        enhanced_code=row["enhanced_code"],
        reply_text=row["reply_text"],
        provider=row["provider"],
    )


def _event(row: asyncpg.Record, **notes: Any) -> Event:
    values = {**row, **notes}
    position = Position(int(values.pop("transaction")), values.pop("position"))
    return Event(
        message_id=str(values.pop("message_id")),
        spool=str(values.pop("spool")),
        recipient=values.pop("address") or "",
        type=EventType(values.pop("type")),
        position=position,
        **values,
    )


def _shown_id(row: asyncpg.Record) -> str:
    return str(row["operation"] or row["command"])


def _command(rows: Sequence[asyncpg.Record]) -> Command:
    """The command that these rows, one for each spool, are parts of."""
    first = rows[0]
    wanted = None
    if first["accepted_before"] is not None:
        wanted = MessageFilter(
            first["filter_provider"],
            first["filter_recipient_domain"],
            first["create_time"] - first["accepted_before"],
            tuple(State(number) for number in first["filter_states"]),
        )
    message_id = str(first["message_ids"][0]) if first["message_ids"] else ""
    return Command(
        command=_shown_id(first),
        order=CommandOrder(first["account"], Verb(first["verb"]), message_id, wanted, first["provider"]),
        create_time=first["create_time"],
        spools=tuple(
            SpoolProgress(
                spool=str(row["spool"]),
                node=row["node"] or "",
                changed_count=row["changed_count"],
                too_late_count=row["too_late_count"],
                error=row["error"],
                update_time=row["update_time"],
                is_done=row["done_time"] is not None,
            )
            for row in rows
        ),
    )
