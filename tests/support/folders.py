"""Scratch folders that a server can use when the tests run as root.

pytest's own tmp_path is closed to other users, and a server started by root runs as `nobody`. A folder made
here can be passed through by everybody. What a killed test run left behind is removed by the next run: a
server's folder that nobody holds the lock of has no owner any more.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from postroad.localstack import LocalStackError, PostgresServer, ValkeyServer

_PREFIX = "postroad-test-"
# Folders of the servers that conftest.py starts; the sweep knows them by these names.
POSTGRES_NAME = "postgres"
VALKEY_NAME = "valkey"
_OLD_ENOUGH_S = 3_600


@contextlib.contextmanager
def passable_folder() -> Iterator[Path]:
    """A new folder that every user may pass through, deleted at the end."""
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    folder.chmod(0o711)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep_left_behind() -> None:
    """End the servers and delete the folders of test runs that were killed an hour ago or more."""
    for folder in Path(tempfile.gettempdir()).glob(_PREFIX + "*"):
        # Another user's folders are not ours to read; a running test's servers hold their locks.
        with contextlib.suppress(OSError, LocalStackError):
            if folder.stat().st_mtime < time.time() - _OLD_ENOUGH_S:
                PostgresServer(folder / POSTGRES_NAME).destroy()
                ValkeyServer(folder / VALKEY_NAME).destroy()
                shutil.rmtree(folder)
