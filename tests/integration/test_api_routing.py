from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from ipaddress import ip_network
from typing import Any

import grpc
import pytest
from aiosmtpd import smtp as aiosmtpd_smtp
from google.protobuf.field_mask_pb2 import FieldMask

from controlplane.domain.hosts import HostPolicy
from controlplane.services import compile as compiling
from dataplane.adapters.sealing import KeyRing
from dataplane.core.config import SealedValue, seal_context
from postroad.config.v1 import bundle_pb2
from postroad.control.v1 import account_service_pb2, provider_pb2, provider_service_pb2
from postroad.control.v1 import routing_rule_pb2 as pb
from postroad.control.v1 import routing_rule_service_pb2 as service
from support.api import ApiStack, Client, running_api
from support.databases import Database

Smtp = provider_pb2.SmtpProvider


@pytest.fixture
async def stack(migrated_database: Database) -> AsyncIterator[ApiStack]:
    async with running_api(migrated_database) as running:
        yield running


@pytest.fixture
async def client(stack: ApiStack) -> Client:
    return await stack.make_account("acme")


def provider_request(
    provider: str, parent: str = "accounts/acme", host: str = "relay.example.com", **smtp: Any
) -> provider_service_pb2.CreateProviderRequest:
    return provider_service_pb2.CreateProviderRequest(
        parent=parent,
        provider_id=provider,
        provider=provider_pb2.Provider(smtp=Smtp(endpoints=[Smtp.Endpoint(host=host)], **smtp)),
    )


def rule_request(rule: str, *providers: str, parent: str = "accounts/acme", **fields: Any) -> Any:
    targets = [pb.RoutingRule.Target(provider=provider) for provider in providers]
    return service.CreateRoutingRuleRequest(
        parent=parent, routing_rule_id=rule, routing_rule=pb.RoutingRule(targets=targets, **fields)
    )


async def bundle_of(stack: ApiStack, name: str) -> bytes:
    (row,) = await stack.as_superuser("SELECT content FROM postroad.config_bundles WHERE bundle = $1", name)
    content: bytes = row["content"]
    return content


async def account_bundle(stack: ApiStack) -> bundle_pb2.AccountBundle:
    return bundle_pb2.AccountBundle.FromString(await bundle_of(stack, "accounts/acme"))


async def pool_keys(stack: ApiStack) -> KeyRing:
    from controlplane.adapters.sealing import Keyring, KeyringSealer

    sealer = KeyringSealer(Keyring({"k1": bytes(range(32))}))
    rows = await stack.as_superuser("SELECT * FROM postroad.pool_keys")
    return KeyRing(
        {row["key_id"]: sealer.unseal_pool_key(row["node_pool"], row["key_id"], row["key_sealed"]) for row in rows}
    )


async def test_a_provider_has_its_defaults_filled_in(client: Client) -> None:
    made = await client.provider("CreateProvider", provider_request("relay"))
    assert made.smtp.endpoints[0].port == 587
    assert made.smtp.tls_policy == Smtp.TLS_POLICY_OPPORTUNISTIC
    assert (made.smtp.max_connections, made.smtp.max_messages_per_connection) == (20, 100)


async def test_a_password_is_sealed_at_rest_and_for_the_pool_and_never_returned(
    stack: ApiStack, client: Client
) -> None:
    made = await client.provider("CreateProvider", provider_request("relay", username="user", password="hunter2!"))
    assert (made.smtp.password, made.smtp.password_set) == ("", True)
    assert made.smtp.tls_policy == Smtp.TLS_POLICY_REQUIRED_VERIFIED
    dump = await stack.as_superuser("SELECT p::text AS text FROM postroad.providers p")
    assert b"hunter2!".hex() not in dump[0]["text"]
    (provider,) = (await account_bundle(stack)).providers
    sealed = SealedValue(provider.smtp.password.key_id, provider.smtp.password.ciphertext)
    context = seal_context("accounts/acme", "accounts/acme/providers/relay", "password")
    assert (await pool_keys(stack)).unseal(sealed, context) == b"hunter2!"


