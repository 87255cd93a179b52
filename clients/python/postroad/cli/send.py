"""`postroad send`: submit a message and watch it to its end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from google.protobuf.json_format import MessageToDict

from postroad.cli.connection import SmtpSettings
from postroad.cli.given_files import read_bytes, read_text
from postroad.cli.messages import FOLLOW_TIMEOUT_S, follow_to_the_end, follow_to_their_ends, is_sent
from postroad.cli.problems import FAILED, NOT_CONFIGURED, CommandError
from postroad.cli.session import Session, session_of
from postroad.cli.submission import Parameter, canonical, compose, submit
from postroad.cli.times import SPAN, hold_seconds_of, later_option
from postroad.control.v1.message_pb2 import Message
from postroad.sdk import PostroadError

# Each costs requests of the key, which has a hundred a minute.
_MOST_TIMELINES = 10
_NO_SERVER = "no SMTP server is known"
_NO_SERVER_ADVICE = "Run `postroad up`, or set POSTROAD_SMTP_SERVER, POSTROAD_SMTP_USERNAME and POSTROAD_SMTP_PASSWORD"


def send(
    context: typer.Context,
    *,
    to: Annotated[list[str], typer.Option("--to", help="Recipient; repeatable")],
    subject: Annotated[str, typer.Option("--subject", help="Subject")] = "A test from Postroad",
    sender: Annotated[str | None, typer.Option("--from", help="Sender; the demo's by default")] = None,
    body: Annotated[str, typer.Option("--body", help="Text")] = "Hello from Postroad.\n",
    body_file: Annotated[Path | None, typer.Option("--body-file", help="File with the text; `-` is stdin")] = None,
    raw: Annotated[
        Path | None, typer.Option("--raw", help="File with the whole message, headers and all; `-` is stdin")
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, max=10_000, help="So many copies")] = 1,
    hold_for_s: Annotated[
        int | None,
        typer.Option(
            "--hold-for", parser=hold_seconds_of, metavar=SPAN, help="Before it goes out: seconds, or 15m, 2h"
        ),
    ] = None,
    at: Annotated[datetime | None, later_option("--at", "When it goes out, UTC")] = None,
    priority: Annotated[
        int, typer.Option("--priority", min=-9, max=9, help="Among the account's mail the highest goes first")
    ] = 0,
    follow_: Annotated[
        bool | None, typer.Option("--follow/--no-follow", help="Watch to the end; by default not what is held")
    ] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", min=1, help="Seconds to watch")] = FOLLOW_TIMEOUT_S,
    implicit_tls: Annotated[bool, typer.Option("--implicit-tls", help="The SMTPS port instead of STARTTLS")] = False,
) -> None:
    """Submit a message over SMTP with TLS and AUTH, and watch it until it is sent.

    Status 0 when every copy was sent to every recipient (with --no-follow: accepted), 1 when one ended otherwise.
    With --hold-for or --at it is accepted now and goes out then; until then `postroad messages cancel` withdraws it.
    When a copy is refused, the ids of those before it are printed, and the rest is not submitted.
    The server is the one of `postroad up`, or POSTROAD_SMTP_SERVER, _USERNAME, _PASSWORD and _CA_FILE.
    """
    parameters = _parameters(hold_for_s, at, priority)
    session = session_of(context)
    settings = smtp_settings(session.connection.smtp)
    sender = sender or settings.sender
    if not settings.server:
        raise CommandError(_NO_SERVER, _NO_SERVER_ADVICE, NOT_CONFIGURED)
    if not sender:
        raise typer.BadParameter("give --from")
    content = canonical(read_bytes(raw)) if raw is not None else compose(sender, to, subject, _text(body, body_file))
    ids: list[str] = []
    try:
        submit(
            settings,
            ids,
            implicit_tls=implicit_tls,
            sender=sender,
            recipients=to,
            content=content,
            count=count,
            parameters=parameters,
        )
    except (CommandError, KeyboardInterrupt):
        if ids:
            _tell_accepted(session, ids)
        raise
    held = hold_for_s is not None or at is not None
    if not (follow_ or (follow_ is None and not held)):
        _tell_accepted(session, ids)
        return
    try:
        messages = _watch(session, ids, timeout_s)
    except (PostroadError, KeyboardInterrupt):
        # They are accepted, whatever becomes of the look at them; people have read it above.
        if session.printer.is_json:
            _tell_accepted(session, ids)
        raise
    if session.printer.is_json:
        session.printer.json({"messages": [MessageToDict(message) for message in messages]})
    if not all(is_sent(message) for message in messages):
        raise typer.Exit(FAILED)


def _parameters(hold_for_s: int | None, at: datetime | None, priority: int) -> list[Parameter]:
    if hold_for_s is not None and at is not None:
        raise typer.BadParameter("give --hold-for or --at, not both")
    parameters = []
    if hold_for_s is not None:
        parameters.append(Parameter("FUTURERELEASE", f"HOLDFOR={hold_for_s}", hold_for_s))
    if at is not None:
        parameters.append(Parameter("FUTURERELEASE", f"HOLDUNTIL={at:%Y-%m-%dT%H:%M:%S}Z"))
    if priority:
        parameters.append(Parameter("MT-PRIORITY", f"MT-PRIORITY={priority}"))
    return parameters


def _tell_accepted(session: Session, ids: Sequence[str]) -> None:
    if session.printer.is_json:
        session.printer.json({"messages": [{"id": one} for one in ids]})
    for one in ids:
        session.printer.say(f"Accepted {one}")


def _watch(session: Session, ids: Sequence[str], timeout_s: float) -> list[Message]:
    if len(ids) > _MOST_TIMELINES:
        session.printer.say(f"Accepted {len(ids)} messages", "bold")
        return follow_to_their_ends(session, ids, timeout_s)
    messages = []
    for one in ids:
        session.printer.say(f"Accepted {one}", "bold")
        messages.append(follow_to_the_end(session, one, timeout_s))
    return messages


def smtp_settings(found: SmtpSettings) -> SmtpSettings:
    """The settings from the file, where the environment does not name others; a file's password goes nowhere else."""
    server = os.environ.get("POSTROAD_SMTP_SERVER", "")
    if server and server not in {found.server, found.tls_server}:
        found = SmtpSettings(server=server, tls_server=server)
    ca_file = os.environ.get("POSTROAD_SMTP_CA_FILE")
    return replace(
        found,
        username=os.environ.get("POSTROAD_SMTP_USERNAME") or found.username,
        password=os.environ.get("POSTROAD_SMTP_PASSWORD") or found.password,
        ca_file=Path(ca_file) if ca_file else found.ca_file,
    )


def _text(body: str, body_file: Path | None) -> str:
    return body if body_file is None else read_text(body_file)
