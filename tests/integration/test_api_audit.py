"""Verbs that change no configuration leave a row in the audit log, too, with who asked and without what is secret."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest

from controlplane.domain.secrets import hash_secret
from dataplane.core.ids import format_message_id, new_message_id
from postroad.control.v1 import message_service_pb2, node_service_pb2
from support.api import ApiStack, running_api
from support.databases import Database

SPOOL = "22222222-2222-4222-8222-222222222222"


@pytest.fixture
async def stack(migrated_database: Database) -> AsyncIterator[ApiStack]:
    async with running_api(migrated_database) as running:
        yield running


async def rows_of(stack: ApiStack, table: str) -> list[tuple[Any, ...]]:
    rows = await stack.as_superuser(
        "SELECT principal, action, account, coalesce(new_row, old_row)::text AS text FROM postroad.audit_log"
        " WHERE table_name = $1 ORDER BY audit_id",
        table,
    )
    return [tuple(row) for row in rows]


async def test_a_token_that_enrols_a_node_has_an_audit_row_without_its_hash(stack: ApiStack) -> None:
    await stack.operator.node("CreateNode", node_service_pb2.CreateNodeRequest(node_id="edge-1"))
    reset = node_service_pb2.ResetNodeEnrollmentRequest(name="nodes/edge-1")
    token = (await stack.operator.node("ResetNodeEnrollment", reset)).enrollment_token

    rows = await rows_of(stack, "enrollment_tokens")

    assert [row[:2] for row in rows] == [("apiKeys/bootstrap", "INSERT")] * 2
    assert "edge-1" in rows[-1][3]
    assert hash_secret(token).hex() not in rows[-1][3]


async def test_a_spool_that_was_taken_back_has_an_audit_row_and_a_report_has_none(stack: ApiStack) -> None:
    await stack.operator.node("CreateNode", node_service_pb2.CreateNodeRequest(node_id="edge-1"))
    await stack.as_superuser("INSERT INTO postroad.spools (spool, node) VALUES ($1, 'edge-1')", SPOOL)
    await stack.as_superuser("UPDATE postroad.spools SET accepted = accepted, cursor = 1")
    await stack.as_superuser("UPDATE postroad.spools SET accepted = false")
    assert await rows_of(stack, "spools") == []

    await stack.operator.node("AcceptSpool", node_service_pb2.AcceptSpoolRequest(name="nodes/edge-1", spool=SPOOL))

    assert [row[:2] for row in await rows_of(stack, "spools")] == [("apiKeys/bootstrap", "UPDATE")]


async def test_a_withdrawn_message_has_an_audit_row_of_its_account(stack: ApiStack) -> None:
    client = await stack.make_account("acme")
    await stack.as_superuser("SELECT postroad.ensure_partitions(current_date - 1, 3)")
    one = format_message_id(new_message_id(int(datetime.now(UTC).timestamp() * 1000), bytes(10)))
    await stack.as_superuser(
        "INSERT INTO postroad.messages (message_id, account, accept_time, sender, size_bytes, header_message_id,"
        " subject, credential, client_address, client_helo, client_tls, session, node, spool)"
        " VALUES ($1, 'acme', now(), '', 1, '', '', '', '', '', '', '', 'edge-1', $2)",
        *(one, SPOOL),
    )

    cancel = message_service_pb2.CancelMessageRequest(name=f"accounts/acme/messages/{one}")
    await client.message("CancelMessage", cancel)

    ((principal, action, account, text),) = await rows_of(stack, "commands")
    assert (principal.startswith("accounts/acme/apiKeys/"), action, account) == (True, "INSERT", "acme")
    assert one in text
