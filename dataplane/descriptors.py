"""How many descriptors this process may have open, and how many connections of clients that leaves room for.

`raise_descriptor_limit` is for the supervisor: those that it starts inherit the limit. `connection_room` is for a
worker that has opened all it keeps open. A quarter of the limit, between 32 and 4,096, stays free for deliveries and
for files that are open for a moment.
"""

from __future__ import annotations

import resource
from pathlib import Path

from dataplane.ports import EventLog

# More than any worker needs; systems whose limit is in the thousands of millions are taken at their word elsewhere.
ENOUGH = 1_048_576
_LEAST_SPARE, _MOST_SPARE = 32, 4_096
_OPEN_HERE = Path("/proc/self/fd")
_OPEN_ELSEWHERE = Path("/dev/fd")


def raise_descriptor_limit(log: EventLog) -> None:
    """Raise the soft limit to the hard one, which needs no privilege; where that fails, it is reported."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError) as error:
        log.warning("descriptors.limit_kept", limit=soft, error=str(error))
    else:
        log.info("descriptors.limit_raised", limit=wanted)


def connection_room(limit: int, open_now: int) -> int:
    """Connections that a process with `open_now` descriptors of `limit` can hold, at least 1."""
    spare = max(_LEAST_SPARE, min(limit // 4, _MOST_SPARE))
    return max(1, limit - open_now - spare)


def descriptor_limit() -> int:
    """The soft limit of this process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return ENOUGH if soft == resource.RLIM_INFINITY else soft


def open_descriptors() -> int:
    """How many this process has open."""
    folder = _OPEN_HERE if _OPEN_HERE.is_dir() else _OPEN_ELSEWHERE
    # One of them is the look itself.
    return sum(1 for _ in folder.iterdir()) - 1
