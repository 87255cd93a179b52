"""The replicated queue as those use it who send by API: accounts, keys, and messages as they come.

Contract. Implements `ports_sending.Outbox` as role `postroad_fleet`; whoever calls has checked whose account it is.
Each method is one statement, and one round trip. An account is read as its nodes are told of it, from its bundle and
its pool's settings; what was made of these is kept while their hashes stay, for ACCOUNTS of them.

    written by one statement     when
    submission_keys              the message has a key, and nobody had it in the last 24 hours
    messages, recipients         that, or it has none
    the queue and its content    the same
    the books of the queue       the same

Nothing is written for an account that was deleted since it was read, whoever has its name: NotFoundError.

Nobody is notified: a notification takes a lock that all commits share. Nodes ask for what is due, watchers look again.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import cycle
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import orjson

from controlplane.adapters.bundles import read_account, read_settings
from controlplane.adapters.ledger_records import DAY_MS, columns
from controlplane.adapters.postgres.fleet_database import FleetDatabase
from controlplane.adapters.postgres.ledger import PostgresLedger
from controlplane.adapters.postgres.queue_commands import QUEUE_SPOOL
from controlplane.domain import names
from controlplane.domain.acceptance import Accepted, SendingAccount
from controlplane.domain.errors import NotFoundError
from controlplane.domain.sending_limits import SendingLimits
from controlplane.ports_sending import KnownKey
from dataplane.core.envelope import envelope_fields
from dataplane.core.idempotency import KEY_WINDOW_MS
from dataplane.core.policy import compile_account
from dataplane.core.queue import State

ACCOUNTS = 1_000
_CHUNK_BYTES = 256 * 1024
_BOOKS = 8
_SCHEDULED, _QUEUED = int(State.SCHEDULED), int(State.QUEUED)
_EPOCH = "timestamptz 'epoch' + interval '1 ms' *"
_WINDOW = f"interval '{KEY_WINDOW_MS // 1000} s'"

_LOOK = """
SELECT b.node_pool, b.revision, b.hash, s.hash AS settings_hash, EXISTS (
    SELECT FROM postroad.denials AS d
    WHERE d.denial = $1 AND (d.expire_time IS NULL OR d.expire_time > transaction_timestamp())
) AS is_suspended
FROM postroad.config_bundles AS b
JOIN postroad.config_bundles AS s ON s.node_pool = b.node_pool AND s.bundle = 'pools/' || b.node_pool || '/settings'
WHERE b.bundle = $1 AND b.content IS NOT NULL AND s.content IS NOT NULL
"""
_READ = """
SELECT b.revision, b.hash, b.content, s.hash AS settings_hash, s.content AS settings
FROM postroad.config_bundles AS b
JOIN postroad.config_bundles AS s ON s.node_pool = b.node_pool AND s.bundle = 'pools/' || b.node_pool || '/settings'
WHERE b.bundle = $1 AND b.node_pool = $2 AND b.content IS NOT NULL AND s.content IS NOT NULL
"""
_KNOWN = f"""
SELECT key_hash, message_id, content_hash FROM postroad.submission_keys
WHERE account = $1 AND key_hash = ANY ($2) AND accept_time > transaction_timestamp() - {_WINDOW}
"""
_STORE = f"""
WITH lives AS MATERIALIZED (
    SELECT FROM postroad.accounts WHERE account = $1 AND uid = $27
), u AS MATERIALIZED (
    SELECT u.* FROM lives, unnest(
        $2::uuid[], $3::bigint[], $4::text[], $5::bigint[], $6::text[], $7::text[], $8::text[], $9::text[], $10::text[],
        $11::text[], $12::bigint[], $13::smallint[], $14::text[], $15::text[], $16::bytea[], $17::bytea[], $18::bytea[]
    ) AS u (
        message_id, accepted_ms, sender, size_bytes, header_message_id, subject, credential, client_address, client_tls,
        session, send_ms, priority, tags, metadata, envelope, key_hash, content_hash
    )
), claimed AS (
    INSERT INTO postroad.submission_keys AS k (account, key_hash, message_id, accept_time, checked, content_hash)
    SELECT $1, key_hash, message_id, {_EPOCH} accepted_ms, true, content_hash FROM u
    WHERE key_hash IS NOT NULL ORDER BY key_hash
    ON CONFLICT (account, key_hash) DO UPDATE SET
        message_id = excluded.message_id, accept_time = excluded.accept_time, checked = true,
        content_hash = excluded.content_hash
    WHERE k.accept_time <= transaction_timestamp() - {_WINDOW}
    RETURNING message_id
), stored AS MATERIALIZED (
    SELECT * FROM u WHERE key_hash IS NULL OR message_id IN (SELECT message_id FROM claimed)
), in_messages AS (
    INSERT INTO postroad.messages (
        message_id, account, accept_time, sender, size_bytes, header_message_id, subject, credential, client_address,
        client_helo, client_tls, session, send_time, priority, node, spool, replicated, tags, metadata
    )
    SELECT message_id, $1, {_EPOCH} accepted_ms, sender, size_bytes, header_message_id, subject, credential,
        client_address, '', client_tls, session, CASE WHEN send_ms > 0 THEN {_EPOCH} send_ms END, priority, '',
        '{QUEUE_SPOOL}'::uuid, true,
        CASE WHEN tags = '' THEN '{{}}' ELSE string_to_array(tags, chr(10)) END, metadata::jsonb
    FROM stored
), r AS MATERIALIZED (
    SELECT r.*, s.accepted_ms, s.send_ms FROM unnest($19::uuid[], $20::integer[], $21::text[], $22::text[])
        AS r (message_id, recipient_index, address, next_hop) JOIN stored AS s USING (message_id)
), in_recipients AS (
    INSERT INTO postroad.recipients (
        message_id, recipient_index, account, address, state, attempts, next_attempt_time, update_time
    )
    SELECT message_id, recipient_index, $1, address, CASE WHEN send_ms > 0 THEN {_SCHEDULED} ELSE {_QUEUED} END, 0,
        CASE WHEN send_ms > 0 THEN {_EPOCH} send_ms END, {_EPOCH} accepted_ms
    FROM r
), in_queue AS (
    INSERT INTO postroad.replicated_queue (message_id, account, account_uid, priority, size_bytes, envelope, due_time)
    SELECT message_id, $1, $27, priority, size_bytes, envelope,
        CASE WHEN send_ms > 0 THEN {_EPOCH} send_ms ELSE transaction_timestamp() END
    FROM stored
), in_queue_recipients AS (
    INSERT INTO postroad.queue_recipients (message_id, recipient_index, state, attempt, due_time, next_hop)
    SELECT message_id, recipient_index, CASE WHEN send_ms > 0 THEN {_SCHEDULED} ELSE {_QUEUED} END, 0,
        CASE WHEN send_ms > 0 THEN {_EPOCH} send_ms ELSE transaction_timestamp() END, next_hop
    FROM r
), in_contents AS (
    INSERT INTO postroad.queue_contents (message_id, chunk, data)
    SELECT c.message_id, c.chunk, c.data
    FROM unnest($23::uuid[], $24::integer[], $25::bytea[]) AS c (message_id, chunk, data)
    WHERE c.message_id IN (SELECT message_id FROM stored)
), in_books AS (
    INSERT INTO postroad.queue_entries AS e (
        spool, account, day, accepted, sent, bounced, failed, expired, cancelled
    )
    SELECT $26, $1, date '1970-01-01' + (accepted_ms / {DAY_MS})::integer, count(*), 0, 0, 0, 0, 0
    FROM r GROUP BY 3
    ON CONFLICT (spool, account, day) DO UPDATE SET accepted = e.accepted + excluded.accepted
)
SELECT message_id FROM stored UNION ALL SELECT NULL WHERE NOT EXISTS (SELECT FROM lives)
"""


class _Made(NamedTuple):
    hash: bytes
    settings_hash: bytes
    account: SendingAccount


class PostgresOutbox:
    """`ports_sending.Outbox`; see the module."""

    def __init__(self, database: FleetDatabase, ledger: PostgresLedger) -> None:
        self._database = database
        self._ledger = ledger
        # Whose statements share a row of the books wait for each other's commits: as many as an account has at a time.
        self._books = cycle([uuid4() for _ in range(_BOOKS)])
        self._made: OrderedDict[str, _Made] = OrderedDict()

    async def account(self, account: str) -> SendingAccount | None:
        """As the port says."""
        bundle = names.format_name(names.ACCOUNT, account)
        async with self._database.statement("outbox_account") as connection:
            look = await connection.fetchrow(_LOOK, bundle)
        if look is None:
            self._made.pop(account, None)
            return None
        made = self._made.get(account)
        if made is None or (made.hash, made.settings_hash) != (look["hash"], look["settings_hash"]):
            made = await self._make(bundle, look["node_pool"])
            if made is None:
                return None
            self._made[account] = made
            if len(self._made) > ACCOUNTS:
                self._made.popitem(last=False)
        self._made.move_to_end(account)
        return made.account._replace(is_suspended=look["is_suspended"])

    async def _make(self, bundle: str, node_pool: str) -> _Made | None:
        async with self._database.statement("outbox_bundle") as connection:
            row = await connection.fetchrow(_READ, bundle, node_pool)
        if row is None:
            return None
        # Ten thousand rules take a while: the loop is everybody's.
        account = await asyncio.to_thread(_make_account, row["content"], row["settings"], row["revision"])
        return _Made(row["hash"], row["settings_hash"], account)

    async def known(self, account: str, key_hashes: Sequence[bytes]) -> dict[bytes, KnownKey]:
        """As the port says."""
        async with self._database.statement("outbox_keys") as connection:
            rows = await connection.fetch(_KNOWN, account, key_hashes)
        return {row["key_hash"]: KnownKey(row["message_id"].bytes, row["content_hash"]) for row in rows}

    async def store(self, account: str, messages: Sequence[Accepted]) -> set[bytes]:
        """As the port says."""
        bounds = self._ledger.bounds(datetime.now(UTC))
        days = {one.envelope.accepted_ms // DAY_MS for one in messages}
        await self._ledger.prepare_days(days, bounds)
        recipients = [
            (UUID(bytes=one.envelope.message_id), index, address, next_hop)
            for one in messages
            for index, (address, next_hop) in enumerate(zip(one.recipients, one.next_hops, strict=True))
        ]
        contents = [
            (UUID(bytes=one.envelope.message_id), chunk, one.content[start : start + _CHUNK_BYTES])
            for one in messages
            for chunk, start in enumerate(range(0, len(one.content), _CHUNK_BYTES))
        ]
        rows = columns([_row(one) for one in messages], 17)
        uid = UUID(messages[0].envelope.account_uid)
        async with self._database.statement("outbox_store") as connection:
            stored = await connection.fetch(
                _STORE, account, *rows, *columns(recipients, 4), *columns(contents, 3), next(self._books), uid
            )
        if [row["message_id"] for row in stored] == [None]:
            raise NotFoundError(names.format_name(names.ACCOUNT, account))
        return {row["message_id"].bytes for row in stored}


def _make_account(content: bytes, settings_content: bytes, revision: int) -> SendingAccount:
    account, settings = read_account(content, revision), read_settings(settings_content)
    return SendingAccount(compile_account(account), settings, SendingLimits(account, settings), is_suspended=False)


def _row(message: Accepted) -> tuple[Any, ...]:
    envelope, key = message.envelope, message.key
    return (
        UUID(bytes=envelope.message_id),
        envelope.accepted_ms,
        envelope.sender,
        envelope.size_bytes,
        envelope.header_message_id,
        envelope.subject,
        envelope.credential,
        envelope.client_address,
        envelope.client_tls,
        envelope.session,
        envelope.send_time_ms,
        envelope.priority,
        "\n".join(message.tags),
        _json(message.metadata),
        orjson.dumps(envelope_fields(envelope, _addresses(message))),
        None if key is None else key.key_hash,
        None if key is None else key.content_hash,
    )


def _addresses(message: Accepted) -> dict[str, str]:
    return {str(index): address for index, address in enumerate(message.recipients)}


def _json(values: Mapping[str, str]) -> str:
    return orjson.dumps(values).decode() if values else "{}"
