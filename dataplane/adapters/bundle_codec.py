"""Bundles and denials as they travel, decoded into the values of `dataplane.core.config`.

Contract. Each `decode_…` takes a Bundle, checks its hash, its kind and that its name fits what is in it, and
returns plain values; `decode_denials` does so for a DenialSet. CodecError says what could not be read, in words fit
to be reported back; nothing is guessed: an unknown field, enum value or subject, a missing oneof, message or name,
and a name that is there twice are errors. Limits and patterns are not looked at here: `check_bundle` adds
`dataplane.core.config.validate_…` and returns the problems of both kinds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import TypeVar, assert_never

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.protobuf.timestamp_pb2 import Timestamp

from dataplane.core.config import (
    Account,
    Credential,
    Denials,
    Endpoint,
    HeaderCondition,
    NodeSettings,
    Problem,
    RetryPolicy,
    Rule,
    SealedValue,
    SmtpProvider,
    Target,
    TlsPolicy,
    validate_account,
    validate_networks,
    validate_provider,
    validate_settings,
)
from dataplane.core.limits import Limit, LimitScope, LimitUnit
from postroad.config.v1 import bundle_pb2 as pb
from postroad.config.v1.denials_pb2 import DenialSet

SHARED_PROVIDERS_NAME = "shared/providers"

_Content = TypeVar("_Content", bound=Message)
_Named = TypeVar("_Named", Credential, SmtpProvider)


class CodecError(ValueError):
    """What arrived cannot be read by this version, or was changed on its way."""


def decode_account(bundle: pb.Bundle) -> Account:
    """Return the account of a bundle of kind ACCOUNT. CodecError."""
    content = _content(bundle, pb.BUNDLE_KIND_ACCOUNT, pb.AccountBundle())
    if content.account != bundle.name:
        raise CodecError("the bundle holds another account than its name says")
    if not content.HasField("retry_policy"):
        raise CodecError("the account has no retry policy")
    return Account(
        name=content.account,
        uid=content.uid,
        revision=bundle.revision,
        sender_domains=tuple(content.sender_domains),
        replicated=content.replicated,
        credentials=_by_name(_credential(credential) for credential in content.credentials),
        providers=_by_name(_provider(provider, content.account) for provider in content.providers),
        rules=tuple([_rule(rule) for rule in content.rules]),
        retry_policy=_retry_policy(content.retry_policy),
        limits=tuple([_limit(limit) for limit in content.limits]),
        delivery_weight=content.delivery_weight or 1,
    )


def decode_shared_providers(bundle: pb.Bundle) -> dict[str, SmtpProvider]:
    """Return the providers by name of a bundle of kind SHARED_PROVIDERS. CodecError."""
    content = _content(bundle, pb.BUNDLE_KIND_SHARED_PROVIDERS, pb.SharedProvidersBundle())
    if bundle.name != SHARED_PROVIDERS_NAME:
        raise CodecError(f"a bundle of shared providers is named {SHARED_PROVIDERS_NAME}")
    return _by_name(_provider(provider, "") for provider in content.providers)


def decode_networks(bundle: pb.Bundle) -> tuple[tuple[str, str], ...]:
    """Return pairs of network and account name of a bundle of kind NETWORKS. CodecError."""
    content = _content(bundle, pb.BUNDLE_KIND_NETWORKS, pb.NetworksBundle())
    _check_pool_name(bundle.name, "networks")
    return tuple([(binding.network, binding.account) for binding in content.bindings])


def decode_settings(bundle: pb.Bundle) -> NodeSettings:
    """Return the settings of a bundle of kind NODE_SETTINGS. CodecError."""
    content = _content(bundle, pb.BUNDLE_KIND_NODE_SETTINGS, pb.NodeSettingsBundle())
    _check_pool_name(bundle.name, "settings")
    return NodeSettings(
        account_messages_per_hour=content.account_messages_per_hour,
        credential_messages_per_hour=content.credential_messages_per_hour,
        address_connections_per_minute=content.address_connections_per_minute,
        max_message_bytes=content.max_message_bytes,
        max_recipients=content.max_recipients,
        node_count=content.node_count,
        limits=tuple([_limit(limit) for limit in content.limits]),
        max_connections=content.max_connections,
        max_connections_per_address=content.max_connections_per_address,
        log_level=content.log_level,
    )


def decode_denials(denials: DenialSet) -> Denials:
    """Return the set. CodecError; of two denials of one subject the wider counts, in time and in since when."""
    _refuse_unknown(denials)
    accounts: dict[str, int] = {}
    credentials: dict[str, int] = {}
    providers: dict[str, int] = {}
    since: dict[str, int] = {}
    destinations: dict[str, int] = {}
    for denial in denials.denials:
        expire_ms = _expire_ms(denial.expire_time) if denial.HasField("expire_time") else 0
        match denial.WhichOneof("subject"):
            case "account":
                _deny(accounts, denial.account, expire_ms)
            case "credential":
                _deny(credentials, denial.credential, expire_ms)
                since_ms = _milliseconds(denial.since_time)
                since[denial.credential] = min(since.get(denial.credential, since_ms), since_ms)
            case "provider":
                _deny(providers, denial.provider, expire_ms)
            case "destination":
                _deny(destinations, denial.destination, expire_ms)
            case None:
                raise CodecError("a denial has no subject")
            case other:
                assert_never(other)
    return Denials(denials.version, accounts, credentials, providers, since, destinations)


def check_bundle(bundle: pb.Bundle) -> list[Problem]:
    """Return everything that is wrong with a bundle of any kind; nothing raises."""
    try:
        check = _CHECKS[bundle.kind]
    except KeyError:
        return [Problem("kind", f"{bundle.kind} is not known to this version")]
    try:
        return check(bundle)
    except CodecError as error:
        return [Problem("content", str(error))]


def _check_shared_providers(bundle: pb.Bundle) -> list[Problem]:
    return [
        Problem(f'providers["{name}"].{problem.field}', problem.description)
        for name, provider in decode_shared_providers(bundle).items()
        for problem in validate_provider(provider)
    ]


_CHECKS: dict[int, Callable[[pb.Bundle], list[Problem]]] = {
    pb.BUNDLE_KIND_ACCOUNT: lambda bundle: validate_account(decode_account(bundle)),
    pb.BUNDLE_KIND_SHARED_PROVIDERS: _check_shared_providers,
    pb.BUNDLE_KIND_NETWORKS: lambda bundle: validate_networks(decode_networks(bundle)),
    pb.BUNDLE_KIND_NODE_SETTINGS: lambda bundle: validate_settings(decode_settings(bundle)),
}


def _content(bundle: pb.Bundle, kind: pb.BundleKind.ValueType, content: _Content) -> _Content:
    """Return `content` filled from the bundle, whose hash and kind are checked."""
    if bundle.kind != kind:
        raise CodecError(f"the bundle's kind is not {pb.BundleKind.Name(kind)}")
    if hashlib.sha256(bundle.content).digest() != bundle.hash:
        raise CodecError("the content does not have the hash that the bundle states")
    try:
        content.ParseFromString(bundle.content)
    except DecodeError as error:
        raise CodecError("the content cannot be parsed") from error
    _refuse_unknown(content)
    return content


def _refuse_unknown(message: Message) -> None:
    """A field that this version does not know may be a restriction: refuse rather than overlook it."""
    size_bytes = message.ByteSize()
    known = type(message)()
    known.CopyFrom(message)
    known.DiscardUnknownFields()
    if known.ByteSize() != size_bytes:
        raise CodecError("the content has fields that this version does not know")


def _check_pool_name(name: str, last: str) -> None:
    parts = name.split("/")
    if len(parts) != 3 or parts[0] != "pools" or not parts[1] or parts[2] != last:
        raise CodecError(f"the bundle must be named pools/{{pool}}/{last}")


def _by_name(values: Iterable[_Named]) -> dict[str, _Named]:
    found: dict[str, _Named] = {}
    for value in values:
        if value.name in found:
            raise CodecError(f"{value.name} is there twice")
        found[value.name] = value
    return found


def _credential(credential: pb.Credential) -> Credential:
    expire_ms = _expire_ms(credential.expire_time) if credential.HasField("expire_time") else 0
    return Credential(credential.name, credential.secret_sha256, expire_ms)


def _provider(provider: pb.Provider, account: str) -> SmtpProvider:
    if provider.WhichOneof("kind") is None:
        raise CodecError(f"{provider.name} has no kind")
    smtp = provider.smtp
    try:
        tls_policy = TlsPolicy(smtp.tls_policy)
    except ValueError as error:
        raise CodecError(f"{provider.name} has a TLS policy that is not known to this version") from error
    return SmtpProvider(
        name=provider.name,
        account=account,
        endpoints=tuple([Endpoint(each.host, each.port, each.implicit_tls) for each in smtp.endpoints]),
        tls_policy=tls_policy,
        ca_pem=smtp.ca_pem,
        username=smtp.username,
        password=SealedValue(smtp.password.key_id, smtp.password.ciphertext) if smtp.HasField("password") else None,
        max_connections=smtp.max_connections,
        max_messages_per_connection=smtp.max_messages_per_connection,
    )


def _rule(rule: pb.Rule) -> Rule:
    return Rule(
        name=rule.name,
        priority=rule.priority,
        targets=tuple([Target(each.provider, each.egress_source, each.weight) for each in rule.targets]),
        sender_patterns=tuple(rule.sender_patterns),
        recipient_patterns=tuple(rule.recipient_patterns),
        headers=tuple([HeaderCondition(each.name, each.pattern) for each in rule.headers]),
        min_size_bytes=rule.min_size_bytes,
        max_size_bytes=rule.max_size_bytes,
    )


def _limit(limit: pb.Limit) -> Limit:
    try:
        scope, unit = LimitScope(limit.scope), LimitUnit(limit.unit)
    except ValueError as error:
        raise CodecError(f"{limit.name} has a scope or unit that is not known to this version") from error
    return Limit(
        name=limit.name,
        scope=scope,
        unit=unit,
        amount=limit.amount,
        period_s=_seconds(limit.period),
        burst=limit.burst,
        subject=limit.subject,
    )


def _retry_policy(policy: pb.RetryPolicy) -> RetryPolicy:
    for name in ("base", "cap", "lifetime"):
        if not policy.HasField(name):
            raise CodecError(f"the retry policy has no {name}")
    return RetryPolicy(_seconds(policy.base), policy.factor, _seconds(policy.cap), _seconds(policy.lifetime))


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def _milliseconds(timestamp: Timestamp) -> int:
    return timestamp.seconds * 1_000 + timestamp.nanos // 1_000_000


def _expire_ms(timestamp: Timestamp) -> int:
    """Return a time that is set as ours, where 0 says "never": a time before 1970 must not become that."""
    return max(1, _milliseconds(timestamp))


def _deny(names: dict[str, int], name: str, expire_ms: int) -> None:
    if not name:
        raise CodecError("a denial's subject has no name")
    before = names.get(name, expire_ms)
    names[name] = 0 if 0 in {before, expire_ms} else max(before, expire_ms)
