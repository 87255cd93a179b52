"""What is left of limits: which subjects to look at, and what the shared counters say of them.

Contract. `plan` is made inside a transaction, `states` asks the counters after it, so that no connection is held while
they do not answer. A limit without a subject is looked at for those that the control plane knows and that no other
limit counts for, at most MAX_SUBJECTS. `account` narrows that to one account; a caller who is no operator is told of
its own account's subjects only. States come in the order of the limits; when the counters cannot be asked each says
so. Cancelling leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from controlplane.domain.access import Caller
from controlplane.domain.limits import (
    MAX_SUBJECTS,
    Limit,
    LimitState,
    Look,
    SubjectState,
    bucket_state,
    look_of,
    replaced_subjects,
    slots_state,
)
from controlplane.ports import LiveLimits, LiveStateUnknownError, Work

_MAX_LOOKS = 500
_TOO_MANY = "there is too much to look at in one answer: get the limit by itself"


class NoLiveLimits:
    """`controlplane.ports.LiveLimits` of a deployment without Redis."""

    async def look(self, looks: Sequence[Look]) -> list[float]:
        """Nobody knows."""
        raise LiveStateUnknownError("no Redis is configured: redis.url")


class LimitPlan(NamedTuple):
    """A limit and whom to look at."""

    limit: Limit
    subjects: Sequence[str]
    more: bool


class LimitStates:
    """See the module."""

    def __init__(self, live: LiveLimits) -> None:
        self._live = live

    async def plan(self, work: Work, caller: Caller, limits: Sequence[Limit], account: str | None) -> list[LimitPlan]:
        """Return whom to look at."""
        known: dict[int, list[str]] = {}
        for limit in limits:
            if not limit.subject and limit.scope is not None and limit.scope not in known:
                known[limit.scope] = await work.limits.subjects(limit.scope, account, MAX_SUBJECTS + 1)
        owners = {name.split("/")[1] for names in known.values() for name in names if name.startswith("accounts/")}
        others = [*await work.limits.list_all(None), *await work.limits.list_of(sorted(owners))] if known else []
        return [_plan(caller, limit, known, others) for limit in limits]

    async def states(self, plans: Sequence[LimitPlan]) -> list[LimitState]:
        """Ask the counters."""
        looks: list[Look] = []
        asked: list[bool] = []
        for plan in plans:
            fits = len(looks) + len(plan.subjects) <= _MAX_LOOKS
            asked.append(fits)
            if fits:
                looks += [look_of(plan.limit, subject) for subject in plan.subjects]
        try:
            levels = iter(await self._live.look(looks))
        except LiveStateUnknownError as error:
            return [LimitState(known=False, reason=str(error))] * len(plans)
        return [
            _state(plan, [next(levels) for _ in plan.subjects]) if fits else LimitState(known=False, reason=_TOO_MANY)
            for plan, fits in zip(plans, asked, strict=True)
        ]


def _plan(caller: Caller, limit: Limit, known: Mapping[int, list[str]], others: Sequence[Limit]) -> LimitPlan:
    subjects = [limit.subject] if limit.subject else known.get(limit.scope or 0, [])
    shown = [name for name in subjects[:MAX_SUBJECTS] if caller.is_operator or _is_of(name, caller.account)]
    if not limit.subject:
        replaced = replaced_subjects(limit, shown, others)
        shown = [name for name in shown if name not in replaced]
    return LimitPlan(limit, shown, len(subjects) > MAX_SUBJECTS)


def _is_of(subject: str, account: str | None) -> bool:
    return f"{subject}/".startswith(f"accounts/{account}/")


def _state(plan: LimitPlan, levels: Sequence[float]) -> LimitState:
    return LimitState(
        known=True,
        subjects=tuple(
            _subject_state(subject, look_of(plan.limit, subject), level)
            for subject, level in zip(plan.subjects, levels, strict=True)
        ),
        more=plan.more,
    )


def _subject_state(subject: str, look: Look, level: float) -> SubjectState:
    if look.rate_per_s:
        return bucket_state(subject, look, level)
    return slots_state(subject, look, int(level))
