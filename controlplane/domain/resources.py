"""The configured resources as plain values, with the fields of each that an edit may set.

Contract. A value holds ids, not full names, except where it names a resource of another kind of owner (a target's
provider). What only the server decides stands in `meta` and in fields that `*_FIELDS` lists as output only. Times are
aware datetimes, durations seconds; None means "not set: the default that the API states".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum

from controlplane.domain.masks import Field, Fields
from dataplane.core.config import Endpoint, HeaderCondition, TlsPolicy

_SERVER = frozenset({"name", "uid", "create_time", "update_time", "etag"})


@dataclass(frozen=True, slots=True)
class Meta:
    """What the server keeps of every resource."""

    uid: str = ""
    version: int = 0
    create_time: datetime | None = None
    update_time: datetime | None = None


class AccountState(IntEnum):
    """Numbers as in postroad.control.v1.Account.State."""

    ACTIVE = 1
    SUSPENDED = 2


class Durability(IntEnum):
    """Numbers as in postroad.control.v1.Account.Durability."""

    UNSPECIFIED = 0
    LOCAL = 1
    REPLICATED = 2


class UncertainPolicy(IntEnum):
    """Numbers as in postroad.control.v1.Account.UncertainPolicy."""

    UNSPECIFIED = 0
    RETRY = 1
    HOLD = 2


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Seconds; None takes the default."""

    base_s: float | None = None
    factor: float | None = None
    cap_s: float | None = None
    lifetime_s: float | None = None


@dataclass(frozen=True, slots=True)
class Account:
    """A tenant."""

    account: str
    display_name: str = ""
    state: AccountState = AccountState.ACTIVE
    suspend_reason: str = ""
    sender_domains: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()
    durability: Durability = Durability.LOCAL
    node_pool: str = ""
    retry_policy: RetryPolicy = RetryPolicy()
    delivery_weight: int = 1
    uncertain_policy: UncertainPolicy = UncertainPolicy.RETRY
    meta: Meta = Meta()


ACCOUNT_FIELDS = Fields(
    {
        "display_name": Field("display_name"),
        "sender_domains": Field("sender_domains"),
        "networks": Field("networks"),
        "durability": Field("durability"),
        "node_pool": Field("node_pool"),
        "delivery_weight": Field("delivery_weight"),
        "uncertain_policy": Field("uncertain_policy"),
        "retry_policy": Field(
            "retry_policy",
            {
                "base": Field("base_s"),
                "factor": Field("factor"),
                "cap": Field("cap_s"),
                "lifetime": Field("lifetime_s"),
            },
        ),
    },
    _SERVER | {"state", "suspend_reason"},
)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key for the API; `account` is None for an operator's. `secret` is set in the answer that made it, only."""

    account: str | None
    api_key: str
    display_name: str = ""
    scopes: tuple[str, ...] = ()
    lookup: str = ""
    expire_time: datetime | None = None
    revoke_time: datetime | None = None
    last_use_time: datetime | None = None
    secret: str = field(default="", repr=False)
    meta: Meta = Meta()


@dataclass(frozen=True, slots=True)
class SmtpCredential:
    """A user and password for SMTP AUTH. `secret` is set in the answer that made it, only."""

    account: str
    smtp_credential: str
    display_name: str = ""
    secret_sha256: bytes = field(default=b"", repr=False)
    expire_time: datetime | None = None
    revoke_time: datetime | None = None
    suspend_time: datetime | None = None
    suspend_reason: str = ""
    secret: str = field(default="", repr=False)
    meta: Meta = Meta()


class ProviderState(IntEnum):
    """Numbers as in postroad.control.v1.Provider.State."""

    ACTIVE = 1
    SUSPENDED = 2


@dataclass(frozen=True, slots=True)
class SmtpSettings:
    """How mail reaches an SMTP relay. `password` is what a caller sent; stored is only `password_sealed`."""

    endpoints: tuple[Endpoint, ...] = ()
    tls_policy: TlsPolicy | None = None
    ca_pem: str = ""
    username: str = ""
    password: str = field(default="", repr=False)
    password_sealed: bytes | None = field(default=None, repr=False)
    max_connections: int = 20
    max_messages_per_connection: int = 100


@dataclass(frozen=True, slots=True)
class Provider:
    """A next hop; `account` is None for a shared one."""

    account: str | None
    provider: str
    display_name: str = ""
    state: ProviderState = ProviderState.ACTIVE
    suspend_reason: str = ""
    smtp: SmtpSettings = SmtpSettings()
    meta: Meta = Meta()


