"""Files that are whole whatever happens: replaced by a rename, durable when the call returns; and room kept for them.

A `Reserve` is a file without content that holds room on a disk. Whoever must write where a full disk does not let it,
although nothing new is taken in, gives it up and writes again: outcomes, a spool's opening, denials. It is made again
once there is ample room.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable
from pathlib import Path


def write_durably(path: Path, parts: Iterable[bytes]) -> None:
    """Replace `path` so that after a crash it is the old file or the new one, whole; only its owner may read it.

    OSError, and whatever `parts` raises, leave the old file in place.
    """
    temporary = path.with_name(f".{path.name}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def no_room(error: BaseException) -> bool:
    """Whether a write failed because the disk, or the user's share of it, is full."""
    return isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}


class Reserve:
    """So many bytes kept on the disk of `path`. It fails nobody: without it a full disk is what it was before."""

    AMPLE = 8
    """How many times its size must be free before it is made."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path = path
        self._size_bytes = size_bytes

    def hold(self) -> None:
        """Make it, unless it is there or room is short."""
        with contextlib.suppress(OSError):
            if self._path.exists() or not self._is_ample():
                return
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, self._size_bytes)
            finally:
                os.close(descriptor)

    def give_up(self) -> bool:
        """Let others have its room; say whether there was any."""
        try:
            self._path.unlink()
        except OSError:
            return False
        return True

    def _is_ample(self) -> bool:
        status = os.statvfs(self._path.parent)
        return status.f_bavail * status.f_frsize >= self.AMPLE * self._size_bytes


def sync_folder(folder: Path) -> None:
    """Make the entries of a folder durable. OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
