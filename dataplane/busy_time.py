"""How long a thread has worked or wanted to: what is left of the wall clock's time it was idle.

Linux keeps both for each thread (`schedstat`, proc(5)); elsewhere the time that it waited for a processor is not known,
and only that in which it worked is counted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

_SCHEDSTAT = "/proc/thread-self/schedstat"


def busy_time() -> Callable[[], float]:
    """Return a clock, in seconds, of the thread that calls this; only that thread's time may be asked of it."""
    try:
        descriptor = os.open(_SCHEDSTAT, os.O_RDONLY | os.O_CLOEXEC)
        _read(descriptor)
    except (OSError, ValueError):
        return time.thread_time
    return lambda: _read(descriptor)


def _read(descriptor: int) -> float:
    ran_ns, waited_ns, _ = os.pread(descriptor, 100, 0).split()
    return (int(ran_ns) + int(waited_ns)) / 1e9
