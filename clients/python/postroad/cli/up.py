"""`postroad up`: the whole of Postroad on this machine; localstack/ does the work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from postroad.cli.session import session_of


def up(
    context: typer.Context,
    folder: Annotated[Path, typer.Option("--dir", envvar="POSTROAD_DIR", help="Where everything lives")] = Path(
        ".postroad"
    ),
    port: Annotated[
        list[str] | None,
        typer.Option(
            "--port", help="NAME=NUMBER, repeatable; 0 picks a free one and keeps it; $POSTROAD_PORT_<NAME> too"
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", min=0, max=256, help="Processes of the node that do the mail; 0: one a core")
    ] = 0,
    port_base: Annotated[
        int | None, typer.Option("--port-base", min=1024, max=65_000, help="All ports in a row from here on")
    ] = None,
) -> None:
    """Start PostgreSQL, Valkey, the control plane, one node and an inbox, with a demo account; Ctrl-C stops all.

    A second start in the same folder goes on with what is there, and takes seconds. Ports: smtp, smtps, plain, inbox,
    grpc, nodes, http, node-http, postgres, valkey.
    """
    from postroad.localstack.ports import wished_ports
    from postroad.localstack.progress import progress_for
    from postroad.localstack.run import run_stack

    session = session_of(context)
    wishes = wished_ports(port or [], port_base, os.environ)
    progress = progress_for(json_lines=session.printer.is_json)
    run_stack(folder.absolute(), wishes, progress, workers)
