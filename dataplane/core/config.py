"""Configuration as plain values, the same for both planes: what an account's bundle says, and what is wrong with it.

Contract. Adapters decode bundles into these values. `validate_account`, `validate_provider`, `validate_rule`,
`validate_retry_policy`, `validate_settings` and `validate_networks` return every problem that they find, each with
the path of its field, and never raise: a node refuses a bundle with problems and keeps the one it has, the control
plane refuses the edit. The limits are those that the comments of postroad.control.v1 and postroad.config.v1 state.
What a name points to (a rule's provider) is not looked up: a missing one is skipped at routing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from uuid import UUID

from dataplane.core.address import AddressError, parse_domain, parse_mailbox
from dataplane.core.limits import Limit, limit_problems

MAX_SENDER_DOMAINS = 500
MAX_RULES = 10_000
MAX_RESIDUE_RULES = 500
MAX_RULE_PATTERNS = 500
MAX_ACCOUNT_PATTERNS = 100_000
MAX_NETWORKS = 100
MAX_LIMITS = 200
LOG_LEVELS = frozenset({"", "debug", "info", "warning", "error"})

NULL_SENDER_PATTERN = "<>"

RULE_HEADER_NAMES = frozenset(
    {
        "subject",
        "list-id",
        "precedence",
        "auto-submitted",
        "x-priority",
        "x-mailer",
        "x-campaign",
        "x-tag",
    }
)
"""Fields that rules may look at, beside all that begin with RULE_HEADER_PREFIX; in lower case."""

RULE_HEADER_PREFIX = "x-postroad-"

_RULE_HEADERS_SHOWN = f"{', '.join(sorted(RULE_HEADER_NAMES))}, or begin with {RULE_HEADER_PREFIX}"

_ID = r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?"
_ACCOUNT_NAME = re.compile(f"accounts/{_ID}")
_CREDENTIAL_ID = re.compile(_ID)
_PROVIDER_NAME = re.compile(f"(?:(accounts/{_ID})/)?providers/{_ID}")
_RULE_ID = re.compile(_ID)
_TAG_HEADER = re.compile(f"{RULE_HEADER_PREFIX}[a-z0-9-]{{1,64}}")
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f]")
_MAPPED = IPv6Network("::ffff:0:0/96")


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
    limits: tuple[Limit, ...] = ()
    delivery_weight: int = 1


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """Settings of a node pool. Limits: 0 means none. `max_connections…` of 0 and no level: the node's own settings."""

    account_messages_per_hour: int = 100_000
    credential_messages_per_hour: int = 50_000
    address_connections_per_minute: int = 10
    max_message_bytes: int = 26_214_400
    max_recipients: int = 1_000
    node_count: int = 1
    limits: tuple[Limit, ...] = ()
    max_connections: int = 0
    max_connections_per_address: int = 0
    log_level: str = ""


@dataclass(frozen=True, slots=True)
class Denials:
    """What must stop now: names, each with the time (ms since 1970) at which the denial falls away, 0 for never.

    `credentials_since` says since when a credential is denied: mail that it submitted before that time goes on.
    `destinations` has names as in `destinations/example.net` (for every account) and
    `accounts/demo/destinations/*.example.net` (domains below it, for one).
    """

    version: int = 0
    accounts: dict[str, int] = field(default_factory=dict)
    credentials: dict[str, int] = field(default_factory=dict)
    providers: dict[str, int] = field(default_factory=dict)
    credentials_since: dict[str, int] = field(default_factory=dict)
    destinations: dict[str, int] = field(default_factory=dict)


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
    return f"postroad/v1\0{account}\0{resource}\0{field_name}".encode()


