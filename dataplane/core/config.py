"""Configuration as plain values, the same for both planes: what an account's bundle says, and what is wrong with it.

Adapters decode bundles into these values. `validate_account` and `validate_provider` return every problem they find,
with the field it stands in; a node refuses a bundle with problems and keeps the one it has, and the control plane
refuses the edit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum


class TlsPolicy(IntEnum):
    """What TLS must hold before mail or credentials are sent; numbers as in postroad.config.v1."""

    NONE = 1
    OPPORTUNISTIC = 2
    REQUIRED = 3
    REQUIRED_VERIFIED = 4


@dataclass(frozen=True, slots=True)
class Credential:
    """A good SMTP credential. `name` is its resource name; `expire_ms` is milliseconds since 1970, 0 for never."""

    name: str
    secret_sha256: bytes
    expire_ms: int = 0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Host name or address and port of a relay."""

    host: str
    port: int
    implicit_tls: bool = False


@dataclass(frozen=True, slots=True)
class SealedValue:
    """A secret under a pool key: `ciphertext` is nonce (12 bytes), ciphertext and tag of AES-256-GCM."""

    key_id: str
    ciphertext: bytes


@dataclass(frozen=True, slots=True)
class SmtpProvider:
    """A next hop of kind `smtp`. `name` is its resource name; `account` is empty for a shared one."""

    name: str
    account: str
    endpoints: tuple[Endpoint, ...]
    tls_policy: TlsPolicy
    ca_pem: str = ""
    username: str = ""
    password: SealedValue | None = None
    max_connections: int = 20
    max_messages_per_connection: int = 100


@dataclass(frozen=True, slots=True)
class HeaderCondition:
    """A glob (`*`, `?`) over a header field; both in lower case."""

    name: str
    pattern: str


@dataclass(frozen=True, slots=True)
class Target:
    """A provider named by a rule; weight 0 keeps its place in the order."""

    provider: str
    egress_source: str = ""
    weight: int = 0


@dataclass(frozen=True, slots=True)
class Rule:
    """A routing rule; all non-empty conditions must hold. Patterns: `a@b`, `@b`, `*.b`, and `<>` for senders."""

    name: str
    priority: int
    targets: tuple[Target, ...]
    sender_patterns: tuple[str, ...] = ()
    recipient_patterns: tuple[str, ...] = ()
    headers: tuple[HeaderCondition, ...] = ()
    min_size_bytes: int = 0
    max_size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential back-off with full jitter; seconds."""

    base_s: float = 60.0
    factor: float = 2.0
    cap_s: float = 3600.0
    lifetime_s: float = 432000.0


@dataclass(frozen=True, slots=True)
class Account:
    """One account's bundle. `revision` is the bundle's, recorded with each decision."""

    name: str
    uid: str
    revision: int
    sender_domains: tuple[str, ...] = ()
    replicated: bool = False
    credentials: dict[str, Credential] = field(default_factory=dict)
    providers: dict[str, SmtpProvider] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    retry_policy: RetryPolicy = RetryPolicy()


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """Settings of a node pool. Limits: 0 means none."""

    account_messages_per_hour: int = 100_000
    credential_messages_per_hour: int = 50_000
    address_connections_per_minute: int = 10
    max_message_bytes: int = 26_214_400
    max_recipients: int = 1_000
    node_count: int = 1


@dataclass(frozen=True, slots=True)
class Denials:
    """What must stop now: names, each with the time (ms since 1970) at which the denial falls away, 0 for never.

    `credentials_since` says since when a credential is denied: mail that it submitted before that time goes on.
    """

    version: int = 0
    accounts: dict[str, int] = field(default_factory=dict)
    credentials: dict[str, int] = field(default_factory=dict)
    providers: dict[str, int] = field(default_factory=dict)
    credentials_since: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong in a configuration: the path of the field and what is wrong, fit to show to whoever edited it."""

    field: str
    description: str


def seal_context(account: str, resource: str, field_name: str) -> bytes:
    """Return the additional data under which a secret is sealed: it opens only where it belongs.

    `account` is empty for shared resources; `field_name` is the field of the resource. The rule is that of
    postroad.config.v1.SealedValue, and stored bytes depend on it.
    """
    return "\0".join(("postroad/v1", account, resource, field_name)).encode("utf-8")
