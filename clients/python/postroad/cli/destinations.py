"""`postroad destinations …`: domains of recipients, and stopping the mail for them."""

from __future__ import annotations

import typer

from postroad.cli.output import Column, enum_text, time_text
from postroad.cli.resources import Kind, add_reading
from postroad.cli.suspensions import add_suspension
from postroad.control.v1 import destination_service_pb2

DESTINATION = Kind(
    noun="Destination",
    collection="destinations",
    service="destinations",
    module=destination_service_pb2,
    columns=(
        Column("DESTINATION", lambda one: one.name),
        Column("STATE", lambda one: enum_text(one, "state")),
        Column("SINCE", lambda one: time_text(one.suspend_time)),
        Column("REASON", lambda one: one.suspend_reason),
    ),
)

app = typer.Typer(
    no_args_is_help=True,
    help="Destinations: domains of recipients, or `*.` and a domain for those below it. "
    "`example.net` is the account's mail to it, `destinations/example.net` that of every account.",
)
add_reading(app, DESTINATION, "List the suspended destinations by name.", shared=True)
add_suspension(
    app, DESTINATION, "Begin no attempt for recipients of this domain; mail for them waits.", "Lift a suspension."
)
