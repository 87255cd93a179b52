"""CPU time and memory of process trees, read from /proc; Linux only.

A tree is named by its root's pid. Children that ended count through their parent's "waited-for" times, so that a
server that starts a process per connection is counted whole. Processes that ended and were adopted elsewhere are lost:
none of the servers measured here does that while it is measured.
"""

from __future__ import annotations

import os
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> tuple[int, float] | None:
    """Return parent pid and CPU seconds (own and of waited-for children) of a process, None when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    ticks = sum(int(field) for field in fields[11:15])
    return int(fields[1]), ticks / _TICKS_PER_S


def tree(root: int) -> list[int]:
    """Return `root` and all its living descendants."""
    children: dict[int, list[int]] = {}
    for entry in (path.name for path in Path("/proc").iterdir()):
        if entry.isdigit() and (found := _stat(int(entry))):
            children.setdefault(found[0], []).append(int(entry))
    pids, todo = [], [root]
    while todo:
        pid = todo.pop()
        pids.append(pid)
        todo.extend(children.get(pid, ()))
    return pids


def cpu_seconds(root: int) -> float:
    """Return user and system CPU seconds that the tree has used so far."""
    return sum(found[1] for pid in tree(root) if (found := _stat(pid)))


def cpu_by_process(root: int) -> dict[int, float]:
    """Return CPU seconds of each living process of the tree."""
    return {pid: found[1] for pid in tree(root) if (found := _stat(pid))}


def command_of(pid: int) -> str:
    """Return the command line of a process, empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""
