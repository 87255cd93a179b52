"""The node's data directory: made, checked and locked before anything else is done. DataDirError says what to do."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

# SQLite opens no file whose path is longer than 504 bytes; below the data directory come the spool, its quarantine and
# the database's name.
LONGEST_DATA_DIR_BYTES = 400


class DataDirError(Exception):
    """The data directory cannot be used; the text says what to do."""


def prepare_data_dir(data_dir: Path) -> None:
    """Make the folders that every process of the node expects. OSError; DataDirError when the path is too long."""
    length = len(os.fsencode(data_dir.resolve()))
    if length > LONGEST_DATA_DIR_BYTES:
        raise DataDirError(
            f"the path of {data_dir} has {length} bytes, and the spool's files below it can be opened up to "
            f"{LONGEST_DATA_DIR_BYTES}: choose a shorter data_dir"
        )
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in ("run", "last-known-good", "identity"):
        (data_dir / name).mkdir(mode=0o700, exist_ok=True)


def lock_data_dir(data_dir: Path) -> int:
    """Lock the data directory for this process; returns the descriptor that holds it. DataDirError when taken."""
    descriptor = os.open(data_dir / "node.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise DataDirError(
            f"{data_dir} is in use by another node: give each its own data_dir, or stop the other one"
        ) from error
    # For those who want to tell the node something; on a full disk they have to wait for its next start.
    with contextlib.suppress(OSError):
        os.truncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
    return descriptor


def holder_of(data_dir: Path) -> int:
    """The process of the node that runs on the data directory, 0 when none does or it could not be found out."""
    try:
        os.close(lock_data_dir(data_dir))
    except DataDirError:
        with contextlib.suppress(OSError, ValueError):
            return int((data_dir / "node.lock").read_text(encoding="ascii"))
    return 0
