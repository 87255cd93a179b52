"""`postroad status` and `postroad health`: what is running, in which version, and whether configuration arrived."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import typer
from google.protobuf.json_format import MessageToDict

from postroad.cli.nodes import NODE
from postroad.cli.output import short, time_text
from postroad.cli.problems import FAILED
from postroad.cli.resources import list_all
from postroad.cli.session import Session, session_of
from postroad.cli.spools import spool_remarks
from postroad.control.v1.node_pb2 import Node
from postroad.localstack.probe import readiness
from postroad.sdk import PermissionDeniedError, PostroadError


@dataclass(frozen=True, slots=True)
class Probe:
    """The answer of one `/readyz`."""

    name: str
    url: str
    ready: bool
    detail: str


def status(context: typer.Context) -> None:
    """Show what is running; status 1 when something that is known is not ready.

    Not ready is a process, a node that is enrolled and not connected or that refused its configuration, and a spool
    that is refused or was damaged.
    """
    session = session_of(context)
    printer = session.printer
    probes = _probes(session)
    nodes, refusal = _nodes(session)
    remarks = [text for node in nodes for text in _remarks(node)]
    ready = not refusal and not remarks and all(probe.ready for probe in probes)
    if printer.is_json:
        printer.json(
            {
                "version": version("postroad"),
                "server": session.connection.server,
                "ready": ready,
                "processes": [{"name": p.name, "url": p.url, "ready": p.ready, "detail": p.detail} for p in probes],
                "nodes": [MessageToDict(node) for node in nodes],
                "error": refusal,
            }
        )
    else:
        printer.say(f"postroad {version('postroad')}, server {session.connection.server or 'unknown'}")
        printer.say(f"settings from {session.connection.source or 'flags and environment'}")
        if probes:
            printer.say("")
            printer.table(
                ("PROCESS", "READY", "DETAIL", "URL"),
                ((p.name, "yes" if p.ready else "no", p.detail, p.url) for p in probes),
            )
        if nodes:
            printer.say("")
            printer.resources("nodes", nodes, NODE.columns)
            for text in remarks:
                printer.remark(text)
        if refusal:
            printer.remark(f"Nodes: {refusal}")
    if not ready:
        raise typer.Exit(FAILED)


def health(context: typer.Context) -> None:
    """Ask the control plane whether it serves: `SERVING` and status 0, else status 1 or 4."""
    session = session_of(context)
    serving = session.client.is_serving()
    text = "SERVING" if serving else "NOT_SERVING"
    if session.printer.is_json:
        session.printer.json({"status": text})
    session.printer.say(text, "green" if serving else "red")
    if not serving:
        raise typer.Exit(FAILED)


def _remarks(node: Node) -> Iterator[str]:
    """What is not in order with a node; nobody waits for one that is not enrolled yet, or is revoked."""
    if node.state == Node.STATE_ENROLLED:
        name = short(node.name)
        if not node.connected:
            yield f"{name}: not connected, last seen {time_text(node.last_seen_time) or 'never'}"
        if node.config_status == Node.CONFIG_STATUS_ERROR:
            yield f"{name}: refused its configuration: {node.config_error}"
    yield from spool_remarks(node)


def _nodes(session: Session) -> tuple[list[Any], str]:
    try:
        return list_all(session, NODE), ""
    except PermissionDeniedError:
        return [], ""  # an account's key: nodes are the operators' business
    except PostroadError as error:
        return [], error.message


def _probes(session: Session) -> list[Probe]:
    known = {"control plane": session.connection.http, "node": session.connection.node_http}
    return [_probe(name, url) for name, url in known.items() if url]


def _probe(name: str, url: str) -> Probe:
    answer = readiness(url)
    return Probe(name, url, answer.ready, answer.detail)
