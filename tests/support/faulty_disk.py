"""A disk that fails on demand: SQLite's own file system under a layer that raises its errors.

What is written before and after a fault really lies in files, so a spool can be opened again on what the fault left.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import apsw

_numbers = itertools.count(1)


@dataclass
class Faults:
    """Which files (by the end of their names) fail how; empty means that all is well."""

    full: set[str] = field(default_factory=set)
    unsyncable: set[str] = field(default_factory=set)
    unreadable: set[str] = field(default_factory=set)
    syncs: list[str] = field(default_factory=list)
    hits: int = 0

    def strikes(self, names: set[str], path: str) -> bool:
        struck = any(path.endswith(name) for name in names)
        self.hits += struck
        return struck


class FaultyDisk(apsw.VFS):
    """Register it, give its `vfs_name` to the spool, and set `faults` when it shall fail."""

    def __init__(self) -> None:
        self.vfs_name = f"faulty-{next(_numbers)}"
        self.faults = Faults()
        super().__init__(self.vfs_name, "")

    def xOpen(self, name: Any, flags: list[int]) -> _FaultyFile:
        return _FaultyFile(name, flags, self.faults)


class _FaultyFile(apsw.VFSFile):
    def __init__(self, name: Any, flags: list[int], faults: Faults) -> None:
        super().__init__("", name, flags)
        self._path = name.filename() if isinstance(name, apsw.URIFilename) else str(name)
        self._faults = faults

    def xWrite(self, data: Any, offset: int) -> None:
        if self._faults.strikes(self._faults.full, self._path):
            raise apsw.FullError("no space left on device")
        super().xWrite(data, offset)

    def xSync(self, flags: int) -> None:
        self._faults.syncs.append(self._path)
        if self._faults.strikes(self._faults.unsyncable, self._path):
            raise _io_error(apsw.SQLITE_IOERR_FSYNC)
        super().xSync(flags)

    def xRead(self, amount: int, offset: int) -> bytes:
        if self._faults.strikes(self._faults.unreadable, self._path):
            raise _io_error(apsw.SQLITE_IOERR_READ)
        return super().xRead(amount, offset)


def _io_error(code: int) -> apsw.IOError:
    error = apsw.IOError("input/output error")
    error.extendedresult = code  # type: ignore[attr-defined]  # apsw reads it, its stubs do not know it
    return error
