"""Which token buckets a connection and a message draw from: limits of the account, shared ones, defaults of the pool.

Contract. `IngressLimits` compiles the limits of an account and credential once for each configuration and keeps the
result (bounded); a message without limits on recipients or octets asks for the same tuple each time. Which of several
limits counts is said in `core/limits`; an amount of 0 in the pool's settings means none, and then there is nothing to
ask.

    scope       units                       drawn from
    address     connection                  when a connection is opened; not by networks bound to an account, unless a
                                            limit names the address
    address     message, recipient, byte    at DATA, with the same exception
    account     message, recipient, byte    at DATA
    credential  message, recipient, byte    at DATA, where there is one

Octets are those that SIZE declares. Without SIZE, and where it was wrong, the difference is settled when the message
is accepted: what is missing is taken then whatever is left, since the content is here already, and leaves a debt. A
bucket that is empty lets no content come, declared or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from dataplane.core.config import NodeSettings
from dataplane.core.limits import (
    NO_LIMITS,
    Limit,
    LimitScope,
    LimitTable,
    LimitUnit,
    bucket_of,
    counting_limit,
    default_limit,
)
from dataplane.core.policy import CompiledAccount
from dataplane.ports import Take

_HOUR_S = 3600.0
_MINUTE_S = 60.0
_MAX_COMPILED = 10_000
_UNITS = (LimitUnit.MESSAGE, LimitUnit.RECIPIENT, LimitUnit.BYTE)


class MessageLimits(NamedTuple):
    """What a message draws from; those of recipients and octets with a cost of one."""

    per_message: tuple[Take, ...] = ()
    per_recipient: tuple[Take, ...] = ()
    per_byte: tuple[Take, ...] = ()

    def takes(self, recipient_count: int, declared_bytes: int) -> tuple[Take, ...]:
        """Return what the limiter must be asked for; what is counted in octets stands at the end."""
        if not self.per_recipient and not self.per_byte:
            return self.per_message
        size = declared_bytes or 1
        return (
            *self.per_message,
            *[Take(*one[:4], recipient_count) for one in self.per_recipient],
            *[Take(*one[:4], size) for one in self.per_byte],
        )


class Permit(NamedTuple):
    """What was granted for a message: all of it, and the part that is counted in octets."""

    takes: tuple[Take, ...]
    byte_takes: tuple[Take, ...]

    def difference(self, size_bytes: int) -> list[Take]:
        """Return what to give back now that the size is known; a negative cost is what was used beyond."""
        return [Take(*take[:4], take.cost - size_bytes) for take in self.byte_takes if take.cost != size_bytes]


class IngressLimits:
    """See the module. One for a worker; whoever asks gives the configuration of that moment."""

    def __init__(self) -> None:
        self._settings: NodeSettings | None = None
        self._shared = NO_LIMITS
        self._compiled: dict[tuple[str, str], tuple[CompiledAccount, MessageLimits]] = {}

    def of_connection(self, settings: NodeSettings, address: str, *, listed: bool) -> tuple[Take, ...]:
        """Return what opening a connection takes; `address` as it is counted, `listed` if bound to an account."""
        shared = self._use(settings)
        found = shared.named if listed else shared.find
        limit = found(LimitScope.ADDRESS, LimitUnit.CONNECTION, address)
        return (_take(limit, address),) if limit is not None else ()

    def of_message(
        self, settings: NodeSettings, compiled: CompiledAccount, credential: str, address: str, *, listed: bool
    ) -> MessageLimits:
        """Return what a message takes; `credential` is empty for a client that is known by its network."""
        shared = self._use(settings)
        name = compiled.account.name
        kept = self._compiled.get((name, credential))
        if kept is None or kept[0] is not compiled:
            if len(self._compiled) >= _MAX_COMPILED:
                self._compiled.clear()
            kept = self._compiled[name, credential] = compiled, self._compile(compiled, credential)
        if not shared.speaks_of(LimitScope.ADDRESS):
            return kept[1]
        return _joined(kept[1], self._of_address(address, listed=listed))

    def _use(self, settings: NodeSettings) -> LimitTable:
        if settings is not self._settings:
            self._settings = settings
            self._shared = LimitTable((*settings.limits, *_defaults(settings)))
            self._compiled.clear()
        return self._shared

    def _compile(self, compiled: CompiledAccount, credential: str) -> MessageLimits:
        account = compiled.account
        own = LimitTable(account.limits)
        subjects = [(LimitScope.ACCOUNT, account.name)]
        if credential:
            subjects.append((LimitScope.CREDENTIAL, credential))
        parts: dict[LimitUnit, list[Take]] = {unit: [] for unit in _UNITS}
        for unit, takes in parts.items():
            for scope, subject in subjects:
                limit = counting_limit(own, self._shared, scope, unit, subject)
                if limit is not None:
                    takes.append(_take(limit, subject))
        return MessageLimits(*map(tuple, parts.values()))

    def _of_address(self, address: str, *, listed: bool) -> MessageLimits:
        found = self._shared.named if listed else self._shared.find
        limits = [found(LimitScope.ADDRESS, unit, address) for unit in _UNITS]
        return MessageLimits(*[(_take(limit, address),) if limit is not None else () for limit in limits])


def _defaults(settings: NodeSettings) -> Iterator[Limit]:
    rows = (
        (LimitScope.ACCOUNT, LimitUnit.MESSAGE, settings.account_messages_per_hour, _HOUR_S),
        (LimitScope.CREDENTIAL, LimitUnit.MESSAGE, settings.credential_messages_per_hour, _HOUR_S),
        (LimitScope.ADDRESS, LimitUnit.CONNECTION, settings.address_connections_per_minute, _MINUTE_S),
    )
    for scope, unit, amount, period_s in rows:
        if amount:
            yield default_limit(scope, unit, amount, period_s)


def _take(limit: Limit, subject: str) -> Take:
    tag, key = bucket_of(limit.scope, limit.unit, subject)
    return Take(key, tag, limit.burst, limit.rate_per_s, 1)


def _joined(one: MessageLimits, other: MessageLimits) -> MessageLimits:
    if not any(other):
        return one
    return MessageLimits(
        one.per_message + other.per_message,
        one.per_recipient + other.per_recipient,
        one.per_byte + other.per_byte,
    )
