"""How old the oldest record is that the control plane has not stored.

Contract. Kept are a few marks of how far a spool's records were, and when. `note` is told from time to time the number
of the last record and of the last one acknowledged; `age_s` is right to the time between two notes, and never too young
by more. Records that were there before the first note count from then on. At most MARKS marks are kept: where there
would be more, two become one, which makes a record look as old as the one before it.
"""

from __future__ import annotations

MARKS = 256


class LedgerLag:
    """State: numbers of records and when they were first seen, oldest first."""

    __slots__ = ("_marks",)

    def __init__(self) -> None:
        self._marks: list[tuple[int, float]] = []

    def note(self, last: int, acknowledged: int, now_s: float) -> None:
        """The spool has written `last`, and the control plane has stored `acknowledged`."""
        marks = [mark for mark in self._marks if mark[0] > acknowledged]
        if last > (marks[-1][0] if marks else acknowledged):
            marks.append((last, now_s))
        if len(marks) > MARKS:
            marks = [(later[0], earlier[1]) for earlier, later in zip(marks[::2], marks[1::2], strict=False)] + (
                marks[-1:] if len(marks) % 2 else []
            )
        self._marks = marks

    def age_s(self, now_s: float) -> float:
        """Seconds since the oldest record that is not stored was seen, 0 when all are."""
        return max(0.0, now_s - self._marks[0][1]) if self._marks else 0.0
