"""Suspending a credential, and the receipt of what is suspended: who has confirmed it, and who may know."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from postroad.control.v1 import account_service_pb2, provider_pb2, provider_service_pb2
from postroad.control.v1 import credential_service_pb2 as service
from postroad.control.v1 import suspension_pb2 as pb
from postroad.control.v1 import suspension_service_pb2 as suspension_service
from support.api import ApiStack, Client, running_api, take_apart
from support.databases import Database

ACCOUNT = "accounts/acme"
DAY_MS = 86_400_000
CREDENTIAL = f"{ACCOUNT}/smtpCredentials/app"


@pytest.fixture
async def stack(migrated_database: Database) -> AsyncIterator[ApiStack]:
    async with running_api(migrated_database) as running:
        yield running


@pytest.fixture
async def client(stack: ApiStack) -> Client:
    client = await stack.make_account("acme")
    request = service.CreateSmtpCredentialRequest(parent=ACCOUNT, smtp_credential_id="app")
    await client.credential("CreateSmtpCredential", request)
    return client


async def add_node(stack: ApiStack, node: str, version: int = 0, *, pool: str = "default", state: int = 2) -> None:
    await stack.as_superuser("INSERT INTO postroad.node_pools (node_pool) VALUES ($1) ON CONFLICT DO NOTHING", pool)
    await stack.as_superuser(
        "INSERT INTO postroad.nodes (node, node_pool, state, certificate_serial, certificate_not_after)"
        " VALUES ($1, $2, $3, $4, now() + interval '30 days')",
        *(node, pool, state, f"serial-{node}"),
    )
    await acknowledge(stack, node, version)


async def acknowledge(stack: ApiStack, node: str, version: int) -> None:
    """What a replica writes when the node's answer came."""
    await stack.as_superuser(
        "INSERT INTO postroad.node_status (node, connected, denials_version, denials_time) VALUES ($1, true, $2, now())"
        " ON CONFLICT (node) DO UPDATE SET denials_version = $2, denials_time = now()",
        *(node, version),
    )


async def receipt(client: Client, resource: str) -> pb.Suspension:
    request = suspension_service.GetSuspensionRequest(name=f"{resource}/suspension")
    found: pb.Suspension = await client.suspension("GetSuspension", request)
    return found


async def suspend(client: Client, reason: str = "") -> Any:
    request = service.SuspendSmtpCredentialRequest(name=CREDENTIAL, reason=reason)
    return await client.credential("SuspendSmtpCredential", request)


async def resume(client: Client) -> Any:
    return await client.credential("ResumeSmtpCredential", service.ResumeSmtpCredentialRequest(name=CREDENTIAL))


async def test_a_suspended_credential_is_denied_with_all_that_it_submitted_until_it_is_resumed(
    stack: ApiStack, client: Client
) -> None:
    await suspend(client, "leaked")
    read = await client.credential("GetSmtpCredential", service.GetSmtpCredentialRequest(name=CREDENTIAL))
    assert (read.HasField("suspend_time"), read.suspend_reason) == (True, "leaked")
    (row,) = await stack.as_superuser("SELECT * FROM postroad.denials")
    assert (row["denial"], row["kind"], row["account"], row["expire_time"]) == (CREDENTIAL, 2, "acme", None)
    assert row["since_time"] == datetime(1970, 1, 1, tzinfo=UTC)
    (state,) = await stack.as_superuser("SELECT version FROM postroad.denial_state")
    assert row["version"] == state["version"]

    again = await suspend(client, "still")
    assert again.suspend_reason == "still"
    assert again.suspend_time == read.suspend_time
    assert await stack.as_superuser("SELECT version FROM postroad.denial_state") == [state]

    resumed = await resume(client)
    assert not resumed.HasField("suspend_time")
    assert await stack.as_superuser("SELECT 1 FROM postroad.denials") == []
    assert await resume(client) == resumed


async def test_what_was_suspended_before_it_was_revoked_is_not_let_go(stack: ApiStack, client: Client) -> None:
    await suspend(client)
    etag = (await client.credential("GetSmtpCredential", service.GetSmtpCredentialRequest(name=CREDENTIAL))).etag
    await client.credential("RevokeSmtpCredential", service.RevokeSmtpCredentialRequest(name=CREDENTIAL, etag=etag))
    (row,) = await stack.as_superuser("SELECT since_time, expire_time FROM postroad.denials")
    assert row["since_time"] == datetime(1970, 1, 1, tzinfo=UTC)
    assert row["expire_time"] > datetime.now(UTC) + timedelta(days=30)
    for call in (suspend(client), resume(client)):
        error = await client.refused(call)
        assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "KEY_REVOKED")


async def test_so_many_credentials_can_be_suspended_that_the_account_should_be(
    stack: ApiStack, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controlplane.services.credentials._DENIED_LIMIT", 1)
    await suspend(client)
    await suspend(client, "the same one may be suspended again")
    request = service.CreateSmtpCredentialRequest(parent=ACCOUNT, smtp_credential_id="two")
    await client.credential("CreateSmtpCredential", request)
    other = service.SuspendSmtpCredentialRequest(name=f"{ACCOUNT}/smtpCredentials/two")
    error = await client.refused(client.credential("SuspendSmtpCredential", other))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "TOO_MANY_SUSPENDED_CREDENTIALS")


