"""A wall clock that jumps for processes started from here; how it does that is told in `inject/chaos_clock.py`."""

from __future__ import annotations

import struct
from pathlib import Path

_NANOSECONDS = 1_000_000_000
_OFFSET = struct.Struct("<q")


def clock_environment(file: Path) -> dict[str, str]:
    """Variables for a node whose clock shall follow this file; to be added to those of `disk_environment`.

    `set_clock` has made the file.
    """
    return {"CHAOS_CLOCK": str(file)}


def set_clock(file: Path, ahead_s: int) -> None:
    """Let the clock be so many seconds ahead of the real one from now on, or behind it."""
    # In place: the processes have mapped this very file.
    with file.open("r+b" if file.exists() else "wb") as opened:
        opened.write(_OFFSET.pack(ahead_s * _NANOSECONDS))