def validate_account(account: Account) -> list[Problem]:
    """Return what is wrong with an account's bundle."""
    problems = validate_sender_domains(account.sender_domains)
    if not _ACCOUNT_NAME.fullmatch(account.name):
        problems.append(Problem("name", "must be accounts/{account}, the id as stated there"))
    if not _is_uuid(account.uid):
        problems.append(Problem("uid", "must be a UUID in its usual form"))
    for key, credential in account.credentials.items():
        problems += _under(f'credentials["{key}"]', _credential_problems(credential, key, account.name))
    for key, provider in account.providers.items():
        problems += _under(f'providers["{key}"]', validate_provider(provider))
        if key != provider.name or provider.account != account.name:
            problems.append(Problem(f'providers["{key}"]', "must be a provider of this account"))
    problems += _rules_problems(account)
    problems += _under("retry_policy", validate_retry_policy(account.retry_policy))
    problems += validate_limits(account.limits, account.name)
    problems += _range_problem("delivery_weight", account.delivery_weight, 1, 100)
    return problems


def validate_provider(provider: SmtpProvider) -> list[Problem]:
    """Return what is wrong with a provider of kind `smtp`; the paths of its own fields begin with `smtp`."""
    named = _PROVIDER_NAME.fullmatch(provider.name)
    problems = []
    if named is None or (named[1] or "") != provider.account:
        problems.append(Problem("name", "must be accounts/{account}/providers/{provider} or providers/{provider}"))
    problems += _endpoints_problems(provider)
    problems += _login_problems(provider)
    pem = provider.ca_pem
    if pem and ("-----BEGIN CERTIFICATE-----" not in pem or "-----END CERTIFICATE-----" not in pem):
        problems.append(Problem("smtp.ca_pem", "must be certificates in PEM"))
    if len(pem) > 65_536:
        problems.append(Problem("smtp.ca_pem", "must be at most 64 KiB"))
    problems += _range_problem("smtp.max_connections", provider.max_connections, 1, 1_000)
    problems += _range_problem("smtp.max_messages_per_connection", provider.max_messages_per_connection, 1, 100_000)
    return problems


def validate_rule(rule: Rule, account: str) -> list[Problem]:
    """Return what is wrong with a routing rule of `account` (its resource name)."""
    problems = []
    prefix = f"{account}/routingRules/"
    if not rule.name.startswith(prefix) or not _RULE_ID.fullmatch(rule.name, len(prefix)):
        problems.append(Problem("name", "must be accounts/{account}/routingRules/{rule} of this account"))
    problems += _range_problem("priority", rule.priority, 0, 1_000_000)
    problems += _pattern_problems("sender_patterns", rule.sender_patterns)
    problems += _pattern_problems("recipient_patterns", rule.recipient_patterns)
    problems += _header_problems(rule.headers)
    if rule.min_size_bytes < 0:
        problems.append(Problem("min_size_bytes", "must not be negative"))
    if rule.max_size_bytes < 0 or 0 < rule.max_size_bytes < rule.min_size_bytes:
        problems.append(Problem("max_size_bytes", "must be 0 or at least min_size_bytes"))
    problems += _target_problems(rule.targets, account)
    return problems


def validate_retry_policy(policy: RetryPolicy) -> list[Problem]:
    """Return what is wrong with a retry policy."""
    problems = _range_problem("base", policy.base_s, 1, 86_400)
    problems += _range_problem("factor", policy.factor, 1, 10)
    problems += _range_problem("lifetime", policy.lifetime_s, 60, 30 * 86_400)
    if not policy.base_s <= policy.cap_s <= 30 * 86_400:
        problems.append(Problem("cap", "must be at least base and at most 30 days"))
    return problems


def validate_settings(settings: NodeSettings) -> list[Problem]:
    """Return what is wrong with the settings of a node pool."""
    most = 10**12
    problems = _range_problem("account_messages_per_hour", settings.account_messages_per_hour, 0, most)
    problems += _range_problem("credential_messages_per_hour", settings.credential_messages_per_hour, 0, most)
    problems += _range_problem("address_connections_per_minute", settings.address_connections_per_minute, 0, most)
    problems += _range_problem("max_message_bytes", settings.max_message_bytes, 1_024, 268_435_456)
    problems += _range_problem("max_recipients", settings.max_recipients, 1, 10_000)
    problems += _range_problem("node_count", settings.node_count, 1, 1_000_000)
    problems += _range_problem("max_connections", settings.max_connections, 0, 1_000_000)
    problems += _range_problem("max_connections_per_address", settings.max_connections_per_address, 0, 1_000_000)
    if settings.log_level not in LOG_LEVELS:
        problems.append(Problem("log_level", "must be debug, info, warning, error or empty"))
    problems += validate_limits(settings.limits, "")
    return problems


