"""Limits as resources: how much may pass, which of several counts, what is left of it.

Contract. Pure values and functions. `config_of` is a limit as nodes see it; `own_problems` yields what is wrong with
one by itself. `effective` returns what holds for an account, out of its own limits, shared ones and the defaults of its
node pool: for a subject and unit the first there is, as `dataplane.core.limits` orders them. `look_of` says which
bucket or slots to look at for a subject.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from controlplane.domain import names
from controlplane.domain.masks import Field, Fields
from controlplane.domain.resources import Meta
from dataplane.core import limits as core
from dataplane.core.config import NodeSettings
from dataplane.core.limits import LimitScope, LimitUnit

MAX_SUBJECTS = 100
"""So many subjects of a limit that names none are looked at."""

_HOUR_S, _MINUTE_S = 3_600.0, 60.0


class LimitOrigin(IntEnum):
    """Numbers as in postroad.control.v1.Limit.Origin."""

    ACCOUNT = 1
    SHARED = 2
    DEFAULT = 3


class SubjectState(NamedTuple):
    """What is left for one subject: whole tokens or free places; seconds are None where nothing comes back."""

    subject: str
    available: int
    used: int
    capacity: int
    next_s: float | None = None
    full_s: float | None = None


@dataclass(frozen=True, slots=True)
class LimitState:
    """What is left of a limit; `reason` says why that is not known."""

    known: bool
    reason: str = ""
    subjects: tuple[SubjectState, ...] = ()
    more: bool = False


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit; `account` is None for a shared one, `limit` empty for a default.

    `scope` and `unit` are None when a caller sent none. `period_s` of 0: at once. `burst` of 0: the default.
    """

    account: str | None
    limit: str
    display_name: str = ""
    scope: LimitScope | None = None
    subject: str = ""
    unit: LimitUnit | None = None
    amount: int = 0
    period_s: float = 0.0
    burst: int = 0
    meta: Meta = field(default_factory=Meta)


LIMIT_FIELDS = Fields(
    {
        "display_name": Field("display_name"),
        "scope": Field("scope"),
        "subject": Field("subject"),
        "unit": Field("unit"),
        "amount": Field("amount"),
        "period": Field("period_s"),
        "burst": Field("burst"),
    },
    frozenset({"name", "uid", "origin", "state", "create_time", "update_time", "etag"}),
)


class Look(NamedTuple):
    """Where a limit is kept for a subject. `rate_per_s` of 0: slots."""

    tag: str
    key: str
    capacity: int
    rate_per_s: float


def name_of(limit: Limit) -> str:
    """Return the full name; empty for a default."""
    return names.limit_name(limit.account, limit.limit) if limit.limit else ""


def origin_of(limit: Limit) -> LimitOrigin:
    """Return where a limit comes from."""
    if not limit.limit:
        return LimitOrigin.DEFAULT
    return LimitOrigin.SHARED if limit.account is None else LimitOrigin.ACCOUNT


def config_of(limit: Limit) -> core.Limit:
    """Return a limit as nodes see it, with the burst filled in. ValueError without scope or unit."""
    if limit.scope is None or limit.unit is None:
        raise ValueError("a limit without scope or unit")
    burst = (limit.burst or core.default_burst(limit.amount)) if limit.period_s else limit.burst
    return core.Limit(
        name=name_of(limit),
        scope=limit.scope,
        unit=limit.unit,
        amount=limit.amount,
        period_s=limit.period_s,
        burst=burst,
        subject=limit.subject,
    )


