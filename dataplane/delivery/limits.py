"""What delivery asks of the limiter: before an attempt, before dialling, and for as long as a connection is open.

Contract. `DeliveryLimits` knows, for a provider and the host that a connection goes to, which limits count; they are
compiled once for each configuration. Where there are none nobody is asked, and nothing waits.

    asked                 of                            refused
    before an attempt     message, recipient, byte      the message waits with its provider, no attempt is counted
    before dialling       connection a period           no connection is opened until then
    while it is open      connections at once, as       not opened; a renewal that is refused lets the connection close
                          slots of SLOT_TTL_S           after its message

Slots are renewed at a third of their time and given back at the end, so that those of a worker that dies end by
themselves. Tokens of an attempt stay taken whatever becomes of it: the provider has seen it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import NamedTuple

from dataplane.core.config import NodeSettings, SmtpProvider
from dataplane.core.limits import (
    NO_LIMITS,
    Limit,
    LimitScope,
    LimitTable,
    LimitUnit,
    bucket_of,
    counting_limit,
    destination_of,
    slots_of,
)
from dataplane.core.policy import CompiledAccount
from dataplane.ports import ConfigView, EventLog, Grant, Limiter, Slot, Take

SLOT_TTL_S = 60.0
_MAX_COMPILED = 10_000


class LimitedError(Exception):
    """A connection may not be opened now; in `wait_s` seconds it makes sense to ask again."""

    def __init__(self, grant: Grant) -> None:
        super().__init__(grant.refused_key)
        self.wait_s = grant.wait_s


class _Compiled(NamedTuple):
    """What counts for a provider and a host: takes with a cost of one, slots as limit and bucket."""

    per_message: tuple[Take, ...]
    per_recipient: tuple[Take, ...]
    per_byte: tuple[Take, ...]
    per_connection: tuple[Take, ...]
    at_once: tuple[tuple[int, str, str], ...]


class _Kept(NamedTuple):
    provider: SmtpProvider
    settings: NodeSettings
    owner: CompiledAccount | None
    compiled: _Compiled


class Lease:
    """Slots of one connection; `lost` when somebody else has them now."""

    __slots__ = ("_limits", "lost", "slots")

    def __init__(self, limits: DeliveryLimits, slots: tuple[Slot, ...]) -> None:
        self._limits = limits
        self.slots = slots
        self.lost = False

    def release(self) -> None:
        """The connection is closed."""
        self._limits.release(self)


class DeliveryLimits:
    """See the module. `holder` names the worker among all of the fleet."""

    def __init__(self, limiter: Limiter, config: ConfigView, holder: str, log: EventLog) -> None:
        self._limiter = limiter
        self._config = config
        self._holder = holder
        self._log = log
        self._shared_for: NodeSettings | None = None
        self._shared = NO_LIMITS
        self._kept: dict[tuple[str, str], _Kept] = {}
        self._leases: set[Lease] = set()
        self._lease_count = 0
        self._timer: asyncio.TimerHandle | None = None
        self._renewal: asyncio.Task[None] | None = None

    # --- before an attempt

    def takes(self, provider: SmtpProvider, host: str, recipient_count: int, size_bytes: int) -> tuple[Take, ...]:
        """Return what an attempt takes; empty when there is nobody to ask."""
        compiled = self._compiled(provider, host)
        if not compiled.per_recipient and not compiled.per_byte:
            return compiled.per_message
        return (
            *compiled.per_message,
            *[Take(*one[:4], recipient_count) for one in compiled.per_recipient],
            *[Take(*one[:4], max(1, size_bytes)) for one in compiled.per_byte],
        )

    def ask(self, takes: tuple[Take, ...], answer: Callable[[asyncio.Future[Grant]], None]) -> None:
        """Ask; `answer` is called on a later turn of the loop."""
        self._limiter.ask(takes).add_done_callback(answer)

    def refund(self, takes: tuple[Take, ...]) -> None:
        """The attempt did not begin."""
        self._limiter.refund(takes)

    # --- connections

    async def connect(self, provider: SmtpProvider, host: str) -> Lease | None:
        """Ask for one more connection to a host; LimitedError. Cancelled: nothing stays taken."""
        compiled = self._compiled(provider, host)
        if not compiled.per_connection and not compiled.at_once:
            return None
        self._lease_count += 1
        holder = f"{self._holder}:{self._lease_count}"
        slots = tuple(Slot(key, tag, count, SLOT_TTL_S, holder) for count, tag, key in compiled.at_once)
        held = await self._limiter.hold(slots)
        if not held.allowed:
            raise LimitedError(held)
        lease = Lease(self, slots)
        try:
            taken = await self._limiter.take(compiled.per_connection)
        except BaseException:
            lease.release()
            raise
        if not taken.allowed:
            lease.release()
            raise LimitedError(taken)
        if slots:
            self._leases.add(lease)
            self._renew_later()
        return lease

    def release(self, lease: Lease) -> None:
        """Give back what a connection held."""
        self._leases.discard(lease)
        if lease.slots:
            self._limiter.release(lease.slots)

    def close(self) -> None:
        """Renew nothing any more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._renewal is not None:
            self._renewal.cancel()

    def _renew_later(self) -> None:
        if self._timer is None and self._leases:
            self._timer = asyncio.get_running_loop().call_later(SLOT_TTL_S / 3, self._renew)

    def _renew(self) -> None:
        self._timer = None
        self._renewal = asyncio.get_running_loop().create_task(self.renew_all())

    async def renew_all(self) -> None:
        """Hold every slot for its full time again."""
        leases = list(self._leases)
        grants = await asyncio.gather(*(self._limiter.hold(lease.slots) for lease in leases))
        for lease, grant in zip(leases, grants, strict=True):
            if lease not in self._leases:
                # Closed meanwhile: what the renewal may have taken after the release is given back.
                self._limiter.release(lease.slots)
            elif not grant.allowed:
                lease.lost = True
                self._leases.discard(lease)
                self._log.info("delivery.slot_lost", bucket=grant.refused_key)
        self._renew_later()

    # --- what counts

    def _compiled(self, provider: SmtpProvider, host: str) -> _Compiled:
        config = self._config
        settings = config.settings
        owner = config.account(provider.account) if provider.account else None
        kept = self._kept.get((provider.name, host))
        if (
            kept is not None
            and kept.provider is provider
            and kept.settings is settings
            and (kept.owner is owner or _limits_of(kept.owner) == _limits_of(owner))
        ):
            return kept.compiled
        if settings is not self._shared_for:
            self._shared_for = settings
            self._shared = LimitTable(settings.limits)
        if len(self._kept) >= _MAX_COMPILED:
            self._kept.clear()
        compiled = self._compile(provider.name, destination_of(host), LimitTable(_limits_of(owner)))
        self._kept[provider.name, host] = _Kept(provider, settings, owner, compiled)
        return compiled

    def _compile(self, provider: str, host: str, own: LimitTable) -> _Compiled:
        subjects = ((LimitScope.PROVIDER, provider), (LimitScope.DESTINATION, host))

        def found(unit: LimitUnit, *, at_once: bool = False) -> Iterable[tuple[Limit, str]]:
            for scope, subject in subjects:
                limit = counting_limit(own, self._shared, scope, unit, subject, at_once=at_once)
                if limit is not None:
                    yield limit, subject

        def takes(unit: LimitUnit) -> tuple[Take, ...]:
            return tuple(_take(limit, subject) for limit, subject in found(unit))

        at_once = [
            (limit.amount, *slots_of(limit.scope, subject))
            for limit, subject in found(LimitUnit.CONNECTION, at_once=True)
        ]
        return _Compiled(
            takes(LimitUnit.MESSAGE),
            takes(LimitUnit.RECIPIENT),
            takes(LimitUnit.BYTE),
            takes(LimitUnit.CONNECTION),
            tuple(at_once),
        )


def _limits_of(account: CompiledAccount | None) -> tuple[Limit, ...]:
    return account.account.limits if account is not None else ()


def _take(limit: Limit, subject: str) -> Take:
    tag, key = bucket_of(limit.scope, limit.unit, subject)
    return Take(key, tag, limit.burst, limit.rate_per_s, 1)
