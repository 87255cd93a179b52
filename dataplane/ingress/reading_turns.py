"""Large contents are read in turns: a few connections at each turn of the loop, however many of them have more.

A read brings up to 256 KiB, and what it brings costs a millisecond. Hundreds of clients that send large contents would
make one turn of the loop last for seconds, and everybody else wait for its end. So a session whose read was a large one
rests, and READERS of those that rest read on in each turn, first come, first served.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

LARGE_READ_BYTES = 128 * 1024
READERS = 8


class Resting(Protocol):
    """A session that rests."""

    def read_on(self) -> None:
        """It is your turn; whoever has left or waits for something else does nothing."""
        ...


class ReadingTurns:
    """Of one worker."""

    def __init__(self) -> None:
        self._resting: deque[Resting] = deque()

    def rest(self, session: Resting) -> None:
        """Let this session, whose reading is paused, read on when it is its turn."""
        self._resting.append(session)
        if len(self._resting) == 1:
            asyncio.get_running_loop().call_soon(self._next_turn)

    def _next_turn(self) -> None:
        for _ in range(min(READERS, len(self._resting))):
            self._resting.popleft().read_on()
        if self._resting:
            asyncio.get_running_loop().call_soon(self._next_turn)
