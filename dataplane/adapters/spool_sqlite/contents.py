"""Contents too large for a row: one file a message in `content/`, named by the message's id in hexadecimal.

A file is durable, and its name in the folder too, before the row that needs it is written; it is removed after the
commit that removed the row. What a crash leaves between the two is an orphan, removed once it is older than any writer
can be, and written over before that when its message is claimed or handed over once more, under the id that it has. A
content that arrives in pieces has a name that ends in `.part` until it is complete (see `incoming`). The functions
block and belong into a thread; errors are OSError.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

from dataplane.adapters.spool_sqlite.identity import sync_folder, write_file
from dataplane.core.ids import MessageId

CONTENT = "content"
# A commit that takes longer was answered 451 long ago.
ORPHAN_AGE_S = 3_600.0
_NAME_CHARACTERS = 32
_PART = ".part"


class Contents:
    """The folder of contents of one spool."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / CONTENT

    def prepare(self) -> None:
        """Make the folder durably."""
        if not self._folder.is_dir():
            self._folder.mkdir(mode=0o700)
            sync_folder(self._folder.parent)

    def write(self, message_id: MessageId, content: bytes) -> None:
        """Write durably. FileExistsError for an id that has a file; after other errors nothing is left, if possible."""
        path = self._path(message_id)
        try:
            write_file(path, content, mode=os.O_EXCL)
            sync_folder(self._folder)
        except FileExistsError:
            raise
        except OSError:
            path.unlink(missing_ok=True)
            raise

    def write_over_orphan(self, message_id: MessageId, content: bytes) -> None:
        """Write durably under a name that only a crash has left. The errors of `write`."""
        self.remove([message_id])
        self.write(message_id, content)

    def read(self, message_id: MessageId) -> bytes:
        """Read whole. FileNotFoundError when it is gone."""
        return self._path(message_id).read_bytes()

    def remove(self, message_ids: list[MessageId]) -> None:
        """Remove files that may be gone already. Not synced: a name that comes back after a crash is an orphan."""
        for message_id in message_ids:
            self._path(message_id).unlink(missing_ok=True)

    def part_path(self, message_id: MessageId) -> Path:
        """Where a content lies that is not complete."""
        return self._folder / f"{message_id.hex()}{_PART}"

    def complete(self, message_id: MessageId) -> None:
        """Give a content that is on disk its final name, durably. FileExistsError for an id that has a file."""
        path = self._path(message_id)
        # Nobody else makes files here: the folder is locked, and what arrives in pieces has a new id.
        if path.exists():
            raise FileExistsError(path)
        self.part_path(message_id).rename(path)
        sync_folder(self._folder)

    def parts(self) -> list[Path]:
        """All contents that are not complete."""
        with os.scandir(self._folder) as entries:
            return [self._folder / entry.name for entry in entries if entry.name.endswith(_PART)]

    @staticmethod
    def remove_parts(paths: list[Path]) -> None:
        """Remove contents that are not complete and may be gone already."""
        for path in paths:
            path.unlink(missing_ok=True)

    def stored(self) -> Iterator[MessageId]:
        """Ids of all files."""
        return self.aged(math.inf)

    def move(self, message_id: MessageId, folder: Path) -> None:
        """Move a file away, within the same file system."""
        self._path(message_id).rename(folder / message_id.hex())

    def aged(self, before_s: float) -> Iterator[MessageId]:
        """Ids of files last written before this time, seconds since 1970."""
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if len(entry.name) == _NAME_CHARACTERS and entry.stat().st_mtime < before_s:
                    yield MessageId(bytes.fromhex(entry.name))

    def _path(self, message_id: MessageId) -> Path:
        return self._folder / message_id.hex()
