"""Which token buckets a message that is sent by API draws from: those of an SMTP submission, as far as they exist here.

Contract. Plain values. `SendingLimits` holds the limits of an account and of its node pool; which of several counts is
said in `dataplane.core.limits`. The requests of an API key are counted elsewhere, before anything of a call is read.

    scope      units                       drawn from
    account    message, recipient, byte    by each message
    address    message, recipient, byte    by each message, under the address that the call came from
    others     —                           not: there is no credential, and no connection is opened for a message
"""

from __future__ import annotations

from typing import NamedTuple

from dataplane.core.config import Account, NodeSettings
from dataplane.core.limits import (
    Limit,
    LimitScope,
    LimitTable,
    LimitUnit,
    bucket_of,
    counting_key,
    counting_limit,
    default_limit,
)

_HOUR_S = 3_600.0


class Take(NamedTuple):
    """Tokens wanted of a bucket; tag and key as in `dataplane.core.limits`, the rate in tokens a second."""

    tag: str
    key: str
    capacity: int
    rate_per_s: float
    cost: int


class SendingLimits:
    """See the module."""

    __slots__ = ("_name", "_of_account", "_shared")

    def __init__(self, account: Account, settings: NodeSettings) -> None:
        defaults: tuple[Limit, ...] = ()
        if settings.account_messages_per_hour:
            amount = settings.account_messages_per_hour
            defaults = (default_limit(LimitScope.ACCOUNT, LimitUnit.MESSAGE, amount, _HOUR_S),)
        self._name = account.name
        self._shared = LimitTable((*settings.limits, *defaults))
        own = LimitTable(account.limits)
        self._of_account = {
            unit: counting_limit(own, self._shared, LimitScope.ACCOUNT, unit, account.name)
            for unit in (LimitUnit.MESSAGE, LimitUnit.RECIPIENT, LimitUnit.BYTE)
        }

    def takes(self, address: str, recipient_count: int, size_bytes: int) -> tuple[Take, ...]:
        """Return what a message takes; all or nothing of it is granted."""
        costs = {LimitUnit.MESSAGE: 1, LimitUnit.RECIPIENT: recipient_count, LimitUnit.BYTE: size_bytes}
        takes = [_take(limit, self._name, costs[unit]) for unit, limit in self._of_account.items() if limit]
        if self._shared.speaks_of(LimitScope.ADDRESS):
            counted = counting_key(address)
            for unit, cost in costs.items():
                limit = self._shared.find(LimitScope.ADDRESS, unit, counted)
                if limit is not None:
                    takes.append(_take(limit, counted, cost))
        return tuple(takes)


def _take(limit: Limit, subject: str, cost: int) -> Take:
    tag, key = bucket_of(limit.scope, limit.unit, subject)
    return Take(tag, key, limit.burst, limit.rate_per_s, cost)
