"""Which spools a node has, which worker owns which, and which are set aside.

A spool is a folder `spool/<uuid>/`. Their number is fixed when the first one is made: one a worker. When there are more
spools than workers later, some workers own several; when there are fewer, there are only as many workers as spools. A
folder with a file `quarantined` in it is set aside until the node starts again; one with a file `refused` came back
older than the control plane knew it, and nothing is sent from it until it is accepted.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from dataplane.files import write_durably

QUARANTINE_FILE = "quarantined"
REFUSED_FILE = "refused"


def assign_spools(folder: Path, worker_count: int) -> list[list[str]]:
    """Names of the spools of each worker, at least one each; makes the folders at the node's first start."""
    names = sorted(_spool_names(folder)) if folder.is_dir() else []
    if not names:
        names = sorted(str(uuid.uuid4()) for _ in range(worker_count))
        # All of them or none: a node killed half-way must not be left with fewer for ever.
        made = folder.with_name(f"{folder.name}.new")
        shutil.rmtree(made, ignore_errors=True)
        for name in names:
            (made / name).mkdir(mode=0o700, parents=True)
        made.replace(folder)
    workers = min(worker_count, len(names))
    return [names[index::workers] for index in range(workers)]


def quarantine_spool(spool: Path, reason: str) -> None:
    """Set a spool aside, for people to see why."""
    (spool / QUARANTINE_FILE).write_text(reason + "\n", encoding="utf-8")


def lift_quarantines(folder: Path) -> list[str]:
    """Take back what was set aside by the last run: starting the node again is how an operator asks for it."""
    lifted = []
    for name in _spool_names(folder):
        mark = folder / name / QUARANTINE_FILE
        if mark.exists():
            mark.unlink()
            lifted.append(name)
    return lifted


def is_refused(spool: Path) -> bool:
    """Whether the control plane refuses the spool."""
    return (spool / REFUSED_FILE).exists()


def mark_refused(spool: Path, *, refused: bool) -> None:
    """Keep the control plane's verdict, durably: without it a restart would send what was sent before."""
    if refused:
        write_durably(spool / REFUSED_FILE, [b"came back older than the control plane knew it\n"])
    else:
        (spool / REFUSED_FILE).unlink(missing_ok=True)


def _spool_names(folder: Path) -> Iterator[str]:
    for entry in folder.iterdir():
        try:
            name = str(uuid.UUID(entry.name))
        except ValueError:
            continue
        if name == entry.name and entry.is_dir():
            yield name
