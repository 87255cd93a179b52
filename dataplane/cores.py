"""How many cores this process may use: those it is scheduled on, and no more than its control group pays for."""

from __future__ import annotations

import os
from pathlib import Path

# The control group of a container as it sees itself: "max" or microseconds, and the period that they are meant for.
_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


def available_cores(cpu_max: Path = _CPU_MAX) -> int:
    """At least 1; a quota of one and a half cores is two."""
    affinity = getattr(os, "sched_getaffinity", None)
    scheduled = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    quota = _quota(cpu_max)
    return max(1, scheduled if quota is None else min(scheduled, quota))


def _quota(cpu_max: Path) -> int | None:
    try:
        quota, period = cpu_max.read_text(encoding="ascii").split()
        return -(-int(quota) // int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return None
