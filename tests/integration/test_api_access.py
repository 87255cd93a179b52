"""Who may call what: every method of the API, with and without keys, and with the ids of somebody else."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import grpc
import pytest
from google.longrunning import operations_pb2
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from controlplane.adapters.grpc.errors import ApiStatusError, code_of
from controlplane.domain.access import METHOD_SCOPES, Scope
from postroad.control.v1 import (
    account_service_pb2,
    book_service_pb2,
    credential_service_pb2,
    destination_service_pb2,
    limit_service_pb2,
    message_service_pb2,
    node_service_pb2,
    provider_service_pb2,
    routing_rule_service_pb2,
    suspension_service_pb2,
)
from postroad.control.v1 import provider_pb2 as provider
from postroad.control.v1.limit_pb2 import Limit
from support.api import ApiStack, Client, reading, running_api
from support.databases import Database

_FILES = (
    account_service_pb2,
    book_service_pb2,
    credential_service_pb2,
    destination_service_pb2,
    limit_service_pb2,
    message_service_pb2,
    node_service_pb2,
    provider_service_pb2,
    routing_rule_service_pb2,
    suspension_service_pb2,
)
METHODS: dict[str, MethodDescriptor] = {
    f"/{service.full_name}/{method.name}": method
    for file in _FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
} | {
    f"/google.longrunning.Operations/{method.name}": method
    for method in operations_pb2.DESCRIPTOR.services_by_name["Operations"].methods
    if method.name in ("GetOperation", "ListOperations", "WaitOperation")
}
_UUID = "0192f8a0-0000-7000-8000-000000000000"
_COLLECTIONS = {
    "ApiKey": "apiKeys/first",
    "SmtpCredential": "smtpCredentials/app",
    "Provider": "providers/relay",
    "Destination": "destinations/example.net",
    "RoutingRule": "routingRules/all",
    "Limit": "limits/hourly",
    "Message": f"messages/{_UUID}",
    "Operation": f"operations/{_UUID}",
    "Suspension": "suspension",
}
OPERATORS_ONLY = {method for method, scope in METHOD_SCOPES.items() if scope is Scope.OPERATOR}


@pytest.fixture
async def stack(migrated_database: Database) -> AsyncIterator[ApiStack]:
    async with running_api(migrated_database) as running:
        yield running


def request_for(method: MethodDescriptor, account: str) -> Any:
    """A request about what `account` owns, good enough to get past the shape of names."""
    request: Any = GetMessageClass(method.input_type)()
    name = name_for(method.name, account)
    values = {
        "parent": f"accounts/{account}",
        "name": name,
        "etag": '"00000000-1"',
        **{field.name: "mine" for field in method.input_type.fields if field.name.endswith("_id")},
        "request_id": "",
    }
    for field in method.input_type.fields:
        if field.name in values:
            setattr(request, field.name, values[field.name])
    if method.name.startswith("Update"):
        resource = getattr(request, re.sub(r"(?<!^)(?=[A-Z])", "_", noun_of(method.name)).lower())
        resource.name, resource.etag = name, '"00000000-1"'
    elif method.name == "CreateProvider":
        request.provider.smtp.endpoints.append(provider.SmtpProvider.Endpoint(host="relay.example.com"))
    elif method.name == "CreateApiKey":
        request.api_key.scopes.append("config.write")
    elif method.name in ("WaitOperation", "WaitSuspension"):
        request.timeout.seconds = 0
    return request


def noun_of(method: str) -> str:
    return re.sub(
        "^(Create|Get|List|Update|Delete|Rotate|Revoke|Suspend|Resume|Verify|Wait"
        "|Cancel|Hold|Release|Retry|Bounce|Reroute)",
        "",
        method,
    )


def name_for(method: str, account: str) -> str:
    if "NodePool" in method:
        return "nodePools/default"
    if "Node" in method or method in {"AcceptSpool", "AttachSpool", "GiveUpSpool"}:
        return "nodes/edge-1"
    inside = _COLLECTIONS.get(noun_of(method))
    return f"accounts/{account}/{inside}" if inside else f"accounts/{account}"


async def code_for(stack: ApiStack, method: str, request: Message, key: str | None) -> grpc.StatusCode:
    """The status of a call in this process, which takes the same way as one over the network."""
    metadata = () if key is None else (("authorization", f"Bearer {key}"),)
    try:
        answer = await stack.api.registry.call(method, reading(request), metadata)
        if METHODS[method].server_streaming:
            return await first_code(answer)
    except ApiStatusError as error:
        return code_of(error.status)
    return grpc.StatusCode.OK


async def first_code(answers: Any) -> grpc.StatusCode:
    try:
        await anext(answers)
    except ApiStatusError as error:
        return code_of(error.status)
    except StopAsyncIteration:
        pass
    return grpc.StatusCode.OK


def test_every_method_of_the_protos_has_a_scope_and_no_scope_is_of_a_missing_method() -> None:
    assert set(METHOD_SCOPES) == set(METHODS)


async def test_the_registry_serves_every_method(stack: ApiStack) -> None:
    for method, descriptor in METHODS.items():
        assert stack.api.registry.method(method) is descriptor


async def test_no_method_answers_without_a_key_or_with_a_made_up_one(stack: ApiStack) -> None:
    made_up = "prk_AAAAAAAA_" + "A" * 43
    right_prefix = stack.operator.key[:-43] + "A" * 43
    for method, descriptor in METHODS.items():
        for key in (None, "", "nonsense", made_up, right_prefix):
            code = await code_for(stack, method, request_for(descriptor, "acme"), key)
            assert code is grpc.StatusCode.UNAUTHENTICATED, (method, key)


async def test_each_method_is_refused_with_every_scope_but_its_own(stack: ApiStack) -> None:
    await stack.make_account("acme")
    keys = {scope: (await stack.make_key("acme", scope)).key for scope in Scope if scope is not Scope.OPERATOR}
    for method, needed in METHOD_SCOPES.items():
        request = request_for(METHODS[method], "acme")
        for scope, key in keys.items():
            if method.endswith("WatchEvents") and scope is needed:
                continue  # would wait for events
            code = await code_for(stack, method, request, key)
            refused = code is grpc.StatusCode.PERMISSION_DENIED
            assert refused is (scope is not needed), (method, scope, code)


async def test_no_account_reaches_what_another_one_owns(stack: ApiStack) -> None:
    mine = await stack.make_account("acme")
    await stack.make_account("other")
    for method, descriptor in METHODS.items():
        if method in OPERATORS_ONLY:
            continue
        for account in ("other", "nobody"):
            request = request_for(descriptor, account)
            code = await code_for(stack, method, request, mine.key)
            # The same for what exists and what does not: an answer must not tell.
            assert code is grpc.StatusCode.PERMISSION_DENIED, (method, account, code)


async def test_operators_get_past_the_guard_everywhere(stack: ApiStack) -> None:
    await stack.make_account("acme")
    refusals = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INTERNAL}
    for method, descriptor in METHODS.items():
        if method.endswith("WatchEvents"):
            continue
        code = await code_for(stack, method, request_for(descriptor, "acme"), stack.operator.key)
        assert code not in refusals, (method, code)


_MESSAGE = """
    INSERT INTO postroad.messages (
        message_id, account, accept_time, sender, size_bytes, header_message_id, subject, credential, client_address,
        client_helo, client_tls, session, node, spool
    )
    VALUES ($1, $2, now(), '', 1, '', '', '', '', '', '', '', 'edge-1', $1)