def own_problems(limit: Limit) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with a limit by itself, as field and description; of each field what is worst."""
    if limit.scope is None:
        yield "scope", "must be account, credential, address, provider or destination"
    if limit.unit is None:
        yield "unit", "must be message, recipient, byte or connection"
    if limit.scope is None or limit.unit is None:
        return
    account = "" if limit.account is None else names.format_name(names.ACCOUNT, limit.account)
    told: set[str] = set()
    for field_name, text in core.limit_problems(config_of(limit), account):
        # The burst follows from the amount.
        if field_name not in told and not (field_name == "burst" and "amount" in told):
            yield field_name, text
        told.add(field_name)


def defaults_of(settings: NodeSettings) -> list[Limit]:
    """Return the defaults of a node pool as limits without names; 0 is none."""
    rows = (
        (LimitScope.ACCOUNT, LimitUnit.MESSAGE, settings.account_messages_per_hour, _HOUR_S),
        (LimitScope.CREDENTIAL, LimitUnit.MESSAGE, settings.credential_messages_per_hour, _HOUR_S),
        (LimitScope.ADDRESS, LimitUnit.CONNECTION, settings.address_connections_per_minute, _MINUTE_S),
    )
    return [
        Limit(None, "", scope=scope, unit=unit, amount=min(amount, core.MAX_TOKENS), period_s=period_s)
        for scope, unit, amount, period_s in rows
        if amount
    ]


def effective(own: Sequence[Limit], shared: Sequence[Limit], settings: NodeSettings) -> list[Limit]:
    """Return what holds for an account, by scope, unit and subject."""
    everything = [*own, *shared, *defaults_of(settings)]
    found = [limit for limit in everything if not any(_replaces(other, limit) for other in everything)]
    return sorted(found, key=lambda limit: (limit.scope or 0, limit.unit or 0, not limit.period_s, limit.subject))


def is_about(limit: Limit, account: str) -> bool:
    """Whether a shared limit says anything to `account` (its id)."""
    if limit.subject.startswith("accounts/"):
        return limit.subject.split("/")[1] == account
    return True


def look_of(limit: Limit, subject: str) -> Look:
    """Return where the limit is kept for `subject`."""
    value = config_of(limit)
    if not value.period_s:
        return Look(*core.slots_of(value.scope, subject), value.amount, 0.0)
    return Look(*core.bucket_of(value.scope, value.unit, subject), value.burst, value.rate_per_s)


def bucket_state(subject: str, look: Look, level: float) -> SubjectState:
    """Return the state of a bucket that holds `level` tokens; a debt, below 0, counts as used and is paid first."""
    whole = math.floor(level)
    if level >= look.capacity:
        return SubjectState(subject, look.capacity, 0, look.capacity)
    return SubjectState(
        subject=subject,
        available=max(0, whole),
        used=look.capacity - whole,
        capacity=look.capacity,
        next_s=min((max(0, whole) + 1 - level) / look.rate_per_s, core.LONGEST_WAIT_S),
        full_s=min((look.capacity - level) / look.rate_per_s, core.LONGEST_WAIT_S),
    )


def slots_state(subject: str, look: Look, held: int) -> SubjectState:
    """Return the state of slots of which `held` are taken; a limit that was lowered may be below that."""
    return SubjectState(subject, max(0, look.capacity - held), held, look.capacity)


def replaced_subjects(limit: Limit, subjects: Iterable[str], others: Sequence[Limit]) -> set[str]:
    """Return those of `subjects` for which one of `others` counts instead of `limit`, which names none."""
    if limit.scope is None or limit.unit is None:
        return set()
    value, at_once = config_of(limit), not limit.period_s
    by_owner: dict[str | None, list[core.Limit]] = {}
    for other in others:
        by_owner.setdefault(other.account, []).append(config_of(other))
    tables = {owner: core.LimitTable(limits) for owner, limits in by_owner.items()}
    shared = tables.get(None, core.NO_LIMITS)
    replaced = set()
    for subject in subjects:
        own = tables.get(subject.split("/")[1] if subject.startswith("accounts/") else None, core.NO_LIMITS)
        counting = core.counting_limit(own, shared, value.scope, value.unit, subject, at_once=at_once)
        if counting not in (None, value):
            replaced.add(subject)
    return replaced


def _speaks_of(limit: Limit, subject: str) -> bool:
    if limit.subject:
        return limit.subject == subject
    return limit.account is None or subject.split("/")[:2] == ["accounts", limit.account]


def _replaces(other: Limit, limit: Limit) -> bool:
    """Whether `limit` says nothing any more beside `other`."""
    if not _same_kind(other, limit) or _rank(other) >= _rank(limit):
        return False
    if limit.scope is LimitScope.ACCOUNT:
        # There is one account to speak of.
        return True
    if limit.subject:
        return _speaks_of(other, limit.subject)
    # One with a subject leaves the others to the general one, which of the shared kind speaks of shared providers, too.
    return not other.subject and (other.account is None or limit.scope is not LimitScope.PROVIDER)


def _rank(limit: Limit) -> tuple[bool, bool, bool]:
    return not limit.limit, *core.precedence(config_of(limit))


def _same_kind(one: Limit, other: Limit) -> bool:
    return (one.scope, one.unit, not one.period_s) == (other.scope, other.unit, not other.period_s)
