"""Which hosts the outside may make us connect to (SSRF): public addresses, and what the deployment allows.

Contract. `HostPolicy(allowed)` says of an address whether it may be connected to; of a host in a configuration what is
wrong with it as far as that can be known without DNS. Names are resolved where the connection is made, once, and every
address is checked there with `permits`. Addresses that carry others inside (IPv4-mapped, 6to4, NAT64) are judged by
what they carry.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

_NAT64 = (IPv6Network("64:ff9b::/96"), IPv6Network("64:ff9b:1::/48"))
_LOCAL_NAMES = ("localhost", "localhost.localdomain", "ip6-localhost")


class HostPolicy:
    """Public addresses, and those in `allowed`."""

    def __init__(self, allowed: Iterable[IPv4Network | IPv6Network] = ()) -> None:
        self._allowed = tuple(allowed)

    def permits(self, address: str) -> bool:
        """Whether to connect to this literal address; False for what is none."""
        try:
            value = ip_address(address.partition("%")[0])
        except ValueError:
            return False
        carried = _carried(value)
        if any(value in network for network in self._allowed):
            return True
        if carried is not None:
            return self.permits(str(carried))
        return value.is_global and not value.is_multicast

    def problem(self, host: str) -> str:
        """Return what is wrong with a configured host; empty when only DNS can tell."""
        try:
            ip_address(host)
        except ValueError:
            local = host.rstrip(".").lower() in _LOCAL_NAMES and not self.permits("127.0.0.1")
            return "is a name of this machine" if local else ""
        return "" if self.permits(host) else "is not a public address, and allowed_private_networks does not list it"


def _carried(value: IPv4Address | IPv6Address) -> IPv4Address | None:
    if isinstance(value, IPv4Address):
        return None
    if any(value in network for network in _NAT64):
        return IPv4Address(int(value) & 0xFFFFFFFF)
    return value.ipv4_mapped or value.sixtofour