"""
_RECIPIENT = """
    INSERT INTO postroad.recipients (message_id, recipient_index, account, address, state, attempts, update_time)
    VALUES ($1, 0, $2, 'a@b.example', 6, 1, now())
"""
_EVENT = """
    INSERT INTO postroad.delivery_events (message_id, account, type, event_time, node, spool)
    VALUES ($1, $2, 2, now(), 'edge-1', $1)
"""
_COMMAND = "INSERT INTO postroad.commands (account, verb, spool, message_ids) VALUES ($2, 1, $1, ARRAY[$1::uuid])"

_BOOK = """
INSERT INTO postroad.books (
    account, spool, node, as_of_record, compare_time, accepted, sent, bounced, failed, expired, cancelled, waiting,
    earlier, spool_waiting, ledger_digest, spool_digest
) VALUES ($2, $1, 'edge-1', 1, now(), 0, 0, 0, 0, 0, 0, 0, 0, 0, '', '')
"""
_FINDING = """
INSERT INTO postroad.book_findings (account, spool, node, kind, detail, first_seen_time, last_seen_time)
VALUES ($2, $1, 'edge-1', 4, '', now(), now())
"""

ACCOUNT_TABLES = (
    *("accounts", "account_sender_domains", "account_networks", "api_keys", "smtp_credentials"),
    *(
        "providers",
        "routing_rules",
        "routing_rule_targets",
        "limit_policies",
        "config_bundles",
        "config_revisions",
        "denials",
    ),
    *("messages", "recipients", "delivery_events", "commands", "books", "book_findings", "audit_log"),
)


async def test_row_level_security_alone_keeps_accounts_apart(stack: ApiStack) -> None:
    for account in ("acme", "other"):
        client = await stack.make_account(account)
        await fill(stack, client, account)
    for table in ACCOUNT_TABLES:
        seen = await accounts_seen(stack, table, "acme")
        assert seen == {"acme"}, table
        assert await accounts_seen(stack, table, "") == set(), table
        assert {"acme", "other"} <= await accounts_seen(stack, table, "*"), table


async def accounts_seen(stack: ApiStack, table: str, account: str) -> set[str]:
    async with stack.pool.acquire() as connection, connection.transaction():
        await connection.execute("SELECT set_config('postroad.account', $1, true)", account)
        rows = await connection.fetch(f"SELECT DISTINCT account FROM postroad.{table} WHERE account IS NOT NULL")  # noqa: S608
    return {row["account"] for row in rows}


async def fill(stack: ApiStack, client: Client, account: str) -> None:
    """One row of everything that an account can own."""
    parent = f"accounts/{account}"
    request = provider_service_pb2.CreateProviderRequest(parent=parent, provider_id="relay")
    request.provider.smtp.endpoints.add(host="relay.example.com")
    made = await client.provider("CreateProvider", request)
    await client.provider("SuspendProvider", provider_service_pb2.SuspendProviderRequest(name=made.name))
    rule = routing_rule_service_pb2.CreateRoutingRuleRequest(parent=parent, routing_rule_id="all")
    rule.routing_rule.targets.add(provider=made.name)
    await client.rule("CreateRoutingRule", rule)
    credential = credential_service_pb2.CreateSmtpCredentialRequest(parent=parent, smtp_credential_id="app")
    await client.credential("CreateSmtpCredential", credential)
    limit = limit_service_pb2.CreateLimitRequest(parent=parent, limit_id="hourly")
    limit.limit.scope, limit.limit.unit = Limit.SCOPE_ACCOUNT, Limit.UNIT_MESSAGE
    limit.limit.amount, limit.limit.period.seconds = 5, 3600
    await stack.operator.limit("CreateLimit", limit)
    one = f"019b7700-0000-7000-8000-00000000000{len(account)}"  # on 2026-01-01
    await stack.as_superuser("SELECT postroad.ensure_partitions(date '2026-01-01', 1)")
    await stack.as_superuser(
        "INSERT INTO postroad.account_networks VALUES ($1, $2::text::cidr, 1)", account, f"10.{len(account)}.0.0/16"
    )
    await stack.as_superuser(_MESSAGE, one, account)
    await stack.as_superuser(_RECIPIENT, one, account)
    await stack.as_superuser(_EVENT, one, account)
    await stack.as_superuser(_COMMAND, one, account)
    await stack.as_superuser(_BOOK, one, account)
    await stack.as_superuser(_FINDING, one, account)


async def test_no_account_writes_rows_of_another_one_whatever_the_code_asks(stack: ApiStack) -> None:
    await fill(stack, await stack.make_account("acme"), "acme")
    await stack.make_account("other")
    async with stack.pool.acquire() as connection, connection.transaction():
        await connection.execute("SELECT set_config('postroad.account', 'acme', true)")
        done = await connection.execute("UPDATE postroad.accounts SET display_name = 'x' WHERE account = 'other'")
        assert done == "UPDATE 0"
        done = await connection.execute("DELETE FROM postroad.api_keys WHERE account = 'other'")
        assert done == "DELETE 0"
        # Not even its own: only operators write limits.
        done = await connection.execute("UPDATE postroad.limit_policies SET amount = 9")
        assert done == "UPDATE 0"
    async with stack.pool.acquire() as connection:
        await connection.execute("BEGIN")
        await connection.execute("SELECT set_config('postroad.account', 'acme', true)")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("INSERT INTO postroad.account_sender_domains VALUES ('other', 'x.example', 9)")
        await connection.execute("ROLLBACK")


async def test_a_presented_key_opens_one_row_and_no_other(stack: ApiStack) -> None:
    client = await stack.make_account("acme")
    async with stack.pool.acquire() as connection, connection.transaction():
        await connection.execute("SELECT set_config('postroad.api_key_lookup', $1, true)", client.key[4:12])
        rows = await connection.fetch("SELECT account FROM postroad.api_keys")
        assert [row["account"] for row in rows] == ["acme"]
        assert await connection.fetch("SELECT 1 FROM postroad.accounts") == []


async def test_the_audit_log_can_only_grow(stack: ApiStack) -> None:
    await stack.make_account("acme")
    for statement in ("UPDATE postroad.audit_log SET principal = 'x'", "DELETE FROM postroad.audit_log"):
        async with stack.pool.acquire() as connection:
            await connection.execute("BEGIN")
            await connection.execute("SELECT set_config('postroad.account', '*', true)")
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(statement)
            await connection.execute("ROLLBACK")


async def test_every_call_is_measured_by_method_and_status(stack: ApiStack) -> None:
    stack.calls.clear()
    client = await stack.make_account("acme")
    await client.refused(client.account("GetAccount", account_service_pb2.GetAccountRequest(name="accounts/other")))
    method, status, seconds = stack.calls[-1]
    assert (method, status) == ("/postroad.control.v1.AccountService/GetAccount", "PERMISSION_DENIED")
    assert seconds is not None
    assert 0 < seconds < 20
