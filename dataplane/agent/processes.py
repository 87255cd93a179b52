"""What the kernel says of the node's processes, and what the supervisor says of them in `run/ready.json`.

Contract. `process_samples` yields memory, descriptors and CPU time of the supervisor and of each process that it names,
and its restarts; beside that the number of spools that were set aside. What cannot be read (a process that just ended,
a system without /proc) is left out.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataplane.spool_folders import QUARANTINE_FILE
from dataplane.telemetry import SampleRow

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# Fields of /proc/<pid>/stat behind the name of the program, which may hold anything: user and system time.
_USER_TICKS, _SYSTEM_TICKS = 11, 12


def process_samples(ready_file: Path, spools: Path, proc: Path = Path("/proc")) -> Iterator[SampleRow]:
    """Rows for the metrics of processes; `spools` is the folder with all spools."""
    state: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        state = json.loads(ready_file.read_bytes())
    processes = {"supervisor": state.get("pid", 0), "agent": os.getpid(), **state.get("processes", {})}
    for name, pid in processes.items():
        yield from _usage(name, proc / str(pid))
    for name, count in state.get("restarts", {}).items():
        yield "process_restarts_total", (name,), count
    yield "spools_quarantined", (), sum(1 for _ in spools.glob(f"*/{QUARANTINE_FILE}"))


def _usage(name: str, folder: Path) -> Iterator[SampleRow]:
    with contextlib.suppress(OSError, ValueError, IndexError):
        resident_pages = int((folder / "statm").read_text().split()[1])
        times = (folder / "stat").read_text().rpartition(")")[2].split()
        open_fds = sum(1 for _ in (folder / "fd").iterdir())
        yield "process_resident_memory_bytes", (name,), resident_pages * _PAGE_BYTES
        yield "process_cpu_seconds_total", (name,), (int(times[_USER_TICKS]) + int(times[_SYSTEM_TICKS])) / _TICKS_PER_S
        yield "process_open_fds", (name,), open_fds
