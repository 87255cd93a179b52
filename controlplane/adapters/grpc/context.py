"""Who makes the call that is being handled, set once it is authenticated, and where it came from; read by the handlers.

Contract. `caller()` returns the Caller of the call that this task handles; LookupError outside of one, which is a
defect. `origin()` returns its Origin, which is looked up only then; what nobody else sent comes from this process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from controlplane.domain.acceptance import Origin
from controlplane.domain.access import Caller

_caller: ContextVar[Caller] = ContextVar("caller")
_HERE = Origin("127.0.0.1", "HTTP")
_origin: ContextVar[Callable[[], Origin]] = ContextVar("origin", default=lambda: _HERE)


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


def origin() -> Origin:
    """Return where the call came from."""
    return _origin.get()()


@contextmanager
def coming_from(find: Callable[[], Origin]) -> Iterator[None]:
    """Handle a call inside the block that came from what `find` says."""
    token = _origin.set(find)
    try:
        yield
    finally:
        _origin.reset(token)
