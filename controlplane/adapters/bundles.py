"""Writes the content of bundles as postroad.config.v1, the same values as the same bytes, and reads what it wrote.

Contract. `ProtobufBundleEncoder` implements `controlplane.ports.BundleEncoder`. Values are valid
(`dataplane.core.config.validate_…`), so that nothing raises. Serialisation is deterministic, since the hash of the
bytes decides whether a bundle changed. `read_account` and `read_settings` give back what decides whether mail is taken
(sender domains, rules, limits, sizes), of bundles that are stored: what nodes alone need is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from dataplane.core import config
from dataplane.core.limits import Limit, LimitScope, LimitUnit
from postroad.config.v1 import bundle_pb2 as pb


class ProtobufBundleEncoder:
    """See the module."""

    def account(self, account: config.Account) -> bytes:
        """As the port says."""
        policy = account.retry_policy
        return _bytes(
            pb.AccountBundle(
                account=account.name,
                uid=account.uid,
                sender_domains=account.sender_domains,
                replicated=account.replicated,
                credentials=[_credential(account.credentials[name]) for name in sorted(account.credentials)],
                providers=[_provider(account.providers[name]) for name in sorted(account.providers)],
                rules=[_rule(rule) for rule in account.rules],
                retry_policy=pb.RetryPolicy(
                    base=_duration(policy.base_s),
                    factor=policy.factor,
                    cap=_duration(policy.cap_s),
                    lifetime=_duration(policy.lifetime_s),
                ),
                limits=[_limit(limit) for limit in account.limits],
                delivery_weight=account.delivery_weight,
            )
        )

    def shared_providers(self, providers: Sequence[config.SmtpProvider]) -> bytes:
        """As the port says."""
        return _bytes(pb.SharedProvidersBundle(providers=[_provider(provider) for provider in providers]))

    def networks(self, bindings: Sequence[tuple[str, str]]) -> bytes:
        """As the port says."""
        binding = pb.NetworksBundle.Binding
        return _bytes(
            pb.NetworksBundle(bindings=[binding(network=network, account=account) for network, account in bindings])
        )

    def settings(self, settings: config.NodeSettings) -> bytes:
        """As the port says."""
        return _bytes(
            pb.NodeSettingsBundle(
                account_messages_per_hour=settings.account_messages_per_hour,
                credential_messages_per_hour=settings.credential_messages_per_hour,
                address_connections_per_minute=settings.address_connections_per_minute,
                max_message_bytes=settings.max_message_bytes,
                max_recipients=settings.max_recipients,
                node_count=settings.node_count,
                limits=[_limit(limit) for limit in settings.limits],
                max_connections=settings.max_connections,
                max_connections_per_address=settings.max_connections_per_address,
                log_level=settings.log_level,
            )
        )


def read_account(content: bytes, revision: int) -> config.Account:
    """Return an account without its credentials, providers and retries."""
    bundle = pb.AccountBundle.FromString(content)
    return config.Account(
        name=bundle.account,
        uid=bundle.uid,
        revision=revision,
        sender_domains=tuple(bundle.sender_domains),
        replicated=bundle.replicated,
        rules=tuple(_read_rule(rule) for rule in bundle.rules),
        limits=tuple(_read_limit(limit) for limit in bundle.limits),
    )


def read_settings(content: bytes) -> config.NodeSettings:
    """Return what a pool's settings say of submission."""
    bundle = pb.NodeSettingsBundle.FromString(content)
    return config.NodeSettings(
        account_messages_per_hour=bundle.account_messages_per_hour,
        max_message_bytes=bundle.max_message_bytes,
        max_recipients=bundle.max_recipients,
        node_count=bundle.node_count,
        limits=tuple(_read_limit(limit) for limit in bundle.limits),
    )


def _read_rule(rule: pb.Rule) -> config.Rule:
    return config.Rule(
        name=rule.name,
        priority=rule.priority,
        targets=tuple(config.Target(one.provider, one.egress_source, one.weight) for one in rule.targets),
        sender_patterns=tuple(rule.sender_patterns),
        recipient_patterns=tuple(rule.recipient_patterns),
        headers=tuple(config.HeaderCondition(one.name, one.pattern) for one in rule.headers),
        min_size_bytes=rule.min_size_bytes,
        max_size_bytes=rule.max_size_bytes,
    )


def _read_limit(limit: pb.Limit) -> Limit:
    period = limit.period.seconds + limit.period.nanos / 1e9
    scope, unit = LimitScope(limit.scope), LimitUnit(limit.unit)
    return Limit(limit.name, scope, unit, limit.amount, period, limit.burst, limit.subject)


def _bytes(message: Message) -> bytes:
    return message.SerializeToString(deterministic=True)


def _duration(seconds: float) -> Duration:
    value = Duration()
    value.FromMicroseconds(round(seconds * 1_000_000))
    return value


def _limit(limit: Limit) -> pb.Limit:
    value = pb.Limit(
        name=limit.name,
        scope=pb.Limit.Scope.ValueType(limit.scope),
        subject=limit.subject,
        unit=pb.Limit.Unit.ValueType(limit.unit),
        amount=limit.amount,
        burst=limit.burst,
    )
    if limit.period_s:
        value.period.CopyFrom(_duration(limit.period_s))
    return value


def _credential(credential: config.Credential) -> pb.Credential:
    value = pb.Credential(name=credential.name, secret_sha256=credential.secret_sha256)
    if credential.expire_ms:
        expire_time = Timestamp()
        expire_time.FromMilliseconds(credential.expire_ms)
        value.expire_time.CopyFrom(expire_time)
    return value


def _provider(provider: config.SmtpProvider) -> pb.Provider:
    sealed = provider.password
    endpoint = pb.SmtpProvider.Endpoint
    return pb.Provider(
        name=provider.name,
        smtp=pb.SmtpProvider(
            endpoints=[
                endpoint(host=one.host, port=one.port, implicit_tls=one.implicit_tls) for one in provider.endpoints
            ],
            tls_policy=pb.SmtpProvider.TlsPolicy.ValueType(provider.tls_policy),
            ca_pem=provider.ca_pem,
            username=provider.username,
            password=pb.SealedValue(key_id=sealed.key_id, ciphertext=sealed.ciphertext) if sealed else None,
            max_connections=provider.max_connections,
            max_messages_per_connection=provider.max_messages_per_connection,
        ),
    )


def _rule(rule: config.Rule) -> pb.Rule:
    return pb.Rule(
        name=rule.name,
        priority=rule.priority,
        sender_patterns=rule.sender_patterns,
        recipient_patterns=rule.recipient_patterns,
        headers=[pb.Rule.HeaderCondition(name=one.name, pattern=one.pattern) for one in rule.headers],
        min_size_bytes=rule.min_size_bytes,
        max_size_bytes=rule.max_size_bytes,
        targets=[
            pb.Rule.Target(provider=one.provider, egress_source=one.egress_source, weight=one.weight)
            for one in rule.targets
        ],
    )
