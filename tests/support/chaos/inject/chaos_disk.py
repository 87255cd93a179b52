"""A disk that fails on demand or forgets at a power cut, under an unchanged worker: SQLite's default VFS, and `os`.

Files in the control folder say what fails, in every process that looks there:

    full      writes to a spool's files find no space, and the file system says that none is left
    late      the same, but the file system still says that there is space: writes fail in their midst
    fsync     the next fsync of a spool's file fails, once; the file is removed by it

With `loses` what SQLite has written and not synced stays in this process's memory: it is there for every reader in the
process, and gone when the process is killed, as after a power cut. SIGKILL alone would leave it in the system's cache.
Contents in files of their own are held back in the same way, until their fsync.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Any

import apsw

_SPOOL = "/spool/"
# Named, since we are the default from now on.
_BASE = apsw.vfs_names()[0]
_kept: list[apsw.VFS] = []


def install(control: str, *, loses: bool) -> None:
    """Take the place of the default VFS and of the calls that files are written with."""
    switch = _Switch(Path(control))
    _kept.append(_Disk(switch, loses=loses))
    _Calls(switch, loses=loses).replace()


class _Switch:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def is_full(self) -> bool:
        return self.says_full() or (self._folder / "late").exists()

    def says_full(self) -> bool:
        return (self._folder / "full").exists()

    def takes_fsync(self) -> bool:
        """Whether the next fsync fails: asked by several processes, told to one."""
        try:
            (self._folder / "fsync").unlink()
        except FileNotFoundError:
            return False
        return True


class _Disk(apsw.VFS):
    def __init__(self, switch: _Switch, *, loses: bool) -> None:
        self._switch = switch
        self._loses = loses
        self._unsynced: dict[str, _Unsynced] = {}
        super().__init__("chaos-disk", _BASE, makedefault=True)

    def xOpen(self, name: Any, flags: list[int]) -> _File:
        path = name.filename() if isinstance(name, apsw.URIFilename) else str(name)
        unsynced = self._unsynced.setdefault(path, _Unsynced()) if self._loses and _SPOOL in path else None
        return _File(name, flags, self._switch if _SPOOL in path else None, unsynced)


class _Unsynced:
    """Writes to one file, in order, that no fsync has followed; None as data truncates."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, bytes | None]] = []
        self.handles = 0


class _File(apsw.VFSFile):
    def __init__(self, name: Any, flags: list[int], switch: _Switch | None, unsynced: _Unsynced | None) -> None:
        super().__init__(_BASE, name, flags)
        self._switch = switch
        self._unsynced = unsynced
        if unsynced is not None:
            unsynced.handles += 1

    def xWrite(self, data: Any, offset: int) -> None:
        if self._switch is not None and self._switch.is_full():
            raise apsw.FullError("no space left on device")
        if self._unsynced is None:
            super().xWrite(data, offset)
        else:
            self._unsynced.writes.append((offset, bytes(data)))

    def xTruncate(self, size: int) -> None:
        if self._unsynced is None:
            super().xTruncate(size)
        else:
            self._unsynced.writes.append((size, None))

    def xSync(self, flags: int) -> None:
        if self._switch is not None and self._switch.takes_fsync():
            error = apsw.IOError("input/output error")
            error.extendedresult = apsw.SQLITE_IOERR_FSYNC  # type: ignore[attr-defined]  # apsw reads it
            raise error
        self._write_out()
        super().xSync(flags)

    def xRead(self, amount: int, offset: int) -> bytes:
        if self._unsynced is None or not self._unsynced.writes:
            return super().xRead(amount, offset)
        size = self.xFileSize()
        wanted = max(0, min(amount, size - offset))
        found = bytearray(super().xRead(amount, offset)[:wanted].ljust(wanted, b"\0"))
        for place, data in self._unsynced.writes:
            if data is None:
                _blank(found, place - offset)
            else:
                _lay(found, data, place - offset)
        return bytes(found)

    def xFileSize(self) -> int:
        size = super().xFileSize()
        for place, data in self._unsynced.writes if self._unsynced is not None else ():
            size = place if data is None else max(size, place + len(data))
        return size

    def xClose(self) -> None:
        if self._unsynced is not None:
            self._unsynced.handles -= 1
            if not self._unsynced.handles:
                # Closed in order: nothing is lost by that.
                self._write_out()
        super().xClose()

    def _write_out(self) -> None:
        if self._unsynced is None:
            return
        writes, self._unsynced.writes = self._unsynced.writes, []
        for place, data in writes:
            if data is None:
                super().xTruncate(place)
            else:
                super().xWrite(data, place)


def _lay(found: bytearray, data: bytes, place: int) -> None:
    start, end = max(0, place), min(len(found), place + len(data))
    if start < end:
        found[start:end] = data[start - place : end - place]


def _blank(found: bytearray, place: int) -> None:
    start = max(0, place)
    if start < len(found):
        found[start:] = bytes(len(found) - start)


class _Calls:
    """Content files: the calls of `os` that write and sync them."""

    def __init__(self, switch: _Switch, *, loses: bool) -> None:
        self._switch = switch
        self._loses = loses
        self._held: dict[int, list[bytes]] = {}
        self._real = (os.write, os.fsync, os.close, os.statvfs)

    def replace(self) -> None:
        os.write, os.fsync, os.close = self.write, self.fsync, self.close  # type: ignore[assignment]  # wider
        os.statvfs = self.statvfs

    def write(self, descriptor: int, data: Any) -> int:
        if not _is_of_a_spool(descriptor):
            return self._real[0](descriptor, data)
        if self._switch.is_full():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if not self._loses:
            return self._real[0](descriptor, data)
        self._held.setdefault(descriptor, []).append(bytes(data))
        return len(data)

    def fsync(self, descriptor: int) -> None:
        if _is_of_a_spool(descriptor) and self._switch.takes_fsync():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        for data in self._held.pop(descriptor, ()):
            left = memoryview(data)
            while left:
                left = left[self._real[0](descriptor, left) :]
        self._real[1](descriptor)

    def close(self, descriptor: int) -> None:
        self._held.pop(descriptor, None)
        self._real[2](descriptor)

    def statvfs(self, path: Any) -> Any:
        status = self._real[3](path)
        if not self._switch.says_full():
            return status
        # Position 4 is f_bavail: what is left for us.
        return os.statvfs_result((*status[:4], 0, *status[5:]))


def _is_of_a_spool(descriptor: int) -> bool:
    with contextlib.suppress(OSError):
        return _SPOOL in str(Path(f"/proc/self/fd/{descriptor}").readlink())
    return False
