"""What each worker of the node has in use, as far as the agent knows.

    unknown   neither connected nor known to be gone: may still use what it had; nothing is acknowledged
    meanwhile present   connected: has what it last said absent    its process is gone; a new one reads the
    files before it does anything, so it counts as up to date

Pure bookkeeping: a `WorkerTable` is told what happened and answers whether something is in use everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class _Present:
    digest: str
    denials_version: int
    halted: bool
    config_error: str = ""
    denials_error: str = ""


class WorkerTable:
    """State of workers 0 to `count` - 1; all unknown at first."""

    def __init__(self, count: int) -> None:
        self._workers: dict[int, _Present | None] = {}
        self._count = count

    @property
    def unknown(self) -> list[int]:
        """Workers of which nothing is known: find out whether their processes live."""
        return [index for index in range(self._count) if index not in self._workers]

    @property
    def connected_count(self) -> int:
        """Workers that are present."""
        return sum(1 for worker in self._workers.values() if worker is not None)

    @property
    def halted(self) -> list[int]:
        """Workers that are present and take no mail, since all their spools are refused."""
        return [index for index, worker in sorted(self._workers.items()) if worker is not None and worker.halted]

    def connected(self, index: int, digest: str, denials_version: int, *, halted: bool = False) -> None:
        """A worker said what it has in use, and whether all its spools are refused: it ends when that changes."""
        self._workers[index] = _Present(digest, denials_version, halted)

    def lost(self, index: int) -> None:
        """The connection to a worker ended; its process may live."""
        self._workers.pop(index, None)

    def absent(self, index: int) -> None:
        """The worker's process is known to be gone."""
        if self._workers.get(index) is None:
            self._workers[index] = None

    def config_applied(self, index: int, digest: str, error: str) -> None:
        """A worker swapped, or could not."""
        if (worker := self._workers.get(index)) is not None:
            worker.digest = digest
            worker.config_error = error

    def denials_applied(self, index: int, version: int, error: str) -> None:
        """A worker has denials in force, or could not read them."""
        if (worker := self._workers.get(index)) is not None:
            worker.denials_version = version
            worker.denials_error = error

    def announced(self) -> None:
        """Something new is on disk: what was known of failures and of absence says nothing about it.

        A process that began just before may have read the old file; only a look from now on proves that there is none.
        """
        for index, worker in list(self._workers.items()):
            if worker is None:
                del self._workers[index]
            else:
                worker.config_error = worker.denials_error = ""

    def config_in_use(self, digest: str) -> bool:
        """Whether every worker uses this configuration."""
        return not self.unknown and all(worker is None or worker.digest == digest for worker in self._workers.values())

    def denials_in_force(self, version: int) -> bool:
        """Whether every worker has these denials or newer ones in force."""
        return not self.unknown and all(
            worker is None or worker.denials_version >= version for worker in self._workers.values()
        )

    def config_errors(self) -> list[str]:
        """Why workers could not swap."""
        return self._errors("config_error")

    def denials_errors(self) -> list[str]:
        """Why workers could not read the denials."""
        return self._errors("denials_error")

    def _errors(self, kind: str) -> list[str]:
        return [
            f"worker {index}: {getattr(worker, kind)}"
            for index, worker in sorted(self._workers.items())
            if worker is not None and getattr(worker, kind)
        ]
