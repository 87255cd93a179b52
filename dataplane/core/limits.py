"""Limits as plain values, the same for both planes: what one says, what is wrong with it, which bucket it draws from.

Contract. `limit_problems` yields every problem of a limit as field and description, and never raises. `bucket_of` names
the bucket of a limit and a subject: nodes draw from it and the control plane looks at it under the same name. A limit
with a period is a token bucket of `burst` tokens that refills with `rate_per_s`; what costs more than the burst passes
when it is full, and leaves a debt. A limit without a period is a number of connections at once, held as slots.

    scope        subject                         tag (keys of one tag lie on one server of a cluster)
    account      accounts/a                      a:accounts/a
    credential   accounts/a/smtpCredentials/c    a:accounts/a
    address      192.0.2.1, 2001:db8:: (a /64)   ip:192.0.2.1
    provider     (accounts/a/)providers/p        p:accounts/a/providers/p
    destination  mx.example.net                  d:mx.example.net

Accounts own limits of account, credential and their own providers; addresses, destinations and shared providers belong
to everybody, so that only shared limits speak of them.

For a subject and unit one limit counts at most, since all of them would draw from one bucket: the first there is in the
order of `precedence`, then the default of the node pool. Connections at once and connections a period are two kinds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv6Address, ip_address
from typing import NamedTuple

MAX_TOKENS = 4_000_000_000
"""Above it a bucket's level in micro-tokens would be no exact number in Lua, which has doubles only."""

LONGEST_WAIT_S = 3_650 * 86_400.0
"""No answer says more: a debt may take longer, and nobody waits for that."""

LEAST_BURST = 10
LONGEST_PERIOD_S = 31 * 86_400.0
_DAY_S = 86_400.0

_ID = r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?"
_LIMIT_NAME = re.compile(rf"(?:(accounts/{_ID})/)?limits/{_ID}")
_CREDENTIAL = re.compile(rf"(accounts/{_ID})/smtpCredentials/{_ID}")
_PROVIDER = re.compile(rf"(?:(accounts/{_ID})/)?providers/{_ID}")
_HOST = re.compile(r"[a-z0-9_](?:[a-z0-9_.:-]{0,252}[a-z0-9])?")


class LimitScope(IntEnum):
    """Whose mail or connections are counted together; numbers as in postroad.config.v1."""

    ACCOUNT = 1
    CREDENTIAL = 2
    ADDRESS = 3
    PROVIDER = 4
    DESTINATION = 5


class LimitUnit(IntEnum):
    """What is counted; numbers as in postroad.config.v1."""

    MESSAGE = 1
    RECIPIENT = 2
    BYTE = 3
    CONNECTION = 4


@dataclass(frozen=True, slots=True)
class Limit:
    """`amount` tokens a period, or at once where `period_s` is 0. An empty subject: each one by itself."""

    name: str
    scope: LimitScope
    unit: LimitUnit
    amount: int
    period_s: float = 0.0
    burst: int = 0
    subject: str = ""

    @property
    def rate_per_s(self) -> float:
        """Tokens that come back each second; 0 for a number of connections at once."""
        return self.amount / self.period_s if self.period_s else 0.0


class Bucket(NamedTuple):
    """Where a limit is kept: tag and key as in `dataplane.ports.Take`."""

    tag: str
    key: str


def precedence(limit: Limit) -> tuple[bool, bool]:
    """Return what sorts the limits that speak of one subject: the account's before shared ones, named before all."""
    return not limit.name.startswith("accounts/"), not limit.subject


class LimitTable:
    """Limits of one owner by what they speak of, so that a look-up costs the same whatever their number.

    Of several that speak of the same the first counts.
    """

    __slots__ = ("_limits", "_scopes")

    def __init__(self, limits: Sequence[Limit]) -> None:
        self._limits = {(one.scope, one.unit, not one.period_s, one.subject): one for one in reversed(limits)}
        self._scopes = frozenset(limit.scope for limit in limits)

    def speaks_of(self, scope: LimitScope) -> bool:
        """Whether there is any limit of this scope."""
        return scope in self._scopes

    def named(self, scope: LimitScope, unit: LimitUnit, subject: str, *, at_once: bool = False) -> Limit | None:
        """Return the limit that names this subject."""
        return self._limits.get((scope, unit, at_once, subject))

    def find(self, scope: LimitScope, unit: LimitUnit, subject: str, *, at_once: bool = False) -> Limit | None:
        """Return the limit that counts for this subject: one that names it, else one for each."""
        return self.named(scope, unit, subject, at_once=at_once) or self.named(scope, unit, "", at_once=at_once)


NO_LIMITS = LimitTable(())


def counting_limit(
    own: LimitTable, shared: LimitTable, scope: LimitScope, unit: LimitUnit, subject: str, *, at_once: bool = False
) -> Limit | None:
    """Return the limit that counts for a subject, in the order of `precedence`.

    `own` are those of the account that the subject belongs to; `shared` ends with the defaults of the node pool.
    """
    # What an account says of providers in general it says of its own.
    if scope is not LimitScope.PROVIDER or subject.startswith("accounts/"):
        limit = own.find(scope, unit, subject, at_once=at_once)
        if limit is not None:
            return limit
    return shared.find(scope, unit, subject, at_once=at_once)


def default_limit(scope: LimitScope, unit: LimitUnit, amount: int, period_s: float) -> Limit:
    """Return a default of a node pool, which has no name, as a limit."""
    amount = min(amount, MAX_TOKENS)
    return Limit("", scope, unit, amount, period_s, default_burst(amount))