def validate_limits(limits: Sequence[Limit], account: str) -> list[Problem]:
    """Return what is wrong with the limits of an account (its resource name), or with the shared ones."""
    problems = []
    if len(limits) > MAX_LIMITS:
        problems.append(Problem("limits", f"must be at most {MAX_LIMITS}"))
    seen: set[str] = set()
    for limit in limits:
        path = f'limits["{limit.name}"]'
        problems += [Problem(f"{path}.{field}", description) for field, description in limit_problems(limit, account)]
        if limit.name in seen:
            problems.append(Problem(path, "is there twice"))
        seen.add(limit.name)
    return problems


def validate_networks(bindings: Iterable[tuple[str, str]]) -> list[Problem]:
    """Return what is wrong with pairs of network (CIDR) and account name; paths are `bindings[n]`.

    Networks of one account may lie in each other; those of two accounts may not touch.
    """
    problems = []
    parsed: list[tuple[IPv4Network | IPv6Network, str, int]] = []
    for index, (network, account) in enumerate(bindings):
        path = f"bindings[{index}]"
        if not _ACCOUNT_NAME.fullmatch(account):
            problems.append(Problem(f"{path}.account", "must be accounts/{account}"))
        try:
            value = ip_network(network)
        except ValueError:
            problems.append(Problem(f"{path}.network", "must be a network in CIDR form without host bits"))
            continue
        if value.prefixlen == 0:
            problems.append(Problem(f"{path}.network", "must not be the whole internet"))
        elif isinstance(value, IPv6Network) and value.overlaps(_MAPPED):
            problems.append(Problem(f"{path}.network", "must be written as IPv4: it holds mapped addresses"))
        else:
            parsed.append((value, account, index))
    return problems + list(_overlap_problems(parsed))


def validate_account_networks(networks: Sequence[str]) -> list[Problem]:
    """Return what is wrong with the list of one account's networks; paths are `networks[n]`."""
    problems = []
    if len(networks) > MAX_NETWORKS:
        problems.append(Problem("networks", f"must be at most {MAX_NETWORKS}"))
    for problem in validate_networks([(network, "accounts/a") for network in networks]):
        path = problem.field.removesuffix(".network").replace("bindings", "networks")
        problems.append(Problem(path, problem.description))
    return problems


def validate_sender_domains(domains: Sequence[str]) -> list[Problem]:
    """Return what is wrong with the list of one account's domains; paths are `sender_domains[n]`."""
    problems = []
    if len(domains) > MAX_SENDER_DOMAINS:
        problems.append(Problem("sender_domains", f"must be at most {MAX_SENDER_DOMAINS}"))
    seen: set[str] = set()
    for index, domain in enumerate(domains):
        name = domain.removeprefix("*.")
        if not _is_domain(name):
            problems.append(Problem(f"sender_domains[{index}]", "must be a domain or *.domain, lower case, A-labels"))
        elif name != domain and "." not in name:
            problems.append(Problem(f"sender_domains[{index}]", "must not be a whole top-level domain"))
        elif domain in seen:
            problems.append(Problem(f"sender_domains[{index}]", "is there twice"))
        seen.add(domain)
    return problems


def _under(path: str, problems: Iterable[Problem]) -> list[Problem]:
    return [Problem(f"{path}.{problem.field}", problem.description) for problem in problems]


def _range_problem(path: str, value: float, lowest: int, highest: int) -> list[Problem]:
    """Return a problem unless the value lies between the bounds, which belong to it; no number (NaN) never does."""
    return [] if lowest <= value <= highest else [Problem(path, f"must be {lowest} to {highest}")]


