"""Suspending destinations: whose they are, what is denied, and the receipt of nodes that know and do not know them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from postroad.control.v1 import account_service_pb2, suspension_pb2, suspension_service_pb2
from postroad.control.v1 import destination_pb2 as pb
from postroad.control.v1 import destination_service_pb2 as service
from support.api import ApiStack, Client, running_api
from support.databases import Database

ACCOUNT = "accounts/acme"
OWN = f"{ACCOUNT}/destinations/example.net"
SHARED = "destinations/*.example.net"


@pytest.fixture
async def stack(migrated_database: Database) -> AsyncIterator[ApiStack]:
    async with running_api(migrated_database) as running:
        yield running


@pytest.fixture
async def client(stack: ApiStack) -> Client:
    return await stack.make_account("acme")


async def suspend(client: Client, name: str, reason: str = "") -> Any:
    request = service.SuspendDestinationRequest(name=name, reason=reason)
    return await client.destination("SuspendDestination", request)


async def resume(client: Client, name: str) -> Any:
    return await client.destination("ResumeDestination", service.ResumeDestinationRequest(name=name))


async def get(client: Client, name: str) -> Any:
    return await client.destination("GetDestination", service.GetDestinationRequest(name=name))


async def listed(client: Client, parent: str, size: int = 0) -> list[str]:
    names: list[str] = []
    token = ""
    while True:
        request = service.ListDestinationsRequest(parent=parent, page_size=size, page_token=token)
        answer = await client.destination("ListDestinations", request)
        names += [one.name for one in answer.destinations]
        token = answer.next_page_token
        if not token:
            return names


async def receipt(client: Client, resource: str) -> suspension_pb2.Suspension:
    request = suspension_service_pb2.GetSuspensionRequest(name=f"{resource}/suspension")
    found: suspension_pb2.Suspension = await client.suspension("GetSuspension", request)
    return found


async def add_node(stack: ApiStack, node: str, version: int, told_since: int | None) -> None:
    """What replicas write of a node with this version of the denials."""
    await stack.as_superuser(
        "INSERT INTO postroad.nodes (node, node_pool, state, certificate_serial, certificate_not_after)"
        " VALUES ($1, 'default', 2, $2, now() + interval '30 days')",
        *(node, f"serial-{node}"),
    )
    await stack.as_superuser(
        "INSERT INTO postroad.node_status (node, connected, denials_version, destinations_version)"
        " VALUES ($1, true, $2, $3)",
        *(node, version, told_since),
    )


@pytest.mark.parametrize("name", [OWN, SHARED])
async def test_a_suspended_destination_is_denied_until_it_is_resumed(
    stack: ApiStack, client: Client, name: str
) -> None:
    operator = stack.operator
    assert (await get(operator, name)).state == pb.Destination.STATE_ACTIVE
    suspended = await suspend(operator, name, "they ask us to wait")
    assert (suspended.name, suspended.state) == (name, pb.Destination.STATE_SUSPENDED)
    assert (suspended.HasField("suspend_time"), suspended.suspend_reason) == (True, "they ask us to wait")
    (row,) = await stack.as_superuser("SELECT * FROM postroad.denials")
    assert (row["denial"], row["kind"], row["expire_time"]) == (name, 4, None)
    assert row["account"] == ("acme" if name == OWN else None)
    (state,) = await stack.as_superuser("SELECT version FROM postroad.denial_state")
    assert row["version"] == state["version"]

    again = await suspend(operator, name, "still")
    assert (again.suspend_reason, again.suspend_time) == ("still", suspended.suspend_time)
    assert await get(operator, name) == again
    assert await stack.as_superuser("SELECT version FROM postroad.denial_state") == [state]

    resumed = await resume(operator, name)
    assert resumed == pb.Destination(name=name, state=pb.Destination.STATE_ACTIVE)
    assert await stack.as_superuser("SELECT 1 FROM postroad.denials") == []
    assert await resume(operator, name) == resumed
    actions = await stack.as_superuser(
        "SELECT action FROM postroad.audit_log WHERE table_name = 'suspended_destinations' ORDER BY audit_id"
    )
    assert [row["action"] for row in actions] == ["INSERT", "UPDATE", "DELETE"]


async def test_suspended_destinations_are_listed_by_name_each_owner_s_own(stack: ApiStack, client: Client) -> None:
    for domain in ("b.example", "a.example", "c.example"):
        await suspend(client, f"{ACCOUNT}/destinations/{domain}")
    await suspend(stack.operator, SHARED)
    assert await listed(client, ACCOUNT, 2) == [f"{ACCOUNT}/destinations/{one}.example" for one in "abc"]
    assert await listed(stack.operator, "") == [SHARED]


async def test_a_key_stops_its_own_account_s_mail_only(stack: ApiStack, client: Client) -> None:
    other = await stack.make_account("other")
    for call in (suspend(other, OWN), resume(other, OWN), get(other, OWN), receipt(other, OWN), listed(other, ACCOUNT)):
        error = await other.refused(call)
        assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, "OTHER_ACCOUNT")
    for call in (suspend(client, SHARED), resume(client, SHARED), get(client, SHARED), listed(client, "")):
        error = await client.refused(call)
        assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, "OPERATOR_ONLY")
    missing = await stack.operator.refused(suspend(stack.operator, "accounts/none/destinations/example.net"))
    assert missing.code is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    "name",
    [
        *(
            "destinations/",
            "destinations/Example.net",
            "destinations/@example.net",
            "destinations/*",
            "destinations/*.",
        ),
        *("destinations/*.*.example.net", "destinations/[192.0.2.1]", "destinations/ü.example", "destinations/a b"),
        *(f"destinations/{'a' * 64}.example", f"destinations/{'a.' * 200}example", "nodes/edge-1", ""),
    ],
)
async def test_what_is_no_domain_is_refused(stack: ApiStack, name: str) -> None:
    for call in (suspend(stack.operator, name), receipt(stack.operator, name)):
        assert (await stack.operator.refused(call)).code is grpc.StatusCode.INVALID_ARGUMENT


async def test_so_many_destinations_can_be_suspended_that_something_else_is_wrong(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controlplane.services.destinations._SUSPENDED_LIMIT", 1)
    await suspend(client, OWN)
    await suspend(client, OWN, "the same one may be suspended again")
    error = await client.refused(suspend(client, f"{ACCOUNT}/destinations/example.org"))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "TOO_MANY_SUSPENDED_DESTINATIONS")


async def test_a_node_that_does_not_know_destinations_never_counts_as_having_confirmed_and_is_named(
    stack: ApiStack, client: Client
) -> None:
    await suspend(client, OWN)
    version = (await receipt(client, OWN)).denials_version
    await add_node(stack, "a-new", version, 1)
    await add_node(stack, "b-behind", version - 1, 1)
    # It has the version, but not as it was when the node learnt of destinations.
    await add_node(stack, "c-upgraded", version, version + 1)
    await add_node(stack, "d-old", version + 10**9, None)
    found = await receipt(client, OWN)
    assert (found.name, found.state) == (f"{OWN}/suspension", suspension_pb2.Suspension.STATE_IN_FORCE)
    assert [(one.node, one.confirmed, one.unsupported) for one in found.receipts] == [
        ("nodes/a-new", True, False),
        ("nodes/b-behind", False, False),
        ("nodes/c-upgraded", False, False),
        ("nodes/d-old", False, True),
    ]
    assert not found.confirmed
    # Of what such a node does know it has the receipt.
    await stack.operator.account("SuspendAccount", account_service_pb2.SuspendAccountRequest(name=ACCOUNT))
    of_account = {one.node: one for one in (await receipt(client, ACCOUNT)).receipts}
    assert (of_account["nodes/d-old"].confirmed, of_account["nodes/d-old"].unsupported) == (True, False)

    await resume(client, OWN)
    lifted = await receipt(client, OWN)
    assert lifted.state == suspension_pb2.Suspension.STATE_LIFTED
    # What it never stopped goes on there.
    assert [one.confirmed for one in lifted.receipts] == [False, False, False, True]


async def test_a_deleted_account_takes_its_suspensions_with_it(stack: ApiStack, client: Client) -> None:
    await suspend(client, OWN)
    account = await stack.operator.account("GetAccount", account_service_pb2.GetAccountRequest(name=ACCOUNT))
    request = account_service_pb2.DeleteAccountRequest(name=ACCOUNT, etag=account.etag)
    await stack.operator.account("DeleteAccount", request)
    assert await stack.as_superuser("SELECT 1 FROM postroad.denials") == []
    assert await stack.as_superuser("SELECT 1 FROM postroad.suspended_destinations") == []
