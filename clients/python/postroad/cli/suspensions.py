"""`suspend`, `resume` and `suspension` of what can be suspended: the verbs, and which nodes have confirmed them."""

from __future__ import annotations

import math
import time
from typing import Annotated, Any

import typer
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict

from postroad.cli.output import enum_text, short, time_text
from postroad.cli.problems import UNREACHABLE
from postroad.cli.resources import Kind, Name, call, show
from postroad.cli.session import Session, session_of
from postroad.control.v1.suspension_pb2 import Suspension
from postroad.control.v1.suspension_service_pb2 import GetSuspensionRequest, WaitSuspensionRequest

# The server waits no longer in one call.
_CALL_S = 60
Wait = Annotated[
    int, typer.Option("--wait", min=0, help="Seconds to wait until every node has confirmed; shows which have")
]
Reason = Annotated[str, typer.Option("--reason", help="Why; shown to operators")]


def add_suspension(app: typer.Typer, kind: Kind, suspend_text: str, resume_text: str) -> None:
    """Give `app` the commands suspend, resume and suspension."""

    def suspend(context: typer.Context, name: Name, reason: Reason = "", wait_s: Wait = 0) -> None:
        session = session_of(context)
        fields = {"name": kind.name(session, name), "reason": reason}
        _tell(session, kind, call(session, kind, f"Suspend{kind.noun}", **fields), wait_s)

    def resume(context: typer.Context, name: Name, wait_s: Wait = 0) -> None:
        session = session_of(context)
        _tell(session, kind, call(session, kind, f"Resume{kind.noun}", name=kind.name(session, name)), wait_s)

    def suspension(context: typer.Context, name: Name) -> None:
        session = session_of(context)
        request = GetSuspensionRequest(name=f"{kind.name(session, name)}/suspension")
        _print(session, session.client.suspensions.GetSuspension(request))

    app.command("suspend", help=suspend_text)(suspend)
    app.command("resume", help=resume_text)(resume)
    app.command("suspension", help="Show which nodes have confirmed what was suspended, resumed or revoked last.")(
        suspension
    )


def _tell(session: Session, kind: Kind, resource: Any, wait_s: int) -> None:
    """Show the resource; or wait, and show who has confirmed it."""
    if not wait_s:
        show(session, kind, resource)
        return
    found = _wait(session, f"{resource.name}/suspension", wait_s)
    _print(session, found)
    if not found.confirmed:
        raise typer.Exit(UNREACHABLE)


def _wait(session: Session, name: str, wait_s: int) -> Suspension:
    ends = time.monotonic() + wait_s
    while True:
        left = math.ceil(min(max(ends - time.monotonic(), 0), _CALL_S))
        request = WaitSuspensionRequest(name=name, timeout=Duration(seconds=left))
        found = session.client.suspensions.WaitSuspension(request, timeout=left + 10)
        if found.confirmed or time.monotonic() >= ends:
            return found


def _print(session: Session, found: Suspension) -> None:
    if session.printer.is_json:
        session.printer.json(MessageToDict(found, always_print_fields_with_no_presence=True))
        return
    missing = sum(not receipt.confirmed for receipt in found.receipts)
    state = enum_text(found, "state").replace("_", " ")
    session.printer.say(f"{state}, denials version {found.denials_version}: " + _summary(len(found.receipts), missing))
    session.printer.table(
        ("NODE", "POOL", "CONFIRMED", "VERSION", "HEARD", "CONNECTED"),
        (
            (
                short(one.node),
                short(one.node_pool),
                "yes" if one.confirmed else "software too old" if one.unsupported else "not yet",
                str(one.denials_version),
                time_text(one.acknowledge_time),
                "yes" if one.connected else "no",
            )
            for one in found.receipts
        ),
    )


def _summary(count: int, missing: int) -> str:
    return f"not yet confirmed by {missing} of {count} nodes" if missing else f"confirmed by all {count} nodes"
