"""Composition root of `postroad-node attach`: another node's spool becomes one of this node's, which may be running.

Inputs are this node's data directory and the folder; the answer is text for people, which says what to do next. A node
that runs is told by SIGHUP, one that does not finds the spool when it starts. AttachmentError says why the folder was
not taken, and what to do; then this node has nothing of it.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from dataplane.adapters.spool_sqlite import TakenSpool, take_folder
from dataplane.agent.identity import IdentityError, load_identity
from dataplane.data_dir import DataDirError, holder_of, prepare_data_dir
from dataplane.ports import SpoolError


class AttachmentError(Exception):
    """The folder was not taken; the text says why."""


def attach(data_dir: Path, folder: Path) -> str:
    """Take the folder into the node of the data directory; what there is to say of it. AttachmentError."""
    try:
        prepare_data_dir(data_dir)
        node = load_identity(data_dir).node
        taken = take_folder(folder, data_dir / "spool", node)
    except (SpoolError, IdentityError, DataDirError, OSError) as error:
        raise AttachmentError(str(error)) from error
    return _text(taken, folder, node, told=_tell(data_dir))


def _tell(data_dir: Path) -> bool:
    """Whether a node runs there and was told."""
    if holder := holder_of(data_dir):
        with contextlib.suppress(ProcessLookupError):
            os.kill(holder, signal.SIGHUP)
            return True
    return False


def _text(taken: TakenSpool, folder: Path, node: str, *, told: bool) -> str:
    lines = [f"took spool {taken.spool} of {taken.former_node}, incarnation {taken.incarnation}"]
    if taken.left_unmarked:
        lines.append(f"{folder} could not be written: see that {taken.former_node} does not start with it again")
    lines.append("the node opens it now" if told else "the node opens it when it starts")
    lines.append(
        f"nothing is sent from it until the control plane says so; unless it did already: "
        f"postroad spool attach {taken.spool} --node {node.removeprefix('nodes/')}"
    )
    return "".join(f"{line}\n" for line in lines)
