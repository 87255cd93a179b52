"""`postroad audit`: whether all mail that was accepted has ended or waits, on both sides alike."""

from __future__ import annotations

from typing import Annotated

import typer
from google.protobuf.json_format import MessageToDict

from postroad.cli.output import Column, enum_text, short, time_text
from postroad.cli.problems import FAILED
from postroad.cli.resources import Kind, list_all
from postroad.cli.session import session_of
from postroad.control.v1 import book_service_pb2
from postroad.control.v1.book_pb2 import Book, BookFinding

_EVERY_ACCOUNT = "accounts/-"


def _waiting(book: Book) -> str:
    earlier = f" ({book.earlier_count} of before the books)" if book.earlier_count else ""
    return f"{book.waiting_count}{earlier}"


def _account(name: str) -> str:
    return name.split("/")[1]


BOOK = Kind(
    noun="Book",
    collection="books",
    service="books",
    module=book_service_pb2,
    columns=(
        Column("ACCOUNT", lambda one: _account(one.name)),
        Column("SPOOL", lambda one: short(one.name)),
        Column("NODE", lambda one: short(one.node)),
        Column("ACCEPTED", lambda one: str(one.accepted_count)),
        Column("SENT", lambda one: str(one.sent_count)),
        Column("BOUNCED", lambda one: str(one.bounced_count)),
        Column("FAILED", lambda one: str(one.failed_count)),
        Column("EXPIRED", lambda one: str(one.expired_count)),
        Column("CANCELLED", lambda one: str(one.cancelled_count)),
        Column("WAITING", _waiting),
        Column("IN SPOOL", lambda one: str(one.spool_waiting_count)),
        Column("BALANCES", lambda one: "yes" if one.balances else "NO"),
        Column("SAME MAIL", lambda one: "yes" if one.agrees else "NO"),
        Column("RECORD", lambda one: str(one.as_of_record)),
        Column("COMPARED", lambda one: time_text(one.compare_time)),
    ),
)
FINDING = Kind(
    noun="BookFinding",
    collection="bookFindings",
    service="books",
    module=book_service_pb2,
    columns=(
        Column("FINDING", lambda one: enum_text(one, "kind")),
        Column("ACCOUNT", lambda one: _account(one.name)),
        Column("MESSAGE", lambda one: short(one.message)),
        Column("RECIPIENT", lambda one: str(one.recipient_index) if one.HasField("recipient_index") else ""),
        Column("SPOOL", lambda one: one.spool),
        Column("DETAIL", lambda one: one.detail),
        Column("SINCE", lambda one: time_text(one.first_seen_time)),
        Column("OVER", lambda one: time_text(one.resolve_time)),
    ),
)


def audit(
    context: typer.Context,
    *,
    every: Annotated[bool, typer.Option("--every-account", help="All accounts; for operators")] = False,
    resolved: Annotated[bool, typer.Option("--resolved", help="Findings that are over, too")] = False,
) -> None:
    """Show the books and what is wrong with them; status 0 when nothing is, else 1."""
    session = session_of(context)
    parent = _EVERY_ACCOUNT if every else session.account
    books: list[Book] = list_all(session, BOOK, parent=parent)
    findings: list[BookFinding] = list_all(session, FINDING, parent=parent, show_resolved=resolved)
    if session.printer.is_json:
        session.printer.json({"books": _as_json(books), "bookFindings": _as_json(findings)})
    else:
        session.printer.resources("books", books, BOOK.columns)
        if findings:
            session.printer.say("")
            session.printer.resources("bookFindings", findings, FINDING.columns)
    is_open = any(not one.HasField("resolve_time") for one in findings)
    if is_open or not all(one.balances and one.agrees for one in books):
        raise typer.Exit(FAILED)


def _as_json(messages: list[Book] | list[BookFinding]) -> list[object]:
    return [MessageToDict(one) for one in messages]