PROVIDER_FIELDS = Fields(
    {
        "display_name": Field("display_name"),
        "smtp": Field(
            "smtp",
            {
                name: Field(name)
                for name in (
                    *("endpoints", "tls_policy", "ca_pem", "username", "password"),
                    *("max_connections", "max_messages_per_connection"),
                )
            },
        ),
    },
    _SERVER | {"state", "suspend_reason", "smtp.password_set"},
)


@dataclass(frozen=True, slots=True)
class Destination:
    """A domain of recipients, or `*.` and the one that they are below; `account` is None for mail of every account."""

    account: str | None
    destination: str
    suspend_time: datetime | None = None
    suspend_reason: str = ""


@dataclass(frozen=True, slots=True)
class RuleTarget:
    """A place where matching mail may go: provider's full name; weight 0 keeps its place."""

    provider: str
    egress_source: str = ""
    weight: int = 0


@dataclass(frozen=True, slots=True)
class RoutingRule:
    """Says through which providers a message goes."""

    account: str
    routing_rule: str
    display_name: str = ""
    priority: int = 0
    sender_patterns: tuple[str, ...] = ()
    recipient_patterns: tuple[str, ...] = ()
    headers: tuple[HeaderCondition, ...] = ()
    min_size_bytes: int = 0
    max_size_bytes: int = 0
    targets: tuple[RuleTarget, ...] = ()
    disabled: bool = False
    meta: Meta = Meta()


ROUTING_RULE_FIELDS = Fields(
    {
        name: Field(name)
        for name in (
            *("display_name", "priority", "sender_patterns", "recipient_patterns", "headers"),
            *("min_size_bytes", "max_size_bytes", "targets", "disabled"),
        )
    },
    _SERVER,
)


@dataclass(frozen=True, slots=True)
class SubmissionLimits:
    """Default buckets; None takes the default, 0 means none."""

    account_messages_per_hour: int | None = None
    credential_messages_per_hour: int | None = None
    address_connections_per_minute: int | None = None


@dataclass(frozen=True, slots=True)
class NodePool:
    """Nodes that serve the same accounts; 0 takes the default, of connections and log level the node's own."""

    node_pool: str
    display_name: str = ""
    submission_limits: SubmissionLimits = SubmissionLimits()
    max_message_bytes: int = 0
    max_recipients: int = 0
    max_connections: int = 0
    max_connections_per_address: int = 0
    log_level: str = ""
    meta: Meta = Meta()


DEFAULT_NODE_POOL = "default"
NODE_POOL_FIELDS = Fields(
    {
        "display_name": Field("display_name"),
        "submission_limits": Field(
            "submission_limits",
            {
                name: Field(name)
                for name in (
                    "account_messages_per_hour",
                    "credential_messages_per_hour",
                    "address_connections_per_minute",
                )
            },
        ),
        "max_message_bytes": Field("max_message_bytes"),
        "max_recipients": Field("max_recipients"),
        "max_connections": Field("max_connections"),
        "max_connections_per_address": Field("max_connections_per_address"),
        "log_level": Field("log_level"),
    },
    _SERVER,
)


class NodeState(IntEnum):
    """Numbers as in postroad.control.v1.Node.State."""

    PENDING = 1
    ENROLLED = 2
    REVOKED = 3


@dataclass(frozen=True, slots=True)
class Spool:
    """A spool of a node, as last reported."""

    spool: str
    incarnation: int
    cursor: int
    accepted: bool
    waiting_count: int
    lost_messages: tuple[str, ...] = ()
    lost_count: int = 0
    unnamed_losses: bool = False


@dataclass(frozen=True, slots=True)
class Node:
    """A data-plane node, with what it last said of itself."""

    node: str
    display_name: str = ""
    node_pool: str = ""
    state: NodeState = NodeState.PENDING
    enrollment_token: str = field(default="", repr=False)
    enrollment_expire_time: datetime | None = None
    certificate_not_before: datetime | None = None
    certificate_not_after: datetime | None = None
    connected: bool = False
    last_seen_time: datetime | None = None
    software_version: str = ""
    config_status: int = 2
    config_error: str = ""
    denials_version: int = 0
    spools: tuple[Spool, ...] = ()
    drain: str = ""
    meta: Meta = Meta()


NODE_FIELDS = Fields(
    {"display_name": Field("display_name"), "node_pool": Field("node_pool")},
    _SERVER
    | {
        *("state", "enrollment_token", "enrollment_expire_time", "certificate_not_before", "certificate_not_after"),
        *("connected", "last_seen_time", "software_version", "config_status", "config_error", "denials_version"),
        *("spools", "drain_operation"),
    },
)