def _is_uuid(text: str) -> bool:
    try:
        return str(UUID(text)) == text
    except ValueError:
        return False


def is_destination(text: str) -> bool:
    """Whether the text is a domain, or `*.` and a domain, in the one form in which recipients' domains are compared."""
    name = text.removeprefix("*.")
    return not name.startswith("[") and _is_domain(name)


def _is_domain(text: str) -> bool:
    """Whether the text is a domain name in the one form in which we compare it."""
    try:
        return parse_domain(text) == text
    except AddressError:
        return False


def _credential_problems(credential: Credential, key: str, account: str) -> Iterator[Problem]:
    prefix = f"{account}/smtpCredentials/"
    good = credential.name.startswith(prefix) and _CREDENTIAL_ID.fullmatch(credential.name, len(prefix))
    if not good or key != credential.name:
        yield Problem("name", "must be accounts/{account}/smtpCredentials/{credential} of this account")
    if len(credential.secret_sha256) != 32:
        yield Problem("secret_sha256", "must be 32 bytes")
    if credential.expire_ms < 0:
        yield Problem("expire_time", "must not lie before 1970")


def _endpoints_problems(provider: SmtpProvider) -> Iterator[Problem]:
    if not 1 <= len(provider.endpoints) <= 10:
        yield Problem("smtp.endpoints", "must be 1 to 10")
    for index, endpoint in enumerate(provider.endpoints):
        path = f"smtp.endpoints[{index}]"
        if not _is_host(endpoint.host):
            yield Problem(f"{path}.host", "must be a host name or an IP address, nothing else")
        yield from _range_problem(f"{path}.port", endpoint.port, 1, 65_535)
        if endpoint.implicit_tls and provider.tls_policy is TlsPolicy.NONE:
            yield Problem(f"{path}.implicit_tls", "must not be set where the TLS policy is NONE")
        if endpoint in provider.endpoints[:index]:
            yield Problem(path, "is there twice")


def _is_host(host: str) -> bool:
    """Whether it is a host name (any case, A-labels) or an address without brackets, zone or port."""
    if "%" in host:
        return False
    try:
        ip_address(host)
    except ValueError:
        return _is_domain(host.lower()) if host.isascii() else False
    return True


def _login_problems(provider: SmtpProvider) -> Iterator[Problem]:
    username, password = provider.username, provider.password
    if _UNPRINTABLE.search(username) or len(username.encode("utf-8", "surrogatepass")) > 255:
        yield Problem("smtp.username", "must have no control characters and at most 255 bytes")
    if bool(username) != (password is not None):
        yield Problem("smtp.password", "must be set together with a username, and only then")
    if password is not None and (not password.key_id or len(password.ciphertext) < 28):
        yield Problem("smtp.password", "must be sealed: key, nonce, ciphertext and tag")
    if username and provider.tls_policy is not TlsPolicy.REQUIRED_VERIFIED:
        yield Problem("smtp.tls_policy", "must be REQUIRED_VERIFIED where there is a username")


def _rules_problems(account: Account) -> Iterator[Problem]:
    rules = account.rules
    if len(rules) > MAX_RULES:
        yield Problem("rules", f"must be at most {MAX_RULES}")
    residue = [rule for rule in rules if not rule.sender_patterns and not rule.recipient_patterns]
    if len(residue) > MAX_RESIDUE_RULES:
        yield Problem("rules", f"must be at most {MAX_RESIDUE_RULES} without sender and recipient patterns")
    if sum(len(rule.sender_patterns) + len(rule.recipient_patterns) for rule in rules) > MAX_ACCOUNT_PATTERNS:
        yield Problem("rules", f"must have at most {MAX_ACCOUNT_PATTERNS} patterns together")
    seen: set[str] = set()
    for rule in rules:
        path = f'rules["{rule.name}"]'
        if rule.name in seen:
            yield Problem(path, "is there twice")
        seen.add(rule.name)
        yield from _under(path, validate_rule(rule, account.name))


