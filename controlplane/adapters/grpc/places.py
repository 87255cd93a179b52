"""How many large calls are in hand at once: each may hold its request in memory, whoever sends it.

Contract. `place(account)` is held while a call is read and handled. There are IN_ALL of them, and of those an account,
or all operators together, has OF_ACCOUNT at most: one that sends slowly keeps itself waiting, not the others. Who waits
is let in in turn; cancelling gives the turn up.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

IN_ALL = 16
OF_ACCOUNT = 8


class _Own:
    """Places of one account, and how many calls hold one or wait for one."""

    __slots__ = ("calls", "free")

    def __init__(self, count: int) -> None:
        self.free = asyncio.Semaphore(count)
        self.calls = 0


class Places:
    """See the module."""

    def __init__(self, in_all: int = IN_ALL, of_account: int = OF_ACCOUNT) -> None:
        self._all = asyncio.Semaphore(in_all)
        self._of_account = of_account
        self._own: dict[str | None, _Own] = {}

    def __len__(self) -> int:
        return len(self._own)

    @asynccontextmanager
    async def place(self, account: str | None) -> AsyncIterator[None]:
        """See the module."""
        own = self._own.setdefault(account, _Own(self._of_account))
        own.calls += 1
        try:
            async with own.free, self._all:
                yield
        finally:
            own.calls -= 1
            if not own.calls:
                del self._own[account]
