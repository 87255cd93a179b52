"""Commands through the API: who may give which to what, what is stored for the spools, and what an Operation says."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf.duration_pb2 import Duration

from controlplane.adapters.postgres import messages as repository
from controlplane.adapters.postgres.queue_commands import QUEUE_SPOOL
from controlplane.services import messages
from dataplane.core.ids import format_message_id, new_message_id
from postroad.control.v1 import account_service_pb2, provider_service_pb2
from postroad.control.v1 import message_pb2 as pb
from postroad.control.v1 import message_service_pb2 as service
from support.api import ApiStack, Client, running_api
from support.databases import Database
from support.fleet import NOW, NOW_MS

SPOOLS = ("11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222")
REQUEST_ID = "33333333-3333-4333-8333-333333333333"
MESSAGE = format_message_id(new_message_id(NOW_MS, bytes(10)))
VERBS = {
    "CancelMessage": service.COMMAND_VERB_CANCEL,
    "HoldMessage": service.COMMAND_VERB_HOLD,
    "ReleaseMessage": service.COMMAND_VERB_RELEASE,
    "RetryMessage": service.COMMAND_VERB_RETRY,
    "BounceMessage": service.COMMAND_VERB_BOUNCE,
    "RerouteMessage": service.COMMAND_VERB_REROUTE,
}
HOLD = service.COMMAND_VERB_HOLD


@pytest.fixture
async def bare(migrated_database: Database) -> AsyncIterator[ApiStack]:
    async with running_api(migrated_database) as running:
        await running.as_superuser("SELECT postroad.ensure_partitions(current_date - 1, 3)")
        yield running


@pytest.fixture
async def stack(bare: ApiStack) -> ApiStack:
    """Two nodes with a spool each."""
    for number, spool in enumerate(SPOOLS, 1):
        await bare.as_superuser("INSERT INTO postroad.nodes (node, node_pool) VALUES ($1, 'default')", f"edge-{number}")
        await bare.as_superuser("INSERT INTO postroad.spools (spool, node) VALUES ($1, $2)", spool, f"edge-{number}")
    return bare


@pytest.fixture
async def client(stack: ApiStack) -> Client:
    made = await stack.make_account("acme")
    await add_message(stack)
    await add_provider(made, "accounts/acme")
    return made


async def add_message(stack: ApiStack, account: str = "acme", one: str = MESSAGE) -> None:
    await stack.as_superuser(
        "INSERT INTO postroad.messages (message_id, account, accept_time, sender, size_bytes, header_message_id,"
        " subject, credential, client_address, client_helo, client_tls, session, node, spool)"
        " VALUES ($1, $2, $3, 'a@acme.example', 100, '', 'Hi', '', '192.0.2.1', 'x', '', 's', 'edge-1', $4)",
        *(one, account, NOW, SPOOLS[0]),
    )


async def add_provider(client: Client, parent: str) -> None:
    request = provider_service_pb2.CreateProviderRequest(parent=parent, provider_id="relay")
    request.provider.smtp.endpoints.add(host="relay.example.com")
    await client.provider("CreateProvider", request)


def request_of(method: str, **fields: Any) -> Any:
    """A request for the message, with what its verb wants."""
    if method == "RerouteMessage":
        fields.setdefault("provider", "accounts/acme/providers/relay")
    return getattr(service, f"{method}Request")(name=f"accounts/acme/messages/{MESSAGE}", **fields)


def all_of(verb: service.CommandVerb.ValueType = HOLD, parent: str = "accounts/acme", **fields: Any) -> Any:
    return service.CommandMessagesRequest(parent=parent, verb=verb, **fields)


def metadata_of(operation: operations_pb2.Operation) -> service.CommandMetadata:
    metadata = service.CommandMetadata()
    assert operation.metadata.Unpack(metadata)
    return metadata


async def get(client: Client, name: str) -> Any:
    stub = operations_pb2_grpc.OperationsStub(client.channel)  # type: ignore[no-untyped-call]  # Google's, untyped
    return await stub.GetOperation(operations_pb2.GetOperationRequest(name=name), metadata=client.metadata, timeout=20)


async def commands(stack: ApiStack) -> list[Any]:
    return await stack.as_superuser("SELECT * FROM postroad.commands ORDER BY spool")


@pytest.mark.parametrize("method", VERBS)
async def test_each_verb_on_a_message_is_a_command_for_its_spool(stack: ApiStack, client: Client, method: str) -> None:
    request = request_of(method, request_id=REQUEST_ID)
    operation = await client.message(method, request)
    assert await client.message(method, request) == operation
    (command,) = await commands(stack)
    assert (str(command["spool"]), command["verb"]) == (SPOOLS[0], VERBS[method])
    assert [str(one) for one in command["message_ids"]] == [MESSAGE]
    metadata = metadata_of(operation)
    assert (metadata.verb, metadata.message, metadata.provider) == (
        VERBS[method],
        f"accounts/acme/messages/{MESSAGE}",
        request.provider if method == "RerouteMessage" else "",
    )
    assert not metadata.HasField("filter")
    assert [(one.spool, one.node) for one in metadata.pending_spools] == [(SPOOLS[0], "nodes/edge-1")]


@pytest.mark.parametrize("method", VERBS)
async def test_a_rehearsal_checks_and_stores_nothing(stack: ApiStack, client: Client, method: str) -> None:
    operation = await client.message(method, request_of(method, validate_only=True))
    assert not operation.done
    bulk = await client.message("CommandMessages", all_of(validate_only=True))
    assert metadata_of(bulk).spool_count == 2
    assert await commands(stack) == []
    missing = getattr(service, f"{method}Request")(name=f"accounts/acme/messages/{MESSAGE[:-1]}f", validate_only=True)
    if method == "RerouteMessage":
        missing.provider = "accounts/acme/providers/relay"
    assert (await client.refused(client.message(method, missing))).code is grpc.StatusCode.NOT_FOUND


async def test_a_filter_goes_to_every_spool_and_its_operation_tells_of_each(stack: ApiStack, client: Client) -> None:
    wanted = service.MessageFilter(
        provider="accounts/acme/providers/gone",
        recipient_domain="X.Example",
        min_age=Duration(seconds=90),
        states=[pb.RECIPIENT_STATE_HELD, pb.RECIPIENT_STATE_QUEUED],
    )
    operation = await client.message("CommandMessages", all_of(filter=wanted, request_id=REQUEST_ID))
    rows = await commands(stack)
    assert [str(row["spool"]) for row in rows] == list(SPOOLS)
    assert len({row["operation"] for row in rows}) == 1
    assert operation.name == f"accounts/acme/operations/{rows[0]['operation']}"
    for row in rows:
        assert (row["create_time"] - row["accepted_before"]).total_seconds() == 90
        assert (row["filter_provider"], row["filter_recipient_domain"]) == (wanted.provider, "x.example")
        assert list(row["filter_states"]) == [2, 5]
        assert list(row["message_ids"]) == []
    assert await client.message("CommandMessages", all_of(filter=wanted, request_id=REQUEST_ID)) == operation
    metadata = metadata_of(operation)
    assert metadata.filter.recipient_domain == "x.example"
    assert (metadata.filter.min_age.seconds, list(metadata.filter.states)) == (90, [2, 5])
    assert (metadata.spool_count, metadata.done_spool_count, metadata.changed_count) == (2, 0, 0)

    await progress(stack, SPOOLS[0], 700, 3, done=True)
    await progress(stack, SPOOLS[1], 40, 0, done=False)
    running = await get(client, operation.name)
    metadata = metadata_of(running)
    assert not running.done
    assert (metadata.spool_count, metadata.done_spool_count) == (2, 1)
    assert (metadata.changed_count, metadata.too_late_count) == (740, 3)
    assert [(one.spool, one.node, one.changed_count) for one in metadata.pending_spools] == [
        (SPOOLS[1], "nodes/edge-2", 40)
    ]
    assert metadata.pending_spools[0].update_time.seconds > 0

    await progress(stack, SPOOLS[1], 41, 2, done=True)
    ended = await get(client, operation.name)
    result = service.CommandResult()
    assert ended.response.Unpack(result)
    assert (result.changed_count, result.too_late_count) == (741, 5)
    assert [(one.spool, one.changed_count, one.too_late_count) for one in result.spools] == [
        (SPOOLS[0], 700, 3),
        (SPOOLS[1], 41, 2),
    ]


async def progress(stack: ApiStack, spool: str, changed: int, late: int, *, done: bool, error: str = "") -> None:
    await stack.as_superuser(
        "UPDATE postroad.commands SET changed_count = $2, too_late_count = $3, update_time = now(), error = $4,"
        " done_time = CASE WHEN $5 THEN now() END WHERE spool = $1",
        *(spool, changed, late, error, done),
    )


async def test_a_spool_that_is_gone_keeps_an_operation_pending_in_plain_sight(stack: ApiStack, client: Client) -> None:
    operation = await client.message("CommandMessages", all_of())
    await progress(stack, SPOOLS[0], 1, 0, done=True)
    await stack.as_superuser("DELETE FROM postroad.nodes WHERE node = 'edge-2'")
    pending = await get(client, operation.name)
    assert not pending.done
    assert [(one.spool, one.node) for one in metadata_of(pending).pending_spools] == [(SPOOLS[1], "")]


async def test_an_operation_fails_only_when_no_spool_did_anything(stack: ApiStack, client: Client) -> None:
    operation = await client.message("CommandMessages", all_of())
    await progress(stack, SPOOLS[0], 0, 0, done=True, error="not known")
    await progress(stack, SPOOLS[1], 1, 0, done=True)
    result = service.CommandResult()
    assert (await get(client, operation.name)).response.Unpack(result)
    assert [one.error for one in result.spools] == ["not known", ""]
    await progress(stack, SPOOLS[1], 0, 0, done=True, error="not known either")
    assert (await get(client, operation.name)).error.message == "not known"


@pytest.mark.parametrize("method", VERBS)
async def test_a_command_on_a_replicated_message_goes_to_the_queue(
    stack: ApiStack, client: Client, method: str
) -> None:
    await stack.as_superuser("UPDATE postroad.messages SET replicated = true")
    operation = await client.message(method, request_of(method))
    (command,) = await commands(stack)
    assert command["spool"] == QUEUE_SPOOL
    # Whichever node accepted it: it waits in the control plane.
    for one in (operation, await get(client, operation.name)):
        assert [(spool.spool, spool.node) for spool in metadata_of(one).pending_spools] == [(str(QUEUE_SPOOL), "")]


async def test_a_filter_goes_to_the_queue_where_mail_of_the_account_is_in_it(stack: ApiStack, client: Client) -> None:
    await queue_message(stack, "acme")
    operation = await client.message("CommandMessages", all_of())
    assert metadata_of(operation).spool_count == 3
    for spool in SPOOLS:
        await progress(stack, spool, 1, 0, done=True)
    pending = await get(client, operation.name)
    assert [(one.spool, one.node) for one in metadata_of(pending).pending_spools] == [(str(QUEUE_SPOOL), "")]
    await progress(stack, str(QUEUE_SPOOL), 5, 0, done=True)
    result = service.CommandResult()
    assert (await get(client, operation.name)).response.Unpack(result)
    assert result.changed_count == 7


async def test_mail_of_others_in_the_queue_is_not_asked_for(stack: ApiStack, client: Client) -> None:
    await stack.make_account("other")
    await queue_message(stack, "other")
    assert metadata_of(await client.message("CommandMessages", all_of())).spool_count == 2
    everywhere = all_of(parent="accounts/-")
    assert metadata_of(await stack.operator.message("CommandMessages", everywhere)).spool_count == 3


async def queue_message(stack: ApiStack, account: str) -> None:
    await stack.as_superuser(
        "INSERT INTO postroad.replicated_queue (message_id, account, size_bytes, envelope, due_time)"
        " VALUES ($1, $2, 1, '', now())",
        *(format_message_id(new_message_id(NOW_MS, bytes(10))), account),
    )


async def test_operations_are_listed_once_each_in_pages(stack: ApiStack, client: Client) -> None:
    names = {(await client.message("CommandMessages", all_of())).name for _ in range(3)}
    names.add((await client.message("HoldMessage", request_of("HoldMessage"))).name)
    stub = operations_pb2_grpc.OperationsStub(client.channel)  # type: ignore[no-untyped-call]  # Google's, untyped
    found: list[Any] = []
    token = ""
    while not found or token:
        request = operations_pb2.ListOperationsRequest(name="accounts/acme", page_size=3, page_token=token)
        page = await stub.ListOperations(request, metadata=client.metadata, timeout=20)
        found += page.operations
        token = page.next_page_token
    assert [one.name for one in found] == sorted(names)
    assert sorted(metadata_of(one).spool_count for one in found) == [1, 2, 2, 2]


async def test_commands_on_every_accounts_mail_are_the_operators(stack: ApiStack, client: Client) -> None:
    everywhere = all_of(parent="accounts/-")
    assert (await client.refused(client.message("CommandMessages", everywhere))).reason == "OTHER_ACCOUNT"
    operation = await stack.operator.message("CommandMessages", everywhere)
    assert operation.name.startswith("accounts/-/operations/")
    assert {row["account"] for row in await commands(stack)} == {"-"}
    assert await get(stack.operator, operation.name) == operation
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await get(client, operation.name)
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    # Mail of all cannot go by a provider of one.
    owned = all_of(service.COMMAND_VERB_REROUTE, "accounts/-", provider="accounts/acme/providers/relay")
    assert (await stack.operator.refused(stack.operator.message("CommandMessages", owned))).fields == ["provider"]
    await add_provider(stack.operator, "")
    shared = all_of(service.COMMAND_VERB_REROUTE, "accounts/-", provider="providers/relay")
    assert metadata_of(await stack.operator.message("CommandMessages", shared)).provider == "providers/relay"


async def test_a_key_reaches_its_own_account_and_wants_the_scope(stack: ApiStack, client: Client) -> None:
    other = await stack.make_account("other")
    reader = await stack.make_key("acme", "messages.read")
    for method in VERBS:
        assert (await other.refused(other.message(method, request_of(method)))).reason == "OTHER_ACCOUNT"
        assert (await reader.refused(reader.message(method, request_of(method)))).reason == "SCOPE_MISSING"
    assert (await other.refused(other.message("CommandMessages", all_of()))).reason == "OTHER_ACCOUNT"
    assert (await reader.refused(reader.message("CommandMessages", all_of()))).reason == "SCOPE_MISSING"
    assert await commands(stack) == []


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"verb": service.COMMAND_VERB_UNSPECIFIED}, "verb"),
        ({"verb": 99}, "verb"),
        ({"verb": service.COMMAND_VERB_REROUTE}, "provider"),
        ({"provider": "providers/relay"}, "provider"),
        ({"verb": service.COMMAND_VERB_REROUTE, "provider": "accounts/other/providers/x"}, "provider"),
        ({"filter": service.MessageFilter(provider="nonsense")}, "filter.provider"),
        ({"filter": service.MessageFilter(provider="accounts/other/providers/x")}, "filter.provider"),
        ({"filter": service.MessageFilter(recipient_domain="a@b.example")}, "filter.recipient_domain"),
        ({"filter": service.MessageFilter(recipient_domain="a\0b")}, "filter.recipient_domain"),
        ({"filter": service.MessageFilter(min_age=Duration(seconds=-1))}, "filter.min_age"),
        ({"filter": service.MessageFilter(min_age=Duration(seconds=315_576_000_000))}, "filter.min_age"),
        ({"filter": service.MessageFilter(states=[pb.RECIPIENT_STATE_SENT])}, "filter.states"),
        ({"filter": service.MessageFilter(states=[pb.RECIPIENT_STATE_SENDING])}, "filter.states"),
    ],
)
async def test_what_cannot_be_meant_is_refused_by_field(client: Client, fields: dict[str, Any], wrong: str) -> None:
    request = all_of(**{"verb": HOLD, **fields})
    assert (await client.refused(client.message("CommandMessages", request))).fields == [wrong]


async def test_a_reroute_to_a_provider_that_does_not_exist_is_refused(stack: ApiStack, client: Client) -> None:
    for method, request in (
        ("RerouteMessage", request_of("RerouteMessage", provider="accounts/acme/providers/nothing")),
        ("CommandMessages", all_of(service.COMMAND_VERB_REROUTE, provider="providers/nothing")),
    ):
        assert (await client.refused(client.message(method, request))).code is grpc.StatusCode.NOT_FOUND
    foreign = request_of("RerouteMessage", provider="accounts/other/providers/relay")
    assert (await client.refused(client.message("RerouteMessage", foreign))).fields == ["provider"]
    assert await commands(stack) == []


async def test_without_any_spool_there_is_nothing_to_command(bare: ApiStack) -> None:
    client = await bare.make_account("acme")
    assert (await client.refused(client.message("CommandMessages", all_of()))).reason == "SPOOL_MISSING"


async def test_a_filter_does_not_reach_the_mail_of_a_former_account_of_the_name(
    stack: ApiStack, client: Client
) -> None:
    account = await client.account("GetAccount", account_service_pb2.GetAccountRequest(name="accounts/acme"))
    delete = account_service_pb2.DeleteAccountRequest(name=account.name, etag=account.etag)
    await stack.operator.account("DeleteAccount", delete)
    successor = await stack.make_account("acme")
    await successor.message("CommandMessages", all_of())
    (since,) = await stack.as_superuser("SELECT messages_since FROM postroad.accounts WHERE account = 'acme'")
    for row in await commands(stack):
        assert row["position"].int >> 80 >= int(since["messages_since"].timestamp() * 1000)


_MANY_COMMANDS = """
INSERT INTO postroad.commands (operation, account, verb, spool, message_ids, accepted_before)
SELECT gen_random_uuid(), 'acme', 2, gen_random_uuid(), '{}', now() FROM generate_series(1, 20000)
"""
_MANY_MESSAGES = """
INSERT INTO postroad.messages
SELECT made.id, account, accept_time, sender, size_bytes, header_message_id, subject, credential, client_address,
    client_helo, client_tls, session, node, spool