async def test_an_edit_beside_the_password_leaves_its_sealed_bytes_alone(stack: ApiStack, client: Client) -> None:
    made = await client.provider("CreateProvider", provider_request("relay", username="user", password="hunter2!"))
    before = (await account_bundle(stack)).providers[0].smtp.password.ciphertext
    made.smtp.max_connections = 3
    made = await client.provider("UpdateProvider", provider_service_pb2.UpdateProviderRequest(provider=made))
    assert (made.smtp.max_connections, made.smtp.password_set) == (3, True)
    after = (await account_bundle(stack)).providers[0].smtp
    assert (after.password.ciphertext, after.max_connections) == (before, 3)
    changed = provider_pb2.Provider(name=made.name, etag=made.etag, smtp=Smtp(password="another"))
    await client.provider("UpdateProvider", provider_service_pb2.UpdateProviderRequest(provider=changed))
    assert (await account_bundle(stack)).providers[0].smtp.password.ciphertext != before


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"username": "user"}, "provider.smtp.password"),
        ({"password": "secret"}, "provider.smtp.password"),
        ({"username": "u", "password": "p", "tls_policy": 2}, "provider.smtp.tls_policy"),
        ({"max_connections": 1_001}, "provider.smtp.max_connections"),
        ({"tls_policy": 9}, "provider.smtp.tls_policy"),
        ({"ca_pem": "no certificate"}, "provider.smtp.ca_pem"),
        ({"host": "10.0.0.1"}, "provider.smtp.endpoints[0].host"),
        ({"host": "[::1]"}, "provider.smtp.endpoints[0].host"),
        ({"host": "::ffff:10.0.0.1"}, "provider.smtp.endpoints[0].host"),
        ({"host": "169.254.169.254"}, "provider.smtp.endpoints[0].host"),
        ({"host": "a b"}, "provider.smtp.endpoints[0].host"),
    ],
)
async def test_a_bad_provider_is_refused_with_the_path_of_the_field(
    client: Client, fields: dict[str, Any], path: str
) -> None:
    error = await client.refused(client.provider("CreateProvider", provider_request("relay", **fields)))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.fields == [path]


async def test_a_shared_provider_is_named_by_accounts_without_seeing_its_login(stack: ApiStack, client: Client) -> None:
    request = provider_request("shared", parent="", username="user", password="hunter2!")
    made = await stack.operator.provider("CreateProvider", request)
    assert made.name == "providers/shared"
    seen = await client.provider("GetProvider", provider_service_pb2.GetProviderRequest(name=made.name))
    assert (seen.smtp.username, seen.smtp.password_set) == ("", False)
    content = bundle_pb2.SharedProvidersBundle.FromString(await bundle_of(stack, "shared/providers"))
    assert [one.name for one in content.providers] == ["providers/shared"]
    rule = await client.rule("CreateRoutingRule", rule_request("all", "providers/shared"))
    assert [target.provider for target in rule.targets] == ["providers/shared"]
    error = await client.refused(client.provider("CreateProvider", provider_request("mine", parent="")))
    assert error.reason == "OPERATOR_ONLY"


async def test_a_provider_that_a_rule_names_cannot_be_deleted(client: Client) -> None:
    made = await client.provider("CreateProvider", provider_request("relay"))
    rule = await client.rule("CreateRoutingRule", rule_request("all", made.name))
    delete = provider_service_pb2.DeleteProviderRequest(name=made.name, etag=made.etag)
    error = await client.refused(client.provider("DeleteProvider", delete))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PROVIDER_IN_USE")
    await client.rule("DeleteRoutingRule", service.DeleteRoutingRuleRequest(name=rule.name, etag=rule.etag))
    await client.provider("DeleteProvider", delete)


