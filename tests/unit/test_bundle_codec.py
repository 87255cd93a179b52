"""Bundles as they travel: read whole, or refused with a reason; nothing is guessed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from dataplane.adapters.bundle_codec import (
    CodecError,
    check_bundle,
    decode_account,
    decode_denials,
    decode_networks,
    decode_settings,
    decode_shared_providers,
)
from dataplane.core.config import (
    Account,
    Credential,
    Denials,
    Endpoint,
    HeaderCondition,
    NodeSettings,
    RetryPolicy,
    Rule,
    SealedValue,
    SmtpProvider,
    Target,
    TlsPolicy,
)
from postroad.config.v1 import bundle_pb2 as pb
from postroad.config.v1.denials_pb2 import Denial, DenialSet

NAME = "accounts/demo"
UID = "6f9c2a0e-3c55-4f6e-9d0a-0b8f0c6f7a11"


def bundle(name: str, kind: pb.BundleKind.ValueType, content: Message | bytes, revision: int = 7) -> pb.Bundle:
    data = content if isinstance(content, bytes) else content.SerializeToString()
    return pb.Bundle(name=name, kind=kind, revision=revision, hash=hashlib.sha256(data).digest(), content=data)


def provider(name: str) -> pb.Provider:
    return pb.Provider(
        name=name,
        smtp=pb.SmtpProvider(
            endpoints=[pb.SmtpProvider.Endpoint(host="relay.example.net", port=465, implicit_tls=True)],
            tls_policy=pb.SmtpProvider.TLS_POLICY_REQUIRED_VERIFIED,
            username="user",
            password=pb.SealedValue(key_id="k", ciphertext=bytes(28)),
            max_connections=3,
            max_messages_per_connection=4,
        ),
    )


def account_content() -> pb.AccountBundle:
    return pb.AccountBundle(
        account=NAME,
        uid=UID,
        sender_domains=["example.com"],
        replicated=True,
        credentials=[
            pb.Credential(name=f"{NAME}/smtpCredentials/app", secret_sha256=bytes(32)),
            pb.Credential(
                name=f"{NAME}/smtpCredentials/old",
                secret_sha256=bytes(32),
                expire_time=Timestamp(seconds=5, nanos=7_000_000),
            ),
        ],
        providers=[provider(f"{NAME}/providers/relay")],
        rules=[
            pb.Rule(
                name=f"{NAME}/routingRules/default",
                priority=3,
                sender_patterns=["@example.com"],
                recipient_patterns=["*.org"],
                headers=[pb.Rule.HeaderCondition(name="subject", pattern="*x*")],
                min_size_bytes=1,
                max_size_bytes=2,
                targets=[pb.Rule.Target(provider="providers/a", weight=5)],
            )
        ],
        retry_policy=pb.RetryPolicy(
            base=Duration(seconds=1, nanos=500_000_000),
            factor=2.0,
            cap=Duration(seconds=60),
            lifetime=Duration(seconds=600),
        ),
    )


def account_bundle(change: Callable[[pb.AccountBundle], object] | None = None) -> pb.Bundle:
    content = account_content()
    if change is not None:
        change(content)
    return bundle(NAME, pb.BUNDLE_KIND_ACCOUNT, content)


def test_an_account_is_read_whole() -> None:
    relay = f"{NAME}/providers/relay"
    app, old = f"{NAME}/smtpCredentials/app", f"{NAME}/smtpCredentials/old"
    assert decode_account(account_bundle()) == Account(
        name=NAME,
        uid=UID,
        revision=7,
        sender_domains=("example.com",),
        replicated=True,
        credentials={app: Credential(app, bytes(32)), old: Credential(old, bytes(32), 5_007)},
        providers={
            relay: SmtpProvider(
                name=relay,
                account=NAME,
                endpoints=(Endpoint("relay.example.net", 465, implicit_tls=True),),
                tls_policy=TlsPolicy.REQUIRED_VERIFIED,
                username="user",
                password=SealedValue("k", bytes(28)),
                max_connections=3,
                max_messages_per_connection=4,
            )
        },
        rules=(
            Rule(
                name=f"{NAME}/routingRules/default",
                priority=3,
                targets=(Target("providers/a", "", 5),),
                sender_patterns=("@example.com",),
                recipient_patterns=("*.org",),
                headers=(HeaderCondition("subject", "*x*"),),
                min_size_bytes=1,
                max_size_bytes=2,
            ),
        ),
        retry_policy=RetryPolicy(1.5, 2.0, 60.0, 600.0),
    )
    assert check_bundle(account_bundle()) == []


def test_an_expiry_before_1970_does_not_become_never() -> None:
    read = decode_account(
        account_bundle(lambda content: content.credentials[1].expire_time.CopyFrom(Timestamp(seconds=-9)))
    )
    assert read.credentials[f"{NAME}/smtpCredentials/old"].expire_ms == 1


def test_the_numbers_of_tls_policies_are_those_of_the_contract() -> None:
    ours = {f"TLS_POLICY_{policy.name}": int(policy) for policy in TlsPolicy}
    theirs = dict(pb.SmtpProvider.TlsPolicy.items())
    del theirs["TLS_POLICY_UNSPECIFIED"]
    assert ours == theirs


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content.providers[0].ClearField("kind"), "kind"),
        (lambda content: setattr(content.providers[0].smtp, "tls_policy", 0), "TLS policy"),
        (lambda content: setattr(content.providers[0].smtp, "tls_policy", 99), "TLS policy"),
        (lambda content: content.ClearField("retry_policy"), "retry policy"),
        (lambda content: content.retry_policy.ClearField("base"), "base"),
        (lambda content: content.retry_policy.ClearField("cap"), "cap"),
        (lambda content: content.retry_policy.ClearField("lifetime"), "lifetime"),
        (lambda content: content.credentials.add(name=content.credentials[0].name), "twice"),
        (lambda content: content.providers.add().CopyFrom(content.providers[0]), "twice"),
        (lambda content: setattr(content, "account", "accounts/other"), "another account"),
        (lambda content: content.MergeFromString(b"\xfa\x3e\x01x"), "does not know"),
        (lambda content: content.rules[0].MergeFromString(b"\xfa\x3e\x01x"), "does not know"),
    ],
)
def test_what_is_missing_or_unknown_is_refused(change: Callable[[pb.AccountBundle], object], reason: str) -> None:
    changed = account_bundle(change)
    with pytest.raises(CodecError, match=reason):
        decode_account(changed)
    assert [problem.field for problem in check_bundle(changed)] == ["content"]


def test_content_that_does_not_have_its_hash_is_refused() -> None:
    changed = account_bundle()
    changed.hash = bytes(32)
    with pytest.raises(CodecError, match="hash"):
        decode_account(changed)


def test_content_that_is_torn_is_refused() -> None:
    with pytest.raises(CodecError, match="parsed"):
        decode_account(bundle(NAME, pb.BUNDLE_KIND_ACCOUNT, account_content().SerializeToString()[:-3]))


def test_a_bundle_of_another_kind_is_refused() -> None:
    with pytest.raises(CodecError, match="kind"):
        decode_account(bundle(NAME, pb.BUNDLE_KIND_NETWORKS, account_content()))
    for kind in (0, 99):
        unknown = account_bundle()
        unknown.kind = kind  # type: ignore[assignment] # what a newer sender might send
        assert [problem.field for problem in check_bundle(unknown)] == ["kind"]


def test_limits_are_looked_at_by_the_check() -> None:
    changed = account_bundle(lambda content: content.sender_domains.append("NOT good"))
    assert [problem.field for problem in check_bundle(changed)] == ["sender_domains[1]"]


def test_shared_providers_are_read_and_checked() -> None:
    good = bundle(
        "shared/providers",
        pb.BUNDLE_KIND_SHARED_PROVIDERS,
        pb.SharedProvidersBundle(providers=[provider("providers/a")]),
    )
    assert decode_shared_providers(good)["providers/a"].account == ""
    assert check_bundle(good) == []
    foreign = pb.SharedProvidersBundle(providers=[provider(f"{NAME}/providers/a")])
    problems = check_bundle(bundle("shared/providers", pb.BUNDLE_KIND_SHARED_PROVIDERS, foreign))
    assert [problem.field for problem in problems] == [f'providers["{NAME}/providers/a"].name']
    with pytest.raises(CodecError):
        decode_shared_providers(bundle("shared/other", pb.BUNDLE_KIND_SHARED_PROVIDERS, foreign))


def test_networks_are_read_and_checked() -> None:
    content = pb.NetworksBundle(bindings=[pb.NetworksBundle.Binding(network="10.0.0.0/8", account=NAME)])
    good = bundle("pools/default/networks", pb.BUNDLE_KIND_NETWORKS, content)
    assert decode_networks(good) == (("10.0.0.0/8", NAME),)
    assert check_bundle(good) == []
    content.bindings[0].network = "0.0.0.0/0"
    assert check_bundle(bundle("pools/default/networks", pb.BUNDLE_KIND_NETWORKS, content)) != []


def test_settings_are_read_and_checked() -> None:
    content = pb.NodeSettingsBundle(
        account_messages_per_hour=1,
        credential_messages_per_hour=2,
        address_connections_per_minute=3,
        max_message_bytes=4_096,
        max_recipients=5,
        node_count=6,
    )
    good = bundle("pools/default/settings", pb.BUNDLE_KIND_NODE_SETTINGS, content)
    assert decode_settings(good) == NodeSettings(1, 2, 3, 4_096, 5, 6)
    assert check_bundle(good) == []
    content.node_count = 0
    assert check_bundle(bundle("pools/default/settings", pb.BUNDLE_KIND_NODE_SETTINGS, content)) != []


@pytest.mark.parametrize(
    "name", ["settings", "pools/settings", "pools//settings", "pools/a/networks", "pools/a/b/settings"]
)
def test_a_pools_bundle_is_named_by_its_pool(name: str) -> None:
    with pytest.raises(CodecError, match="named"):
        decode_settings(bundle(name, pb.BUNDLE_KIND_NODE_SETTINGS, pb.NodeSettingsBundle()))


def test_denials_are_read() -> None:
    credential = f"{NAME}/smtpCredentials/app"
    denials = DenialSet(
        version=9,
        denials=[
            Denial(account=NAME),
            Denial(credential=credential, since_time=Timestamp(seconds=4), expire_time=Timestamp(seconds=5)),
            Denial(provider="providers/a", expire_time=Timestamp(seconds=0)),
            Denial(destination="destinations/*.example.net"),
        ],
    )
    assert decode_denials(denials) == Denials(
        9, {NAME: 0}, {credential: 5_000}, {"providers/a": 1}, {credential: 4_000}, {"destinations/*.example.net": 0}
    )


def test_of_two_denials_of_one_subject_the_wider_counts() -> None:
    credential = f"{NAME}/smtpCredentials/app"
    short = Denial(credential=credential, since_time=Timestamp(seconds=4), expire_time=Timestamp(seconds=5))
    long = Denial(credential=credential, since_time=Timestamp(seconds=8), expire_time=Timestamp(seconds=9))
    ever = Denial(credential=credential, since_time=Timestamp(seconds=9))
    for denials, expire_ms in (([short, long], 9_000), ([long, short], 9_000), ([ever, long], 0), ([long, ever], 0)):
        read = decode_denials(DenialSet(version=1, denials=denials))
        assert read.credentials == {credential: expire_ms}
        since = min(denial.since_time.seconds for denial in denials) * 1_000
        assert read.credentials_since == {credential: since}


@pytest.mark.parametrize("denial", [Denial(), Denial(account="")])
def test_a_denial_without_a_subject_refuses_the_set(denial: Denial) -> None:
    with pytest.raises(CodecError):
        decode_denials(DenialSet(version=1, denials=[denial]))


def test_a_denial_of_an_unknown_subject_refuses_the_set() -> None:
    newer = Denial()
    newer.MergeFromString(b"\xfa\x3e\x01x")
    with pytest.raises(CodecError, match="does not know"):
        decode_denials(DenialSet(version=1, denials=[newer]))
