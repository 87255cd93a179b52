"""What an error of SQLite or of the file system means for the spool.

isolated   this write is impossible, others are not
full       no room; passes by itself
fatal      the disk failed or the file is damaged: never retried
others     temporary: somebody holds a lock, no memory, no descriptor
"""

from __future__ import annotations

import errno

import apsw

from dataplane.ports import SpoolError, SpoolFailedError, SpoolFullError

ISOLATED = (
    apsw.ConstraintError,
    apsw.MismatchError,
    apsw.TooBigError,
    apsw.RangeError,
    TypeError,
    ValueError,
    OverflowError,
)
_TEMPORARY = (apsw.BusyError, apsw.LockedError, apsw.NoMemError, apsw.InterruptError, apsw.ProtocolError)
_SHARED_INDEX_TOO_SMALL: int = apsw.SQLITE_IOERR_SHMSIZE
_SCARCE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})


def translate(error: Exception) -> SpoolError:
    """Return what the callers of the failed writes are told."""
    if isinstance(error, SpoolError):
        return error
    if is_full(error):
        return SpoolFullError("the disk is full")
    if isinstance(error, (*ISOLATED, *_TEMPORARY)) or (isinstance(error, OSError) and error.errno in _SCARCE):
        return SpoolError(f"the spool could not write: {type(error).__name__}")
    return SpoolFailedError(f"the spool failed: {type(error).__name__}: {error}")


def is_full(error: Exception) -> bool:
    """Whether the disk has no room."""
    if isinstance(error, apsw.FullError):
        return True
    if isinstance(error, apsw.IOError):
        # The shared index of the WAL could not grow: SQLite has no better word for a full disk there.
        return getattr(error, "extendedresult", 0) == _SHARED_INDEX_TOO_SMALL
    return isinstance(error, OSError) and error.errno in _NO_ROOM
