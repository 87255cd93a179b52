"""Whose folder it is: the lock that admits one process, and the file `identity` with node and incarnation.

The lock is flock on the folder itself; the system drops it when the process ends, however it ends. The incarnation
grows by one at each open and is on disk before anything else happens. Opening fails with SpoolError when another
process holds the folder, when it belongs to another node, and when the file says another spool than the folder's name.
"""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
from pathlib import Path

import orjson

from dataplane.ports import SpoolError, SpoolIdentity

IDENTITY = "identity"


def lock_folder(folder: Path) -> int:
    """Make the folder if need be, lock it and return the descriptor that holds the lock. SpoolError when it is held."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in {errno.EAGAIN, errno.EACCES}:
            raise SpoolError(f"spool {folder} is in use by another process") from error
        raise
    return descriptor


def read_identity(folder: Path, node: str) -> SpoolIdentity:
    """Return what the folder says of itself, incarnation 0 for a new one. SpoolError when it is another's."""
    found = read_any_identity(folder) or SpoolIdentity(folder.name, node, 0)
    if found.node != node:
        raise SpoolError(f"spool {found.spool} belongs to node {found.node}, not to {node}")
    return found


def read_any_identity(folder: Path) -> SpoolIdentity | None:
    """Return what the folder says of itself, whoever's it is, None for a new one. SpoolError for what is no spool."""
    try:
        name = str(uuid.UUID(folder.name))
    except ValueError as error:
        raise SpoolError(f"a spool's folder is named by its UUID, not {folder.name!r}") from error
    try:
        encoded = (folder / IDENTITY).read_bytes()
    except FileNotFoundError:
        return None
    try:
        fields = orjson.loads(encoded)
        found = SpoolIdentity(str(fields["spool"]), str(fields["node"]), int(fields["incarnation"]))
    except (ValueError, KeyError, TypeError) as error:
        raise SpoolError(f"{folder / IDENTITY} cannot be read") from error
    if found.spool != name:
        raise SpoolError(f"{folder} holds spool {found.spool}: a copied spool must not be opened")
    return found


def write_identity(folder: Path, identity: SpoolIdentity) -> None:
    """Replace the file durably: the old or the new one is there whenever the power goes."""
    encoded = orjson.dumps({"spool": identity.spool, "node": identity.node, "incarnation": identity.incarnation})
    write_file(folder / f"{IDENTITY}.new", encoded)
    (folder / f"{IDENTITY}.new").rename(folder / IDENTITY)
    sync_folder(folder)


def write_file(path: Path, content: bytes, *, mode: int = os.O_TRUNC) -> None:
    """Write a file and wait until it is on disk; with `mode` O_EXCL it must be new. OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | mode, 0o600)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until names made or removed in the folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
