"""A disk that fails on demand for processes started from here; what it can do is told in `inject/chaos_disk.py`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from support.killable_stack import wait_until

_INJECT = Path(__file__).parent / "inject"


def disk_environment(control: Path, *, loses: bool = False) -> dict[str, str]:
    """Variables for a process whose workers shall have such a disk; `loses` forgets what was not synced at a kill."""
    control.mkdir(mode=0o755, exist_ok=True)
    paths = [str(_INJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "CHAOS_DISK": str(control),
        "CHAOS_DISK_LOSES": "1" if loses else "",
    }


@contextlib.contextmanager
def full_disk(control: Path, *, told: bool) -> Iterator[None]:
    """No space; with `told` the file system says so, otherwise only the writes find out."""
    switch = control / ("full" if told else "late")
    switch.touch()
    try:
        yield
    finally:
        switch.unlink()


def fail_next_fsync(control: Path, timeout_s: float = 30.0) -> bool:
    """Let the next fsync of a spool fail; whether one came."""
    switch = control / "fsync"
    switch.touch()
    try:
        wait_until(lambda: not switch.exists(), "an fsync failed", timeout_s)
    except AssertionError:
        switch.unlink(missing_ok=True)
        return False
    return True
