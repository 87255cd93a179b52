"""The folder of the local stack: what lies where, who uses it now, and how far its setting-up has come.

Contract. `open()` makes the folder and holds its lock until `close()`, so that two stacks never share one; the kernel
frees the lock when its holder dies. Notes say which steps are complete: a step notes itself only after all it did is on
the disk, so that a start that was cut off anywhere does the cut-off step again. Notes about the database name the
cluster they were made for: a new cluster knows nothing of them.

    notes.json       steps that are complete, ports
    cli.yaml         how the CLI finds everything (0600); written when the demo's secrets are known
    keys/            operator's key, passwords of database roles, key ring of the control plane
    pki/             CA and server certificates
    run/             pids of child processes
    logs/            what they say
    postgres/ valkey/ controlplane/ node-1/ inbox/    one for each server
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import Any, Self

from postroad.files import write_private
from postroad.localstack.errors import LocalStackError

# SQLite opens no file whose path is longer than 504 bytes, and the node's spool lies deepest.
_LONGEST_ROOT_BYTES = 390
_FOLDERS = ("keys", "pki", "run", "logs", "controlplane", "inbox")


class Layout:
    """A local stack's folder. See the module."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock: int | None = None
        self._notes: dict[str, Any] = {}

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    def log(self, name: str) -> Path:
        """Where a server's words go."""
        return self.root / "logs" / f"{name}.log"

    def open(self) -> Self:
        """Make and lock the folder; LocalStackError when it is in use, cannot be made, or lies too deep."""
        length = len(os.fsencode(self.root.resolve()))
        if length > _LONGEST_ROOT_BYTES:
            raise LocalStackError(
                f"the path of the folder {self.root} has {length} bytes, and {_LONGEST_ROOT_BYTES} are the most",
                "Choose another one with --dir: what is made there does not depend on where Postroad is installed",
            )
        try:
            self.root.mkdir(mode=0o711, parents=True, exist_ok=True)
            # The database may run as another user, who has to pass through; what is private says so itself.
            self.root.chmod(0o711)
            for name in _FOLDERS:
                (self.root / name).mkdir(mode=0o700, exist_ok=True)
            self._lock = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise LocalStackError(
                f"the folder {self.root} cannot be used: {error.strerror}", "Choose another one with --dir"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise LocalStackError(
                f"`postroad up` runs already in {self.root}", "Use that one, or choose another folder with --dir"
            ) from error
        self._notes = self._read_notes()
        return self

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def note(self, name: str) -> Any:
        """What was noted, None when nothing was."""
        return self._notes.get(name)

    def keep_note(self, name: str, value: Any) -> None:
        """Note durably that a step is complete."""
        self._notes = {**self._notes, name: value}
        write_private(self.root / "notes.json", json.dumps(self._notes, indent=1))

    def _read_notes(self) -> dict[str, Any]:
        with contextlib.suppress(FileNotFoundError):
            try:
                notes = json.loads((self.root / "notes.json").read_text(encoding="utf-8"))
            except ValueError:
                notes = None
            if not isinstance(notes, dict):
                raise LocalStackError(
                    f"{self.root / 'notes.json'} is damaged", "Delete it: steps that are complete are found out again"
                )
            return notes
        return {}
