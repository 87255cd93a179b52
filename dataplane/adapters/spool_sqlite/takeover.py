"""Takes the folder of another node's spool over: from wherever it was copied or mounted into this node's spools.

Inputs are the folder `<uuid>`, this node's folder of spools and its name. The folder is locked while it is taken, so
that a node that still has it open keeps it. What is taken names this node as its own, keeps its incarnation, and bears
the mark of a refused spool: nothing is sent from it until the control plane has said that it is this node's. On the
same disk the folder is moved; from another one it is copied, and what is left behind names the new node too, so that
the former one cannot open it.

    a crash leaves                            taking it again
    before the mark: the folder as it was     takes it
    behind the mark: a marked folder          takes it, or leaves it to another node that does
    a copy `<uuid>.attaching`                 begins the copy anew

SpoolError says why a folder cannot be taken; OSError when the disk does not let it. Either leaves no folder of a spool.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from dataplane.adapters.spool_sqlite import schema
from dataplane.adapters.spool_sqlite.identity import (
    lock_folder,
    read_any_identity,
    sync_folder,
    write_identity,
)
from dataplane.ports import SpoolError, SpoolIdentity
from dataplane.spool_folders import QUARANTINE_FILE, mark_waiting

_UNFINISHED = ".attaching"
# Room kept on a disk, and a mark of the former node's: the next opening makes what it needs.
_LEFT_OUT = ("reserve", QUARANTINE_FILE)
_OTHER_DISK = (errno.EXDEV, errno.EBUSY, errno.EROFS, errno.EACCES, errno.EPERM)


class TakenSpool(NamedTuple):
    """What was taken and whose it was; `left_unmarked` when the old folder is still there and could not be marked."""

    spool: str
    former_node: str
    incarnation: int
    left_unmarked: bool


def take_folder(source: Path, spools: Path, node: str) -> TakenSpool:
    """Take `source` into `spools` for `node`."""
    source = source.absolute()
    if not source.is_dir():
        raise SpoolError(f"{source} is no folder")
    target = spools / source.name
    if target.exists():
        raise SpoolError(f"this node has a folder {target} already: a spool is attached once")
    lock = lock_folder(source)
    try:
        found = read_any_identity(source)
        if found is None or not (source / schema.DATABASE).is_file():
            raise SpoolError(f"{source} holds no spool: `identity` and `{schema.DATABASE}` must lie in it")
        spools.mkdir(mode=0o700, exist_ok=True)
        mine = SpoolIdentity(found.spool, node, found.incarnation)
        left_unmarked = False
        if not _move(source, target, mine):
            left_unmarked = _copy(source, target, mine)
    finally:
        os.close(lock)
    return TakenSpool(found.spool, found.node, found.incarnation, left_unmarked)


def _move(source: Path, target: Path, mine: SpoolIdentity) -> bool:
    """Move the folder, marked; False when it lies on another disk, or on one that cannot be written."""
    if source.stat().st_dev != target.parent.stat().st_dev:
        return False
    try:
        _mark(source, mine)
        source.rename(target)
    except OSError as error:
        if error.errno in _OTHER_DISK:
            return False
        raise
    sync_folder(target.parent)
    return True


def _copy(source: Path, target: Path, mine: SpoolIdentity) -> bool:
    """Copy the folder; whether what is left behind could not be marked."""
    unfinished = target.with_name(target.name + _UNFINISHED)
    if unfinished.exists():
        shutil.rmtree(unfinished)
    try:
        shutil.copytree(source, unfinished, ignore=shutil.ignore_patterns(*_LEFT_OUT))
        _mark(unfinished, mine)
        _sync_all(unfinished)
        left_unmarked = not _try_to_mark(source, mine)
        unfinished.rename(target)
    except BaseException:
        with contextlib.suppress(OSError):
            shutil.rmtree(unfinished)
        raise
    sync_folder(target.parent)
    return left_unmarked


def _mark(folder: Path, mine: SpoolIdentity) -> None:
    """The mark before the name: whoever opens the folder as its own must find it."""
    mark_waiting(folder, mine.node)
    write_identity(folder, mine)


def _try_to_mark(source: Path, mine: SpoolIdentity) -> bool:
    try:
        _mark(source, mine)
    except OSError:
        return False
    return True


def _sync_all(folder: Path) -> None:
    for path, _, files in os.walk(folder):
        for name in files:
            descriptor = os.open(Path(path) / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(path))