async def test_the_receipt_names_the_nodes_of_the_account_s_pool_that_have_confirmed_it_and_those_that_have_not(
    stack: ApiStack, client: Client
) -> None:
    await suspend(client)
    version = (await receipt(client, CREDENTIAL)).denials_version
    await add_node(stack, "behind", version - 1)
    await add_node(stack, "ahead", version + DAY_MS)
    await add_node(stack, "elsewhere", pool="other")
    await add_node(stack, "new", state=1)
    await add_node(stack, "gone", version, state=3)
    found = await receipt(client, CREDENTIAL)
    assert (found.name, found.state) == (f"{CREDENTIAL}/suspension", pb.Suspension.STATE_IN_FORCE)
    assert [(one.node, one.node_pool, one.confirmed) for one in found.receipts] == [
        ("nodes/ahead", "nodePools/default", True),
        ("nodes/behind", "nodePools/default", False),
    ]
    assert not found.confirmed
    await acknowledge(stack, "behind", version)
    found = await receipt(client, CREDENTIAL)
    assert found.confirmed
    assert all(one.HasField("acknowledge_time") and one.connected for one in found.receipts)

    await resume(client)
    lifted = await receipt(client, CREDENTIAL)
    assert lifted.state == pb.Suspension.STATE_LIFTED
    assert version < lifted.denials_version < version + DAY_MS
    assert [one.confirmed for one in lifted.receipts] == [True, False]


async def test_accounts_and_providers_have_receipts_too_and_a_shared_provider_one_of_all_pools(
    stack: ApiStack, client: Client
) -> None:
    operator = stack.operator
    provider = provider_pb2.Provider(
        smtp=provider_pb2.SmtpProvider(endpoints=[provider_pb2.SmtpProvider.Endpoint(host="127.0.0.1", port=25)])
    )
    for parent in (ACCOUNT, ""):
        request = provider_service_pb2.CreateProviderRequest(parent=parent, provider_id="relay", provider=provider)
        await operator.provider("CreateProvider", request)
    await operator.account("SuspendAccount", account_service_pb2.SuspendAccountRequest(name=ACCOUNT))
    await add_node(stack, "one")
    await add_node(stack, "two", pool="other")
    for name in (f"{ACCOUNT}/providers/relay", "providers/relay"):
        await operator.provider("SuspendProvider", provider_service_pb2.SuspendProviderRequest(name=name))
    for name, nodes in ((ACCOUNT, 1), (f"{ACCOUNT}/providers/relay", 1), ("providers/relay", 2)):
        found = await receipt(operator, name)
        assert (found.state, found.confirmed, len(found.receipts)) == (pb.Suspension.STATE_IN_FORCE, False, nodes)
    error = await client.refused(receipt(client, "providers/relay"))
    assert error.code is grpc.StatusCode.PERMISSION_DENIED


async def test_who_waits_is_answered_when_the_last_node_has_confirmed(stack: ApiStack, client: Client) -> None:
    await add_node(stack, "edge-1")
    await suspend(client)
    version = (await receipt(client, CREDENTIAL)).denials_version

    async def wait(seconds: int) -> pb.Suspension:
        request = suspension_service.WaitSuspensionRequest(
            name=f"{CREDENTIAL}/suspension", timeout=Duration(seconds=seconds)
        )
        found: pb.Suspension = await client.suspension("WaitSuspension", request)
        return found

    assert not (await wait(0)).confirmed
    waiting = asyncio.ensure_future(wait(15))
    await acknowledge(stack, "edge-1", version)
    assert (await waiting).confirmed


async def test_one_account_cannot_take_every_wait_for_receipts(migrated_database: Database) -> None:
    async with running_api(migrated_database, max_watchers=4) as stack:
        client = await stack.make_account("acme")
        await add_node(stack, "edge-1")
        request = service.CreateSmtpCredentialRequest(parent=ACCOUNT, smtp_credential_id="app")
        await client.credential("CreateSmtpCredential", request)
        await suspend(client)
        wait = suspension_service.WaitSuspensionRequest(name=f"{CREDENTIAL}/suspension", timeout=Duration(seconds=2))
        ended = await asyncio.gather(
            *(client.suspension("WaitSuspension", wait) for _ in range(2)), return_exceptions=True
        )
        (refused,) = [one for one in ended if isinstance(one, grpc.aio.AioRpcError)]
        assert take_apart(refused).reason == "TOO_MANY_WATCHERS"
        assert not (await client.suspension("WaitSuspension", wait)).confirmed


@pytest.mark.parametrize(
    "name",
    [ACCOUNT, "suspension", f"{ACCOUNT}/routingRules/x/suspension", "nodes/edge-1/suspension", "/suspension", ""],
)
async def test_what_has_no_suspension_is_refused(client: Client, name: str) -> None:
    request = suspension_service.GetSuspensionRequest(name=name)
    error = await client.refused(client.suspension("GetSuspension", request))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_key_sees_and_stops_its_own_account_s_only(stack: ApiStack, client: Client) -> None:
    other = await stack.make_account("other")
    for call in (suspend(other), resume(other), receipt(other, CREDENTIAL), receipt(other, ACCOUNT)):
        error = await other.refused(call)
        assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, "OTHER_ACCOUNT")
    reader = await stack.make_key("acme", "config.read")
    assert (await reader.refused(suspend(reader))).reason == "SCOPE_MISSING"
    assert (await receipt(reader, CREDENTIAL)).state == pb.Suspension.STATE_LIFTED
    missing = await client.refused(receipt(client, f"{ACCOUNT}/smtpCredentials/none"))
    assert missing.code is grpc.StatusCode.NOT_FOUND
