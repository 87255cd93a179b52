"""LimitService: what operators may set, what nodes are told of it, what accounts see."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from dataplane.adapters.bundle_codec import decode_account, decode_settings
from dataplane.core.limits import Limit as NodeLimit
from dataplane.core.limits import LimitScope, LimitUnit
from postroad.config.v1 import bundle_pb2
from postroad.control.v1 import (
    account_pb2,
    account_service_pb2,
    credential_service_pb2,
    node_service_pb2,
    provider_service_pb2,
)
from postroad.control.v1 import limit_pb2 as pb
from postroad.control.v1 import limit_service_pb2 as service
from support.api import ApiStack, Client, running_api
from support.databases import Database

HOUR = Duration(seconds=3_600)


@pytest.fixture
async def stack(migrated_database: Database) -> AsyncIterator[ApiStack]:
    async with running_api(migrated_database) as running:
        yield running


@pytest.fixture
async def client(stack: ApiStack) -> Client:
    return await stack.make_account("acme")


def limit_of(scope: str, unit: str, amount: int, **fields: Any) -> pb.Limit:
    fields.setdefault("period", HOUR)
    return pb.Limit(
        scope=pb.Limit.Scope.Value(f"SCOPE_{scope}"), unit=pb.Limit.Unit.Value(f"UNIT_{unit}"), amount=amount, **fields
    )


def request_of(limit_id: str, limit: pb.Limit, parent: str = "accounts/acme", **more: Any) -> Any:
    return service.CreateLimitRequest(parent=parent, limit_id=limit_id, limit=limit, **more)


async def make(stack: ApiStack, limit_id: str, limit: pb.Limit, parent: str = "accounts/acme") -> pb.Limit:
    made: pb.Limit = await stack.operator.limit("CreateLimit", request_of(limit_id, limit, parent))
    return made


async def make_credential(stack: ApiStack, account: str = "acme", credential: str = "app") -> str:
    request = credential_service_pb2.CreateSmtpCredentialRequest(
        parent=f"accounts/{account}", smtp_credential_id=credential
    )
    made = await stack.operator.credential("CreateSmtpCredential", request)
    return str(made.name)


async def make_provider(stack: ApiStack, provider: str, parent: str = "accounts/acme") -> str:
    request = provider_service_pb2.CreateProviderRequest(parent=parent, provider_id=provider)
    request.provider.smtp.endpoints.add(host="relay.example.com")
    return str((await stack.operator.provider("CreateProvider", request)).name)


async def bundle_of(stack: ApiStack, name: str) -> bundle_pb2.Bundle:
    rows = await stack.as_superuser(
        "SELECT bundle AS name, kind, revision, hash, content FROM postroad.config_bundles WHERE bundle = $1", name
    )
    return bundle_pb2.Bundle(**dict(rows[0]))


async def account_limits(stack: ApiStack, account: str = "acme") -> tuple[NodeLimit, ...]:
    return decode_account(await bundle_of(stack, f"accounts/{account}")).limits


async def pool_limits(stack: ApiStack, pool: str = "default") -> tuple[NodeLimit, ...]:
    return decode_settings(await bundle_of(stack, f"pools/{pool}/settings")).limits


# --- what nodes are told ---------------------------------------------------------------------------------------------


async def test_an_accounts_limit_is_in_its_bundle_with_the_burst_filled_in(stack: ApiStack, client: Client) -> None:
    made = await make(stack, "hourly", limit_of("ACCOUNT", "MESSAGE", 600, display_name="Trial"))
    assert (made.name, made.burst, made.display_name) == ("accounts/acme/limits/hourly", 0, "Trial")
    assert made.origin == pb.Limit.ORIGIN_ACCOUNT
    assert str(uuid.UUID(made.uid)) == made.uid
    assert made.etag
    assert made.create_time.seconds
    expected = NodeLimit(made.name, LimitScope.ACCOUNT, LimitUnit.MESSAGE, 600, 3_600.0, 60)
    assert await account_limits(stack) == (expected,)


async def test_a_shared_limit_is_in_the_settings_of_every_pool(stack: ApiStack) -> None:
    await stack.operator.node("CreateNodePool", node_service_pb2.CreateNodePoolRequest(node_pool_id="second"))
    made = await make(stack, "hosts", limit_of("DESTINATION", "CONNECTION", 5, period=None), "")
    assert (made.name, made.origin) == ("limits/hosts", pb.Limit.ORIGIN_SHARED)
    expected = (NodeLimit("limits/hosts", LimitScope.DESTINATION, LimitUnit.CONNECTION, 5),)
    assert await pool_limits(stack) == await pool_limits(stack, "second") == expected
    # A pool that comes later, and one that changes, have it, too.
    await stack.operator.node("CreateNodePool", node_service_pb2.CreateNodePoolRequest(node_pool_id="third"))
    await stack.operator.node("CreateNode", node_service_pb2.CreateNodeRequest(node_id="edge-1"))
    assert await pool_limits(stack) == await pool_limits(stack, "third") == expected


async def test_an_edit_and_a_deletion_reach_the_bundle(stack: ApiStack, client: Client) -> None:
    made = await make(stack, "hourly", limit_of("ACCOUNT", "MESSAGE", 600))
    change = pb.Limit(name=made.name, etag=made.etag, amount=50, burst=7)
    changed = await stack.operator.limit("UpdateLimit", service.UpdateLimitRequest(limit=change))
    assert (changed.amount, changed.burst, changed.period) == (50, 7, HOUR)
    assert changed.etag != made.etag
    assert [(one.amount, one.burst) for one in await account_limits(stack)] == [(50, 7)]
    mask = FieldMask(paths=["burst"])
    change = pb.Limit(name=made.name, etag=changed.etag, amount=9_999)
    changed = await stack.operator.limit("UpdateLimit", service.UpdateLimitRequest(limit=change, update_mask=mask))
    assert (changed.amount, changed.burst) == (50, 0)
    assert [(one.amount, one.burst) for one in await account_limits(stack)] == [(50, 10)]
    await stack.operator.limit("DeleteLimit", service.DeleteLimitRequest(name=made.name, etag=changed.etag))
    assert await account_limits(stack) == ()
    gone = await stack.operator.refused(stack.operator.limit("GetLimit", service.GetLimitRequest(name=made.name)))
    assert gone.code is grpc.StatusCode.NOT_FOUND


async def test_an_edit_of_the_account_by_its_own_key_keeps_its_limits(stack: ApiStack, client: Client) -> None:
    await make(stack, "hourly", limit_of("ACCOUNT", "MESSAGE", 600))
    account = await client.account("GetAccount", account_service_pb2.GetAccountRequest(name="accounts/acme"))
    account.display_name = "Other"
    mask = FieldMask(paths=["display_name"])
    await client.account("UpdateAccount", account_service_pb2.UpdateAccountRequest(account=account, update_mask=mask))
    assert len(await account_limits(stack)) == 1


async def test_deleting_the_account_deletes_its_limits(stack: ApiStack, client: Client) -> None:
    await make(stack, "hourly", limit_of("ACCOUNT", "MESSAGE", 600))
    account = await client.account("GetAccount", account_service_pb2.GetAccountRequest(name="accounts/acme"))
    delete = account_service_pb2.DeleteAccountRequest(name=account.name, etag=account.etag)
    await stack.operator.account("DeleteAccount", delete)
    assert await stack.as_superuser("SELECT 1 FROM postroad.limit_policies") == []


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parent", "limit", "path"),
    [
        ("accounts/acme", limit_of("ACCOUNT", "MESSAGE", 0), "limit.amount"),
        ("accounts/acme", limit_of("ACCOUNT", "MESSAGE", 4_000_000_001), "limit.amount"),
        ("accounts/acme", limit_of("ACCOUNT", "MESSAGE", 5, burst=6), "limit.burst"),
        ("accounts/acme", limit_of("ACCOUNT", "MESSAGE", 5, burst=-1), "limit.burst"),
        ("accounts/acme", limit_of("ACCOUNT", "MESSAGE", 5, period=Duration(nanos=1)), "limit.period"),
        ("accounts/acme", limit_of("ACCOUNT", "MESSAGE", 5, period=Duration(seconds=2_678_401)), "limit.period"),
        ("accounts/acme", limit_of("ACCOUNT", "MESSAGE", 5, period=Duration(seconds=-5)), "limit.period"),
        ("accounts/acme", limit_of("ACCOUNT", "MESSAGE", 30, period=Duration(seconds=2_678_400)), "limit.period"),
        ("accounts/acme", limit_of("ACCOUNT", "MESSAGE", 5, period=None), "limit.period"),
        ("accounts/acme", limit_of("PROVIDER", "CONNECTION", 5, period=None, burst=1), "limit.burst"),
        ("accounts/acme", limit_of("ACCOUNT", "CONNECTION", 5), "limit.unit"),
        ("accounts/acme", limit_of("ACCOUNT", "UNSPECIFIED", 5), "limit.unit"),
        ("accounts/acme", limit_of("UNSPECIFIED", "MESSAGE", 5), "limit.scope"),
        ("accounts/acme", pb.Limit(scope=99, unit=1, amount=5, period=HOUR), "limit.scope"),  # type: ignore[arg-type]
        ("accounts/acme", limit_of("ADDRESS", "CONNECTION", 5), "limit.scope"),
        ("accounts/acme", limit_of("DESTINATION", "CONNECTION", 5), "limit.scope"),
        ("accounts/acme", limit_of("ACCOUNT", "MESSAGE", 5, subject="accounts/acme"), "limit.subject"),
        (
            "accounts/acme",
            limit_of("CREDENTIAL", "MESSAGE", 5, subject="accounts/other/smtpCredentials/app"),
            "limit.subject",
        ),
        ("accounts/acme", limit_of("PROVIDER", "MESSAGE", 5, subject="providers/shared"), "limit.subject"),
        ("", limit_of("ADDRESS", "CONNECTION", 5, subject="2001:db8::1"), "limit.subject"),
        ("", limit_of("DESTINATION", "CONNECTION", 5, subject="MX.example"), "limit.subject"),
        ("accounts/acme", limit_of("ACCOUNT", "MESSAGE", 5, display_name="x" * 201), "limit.display_name"),
    ],
)
async def test_a_bad_limit_is_refused_with_the_path_of_the_field(
    stack: ApiStack, client: Client, parent: str, limit: pb.Limit, path: str
) -> None:
    error = await client.refused(stack.operator.limit("CreateLimit", request_of("bad", limit, parent)))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.fields == [path]
    assert await stack.as_superuser("SELECT 1 FROM postroad.limit_policies") == []


async def test_an_edit_that_makes_a_limit_bad_is_refused(stack: ApiStack, client: Client) -> None:
    made = await make(stack, "hourly", limit_of("ACCOUNT", "MESSAGE", 600))
    for paths, field in ((["scope"], "limit.scope"), (["*"], "limit.scope"), (["period"], "limit.period")):
        request = service.UpdateLimitRequest(
            limit=pb.Limit(name=made.name, etag=made.etag), update_mask=FieldMask(paths=paths)
        )
        error = await client.refused(stack.operator.limit("UpdateLimit", request))
        assert field in error.fields
    unknown = service.UpdateLimitRequest(limit=made, update_mask=FieldMask(paths=["nonsense"]))
    assert (await client.refused(stack.operator.limit("UpdateLimit", unknown))).fields == ["update_mask"]


@pytest.mark.parametrize(
    ("parent", "scope", "subject"),
    [
        ("accounts/acme", "CREDENTIAL", "accounts/acme/smtpCredentials/typo"),
        ("accounts/acme", "PROVIDER", "accounts/acme/providers/typo"),
        ("", "PROVIDER", "providers/typo"),
        ("", "ACCOUNT", "accounts/typo"),
    ],
)
async def test_a_subject_that_does_not_exist_is_refused(
    stack: ApiStack, client: Client, parent: str, scope: str, subject: str
) -> None:
    limit = limit_of(scope, "MESSAGE", 5, subject=subject)
    error = await client.refused(stack.operator.limit("CreateLimit", request_of("one", limit, parent)))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "LIMIT_SUBJECT_MISSING")
    assert error.details["PreconditionFailure"].violations[0].subject == subject


async def test_a_limit_outlives_its_subject(stack: ApiStack, client: Client) -> None:
    credential = await make_credential(stack)
    await make(stack, "app", limit_of("CREDENTIAL", "MESSAGE", 5, subject=credential))
    found = await client.credential(
        "GetSmtpCredential", credential_service_pb2.GetSmtpCredentialRequest(name=credential)
    )
    await client.credential(
        "DeleteSmtpCredential",
        credential_service_pb2.DeleteSmtpCredentialRequest(name=credential, etag=found.etag),
    )
    made = await stack.operator.limit("GetLimit", service.GetLimitRequest(name="accounts/acme/limits/app"))
    # The subject need not exist for an edit that leaves it alone.
    made.amount = 6
    await stack.operator.limit("UpdateLimit", service.UpdateLimitRequest(limit=made))
    assert [one.amount for one in await account_limits(stack)] == [6]


async def test_two_limits_of_an_owner_that_count_the_same_are_refused(stack: ApiStack, client: Client) -> None:
    await make(stack, "hourly", limit_of("ACCOUNT", "MESSAGE", 600))
    twin = limit_of("ACCOUNT", "MESSAGE", 5, period=Duration(seconds=60))
    error = await client.refused(stack.operator.limit("CreateLimit", request_of("other", twin)))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "LIMIT_TAKEN")
    same = await client.refused(
        stack.operator.limit("CreateLimit", request_of("hourly", limit_of("ACCOUNT", "BYTE", 5)))
    )
    assert same.code is grpc.StatusCode.ALREADY_EXISTS
    recipients = await make(stack, "recipients", limit_of("ACCOUNT", "RECIPIENT", 600))
    recipients.unit = pb.Limit.UNIT_MESSAGE
    error = await client.refused(stack.operator.limit("UpdateLimit", service.UpdateLimitRequest(limit=recipients)))
    assert error.reason == "LIMIT_TAKEN"
    # Connections at once and a period are two things to count.
    await make(stack, "at-once", limit_of("PROVIDER", "CONNECTION", 5, period=None))
    await make(stack, "a-period", limit_of("PROVIDER", "CONNECTION", 5))
    await make(stack, "shared", limit_of("ACCOUNT", "MESSAGE", 600), "")


async def test_more_limits_than_a_node_takes_are_refused(stack: ApiStack, client: Client) -> None:
    fill = """
        INSERT INTO postroad.limit_policies (account, limit_id, scope, subject, unit, amount, period_s)
        SELECT $1, 'limit-' || n, 2, 'accounts/acme/smtpCredentials/c' || n, 1, 5, 60 FROM generate_series(1, 200) n
    """
    for account, parent in (("acme", "accounts/acme"), (None, "")):
        await stack.as_superuser(fill, account)
        request = request_of("more", limit_of("ACCOUNT", "MESSAGE", 5), parent)
        error = await client.refused(stack.operator.limit("CreateLimit", request))
        assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "CONFIGURATION_INVALID")
        assert "at most 200" in error.text


async def test_a_stale_or_missing_etag_changes_nothing(stack: ApiStack, client: Client) -> None:
    made = await make(stack, "hourly", limit_of("ACCOUNT", "MESSAGE", 600))
    await stack.operator.limit("UpdateLimit", service.UpdateLimitRequest(limit=made))
    for call in (
        stack.operator.limit("UpdateLimit", service.UpdateLimitRequest(limit=made)),
        stack.operator.limit("DeleteLimit", service.DeleteLimitRequest(name=made.name, etag=made.etag)),
    ):
        error = await client.refused(call)
        assert (error.code, error.reason) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    error = await client.refused(stack.operator.limit("DeleteLimit", service.DeleteLimitRequest(name=made.name)))
    assert error.reason == "ETAG_REQUIRED"
    missing = service.DeleteLimitRequest(name="limits/none", etag=made.etag, allow_missing=True)
    await stack.operator.limit("DeleteLimit", missing)


async def test_a_request_id_gives_the_first_answer_again_and_a_rehearsal_leaves_nothing(
    stack: ApiStack, client: Client
) -> None:
    request = request_of("hourly", limit_of("ACCOUNT", "MESSAGE", 600), validate_only=True)
    assert (await stack.operator.limit("CreateLimit", request)).amount == 600
    assert await account_limits(stack) == ()
    request = request_of("hourly", limit_of("ACCOUNT", "MESSAGE", 600), request_id=str(uuid.uuid4()))
    first = await stack.operator.limit("CreateLimit", request)
    assert await stack.operator.limit("CreateLimit", request) == first


async def test_pages_of_limits_are_in_order_of_name(stack: ApiStack, client: Client) -> None:
    units = ("MESSAGE", "RECIPIENT", "BYTE")
    for limit_id, unit in zip("bca", units, strict=True):
        await make(stack, limit_id, limit_of("ACCOUNT", unit, 5))
    await make(stack, "shared", limit_of("ACCOUNT", "MESSAGE", 5), "")
    request = service.ListLimitsRequest(parent="accounts/acme", page_size=2)
    first = await client.limit("ListLimits", request)
    request.page_token = first.next_page_token
    second = await client.limit("ListLimits", request)
    names = [one.name.rpartition("/")[2] for page in (first, second) for one in page.limits]
    assert (names, second.next_page_token) == (["a", "b", "c"], "")
    shared = await stack.operator.limit("ListLimits", service.ListLimitsRequest(page_token=""))
    assert [one.name for one in shared.limits] == ["limits/shared"]


async def test_every_edit_has_an_audit_row(stack: ApiStack, client: Client) -> None:
    made = await make(stack, "hourly", limit_of("ACCOUNT", "MESSAGE", 600))
    made = await stack.operator.limit("UpdateLimit", service.UpdateLimitRequest(limit=made))
    await stack.operator.limit("DeleteLimit", service.DeleteLimitRequest(name=made.name, etag=made.etag))
    rows = await stack.as_superuser(
        "SELECT principal, action, account FROM postroad.audit_log"
        " WHERE table_name = 'limit_policies' ORDER BY audit_id"
    )
    assert [tuple(row) for row in rows] == [
        ("apiKeys/bootstrap", action, "acme") for action in ("INSERT", "UPDATE", "DELETE")
    ]


# --- who may what ----------------------------------------------------------------------------------------------------


async def test_an_account_reads_its_limits_and_changes_none(stack: ApiStack, client: Client) -> None:
    made = await make(stack, "hourly", limit_of("ACCOUNT", "MESSAGE", 600))
    assert (await client.limit("GetLimit", service.GetLimitRequest(name=made.name))).amount == 600
    limit = limit_of("ACCOUNT", "BYTE", 5)
    for call in (
        client.limit("CreateLimit", request_of("mine", limit)),
        client.limit("UpdateLimit", service.UpdateLimitRequest(limit=made)),
        client.limit("DeleteLimit", service.DeleteLimitRequest(name=made.name, etag=made.etag)),
    ):
        assert (await client.refused(call)).code is grpc.StatusCode.PERMISSION_DENIED


async def test_an_account_sees_no_limits_of_others_and_no_shared_ones_by_name(stack: ApiStack, client: Client) -> None:
    await stack.make_account("other")
    await make(stack, "hourly", limit_of("ACCOUNT", "MESSAGE", 600), "accounts/other")
    await make(stack, "shared", limit_of("ACCOUNT", "MESSAGE", 600), "")
    for request, method in (
        (service.GetLimitRequest(name="accounts/other/limits/hourly"), "GetLimit"),
        (service.GetLimitRequest(name="limits/shared"), "GetLimit"),
        (service.GetLimitRequest(name="limits/none"), "GetLimit"),
        (service.ListLimitsRequest(parent="accounts/other"), "ListLimits"),
        (service.ListLimitsRequest(), "ListLimits"),
        (service.ListEffectiveLimitsRequest(parent="accounts/other"), "ListEffectiveLimits"),
    ):
        assert (await client.refused(client.limit(method, request))).code is grpc.StatusCode.PERMISSION_DENIED


async def test_row_level_security_shows_an_account_the_shared_limits_that_speak_of_it(
    stack: ApiStack, client: Client
) -> None:
    await stack.make_account("acme-2")
    provider = await make_provider(stack, "relay", "")
    rows = {
        "everybody": limit_of("ACCOUNT", "MESSAGE", 5),
        "acme": limit_of("ACCOUNT", "MESSAGE", 5, subject="accounts/acme"),
        "acme-2": limit_of("ACCOUNT", "MESSAGE", 5, subject="accounts/acme-2"),
        "app": limit_of("CREDENTIAL", "MESSAGE", 5, subject=await make_credential(stack)),
        "relay": limit_of("PROVIDER", "MESSAGE", 5, subject=provider),
        "host": limit_of("DESTINATION", "CONNECTION", 5, subject="mx.example"),
        "address": limit_of("ADDRESS", "CONNECTION", 5, subject="192.0.2.1"),
    }
    for limit_id, limit in rows.items():
        await make(stack, limit_id, limit, "")
    async with stack.pool.acquire() as connection, connection.transaction():
        await connection.execute("SELECT set_config('postroad.account', 'acme', true)")
        seen = {row["limit_id"] for row in await connection.fetch("SELECT limit_id FROM postroad.limit_policies")}
    assert seen == {"everybody", "acme", "app", "relay"}
    async with stack.pool.acquire() as connection, connection.transaction():
        await connection.execute("SELECT set_config('postroad.account', '', true)")
        assert await connection.fetch("SELECT limit_id FROM postroad.limit_policies") == []


# --- what holds ------------------------------------------------------------------------------------------------------


async def effective(client: Client, account: str = "acme") -> list[tuple[str, str, str, int, int]]:
    request = service.ListEffectiveLimitsRequest(parent=f"accounts/{account}")
    found = await client.limit("ListEffectiveLimits", request)
    return [
        (
            one.name,
            pb.Limit.Scope.Name(one.scope).removeprefix("SCOPE_"),
            one.subject,
            one.amount,
            one.origin,
        )
        for one in found.limits
    ]


async def test_defaults_of_the_pool_hold_until_something_takes_their_place(stack: ApiStack, client: Client) -> None:
    address = ("", "ADDRESS", "", 10, pb.Limit.ORIGIN_DEFAULT)
    credentials = ("", "CREDENTIAL", "", 50_000, pb.Limit.ORIGIN_DEFAULT)
    assert await effective(client) == [("", "ACCOUNT", "", 100_000, pb.Limit.ORIGIN_DEFAULT), credentials, address]
    await make(stack, "all", limit_of("ACCOUNT", "MESSAGE", 700), "")
    assert await effective(client) == [
        ("limits/all", "ACCOUNT", "", 700, pb.Limit.ORIGIN_SHARED),
        credentials,
        address,
    ]
    await make(stack, "acme", limit_of("ACCOUNT", "MESSAGE", 800, subject="accounts/acme"), "")
    assert (await effective(client))[0][0] == "limits/acme"
    await make(stack, "mine", limit_of("ACCOUNT", "MESSAGE", 900))
    assert (await effective(client))[0][0] == "accounts/acme/limits/mine"
    # Another unit is another limit.
    await make(stack, "bytes", limit_of("ACCOUNT", "BYTE", 900))
    assert [one[0] for one in await effective(client)][:2] == [
        "accounts/acme/limits/mine",
        "accounts/acme/limits/bytes",
    ]
    # The other account still has the shared one.
    other = await stack.make_account("other")
    assert (await effective(other, "other"))[0] == ("limits/all", "ACCOUNT", "", 700, pb.Limit.ORIGIN_SHARED)


async def test_a_limit_of_one_credential_leaves_the_others_to_the_default(stack: ApiStack, client: Client) -> None:
    credential = await make_credential(stack)
    await make(stack, "app", limit_of("CREDENTIAL", "MESSAGE", 5, subject=credential))
    found = [one for one in await effective(client) if one[1] == "CREDENTIAL"]
    assert found == [
        ("", "CREDENTIAL", "", 50_000, pb.Limit.ORIGIN_DEFAULT),
        ("accounts/acme/limits/app", "CREDENTIAL", credential, 5, pb.Limit.ORIGIN_ACCOUNT),
    ]
    # The account's own word for all of its credentials goes before the shared one for one of them.
    await make(stack, "shared", limit_of("CREDENTIAL", "RECIPIENT", 5, subject=credential), "")
    await make(stack, "each", limit_of("CREDENTIAL", "RECIPIENT", 6))
    assert [one[0] for one in await effective(client) if one[3] in (5, 6)] == [
        "accounts/acme/limits/app",
        "accounts/acme/limits/each",
    ]


async def test_a_pool_without_a_default_shows_none(stack: ApiStack, client: Client) -> None:
    pool = await stack.operator.node("GetNodePool", node_service_pb2.GetNodePoolRequest(name="nodePools/default"))
    pool.submission_limits.address_connections_per_minute = 0
    pool.submission_limits.account_messages_per_hour = 5
    await stack.operator.node("UpdateNodePool", node_service_pb2.UpdateNodePoolRequest(node_pool=pool))
    assert [(one[1], one[3]) for one in await effective(client)] == [("ACCOUNT", 5), ("CREDENTIAL", 50_000)]


async def test_effective_limits_of_an_account_that_does_not_exist_are_not_found(stack: ApiStack) -> None:
    request = service.ListEffectiveLimitsRequest(parent="accounts/none")
    error = await stack.operator.refused(stack.operator.limit("ListEffectiveLimits", request))
    assert error.code is grpc.StatusCode.NOT_FOUND


async def test_without_redis_the_state_is_not_known_and_says_why(stack: ApiStack, client: Client) -> None:
    made = await make(stack, "hourly", limit_of("ACCOUNT", "MESSAGE", 600))
    state = (await client.limit("GetLimit", service.GetLimitRequest(name=made.name))).state
    assert (state.known, list(state.subjects)) == (False, [])
    assert "redis.url" in state.reason


# --- the account's share of delivery ---------------------------------------------------------------------------------


async def test_an_accounts_weight_is_in_its_bundle_and_operators_change_it(stack: ApiStack, client: Client) -> None:
    account = await client.account("GetAccount", account_service_pb2.GetAccountRequest(name="accounts/acme"))
    assert account.delivery_weight == 1
    assert decode_account(await bundle_of(stack, "accounts/acme")).delivery_weight == 1
    account.delivery_weight = 20
    error = await client.refused(
        client.account("UpdateAccount", account_service_pb2.UpdateAccountRequest(account=account))
    )
    assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, "FIELD_OPERATOR_ONLY")
    everything = account_service_pb2.UpdateAccountRequest(account=account, update_mask=FieldMask(paths=["*"]))
    assert (await client.refused(client.account("UpdateAccount", everything))).reason == "FIELD_OPERATOR_ONLY"
    changed = await stack.operator.account("UpdateAccount", account_service_pb2.UpdateAccountRequest(account=account))
    assert changed.delivery_weight == 20
    assert decode_account(await bundle_of(stack, "accounts/acme")).delivery_weight == 20


@pytest.mark.parametrize("weight", [-1, 101])
async def test_a_weight_out_of_its_limits_is_refused(stack: ApiStack, weight: int) -> None:
    request = account_service_pb2.CreateAccountRequest(
        account_id="acme", account=account_pb2.Account(delivery_weight=weight)
    )
    error = await stack.operator.refused(stack.operator.account("CreateAccount", request))
    assert (error.code, error.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["account.delivery_weight"])
