"""Which spools a node has, which worker owns which, and which are set aside.

A spool is a folder `spool/<uuid>/`, and their number never shrinks. Each worker takes mail into one of them; what is
missing for that is made at the node's start. When there are more spools than workers, some workers own several: the
first takes mail, the others only deliver what they hold and wait to be needed again.

    file in the folder   meaning                                          until
    quarantined          its worker ended three times within seconds of   the node starts again, or a
                         a start, or cannot open it and has others        worker opens it
    refused              came back older than the control plane knew it,   the control plane accepts it
                         or was attached and may still be another node's
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

from dataplane.files import sync_folder, write_durably

QUARANTINE_FILE = "quarantined"
REFUSED_FILE = "refused"


def assign_spools(folder: Path, worker_count: int) -> list[list[str]]:
    """Names of the spools of each worker, the one that takes mail first; makes those that are missing. OSError."""
    folder.mkdir(mode=0o700, exist_ok=True)
    names = list(spool_names(folder))
    while len(names) < worker_count:
        names.append(str(uuid.uuid4()))
        (folder / names[-1]).mkdir(mode=0o700)
    # What is answered 250 must not lie in a folder that a loss of power takes back.
    sync_folder(folder)
    sync_folder(folder.parent)
    names.sort(key=lambda name: (is_refused(folder / name), name))
    return [names[index::worker_count] for index in range(worker_count)]


def quarantine_spool(spool: Path, reason: str) -> None:
    """Set a spool aside, for people to see why."""
    (spool / QUARANTINE_FILE).write_text(reason + "\n", encoding="utf-8")


def lift_quarantines(folder: Path) -> list[str]:
    """Take back what was set aside by the last run: starting the node again is how an operator asks for it."""
    return [name for name in spool_names(folder) if lift_quarantine(folder / name)]


def lift_quarantine(spool: Path) -> bool:
    """The spool is in use again; whether it had been set aside."""
    mark = spool / QUARANTINE_FILE
    was_there = mark.exists()
    mark.unlink(missing_ok=True)
    return was_there


def is_refused(spool: Path) -> bool:
    """Whether the control plane refuses the spool."""
    return (spool / REFUSED_FILE).exists()


def mark_refused(spool: Path, *, refused: bool) -> None:
    """Keep the control plane's verdict, durably: without it a restart would send what was sent before."""
    if refused:
        write_durably(spool / REFUSED_FILE, [b"the control plane says that nothing may be sent from it\n"])
    else:
        (spool / REFUSED_FILE).unlink(missing_ok=True)


def mark_waiting(spool: Path, node: str) -> None:
    """Let nothing be sent from a spool that was attached to `node` before the control plane has said that it may."""
    write_durably(spool / REFUSED_FILE, [f"attached to {node}: waits for the control plane\n".encode()])


def spool_names(folder: Path) -> Iterator[str]:
    """Names of the spools in the folder. OSError."""
    for entry in folder.iterdir():
        try:
            name = str(uuid.UUID(entry.name))
        except ValueError:
            continue
        if name == entry.name and entry.is_dir():
            yield name
