"""Names of next hops to addresses that may be dialled: each one checked, and only what was checked is handed out.

Fills `ports.Resolver`. A name is asked of DNS (A and AAAA at once, search list and time limit of the system's
configuration); names without a dot, and names that DNS does not know, are asked of the operating system, which knows
its hosts file. A literal is checked like an answer. What is not on the public internet is forbidden, however it is
written or embedded, unless a network of the node's settings allows it; one forbidden address among many forbids the
name, since a name that mixes them is a trap. Who dials gets addresses and never a name, so that a second answer
cannot be another one.

LookupError for a name without addresses, PermissionError for a forbidden one, OSError where no answer could be had.
Concurrent questions for one name are one question; an answer is kept for CACHE_S. A caller that is cancelled leaves the
question to the others.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

import dns.asyncresolver
import dns.exception
import dns.rdatatype
import dns.resolver

from dataplane.ports import Clock

CACHE_S = 30.0
CACHE_LIMIT = 4_096
LOOKUP_TIMEOUT_S = 20.0
MAX_ADDRESSES = 16

Lookup = Callable[[str], Awaitable[list[str]]]

_FORBIDDEN = tuple(
    ip_network(network)
    for network in (
        "0.0.0.0/8",  # this network (RFC 791)
        "10.0.0.0/8",  # private (RFC 1918)
        "100.64.0.0/10",  # carrier-grade NAT (RFC 6598)
        "127.0.0.0/8",  # loopback
        "169.254.0.0/16",  # link-local (RFC 3927), metadata services
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments (RFC 6890)
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays (RFC 7526)
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarking (RFC 2544)
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
        "::/96",  # unspecified, loopback, IPv4-compatible
        "::ffff:0:0:0/96",  # IPv4-translated (RFC 2765)
        "64:ff9b::/96",  # NAT64 (RFC 6052): any IPv4 address behind the translator
        "64:ff9b:1::/48",  # NAT64, local use (RFC 8215)
        "100::/64",  # discard (RFC 6666)
        "2001::/23",  # Teredo, ORCHID, benchmarking and other assignments
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4 (RFC 3056): any IPv4 address
        "3fff::/20",  # documentation (RFC 9637)
        "5f00::/16",  # segment routing (RFC 9602)
        "fc00::/7",  # unique local
        "fe80::/10",  # link-local
        "fec0::/10",  # site-local
        "ff00::/8",  # multicast
    )
)
_MAPPED = IPv6Network("::ffff:0:0/96")


def may_dial(address: IPv4Address | IPv6Address, allowed: Sequence[str]) -> bool:
    """Whether mail may be sent to this address; `allowed` are networks of the deployment that may be."""
    if isinstance(address, IPv6Address) and address in _MAPPED:
        return may_dial(IPv4Address(int(address) & 0xFFFFFFFF), allowed)
    if any(address in ip_network(network) for network in allowed):
        return True
    return not any(address in network for network in _FORBIDDEN)


class CheckingResolver:
    """`ports.Resolver`. `allowed_networks` are CIDR; ValueError for one that is none."""

    def __init__(
        self,
        clock: Clock,
        allowed_networks: Sequence[str] = (),
        *,
        dns_lookup: Lookup | None = None,
        system_lookup: Lookup | None = None,
    ) -> None:
        self._clock = clock
        self._allowed = tuple(str(ip_network(network)) for network in allowed_networks)
        self._dns = dns_lookup or _ask_dns
        self._system = system_lookup or _ask_system
        self._cache: dict[str, tuple[float, list[str]]] = {}
        self._asking: dict[str, asyncio.Task[list[str]]] = {}

    async def addresses(self, host: str) -> list[str]:
        """See `ports.Resolver`."""
        try:
            found = [str(ip_address(host))]
        except ValueError:
            found = await self._resolve(host.lower().removesuffix("."))
        if not found:
            raise LookupError("no address")
        for text in found:
            if "%" in text or not may_dial(ip_address(text), self._allowed):
                raise PermissionError(f"{text} may not be dialled")
        return found

    async def _resolve(self, name: str) -> list[str]:
        known = self._cache.get(name)
        if known is not None and self._clock.monotonic() < known[0]:
            return known[1]
        task = self._asking.get(name)
        if task is None:
            task = self._asking[name] = asyncio.get_running_loop().create_task(self._ask(name))
            task.add_done_callback(lambda _: self._asking.pop(name, None))
        return await asyncio.shield(task)

    async def _ask(self, name: str) -> list[str]:
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S):
                found = await self._dns(name) if "." in name else []
                found = found or await self._system(name)
        except TimeoutError:
            raise OSError("no answer within the time allowed") from None
        found = list(dict.fromkeys(found))[:MAX_ADDRESSES]
        if found:
            if len(self._cache) >= CACHE_LIMIT:
                self._cache.clear()
            self._cache[name] = (self._clock.monotonic() + CACHE_S, found)
        return found


async def _ask_dns(name: str) -> list[str]:
    """Addresses by DNS, IPv6 first as the system would order them; none for a name that does not exist."""
    kinds = (dns.rdatatype.AAAA, dns.rdatatype.A)
    answers = await asyncio.gather(*(_ask_kind(name, kind) for kind in kinds), return_exceptions=True)
    found: list[str] = []
    failure: BaseException | None = None
    for answer in answers:
        if isinstance(answer, BaseException):
            failure = answer
        else:
            found += answer
    if failure is not None and not found:
        raise OSError("DNS gave no answer") from failure
    return found


async def _ask_kind(name: str, kind: dns.rdatatype.RdataType) -> list[str]:
    try:
        answer = await dns.asyncresolver.resolve(name, kind, lifetime=LOOKUP_TIMEOUT_S / 2)
    except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
        return []
    return [record.to_text() for record in answer]


async def _ask_system(name: str) -> list[str]:
    """Addresses by the operating system; none for a name that it does not know."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)):
            return []
        raise
    except UnicodeError:
        return []  # a label that IDNA refuses names no host
    return [str(entry[4][0]) for entry in found]
