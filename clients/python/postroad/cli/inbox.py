"""`postroad inbox …`: what the local stack delivered."""

from __future__ import annotations

import sys
from base64 import b64encode
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from postroad.cli.output import printable
from postroad.cli.problems import NOT_CONFIGURED, CommandError
from postroad.cli.resources import bound_of, tell_more
from postroad.cli.session import Session, session_of
from postroad.inbox import Inbox, ReceivedMail

app = typer.Typer(no_args_is_help=True, help="The inbox of the local stack: mail that was delivered, byte for byte.")

# What people see of a list unless they say otherwise.
_LAST = 50

Folder = Annotated[Path | None, typer.Option("--dir", help="Folder of the inbox; that of `postroad up` by default")]


def _inbox(session: Session, folder: Path | None) -> Inbox:
    folder = folder or session.connection.inbox
    if folder is None:
        raise CommandError("no inbox is known", "Run `postroad up`, or give --dir", NOT_CONFIGURED)
    return Inbox(folder)


@app.command("list")
def list_mail(
    context: typer.Context,
    last: Annotated[
        int | None,
        typer.Option("--last", min=0, help="The last so many; 0 is all, as with JSON unless given", show_default=False),
    ] = None,
    folder: Folder = None,
) -> None:
    """List received mail, oldest first."""
    session = session_of(context)
    bound = bound_of(session, last, _LAST)
    mails = _inbox(session, folder).mails(None if bound is None else bound + 1)
    if bound is not None and len(mails) > bound:
        mails = mails[-bound:]
        tell_more(session, bound, "--last")
    if session.printer.is_json:
        session.printer.json({"mails": [_for_programs(mail) for mail in mails]})
        return
    session.printer.table(
        ("NUMBER", "RECEIVED", "FROM", "TO", "BYTES", "SUBJECT", "MESSAGE"),
        (
            (
                str(mail.number),
                _local(mail.receive_time),
                mail.sender or "<>",
                ", ".join(mail.recipients),
                str(mail.size_bytes),
                mail.subject,
                mail.message,
            )
            for mail in mails
        ),
    )


@app.command("show")
def show_mail(
    context: typer.Context,
    mail_id: Annotated[str, typer.Argument(help="Number, or Postroad's message id")],
    raw: Annotated[bool, typer.Option("--raw", help="The content alone, byte for byte")] = False,
    folder: Folder = None,
) -> None:
    """Show a mail: envelope and content."""
    session = session_of(context)
    inbox = _inbox(session, folder)
    mails = inbox.find(mail_id)
    if raw:
        sys.stdout.buffer.write(inbox.content(mails[0]))
        sys.stdout.buffer.flush()
        return
    if session.printer.is_json:
        contents = [{**_for_programs(mail), "contentBase64": b64encode(inbox.content(mail)).decode()} for mail in mails]
        session.printer.json({"mails": contents})
        return
    for mail in mails:
        session.printer.say(f"Mail {mail.number}, received {_local(mail.receive_time)}", "bold")
        session.printer.say(f"MAIL FROM:<{mail.sender}> {' '.join(mail.options)}".rstrip())
        for recipient in mail.recipients:
            session.printer.say(f"RCPT TO:<{recipient}>")
        session.printer.say("")
        text = inbox.content(mail).decode("utf-8", errors="replace").replace("\r\n", "\n")
        session.printer.say(printable(text))


def _for_programs(mail: ReceivedMail) -> dict[str, Any]:
    # Named as in the API's JSON, so that programs meet one style.
    def camel_case(name: str) -> str:
        first, *others = name.split("_")
        return first + "".join(word.capitalize() for word in others)

    return {camel_case(name): value for name, value in asdict(mail).items()}


def _local(text: str) -> str:
    return datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M:%S")
