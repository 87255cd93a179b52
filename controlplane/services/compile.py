"""Turns what is configured into the bundles that nodes run on, inside the transaction of the edit.

Contract. Each method reads what the transaction sees, builds the bundle as nodes will see it, checks and compiles it
with the nodes' own code, and stores it. What does not pass is InvalidArgumentError, with paths into the resource that
was edited where it is to blame: `Edited` names it. A bundle that comes out as it was keeps its revision. Callers hold
the lock of the account or of the pools.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from controlplane.domain import names
from controlplane.domain.errors import InvalidArgumentError, Reason, Violation
from controlplane.domain.limits import config_of as limit_config
from controlplane.domain.messages import milliseconds_at
from controlplane.domain.resources import Account, Durability, NodePool, Provider, RoutingRule, SmtpCredential
from controlplane.ports import BundleEncoder, Sealer, Work
from dataplane.core import config
from dataplane.core.policy import compile_account, compile_networks

KIND_ACCOUNT = 1
KIND_SHARED_PROVIDERS = 2
KIND_NETWORKS = 3
KIND_NODE_SETTINGS = 4

# A bundle travels whole in one message of at most 16 MiB, which also carries what else changed: one that did not fit
# would keep every other change from every node of the pool.
MAX_BUNDLE_BYTES = 8 * 1024 * 1024

PASSWORD_PLACE = ("providers", "password_sealed")
POOL_KEY_PLACE = ("pool_keys", "key_sealed")
PASSWORD_FIELD = "password"  # noqa: S105 - the name of a field


class Edited(NamedTuple):
    """Where problems of the edited resource begin in the bundle, and what its field in the request is called."""

    prefix: str
    field: str


_EDITED_POOL = Edited("", "node_pool")


class _PoolKey(NamedTuple):
    key_id: str
    key: bytes


class BundleCompiler:
    """Compiles accounts and what pools share; see the module."""

    def __init__(self, sealer: Sealer, encoder: BundleEncoder) -> None:
        self._sealer = sealer
        self._encoder = encoder

    async def account(self, work: Work, account: Account, edited: Edited) -> None:
        """Rebuild the account's bundle in its pool, and delete it from every other."""
        name = names.format_name(names.ACCOUNT, account.account)
        key = await self._pool_key(work, account.node_pool)
        credentials = [_credential(one) for one in await work.smtp_credentials.list_good(account.account)]
        providers = [self._provider(one, key) for one in await work.providers.list_all(account.account)]
        policy = account.retry_policy
        base_s = 60.0 if policy.base_s is None else policy.base_s
        value = config.Account(
            name=name,
            uid=account.meta.uid,
            revision=0,
            sender_domains=account.sender_domains,
            credentials={one.name: one for one in credentials},
            providers={one.name: one for one in providers},
            rules=tuple(rule_config(one) for one in await work.routing_rules.list_enabled(account.account)),
            retry_policy=config.RetryPolicy(
                base_s=base_s,
                factor=2.0 if policy.factor is None else policy.factor,
                cap_s=max(3_600.0, base_s) if policy.cap_s is None else policy.cap_s,
                lifetime_s=432_000.0 if policy.lifetime_s is None else policy.lifetime_s,
            ),
            limits=tuple(limit_config(one) for one in await work.limits.list_all(account.account)),
            delivery_weight=account.delivery_weight,
            replicated=account.durability is Durability.REPLICATED,
        )
        refuse(config.validate_account(value), edited)
        compile_account(value)
        content = _within_limit(self._encoder.account(value), edited)
        await work.bundles.put(account.node_pool, name, KIND_ACCOUNT, account.account, content)
        await work.bundles.remove(name, except_pool=account.node_pool)

    async def shared_providers(self, work: Work) -> None:
        """Rebuild the shared providers of every pool."""
        for pool in await work.nodes.lock_pools():
            await self._shared_providers(work, pool)

    async def networks(self, work: Work, node_pools: Iterable[str]) -> None:
        """Rebuild the networks of these pools, taking their locks in order of id."""
        for node_pool in sorted(set(node_pools)):
            await self._networks(work, await work.nodes.lock_pool(node_pool))

    async def settings(self, work: Work, node_pools: Iterable[str]) -> None:
        """Rebuild the settings of these pools, taking their locks in order of id."""
        for node_pool in sorted(set(node_pools)):
            await self._settings(work, await work.nodes.lock_pool(node_pool))

    async def shared_limits(self, work: Work, edited: Edited) -> None:
        """Rebuild the settings of every pool, which carry the shared limits."""
        for pool in await work.nodes.lock_pools():
            await self._settings(work, pool, edited)

    async def new_pool(self, work: Work, pool: NodePool) -> None:
        """Make everything that a pool has from the beginning; its key must be there."""
        await self._settings(work, pool)
        await self._networks(work, pool)
        await self._shared_providers(work, pool)

    async def _shared_providers(self, work: Work, pool: NodePool) -> None:
        key = await self._pool_key(work, pool.node_pool)
        providers = [self._provider(one, key) for one in await work.providers.list_all(None)]
        for provider in providers:
            # What is stored passed already: only the provider that is edited now can be to blame.
            refuse(config.validate_provider(provider), Edited("", "provider"))
        content = _within_limit(self._encoder.shared_providers(providers), Edited("", "provider"))
        await work.bundles.put(pool.node_pool, "shared/providers", KIND_SHARED_PROVIDERS, None, content)

    async def _networks(self, work: Work, pool: NodePool) -> None:
        bindings = [
            (network, names.format_name(names.ACCOUNT, account))
            for network, account in await work.accounts.networks(pool.node_pool)
        ]
        refuse(config.validate_networks(bindings), Edited("", "account.networks"))
        compile_networks(bindings)
        content = _within_limit(self._encoder.networks(bindings), Edited("", "account.networks"))
        await work.bundles.put(pool.node_pool, f"pools/{pool.node_pool}/networks", KIND_NETWORKS, None, content)

    async def _settings(self, work: Work, pool: NodePool, edited: Edited = _EDITED_POOL) -> None:
        shared = tuple(limit_config(one) for one in await work.limits.list_all(None))
        value = replace(settings_of(pool, await work.nodes.count_nodes(pool.node_pool)), limits=shared)
        refuse(config.validate_settings(value), edited)
        content = self._encoder.settings(value)
        await work.bundles.put(pool.node_pool, f"pools/{pool.node_pool}/settings", KIND_NODE_SETTINGS, None, content)

    async def _pool_key(self, work: Work, node_pool: str) -> _PoolKey:
        key_id, sealed = await work.nodes.newest_pool_key(node_pool)
        table, column = POOL_KEY_PLACE
        return _PoolKey(key_id, self._sealer.unseal(sealed, "", table, f"{node_pool}/{key_id}", column))

    def _provider(self, provider: Provider, key: _PoolKey) -> config.SmtpProvider:
        value = provider_config(provider)
        sealed = provider.smtp.password_sealed
        if sealed is None:
            return value
        table, column = PASSWORD_PLACE
        password = self._sealer.unseal(sealed, provider.account or "", table, provider.meta.uid, column)
        context = config.seal_context(value.account, value.name, PASSWORD_FIELD)
        return provider_config(provider, self._sealer.seal_for_pool(password, key.key_id, key.key, context))


