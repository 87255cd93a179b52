"""`postroad spool …`: where mail waits, and the operator's word when a spool moved or came back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from postroad.cli.nodes import NODE
from postroad.cli.output import Column, short
from postroad.cli.resources import Limit, Yes, bound_of, call, confirm, list_some, show
from postroad.cli.session import session_of
from postroad.control.v1.node_pb2 import Node

app = typer.Typer(no_args_is_help=True, help="Spools: the queues on the disks of nodes. Operators only.")

_COLUMNS = (
    Column("SPOOL", lambda one: one[1].spool),
    Column("NODE", lambda one: short(one[0].name)),
    Column("STATE", lambda one: "accepted" if one[1].accepted else "refused"),
    Column("INCARNATION", lambda one: str(one[1].incarnation)),
    Column("CURSOR", lambda one: str(one[1].cursor)),
    Column("WAITING", lambda one: str(one[1].waiting_count)),
    Column("LOST", lambda one: _lost(one[1])),
)

_NAMED = 10

Spool = Annotated[str, typer.Argument(help="Its UUID")]
OfNode = Annotated[str, typer.Option("--node", help="Name or id of the node")]


@app.command("list")
def list_spools(context: typer.Context, limit: Limit = None) -> None:
    """List the spools of all nodes; `nodes get` names what one lost."""
    session = session_of(context)
    found = list_some(session, NODE, bound_of(session, limit))
    if session.printer.is_json:
        session.printer.resources("nodes", found, NODE.columns)
        return
    rows = [(node, spool) for node in found for spool in node.spools]
    session.printer.table([column.heading for column in _COLUMNS], ([c.cell(row) for c in _COLUMNS] for row in rows))


@app.command("attach")
def attach(
    context: typer.Context,
    spool: Spool,
    node: OfNode,
    *,
    force: Annotated[
        bool, typer.Option("--force", help="Even from a node that is connected: what it is sending may go out twice")
    ] = False,
) -> None:
    """Let a node send from a spool of another one, whose folder `postroad-node attach` took there."""
    session = session_of(context)
    name = NODE.name(session, node)
    show(session, NODE, call(session, NODE, "AttachSpool", name=name, spool=spool, force=force))


@app.command("accept")
def accept(context: typer.Context, spool: Spool, node: OfNode) -> None:
    """Send again from a spool that came back older than it was (a restored disk)."""
    session = session_of(context)
    show(session, NODE, call(session, NODE, "AcceptSpool", name=NODE.name(session, node), spool=spool))


@app.command("give-up")
def give_up(context: typer.Context, spool: Spool, node: OfNode, yes: Yes = False) -> None:
    """End all mail that waits in a spool whose disk will not come back; there is no way back."""
    session = session_of(context)
    name = NODE.name(session, node)
    confirm(session, f"Fail all that waits in spool {spool} of {short(name)}, and refuse its disk for ever?", yes=yes)
    show(session, NODE, call(session, NODE, "GiveUpSpool", name=name, spool=spool))


def spool_remarks(node: Node) -> Iterator[str]:
    """What somebody has to know of the node's spools: those that wait for a word, and what was lost."""
    name = short(node.name)
    for spool in node.spools:
        if not spool.accepted:
            yield (
                f"{name}: spool {spool.spool} came back older than it was, and nothing is sent from it until "
                f"`postroad spool accept {spool.spool} --node {name}`"
            )
        if spool.lost_count:
            named = ", ".join(spool.lost_messages[:_NAMED])
            rest = f"; `postroad nodes get {name}` names more" if len(spool.lost_messages) > _NAMED else ""
            lost = f"messages lost: {_lost(spool)}{': ' if named else ''}{named}{rest}"
            yield f"{name}: spool {spool.spool} was damaged, {lost}"
        elif spool.unnamed_losses:
            yield f"{name}: spool {spool.spool} was damaged: no message is known to be lost, but parts cannot be read"


def _lost(spool: Any) -> str:
    if not spool.lost_count:
        return "none known" if spool.unnamed_losses else ""
    return f"{spool.lost_count} or more" if spool.unnamed_losses else str(spool.lost_count)
