"""How many callers a replica lets wait at once: each looks at the database again and again until it has its answer.

Contract. `seat(account)` is held while a call waits; ResourceExhaustedError when all are taken, or the account's part
of them, which leaves the others theirs. What is for no account alone is one account here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from controlplane.domain.errors import Reason, ResourceExhaustedError

IN_ALL = 200
# Of all seats, one account has at most this part.
_ACCOUNT_PART = 4
_RETRY_AFTER_S = 5


class Seats:
    """See the module."""

    def __init__(self, in_all: int = IN_ALL) -> None:
        self._in_all = in_all
        self._taken: Counter[str | None] = Counter()

    @contextmanager
    def seat(self, account: str | None) -> Iterator[None]:
        """See the module."""
        if self._taken.total() >= self._in_all:
            raise _refusal("too many calls that watch or wait on this replica")
        if self._taken[account] >= max(self._in_all // _ACCOUNT_PART, 1):
            raise _refusal("too many calls of this account that watch or wait on this replica")
        self._taken[account] += 1
        try:
            yield
        finally:
            self._taken[account] -= 1
            if not self._taken[account]:
                del self._taken[account]


def _refusal(text: str) -> ResourceExhaustedError:
    return ResourceExhaustedError(Reason.TOO_MANY_WATCHERS, text, retry_after_s=_RETRY_AFTER_S)
