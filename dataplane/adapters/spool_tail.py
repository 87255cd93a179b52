"""Which acknowledged records may be forgotten: those past ten minutes, or past 64 MiB, whichever comes first.

The tail is what a control plane may ask for again after its database failed over. Inputs are acknowledged numbers and
seconds that only grow; the output is the highest number that nobody may ask for any more. Times are not kept over a
restart: what was acknowledged before it counts as acknowledged at it, so the tail is rather too long than too short.
Acknowledgements of the same five seconds share one mark, which bounds memory to some 120 marks.
"""

from __future__ import annotations

from collections import deque

TAIL_S = 600.0
TAIL_BYTES = 64 * 1024 * 1024
_MARK_S = 5.0


class AcknowledgedTail:
    """When records were acknowledged. Not thread-safe."""

    def __init__(self, acknowledged: int, now_s: float) -> None:
        self._marks: deque[tuple[float, int]] = deque([(now_s, acknowledged)])
        self._expired = 0

    def note(self, number: int, now_s: float) -> None:
        """Records up to `number` count as acknowledged from now on; a lower number than before takes back the rest."""
        if self._marks and number < self._marks[-1][1]:
            self._marks = deque((ends_s, min(marked, number)) for ends_s, marked in self._marks)
        if self._marks and now_s < self._marks[-1][0]:
            self._marks[-1] = (self._marks[-1][0], number)
        else:
            self._marks.append((now_s + _MARK_S, number))

    def expired(self, now_s: float) -> int:
        """The highest number acknowledged at least ten minutes ago; 0 when there is none."""
        while self._marks and self._marks[0][0] + TAIL_S <= now_s:
            self._expired = self._marks.popleft()[1]
        return self._expired