def refuse(problems: Sequence[config.Problem], edited: Edited) -> None:
    """Raise InvalidArgumentError when there are problems; their paths are the request's."""
    if not problems:
        return
    violations = []
    for problem in problems:
        inside = problem.field.startswith(edited.prefix)
        path = problem.field[len(edited.prefix) :].lstrip(".") if inside else problem.field
        violations.append(
            Violation(f"{edited.field}.{path}" if inside and path else path or edited.field, problem.description)
        )
    raise InvalidArgumentError(violations, Reason.CONFIGURATION_INVALID)


def _within_limit(content: bytes, edited: Edited) -> bytes:
    """Return the content of a bundle; InvalidArgumentError for one that nodes could not be sent."""
    if len(content) > MAX_BUNDLE_BYTES:
        text = f"makes the configuration that nodes are sent larger than {MAX_BUNDLE_BYTES // 1024 // 1024} MiB"
        raise InvalidArgumentError([Violation(edited.field, text)], Reason.CONFIGURATION_INVALID)
    return content


def provider_config(provider: Provider, password: config.SealedValue | None = None) -> config.SmtpProvider:
    """Return a provider as nodes see it."""
    smtp = provider.smtp
    return config.SmtpProvider(
        name=names.provider_name(provider.account, provider.provider),
        account="" if provider.account is None else names.format_name(names.ACCOUNT, provider.account),
        endpoints=smtp.endpoints,
        tls_policy=smtp.tls_policy or config.TlsPolicy.OPPORTUNISTIC,
        ca_pem=smtp.ca_pem,
        username=smtp.username,
        password=password,
        max_connections=smtp.max_connections,
        max_messages_per_connection=smtp.max_messages_per_connection,
    )


def settings_of(pool: NodePool, node_count: int) -> config.NodeSettings:
    """Return a pool's settings with every default filled in."""
    defaults, limits = config.NodeSettings(), pool.submission_limits
    return config.NodeSettings(
        account_messages_per_hour=_given(limits.account_messages_per_hour, defaults.account_messages_per_hour),
        credential_messages_per_hour=_given(limits.credential_messages_per_hour, defaults.credential_messages_per_hour),
        address_connections_per_minute=_given(
            limits.address_connections_per_minute, defaults.address_connections_per_minute
        ),
        max_message_bytes=pool.max_message_bytes or defaults.max_message_bytes,
        max_recipients=pool.max_recipients or defaults.max_recipients,
        node_count=max(node_count, 1),
        max_connections=pool.max_connections,
        max_connections_per_address=pool.max_connections_per_address,
        log_level=pool.log_level,
    )


def _given(value: int | None, default: int) -> int:
    return default if value is None else value


def _credential(credential: SmtpCredential) -> config.Credential:
    name = names.format_name(names.SMTP_CREDENTIAL, credential.account, credential.smtp_credential)
    expire = credential.expire_time
    return config.Credential(name, credential.secret_sha256, 0 if expire is None else milliseconds_at(expire))


def rule_config(rule: RoutingRule) -> config.Rule:
    """Return a rule as nodes see it: conditions compare without regard to case, so they go in lower case."""
    return config.Rule(
        name=names.format_name(names.ROUTING_RULE, rule.account, rule.routing_rule),
        priority=rule.priority,
        targets=tuple(config.Target(one.provider, one.egress_source, one.weight) for one in rule.targets),
        sender_patterns=tuple(pattern.lower() for pattern in rule.sender_patterns),
        recipient_patterns=tuple(pattern.lower() for pattern in rule.recipient_patterns),
        headers=tuple(config.HeaderCondition(one.name.lower(), one.pattern.lower()) for one in rule.headers),
        min_size_bytes=rule.min_size_bytes,
        max_size_bytes=rule.max_size_bytes,
    )
