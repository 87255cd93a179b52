"""Keeps the books while records are stored: how many recipients a transaction accepted, and how many ended, by day.

Contract. `Entered` is told of the rows that `BY_DAY` answers, each with how many recipients of a partition, account and
state were written, and answers how many those are together. `ENTER` is a statement for the end of the transaction; its
arguments begin with the spool, and those from the fifth on are `Entered.columns()`. A partition is a day, by its name.
`enter_queue` does the same for what the replicated queue had or has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import date
from typing import Any
from uuid import UUID

import asyncpg

from controlplane.adapters.postgres.session import Connection
from dataplane.core.queue import TERMINAL, State

BY_DAY = """
SELECT right(partition::regclass::text, 8) AS day, account, state, count(*) AS count
FROM written GROUP BY partition, account, state
"""
_ENDS = (State.SENT, State.BOUNCED, State.FAILED, State.EXPIRED, State.CANCELLED)
_NAMES = ("accepted", *(state.name.lower() for state in _ENDS))
_TYPES = ", ".join(f"${number}::bigint[]" for number in range(7, 7 + len(_NAMES)))
_SUMS = ", ".join(f"{name} = e.{name} + excluded.{name}" for name in _NAMES)
ENTER = f"""
INSERT INTO postroad.book_entries AS e (spool, account, day, {", ".join(_NAMES)})
SELECT $1, u.* FROM unnest($5::text[], $6::date[], {_TYPES}) AS u
ON CONFLICT (spool, account, day) DO UPDATE SET {_SUMS}
"""

_QUEUE_TYPES = ", ".join(f"${number}::bigint[]" for number in range(4, 4 + len(_NAMES)))
_ENTER_QUEUE = f"""
INSERT INTO postroad.queue_entries AS e (spool, account, day, {", ".join(_NAMES)})
SELECT $1, u.* FROM unnest($2::text[], $3::date[], {_QUEUE_TYPES}) AS u
ON CONFLICT (spool, account, day) DO UPDATE SET {_SUMS}
"""

# What a recipient that is accepted counts as, beside the states that ended.
_ACCEPTED = State.QUEUED

Written = Iterable[asyncpg.Record]


class Entered:
    """See the module."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str, State]] = Counter()

    def accepted(self, written: Written) -> int:
        """Recipients came in, some of them with their end."""
        return self._count(written, new=True)

    def changed(self, written: Written) -> int:
        """Recipients that had not ended were changed, some of them to their end."""
        return self._count(written, new=False)

    def moved(self, written: Written, sign: int) -> int:
        """Recipients that wait came from another spool (1), or went to one (-1), as if they had been accepted there."""
        total = 0
        for row in written:
            total += row["count"]
            self._counts[row["account"], row["day"], _ACCEPTED] += sign * row["count"]
        return total

    def add(self, other: Entered) -> None:
        """What another part of the transaction did."""
        # Not `+`, which forgets what is below 0.
        self._counts.update(other._counts)

    def columns(self) -> list[list[Any]]:
        """Accounts, days and a column for each kind of entry."""
        places = sorted({place[:2] for place in self._counts})
        days = [date(int(day[:4]), int(day[4:6]), int(day[6:])) for _, day in places]
        entries = [[self._counts[(*place, kind)] for place in places] for kind in (_ACCEPTED, *_ENDS)]
        return [[account for account, _ in places], days, *entries]

    def __bool__(self) -> bool:
        """Whether there is anything to be entered."""
        return bool(self._counts)

    def _count(self, written: Written, *, new: bool) -> int:
        total = 0
        for row in written:
            count, state = row["count"], State(row["state"])
            total += count
            if new:
                self._counts[row["account"], row["day"], _ACCEPTED] += count
            if state in TERMINAL:
                self._counts[row["account"], row["day"], state] += count
        return total


async def enter_queue(connection: Connection, spool: UUID, entered: Entered) -> None:
    """Enter what a transaction did to mail of the replicated queue, by the word of this spool."""
    if entered:
        await connection.execute(_ENTER_QUEUE, spool, *entered.columns())