def default_burst(amount: int) -> int:
    """Return a tenth, but ten where the limit allows that many: one would refuse the second of two at once."""
    return max(-(-amount // 10), min(amount, LEAST_BURST))


def bucket_of(scope: LimitScope, unit: LimitUnit, subject: str) -> Bucket:
    """Return the bucket of a subject. `subject` is never empty: who draws says who it is."""
    name = unit.name.lower()
    match scope:
        case LimitScope.ACCOUNT:
            return Bucket(f"a:{subject}", f"account:{name}")
        case LimitScope.CREDENTIAL:
            return Bucket(f"a:{subject.partition('/smtpCredentials/')[0]}", f"credential:{subject}:{name}")
        case LimitScope.ADDRESS:
            return Bucket(f"ip:{subject}", f"address:{name}")
        case LimitScope.PROVIDER:
            return Bucket(f"p:{subject}", f"provider:{name}")
        case LimitScope.DESTINATION:
            return Bucket(f"d:{subject}", f"destination:{name}")


def normalize_address(address: str) -> str:
    """Return the address without zone, and an IPv4 one written as IPv6 as IPv4."""
    address = address.partition("%")[0]
    if ":" in address:
        parsed = ip_address(address)
        if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
    return address


def counting_key(address: str) -> str:
    """Return what connections and mail of this address are counted under: of IPv6 its /64."""
    if ":" not in address:
        return address
    return str(IPv6Address(int(IPv6Address(address)) >> 64 << 64))


def destination_of(host: str) -> str:
    """Return the subject that a host is counted under, in whatever way it is written."""
    try:
        address = ip_address(host)
    except ValueError:
        return host.lower().removesuffix(".")
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return str(address)


def slots_of(scope: LimitScope, subject: str) -> Bucket:
    """Return where connections at once are held; `scope` is PROVIDER or DESTINATION."""
    tag = bucket_of(scope, LimitUnit.CONNECTION, subject).tag
    return Bucket(tag, f"{scope.name.lower()}:slots")


def server_key(tag: str, key: str) -> str:
    """Return the key of a bucket or of slots in Redis; what stands in braces chooses the slot of a cluster."""
    return f"postroad:{{{tag}}}{key}"


def limit_problems(limit: Limit, account: str) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with a limit of `account` (its resource name), empty for a shared one."""
    named = _LIMIT_NAME.fullmatch(limit.name)
    if named is None or (named[1] or "") != account:
        yield "name", "must be accounts/{account}/limits/{limit} or limits/{limit}"
    if not 1 <= limit.amount <= MAX_TOKENS:
        yield "amount", f"must be 1 to {MAX_TOKENS}"
    yield from _owner_problems(limit, account)
    yield from _period_problems(limit)
    if limit.subject and not _is_subject(limit, account):
        yield "subject", "must be one of the scope, and for an account's limit one of this account"


def _owner_problems(limit: Limit, account: str) -> Iterator[tuple[str, str]]:
    shared_only = limit.scope in (LimitScope.ADDRESS, LimitScope.DESTINATION)
    if account and shared_only:
        yield "scope", "must be account, credential or provider: addresses and destinations are everybody's"
    if limit.scope is LimitScope.ACCOUNT and account and limit.subject:
        yield "subject", "must be empty: the limit is its account's"


def _period_problems(limit: Limit) -> Iterator[tuple[str, str]]:
    if not limit.period_s:
        if limit.unit is not LimitUnit.CONNECTION or limit.scope not in (LimitScope.PROVIDER, LimitScope.DESTINATION):
            yield "period", "must be set, but for connections at once to a provider or destination"
        if limit.burst:
            yield "burst", "must be 0 for connections at once"
        return
    if not 1.0 <= limit.period_s <= LONGEST_PERIOD_S:
        yield "period", "must be 1 second to 31 days"
    elif 0 < limit.amount * _DAY_S < limit.period_s:
        # Rates are whole micro-tokens a second: one a month would be none, and an empty bucket be full after a day.
        yield "period", "must be short enough for one a day"
    if not 1 <= limit.burst <= limit.amount:
        yield "burst", "must be 1 to the amount"
    if limit.unit is LimitUnit.CONNECTION and limit.scope in (LimitScope.ACCOUNT, LimitScope.CREDENTIAL):
        yield "unit", "must not be connection: who a connection belongs to is known too late to refuse it"


def _is_subject(limit: Limit, account: str) -> bool:
    subject = limit.subject
    match limit.scope:
        case LimitScope.ACCOUNT:
            return not account and bool(re.fullmatch(rf"accounts/{_ID}", subject))
        case LimitScope.CREDENTIAL:
            found = _CREDENTIAL.fullmatch(subject)
            return found is not None and account in ("", found[1])
        case LimitScope.PROVIDER:
            found = _PROVIDER.fullmatch(subject)
            return found is not None and account in ("", found[1])
        case LimitScope.ADDRESS:
            return _is_counted_address(subject)
        case LimitScope.DESTINATION:
            return _HOST.fullmatch(subject) is not None and destination_of(subject) == subject


def _is_counted_address(text: str) -> bool:
    """Whether it is an address as connections are counted: IPv4, or the first of an IPv6 /64."""
    try:
        parsed = ip_address(text)
    except ValueError:
        return False
    if isinstance(parsed, IPv6Address) and int(parsed) & (2**64 - 1):
        return False
    return str(parsed) == text
