"""Which token buckets a connection and a message draw from, by the settings of the node's pool.

Contract. Pure functions from settings to wishes; a limit of 0 means none, and then there is nothing to ask. Buckets
hold a tenth of an hour's (or a minute's) limit as burst, but ten at least where the limit allows that many: a bucket of
one would refuse the second of two connections that a client opens at once.

    bucket       unit          tag            key
    address      connections   ip:<address>   connections
    account      messages      a:<account>    messages
    credential   messages      a:<account>    messages:<credential>
"""

from __future__ import annotations

from dataplane.core.config import NodeSettings
from dataplane.ports import Take

_HOUR_S = 3600.0
_MINUTE_S = 60.0
_LEAST_BURST = 10


def connection_takes(settings: NodeSettings, address: str) -> tuple[Take, ...]:
    """Return what opening a connection from this address (as it is counted) takes."""
    limit = settings.address_connections_per_minute
    return (_take("connections", f"ip:{address}", limit, _MINUTE_S),) if limit else ()


def message_takes(settings: NodeSettings, account: str, credential: str) -> tuple[Take, ...]:
    """Return what a message takes; `credential` is empty for a client that is known by its network."""
    takes: list[Take] = []
    tag = f"a:{account}"
    if settings.account_messages_per_hour:
        takes.append(_take("messages", tag, settings.account_messages_per_hour, _HOUR_S))
    if credential and settings.credential_messages_per_hour:
        takes.append(_take(f"messages:{credential}", tag, settings.credential_messages_per_hour, _HOUR_S))
    return tuple(takes)


def _take(key: str, tag: str, limit: int, period_s: float) -> Take:
    burst = max(-(-limit // 10), min(limit, _LEAST_BURST))
    return Take(key, tag, burst, limit / period_s, 1)
