"""Who makes the call that is being handled: set once it is authenticated, read by the handlers.

Contract. `caller()` returns the Caller of the call that this task handles; LookupError outside of one, which is a
defect.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from controlplane.domain.access import Caller

_caller: ContextVar[Caller] = ContextVar("caller")


def caller() -> Caller:
    """Return who calls."""
    return _caller.get()


@contextmanager
def calling(who: Caller) -> Iterator[None]:
    """Handle a call of `who` inside the block."""
    token = _caller.set(who)
    try:
        yield
    finally:
        _caller.reset(token)
