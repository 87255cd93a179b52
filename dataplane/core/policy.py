"""What an account may do, decided from memory: sender domains, credentials, denials and networks.

Contract. `compile_account` and `compile_networks` take configuration that was validated and return values whose
look-ups cost the same whatever their size; they keep no reference to a clock: times are arguments, in milliseconds
since 1970. Nothing raises, except that `compile_networks` passes on the ValueError of a malformed network.

A denial speaks for an account, a credential, a provider or a destination until it falls away by itself; who asks must
ask anew at each MAIL and before each attempt, with the denials of that moment.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address, ip_network

from dataplane.core.config import Account, Credential, Denials
from dataplane.core.routing import CompiledRules, address_patterns, compile_rules

# Compared when there is no credential of that name, so that a wrong name takes the same way as a wrong secret.
_NO_SECRET = bytes(32)

_MAX_FOUND = 4_096


class Denied(Enum):
    """Which denial stops a transaction or an attempt."""

    ACCOUNT = "account"
    CREDENTIAL = "credential"
    PROVIDER = "provider"


@dataclass(frozen=True, slots=True)
class CompiledAccount:
    """An account ready for the hot path; immutable, so that a transaction or an attempt can pin it."""

    account: Account
    rules: CompiledRules
    _exact_domains: frozenset[str]
    _parent_domains: frozenset[str]

    def owns_sender_domain(self, domain: str) -> bool:
        """Whether the account may send as `domain` (lower case, A-labels)."""
        if domain in self._exact_domains:
            return True
        if self._parent_domains:
            dot = domain.find(".")
            while dot >= 0:
                if domain[dot + 1 :] in self._parent_domains:
                    return True
                dot = domain.find(".", dot + 1)
        return False

    def owns_sender_domains(self, domains: Iterable[str]) -> bool:
        """Whether the account may send as every one of `domains`."""
        return all(self.owns_sender_domain(domain) for domain in domains)

    def credential(self, name: str) -> Credential | None:
        """Return the credential with this resource name."""
        return self.account.credentials.get(name)


def compile_account(account: Account) -> CompiledAccount:
    """Return the account ready for use."""
    return CompiledAccount(
        account=account,
        rules=compile_rules(account.rules),
        _exact_domains=frozenset(name for name in account.sender_domains if not name.startswith("*.")),
        _parent_domains=frozenset(name[2:] for name in account.sender_domains if name.startswith("*.")),
    )


def split_username(username: str) -> tuple[str, str]:
    """Return the resource names of account and credential that the user name `{account}.{credential}` stands for.

    Ids hold no dot, so the first one parts them; a name without one stands for a credential that cannot exist.
    """
    account, _, credential = username.partition(".")
    return f"accounts/{account}", f"accounts/{account}/smtpCredentials/{credential}"


def secret_matches(credential: Credential | None, secret: str | bytes, now_ms: int) -> bool:
    """Whether `secret` opens the credential now. Takes the same way and time for one that does not exist."""
    data = secret.encode("utf-8", "surrogatepass") if isinstance(secret, str) else secret
    expected = credential.secret_sha256 if credential is not None else _NO_SECRET
    equal = hmac.compare_digest(hashlib.sha256(data).digest(), expected)
    return equal and credential is not None and (credential.expire_ms == 0 or now_ms < credential.expire_ms)


def denied(
    denials: Denials, account: str, credential: str, now_ms: int, *, provider: str = "", accepted_ms: int = 0
) -> Denied | None:
    """Return what denies a transaction or an attempt now. An empty credential or provider is not asked for.

    An attempt gives `accepted_ms`, when its message was accepted: a denied credential stops only what it submitted
    from the beginning of the denial on. A transaction leaves it 0.
    """
    if is_denied(denials.accounts, account, now_ms):
        return Denied.ACCOUNT
    if credential and is_denied(denials.credentials, credential, now_ms):
        since_ms = denials.credentials_since.get(credential, 0)
        if not accepted_ms or accepted_ms >= since_ms:
            return Denied.CREDENTIAL
    if provider and is_denied(denials.providers, provider, now_ms):
        return Denied.PROVIDER
    return None


def is_suspended(denials: Denials, account: str, credential: str, now_ms: int) -> bool:
    """Whether what keeps a client from sending is a suspension, which passes: an account's, or a credential's.

    A credential that is suspended is denied until it is lifted; one that was revoked, for as long as some configuration
    may still have it.
    """
    return is_denied(denials.accounts, account, now_ms) or denials.credentials.get(credential) == 0


def destination_denied(denials: Denials, account: str, address: str, now_ms: int) -> bool:
    """Whether mail of the account to this address must wait now.

    Its domain is denied, or with `*.` one that it is below; to this account, or to all.
    """
    names = denials.destinations
    if not names:
        return False
    for pattern in address_patterns(address)[1:]:
        destination = f"destinations/{pattern.removeprefix('@')}"
        if is_denied(names, destination, now_ms) or is_denied(names, f"{account}/{destination}", now_ms):
            return True
    return False


def is_denied(names: dict[str, int], name: str, now_ms: int) -> bool:
    """Whether `name` is denied now; a denial whose time has come no longer counts."""
    expire_ms = names.get(name)
    return expire_ms is not None and (expire_ms == 0 or now_ms < expire_ms)


class NetworkTable:
    """Accounts by network; the longest prefix that holds an address decides. Answers are remembered: asked per MAIL."""

    __slots__ = ("_by_prefix", "_found", "_prefixes")

    def __init__(self, bindings: Sequence[tuple[IPv4Network | IPv6Network, str]]) -> None:
        self._by_prefix: dict[tuple[int, int, int], str] = {}
        self._found: dict[str, str | None] = {}
        for network, account in bindings:
            key = (network.version, network.prefixlen, int(network.network_address))
            self._by_prefix[key] = account
        prefixes: dict[int, set[int]] = {4: set(), 6: set()}
        for version, length, _ in self._by_prefix:
            prefixes[version].add(length)
        self._prefixes = {version: sorted(lengths, reverse=True) for version, lengths in prefixes.items()}

    def lookup(self, address: str) -> str | None:
        """Return the account bound to the network of `address`; None as well for what is no address.

        An IPv4 address written as IPv6 (`::ffff:192.0.2.1`) is looked up as IPv4; a zone (`%eth0`) is ignored.
        """
        if not self._by_prefix:
            return None
        if address in self._found:
            return self._found[address]
        if len(self._found) >= _MAX_FOUND:
            self._found.clear()
        self._found[address] = account = self._search(address)
        return account

    def _search(self, address: str) -> str | None:
        try:
            parsed = ip_address(address.partition("%")[0])
        except ValueError:
            return None
        if not isinstance(parsed, IPv4Address):
            parsed = parsed.ipv4_mapped or parsed
        number, bits = int(parsed), parsed.max_prefixlen
        for length in self._prefixes[parsed.version]:
            shift = bits - length
            account = self._by_prefix.get((parsed.version, length, number >> shift << shift))
            if account is not None:
                return account
        return None


def compile_networks(bindings: Iterable[tuple[str, str]]) -> NetworkTable:
    """Return the table for pairs of network (CIDR) and account name. ValueError for a malformed network."""
    return NetworkTable([(ip_network(network), account) for network, account in bindings])