async def test_an_account_is_deleted_with_its_rules_and_providers(stack: ApiStack, client: Client) -> None:
    made = await client.provider("CreateProvider", provider_request("relay"))
    await client.rule("CreateRoutingRule", rule_request("all", made.name))
    account = await client.account("GetAccount", account_service_pb2.GetAccountRequest(name="accounts/acme"))
    stale = account_service_pb2.DeleteAccountRequest(name=account.name, etag=f'{account.etag[:-1]}9"')
    assert (await stack.operator.refused(stack.operator.account("DeleteAccount", stale))).reason == "ETAG_MISMATCH"
    assert await stack.as_superuser("SELECT 1 FROM postroad.routing_rules")
    delete = account_service_pb2.DeleteAccountRequest(name=account.name, etag=account.etag)
    await stack.operator.account("DeleteAccount", delete)
    assert await stack.as_superuser("SELECT account FROM postroad.routing_rules") == []
    assert await stack.as_superuser("SELECT account FROM postroad.providers") == []
    assert await stack.as_superuser("SELECT account FROM postroad.accounts") == []


async def test_suspending_a_provider_is_a_denial_and_verify_says_so(stack: ApiStack, client: Client) -> None:
    made = await client.provider("CreateProvider", provider_request("relay"))
    request = provider_service_pb2.SuspendProviderRequest(name=made.name, reason="costs")
    suspended = await client.provider("SuspendProvider", request)
    assert suspended.state == provider_pb2.Provider.STATE_SUSPENDED
    (denial,) = await stack.as_superuser("SELECT denial, kind FROM postroad.denials")
    assert tuple(denial) == (made.name, 3)
    verify = provider_service_pb2.VerifyProviderRequest(name=made.name)
    error = await client.refused(client.provider("VerifyProvider", verify))
    assert error.reason == "PROVIDER_SUSPENDED"
    await client.provider("ResumeProvider", provider_service_pb2.ResumeProviderRequest(name=made.name))
    assert await stack.as_superuser("SELECT 1 FROM postroad.denials") == []


@pytest.fixture
async def smtp_port() -> AsyncIterator[int]:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: aiosmtpd_smtp.SMTP(object(), enable_SMTPUTF8=False), "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()


async def test_verify_connects_as_the_policy_says(client: Client, smtp_port: int) -> None:
    request = provider_request("relay", host="127.0.0.1")
    request.provider.smtp.endpoints[0].port = smtp_port
    made = await client.provider("CreateProvider", request)
    verify = provider_service_pb2.VerifyProviderRequest(name=made.name)
    seen = await client.provider("VerifyProvider", verify)
    assert (seen.ok, seen.tls_version) == (True, "")
    made.smtp.tls_policy = Smtp.TLS_POLICY_REQUIRED
    await client.provider("UpdateProvider", provider_service_pb2.UpdateProviderRequest(provider=made))
    seen = await client.provider("VerifyProvider", verify)
    assert not seen.ok
    assert "STARTTLS" in seen.detail


async def test_verify_refuses_a_name_that_leads_to_an_inner_address(
    migrated_database: Database, smtp_port: int
) -> None:
    async with running_api(migrated_database, hosts=HostPolicy([ip_network("10.0.0.0/8")])) as stack:
        client = await stack.make_account("acme")
        await client.provider("CreateProvider", provider_request("relay"))
        # What DNS would answer tomorrow: the name passed when it was configured.
        await stack.as_superuser(
            "UPDATE postroad.providers SET endpoints = $1",
            f'[{{"host": "localhost", "port": {smtp_port}, "implicit_tls": false}}]',
        )
        verify = provider_service_pb2.VerifyProviderRequest(name="accounts/acme/providers/relay")
        seen = await client.provider("VerifyProvider", verify)
        assert not seen.ok
        assert "not allowed" in seen.detail
        assert "127.0.0.1" not in seen.detail


