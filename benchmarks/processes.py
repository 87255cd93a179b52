"""CPU time and memory of process trees, read from /proc; Linux only.

A tree is named by its root's pid. Children that ended count through their parent's "waited-for" times, so that a
server that starts a process per connection is counted whole. Processes that ended and were adopted elsewhere are lost:
none of the servers measured here does that while it is measured.
"""

from __future__ import annotations

import os
from collections.abc import Callable
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


def cpu_of(pid: int) -> float:
    """Return CPU seconds of one process with its waited-for children, 0 when it is gone."""
    found = _stat(pid)
    return found[1] if found else 0.0


def machine_busy_s() -> float:
    """Return CPU seconds that all cores together were busy since the machine's start, with what was stolen from it."""
    fields = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0].split()[1:]
    user, nice, system, _idle, _wait, interrupts, soft_interrupts, stolen = map(int, fields[:8])
    return (user + nice + system + interrupts + soft_interrupts + stolen) / _TICKS_PER_S


def cpu_by_role(root: int, role_of: Callable[[str], str]) -> dict[str, float]:
    """Return CPU seconds of the tree by what `role_of` makes of each command line."""
    roles: dict[str, float] = {}
    for pid in tree(root):
        role = role_of(command_of(pid))
        roles[role] = roles.get(role, 0.0) + cpu_of(pid)
    return roles


def memory_by_role(root: int, role_of: Callable[[str], str]) -> dict[str, int]:
    """Return proportional memory in bytes of the tree by role: what processes share is split between them."""
    roles: dict[str, int] = {}
    for pid in tree(root):
        role = role_of(command_of(pid))
        roles[role] = roles.get(role, 0) + proportional_bytes(pid)
    return roles


def proportional_bytes(pid: int) -> int:
    """Return the memory of a process with its share of what it shares (PSS), 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))


def command_of(pid: int) -> str:
    """Return the command line of a process, empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""
