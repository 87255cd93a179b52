"""Whether the disk has room for a message: free space is asked for at most every 50 ms or 4 MiB, so asking is cheap.

Input is a function that tells free bytes; what was promised since it was asked counts twice, for WAL and file. It never
fails: when the file system gives no answer there is no room.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from dataplane.ports import Clock

_ASK_AGAIN_S = 0.05
_ASK_AGAIN_BYTES = 4 * 1024 * 1024
_INODES = 64


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write in the folder; 0 when files cannot be made any more. OSError."""
    status = os.statvfs(folder)
    # Some file systems have no fixed number of inodes and say 0 of both.
    if status.f_files and status.f_favail < _INODES:
        return 0
    return status.f_bavail * status.f_frsize


class Room:
    """Free space above a floor."""

    def __init__(self, ask: Callable[[], int], floor_bytes: int, clock: Clock) -> None:
        self._ask = ask
        self._floor_bytes = floor_bytes
        self._clock = clock
        self._free_bytes = 0
        self._promised_bytes = 0
        self._asked_s: float | None = None

    def has(self, size_bytes: int) -> bool:
        """Whether this many bytes fit above the floor."""
        now_s = self._clock.monotonic()
        if self._asked_s is None or now_s - self._asked_s >= _ASK_AGAIN_S or self._promised_bytes > _ASK_AGAIN_BYTES:
            try:
                self._free_bytes = self._ask()
            except OSError:
                self._free_bytes = 0
            self._asked_s = now_s
            self._promised_bytes = 0
        return self._free_bytes - self._promised_bytes - 2 * size_bytes >= self._floor_bytes

    def promise(self, size_bytes: int) -> None:
        """A message of this size is about to be written."""
        self._promised_bytes += 2 * size_bytes
