"""`postroad nodes drain`: a node takes no more mail, and what waits on it moves to the others.

It says how far that is, and with `--wait` goes on saying so until nothing waits there any more; interrupted, the drain
goes on, and the same command looks again. Status 1 when the node was undrained meanwhile.
"""

from __future__ import annotations

from typing import Annotated

import typer
from google.longrunning.operations_pb2 import Operation, WaitOperationRequest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict

from postroad.cli.output import short
from postroad.cli.problems import CommandError
from postroad.cli.resources import Name
from postroad.cli.session import Session, session_of
from postroad.control.v1.node_service_pb2 import DrainNodeMetadata, DrainNodeRequest

_LOOK_S = 2
_CALL_S = 30.0

WaitFor = Annotated[bool, typer.Option("--wait", help="Until nothing waits on the node any more")]


def add_drain(app: typer.Typer) -> None:
    """Give `app` the command."""
    app.command("drain", help="Take no more mail, and hand what waits over to the other nodes of the pool.")(_drain)


def _drain(context: typer.Context, name: Name, *, wait: WaitFor = False) -> None:
    session = session_of(context)
    operation = session.client.nodes.DrainNode(DrainNodeRequest(name=session.name("nodes", name, "")))
    said = ""
    while True:
        text = progress_text(operation)
        if text != said and not session.printer.is_json:
            session.printer.say(text)
            said = text
        if operation.done or not wait:
            break
        request = WaitOperationRequest(name=operation.name, timeout=Duration(seconds=_LOOK_S))
        operation = session.client.operations.WaitOperation(request, timeout=_CALL_S)
    _conclude(session, operation)


def _conclude(session: Session, operation: Operation) -> None:
    if session.printer.is_json:
        shown = {"operation": operation.name, "done": operation.done}
        session.printer.json(shown | MessageToDict(_metadata(operation), always_print_fields_with_no_presence=True))
    if operation.HasField("error"):
        raise CommandError(operation.error.message)


def _metadata(operation: Operation) -> DrainNodeMetadata:
    metadata = DrainNodeMetadata()
    operation.metadata.Unpack(metadata)
    return metadata


def progress_text(operation: Operation) -> str:
    """How far a drain is, and who took what."""
    found = _metadata(operation)
    node = short(found.node)
    if operation.done:
        state = f"{node} takes no mail, and nothing waits there"
    elif found.closed:
        state = f"{node} takes no mail; {found.waiting_count} recipients wait there"
    else:
        state = f"{node} is told to take no mail; {found.waiting_count} recipients wait there"
    moving = f", {found.moving_count} messages are between two nodes" if found.moving_count else ""
    taken = ", ".join(f"{short(one.node)} {one.message_count}" for one in found.targets)
    return f"{state}{moving}; messages taken: {taken or 'none'}"