FROM postroad.messages, LATERAL (
    SELECT (substr(message_id::text, 1, 24) || lpad(n::text, 12, '0'))::uuid AS id FROM generate_series(1, 20000) AS n
) AS made
"""
_LOOKS = (
    f"{repository._COMMANDS} WHERE c.account = 'acme' AND coalesce(c.operation, c.command) = '{MESSAGE}'",
    f"SELECT * FROM postroad.messages WHERE account = 'acme' AND message_id = '{MESSAGE}'",  # noqa: S608 - a constant
    # As fleet._COMMANDS, which wants its spools as an argument.
    """
    SELECT command FROM postroad.commands
    WHERE done_time IS NULL AND spool = ANY ('{11111111-1111-4111-8111-111111111111}'::uuid[])
    """,
)


async def test_finding_what_a_command_needs_scans_no_table(stack: ApiStack, client: Client) -> None:
    await stack.as_superuser(_MANY_COMMANDS)
    await stack.as_superuser(_MANY_MESSAGES)
    await stack.as_superuser("ANALYZE postroad.commands, postroad.messages")
    for sql in _LOOKS:
        plan = "\n".join(row[0] for row in await stack.as_superuser(f"EXPLAIN {sql}"))
        assert "Seq Scan on commands" not in plan, plan
        assert "Seq Scan on messages" not in plan, plan


async def test_an_account_has_so_many_commands_with_a_filter_under_way(
    stack: ApiStack, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "MAX_FILTER_COMMANDS", 2)
    for _ in range(2):
        await client.message("CommandMessages", all_of())
    error = await client.refused(client.message("CommandMessages", all_of()))
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_COMMANDS")
    assert error.details["RetryInfo"].retry_delay.seconds > 0
    await stack.operator.message("CommandMessages", all_of(parent="accounts/-"))
    await stack.as_superuser("UPDATE postroad.commands SET done_time = now() WHERE account = 'acme'")
    await client.message("CommandMessages", all_of())