async def test_rules_are_compiled_in_order_and_disabled_ones_left_out(stack: ApiStack, client: Client) -> None:
    await client.provider("CreateProvider", provider_request("relay"))
    target = "accounts/acme/providers/relay"
    await client.rule("CreateRoutingRule", rule_request("late", target, priority=20))
    await client.rule(
        "CreateRoutingRule", rule_request("early", target, priority=10, recipient_patterns=["@Example.COM"])
    )
    await client.rule("CreateRoutingRule", rule_request("off", target, priority=5, disabled=True))
    rules = (await account_bundle(stack)).rules
    assert [rule.name.rsplit("/", 1)[1] for rule in rules] == ["early", "late"]
    assert list(rules[0].recipient_patterns) == ["@example.com"]
    listed = await client.rule("ListRoutingRules", service.ListRoutingRulesRequest(parent="accounts/acme", page_size=2))
    assert [rule.name.rsplit("/", 1)[1] for rule in listed.routing_rules] == ["off", "early"]
    more = service.ListRoutingRulesRequest(parent="accounts/acme", page_token=listed.next_page_token)
    assert [rule.priority for rule in (await client.rule("ListRoutingRules", more)).routing_rules] == [20]


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"recipient_patterns": ["@ok.example", "/.*/"]}, "routing_rule.recipient_patterns[1]"),
        ({"priority": 1_000_001}, "routing_rule.priority"),
        ({"headers": [pb.RoutingRule.HeaderCondition(name="Bcc", pattern="*")]}, "routing_rule.headers[0].name"),
        ({"min_size_bytes": 9, "max_size_bytes": 5}, "routing_rule.max_size_bytes"),
    ],
)
async def test_a_bad_rule_is_refused_with_the_path_and_changes_nothing(
    stack: ApiStack, client: Client, fields: dict[str, Any], path: str
) -> None:
    await client.provider("CreateProvider", provider_request("relay"))
    before = await bundle_of(stack, "accounts/acme")
    request = rule_request("bad", "accounts/acme/providers/relay", **fields)
    error = await client.refused(client.rule("CreateRoutingRule", request))
    assert (error.code, error.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [path])
    assert await bundle_of(stack, "accounts/acme") == before


async def test_a_rule_names_only_providers_that_exist_for_its_account(stack: ApiStack, client: Client) -> None:
    missing = rule_request("all", "accounts/acme/providers/nowhere")
    error = await client.refused(client.rule("CreateRoutingRule", missing))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PROVIDER_MISSING")
    other = await stack.make_account("other")
    await other.provider("CreateProvider", provider_request("relay", parent="accounts/other"))
    foreign = rule_request("all", "accounts/other/providers/relay")
    error = await client.refused(client.rule("CreateRoutingRule", foreign))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_rule_is_updated_by_mask_and_guarded_by_its_etag(stack: ApiStack, client: Client) -> None:
    for name in ("one", "two"):
        await client.provider("CreateProvider", provider_request(name))
    made = await client.rule("CreateRoutingRule", rule_request("all", "accounts/acme/providers/one", priority=7))
    sent = pb.RoutingRule(
        name=made.name,
        etag=made.etag,
        targets=[pb.RoutingRule.Target(provider="accounts/acme/providers/two", weight=3)],
    )
    update = service.UpdateRoutingRuleRequest(routing_rule=sent, update_mask=FieldMask(paths=["targets"]))
    changed = await client.rule("UpdateRoutingRule", update)
    assert (changed.priority, changed.targets[0].provider) == (7, "accounts/acme/providers/two")
    error = await client.refused(client.rule("UpdateRoutingRule", update))
    assert error.code is grpc.StatusCode.ABORTED
    (rule,) = (await account_bundle(stack)).rules
    assert (rule.targets[0].provider, rule.targets[0].weight) == ("accounts/acme/providers/two", 3)


async def test_two_edits_at_a_time_both_reach_the_bundle(stack: ApiStack, client: Client) -> None:
    await client.provider("CreateProvider", provider_request("relay"))
    target = "accounts/acme/providers/relay"
    await asyncio.gather(
        *(client.rule("CreateRoutingRule", rule_request(f"rule-{number}", target)) for number in range(8))
    )
    assert len((await account_bundle(stack)).rules) == 8


async def test_an_account_cannot_grow_beyond_what_nodes_can_be_sent(
    client: Client, stack: ApiStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    await client.provider("CreateProvider", provider_request("first"))
    before = await bundle_of(stack, "accounts/acme")
    monkeypatch.setattr(compiling, "MAX_BUNDLE_BYTES", len(before) + 50)

    error = await client.refused(client.provider("CreateProvider", provider_request("second")))

    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "CONFIGURATION_INVALID")
    assert error.fields == ["provider"]
    assert await bundle_of(stack, "accounts/acme") == before