def _pattern_problems(path: str, patterns: Sequence[str]) -> Iterator[Problem]:
    if len(patterns) > MAX_RULE_PATTERNS:
        yield Problem(path, f"must be at most {MAX_RULE_PATTERNS}")
    may_be_null = path == "sender_patterns"
    for index, pattern in enumerate(patterns):
        if not (_is_pattern(pattern) or (may_be_null and pattern == NULL_SENDER_PATTERN)):
            forms = "a@b, @b or *.b" + (" or <>" if may_be_null else "")
            yield Problem(f"{path}[{index}]", f"must be {forms}, lower case, A-labels")
    if len(set(patterns)) < len(patterns):
        yield Problem(path, "must not hold one pattern twice")


def _is_pattern(pattern: str) -> bool:
    if pattern.startswith(("@", "*.")):
        return _is_domain(pattern.removeprefix("@") if pattern[0] == "@" else pattern[2:])
    try:
        mailbox = parse_mailbox(pattern, smtputf8=True)
    except AddressError:
        return False
    # A star is legal in a local part, but whoever writes one there means a pattern that we do not have.
    if "*" in mailbox.local or mailbox.domain[0] == "[":
        return False
    return mailbox.text == pattern == pattern.lower()


def _header_problems(conditions: Sequence[HeaderCondition]) -> Iterator[Problem]:
    if len(conditions) > 20:
        yield Problem("headers", "must be at most 20")
    for index, condition in enumerate(conditions):
        if condition.name not in RULE_HEADER_NAMES and not _TAG_HEADER.fullmatch(condition.name):
            yield Problem(f"headers[{index}].name", f"must be one of {_RULE_HEADERS_SHOWN}")
        pattern = condition.pattern
        if not 1 <= len(pattern) <= 200 or _UNPRINTABLE.search(pattern) or pattern != pattern.lower():
            yield Problem(f"headers[{index}].pattern", "must be 1 to 200 characters, lower case, no control characters")


def _target_problems(targets: Sequence[Target], account: str) -> Iterator[Problem]:
    if not 1 <= len(targets) <= 10:
        yield Problem("targets", "must be 1 to 10")
    seen: set[str] = set()
    for index, target in enumerate(targets):
        path = f"targets[{index}]"
        named = _PROVIDER_NAME.fullmatch(target.provider)
        if named is None or named[1] not in {None, account}:
            yield Problem(f"{path}.provider", "must be a provider of this account or a shared one")
        elif target.provider in seen:
            yield Problem(f"{path}.provider", "is there twice")
        seen.add(target.provider)
        if target.egress_source:
            yield Problem(f"{path}.egress_source", "must be empty")
        yield from _range_problem(f"{path}.weight", target.weight, 0, 1_000)


def _overlap_problems(parsed: list[tuple[IPv4Network | IPv6Network, str, int]]) -> Iterator[Problem]:
    """Networks lie in each other or apart: in order of begin and length, `around` holds what the next may lie in."""
    around: list[tuple[IPv4Network | IPv6Network, str]] = []
    for network, account, index in sorted(
        parsed, key=lambda entry: (entry[0].version, int(entry[0].network_address), entry[0].prefixlen)
    ):
        while around and not _lies_in(network, around[-1][0]):
            around.pop()
        if around and around[-1] == (network, account):
            yield Problem(f"bindings[{index}].network", "is there twice")
        elif any(other != account for _, other in around):
            yield Problem(f"bindings[{index}].network", "must not overlap another account's")
        around.append((network, account))


def _lies_in(inner: IPv4Network | IPv6Network, outer: IPv4Network | IPv6Network) -> bool:
    if inner.version != outer.version or inner.prefixlen < outer.prefixlen:
        return False
    shift = outer.max_prefixlen - outer.prefixlen
    return int(inner.network_address) >> shift == int(outer.network_address) >> shift
