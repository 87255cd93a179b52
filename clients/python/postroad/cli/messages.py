"""`postroad messages …`: the record of every message, and its timeline as text."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict

from postroad.cli.commands import add_commands
from postroad.cli.output import Column, Printer, clock_text, enum_text, short, time_text
from postroad.cli.problems import FAILED
from postroad.cli.resources import Kind, Limit, bound_of, call, list_some
from postroad.cli.session import Session, session_of
from postroad.cli.times import earlier_option, timestamp
from postroad.control.v1 import message_service_pb2
from postroad.control.v1.message_pb2 import (
    DELIVERY_EVENT_TYPE_ACCEPTED,
    DELIVERY_EVENT_TYPE_SENT,
    DeliveryEvent,
    Message,
    RecipientState,
)
from postroad.sdk import follow, follow_all, is_over, watch_events


def _recipients(message: Message) -> str:
    first = message.recipients[0].address if message.recipients else ""
    more = len(message.recipients) - 1
    return f"{first} and {more} more" if more > 0 else first


MESSAGE = Kind(
    noun="Message",
    collection="messages",
    service="messages",
    module=message_service_pb2,
    columns=(
        Column("MESSAGE", lambda one: short(one.name)),
        Column("ACCEPTED", lambda one: time_text(one.accept_time)),
        Column("STATE", lambda one: enum_text(one, "state")),
        Column("GOES OUT", lambda one: time_text(one.send_time)),
        Column("PRIORITY", lambda one: str(one.priority or "")),
        Column("SENDER", lambda one: one.sender or "<>"),
        Column("RECIPIENT", _recipients),
        Column("SUBJECT", lambda one: one.subject),
    ),
)

app = typer.Typer(no_args_is_help=True, help="Messages: what was accepted, where it is, and what happened to it.")

MessageName = Annotated[str, typer.Argument(help="Id from the 250, or full resource name")]
FOLLOW_TIMEOUT_S = 60.0
# What people see of a list unless they say otherwise.
_NEWEST = 50


class State(StrEnum):
    """States of a recipient."""

    SCHEDULED = "scheduled"
    QUEUED = "queued"
    SENDING = "sending"
    DEFERRED = "deferred"
    HELD = "held"
    SENT = "sent"
    BOUNCED = "bounced"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


Since = Annotated[datetime | None, earlier_option("--since", "Accepted then or later, UTC")]
Before = Annotated[datetime | None, earlier_option("--before", "Accepted earlier, UTC")]


@app.command("list")
def list_messages(
    context: typer.Context,
    state: Annotated[State | None, typer.Option("--state", help="With a recipient in this state")] = None,
    recipient: Annotated[str, typer.Option("--recipient", help="With exactly this recipient")] = "",
    tag: Annotated[str, typer.Option("--tag", help="With this tag")] = "",
    since: Since = None,
    before: Before = None,
    limit: Limit = None,
) -> None:
    """List messages, newest first."""
    session = session_of(context)
    filters: dict[str, Any] = {"parent": session.account, "recipient": recipient, "tag": tag}
    if state is not None:
        filters["state"] = RecipientState.Value(f"RECIPIENT_STATE_{state.upper()}")
    for field, moment in (("start_time", since), ("end_time", before)):
        if moment is not None:
            filters[field] = timestamp(moment)
    found = list_some(session, MESSAGE, bound_of(session, limit, _NEWEST), **filters)
    session.printer.resources("messages", found, MESSAGE.columns)


@app.command("get")
def get_message(context: typer.Context, name: MessageName) -> None:
    """Show a message, its recipients and its timeline."""
    session = session_of(context)
    message = call(session, MESSAGE, "GetMessage", name=MESSAGE.name(session, name))
    session.printer.resource(message, hidden=frozenset({"recipients", "events"}))
    if session.printer.is_json:
        return
    session.printer.say("")
    session.printer.table(
        ("RECIPIENT", "STATE", "ATTEMPTS", "NEXT ATTEMPT", "PROVIDER", "LAST REPLY"),
        (
            (
                one.address,
                enum_text(one, "state"),
                str(one.attempts),
                time_text(one.next_attempt_time),
                short(one.provider),
                reply_text(one),
            )
            for one in message.recipients
        ),
    )
    session.printer.say("")
    for event in message.events:
        session.printer.say(event_line(event))


@app.command("follow")
def follow_message(
    context: typer.Context,
    name: MessageName,
    timeout_s: Annotated[float, typer.Option("--timeout", min=1, help="Seconds to watch")] = FOLLOW_TIMEOUT_S,
) -> None:
    """Watch a message to its end; status 0 when it was sent to every recipient, else 1."""
    session = session_of(context)
    message = follow_to_the_end(session, name, timeout_s)
    if session.printer.is_json:
        session.printer.json(MessageToDict(message))
    if not is_sent(message):
        raise typer.Exit(FAILED)


@app.command("watch")
def watch_messages(
    context: typer.Context,
    position: Annotated[str, typer.Option("--position", help="Go on after this position; without it begin now")] = "",
    timeout_s: Annotated[
        float | None, typer.Option("--timeout", min=1, help="Seconds to watch; without it until interrupted")
    ] = None,
) -> None:
    """Watch what happens to all mail of the account, and go on where it was when the server was away.

    With `--output json` each answer is one line, and its position is where another `watch` goes on.
    """
    session = session_of(context)
    printer = session.printer
    answers = watch_events(session.client, session.account, position=position, timeout_s=timeout_s)
    try:
        with contextlib.closing(answers):
            for answer in answers:
                position = answer.position
                printer.json_line(MessageToDict(answer))
                for event in answer.events:
                    printer.say(f"{short(event.message)}  {event_line(event)}")
    finally:
        if position and not printer.is_json:
            printer.remark(f"`--position {position}` goes on from here")


add_commands(app)


def follow_to_the_end(session: Session, identifier: str, timeout_s: float) -> Message:
    """Print each event of a message as it happens, until it is over; DeadlineError when that takes too long."""
    printer = session.printer
    events = follow(session.client, session.name("messages", identifier), timeout_s)
    message = _print_to_the_end(printer, events)
    _print_end(printer, message)
    return message


def follow_to_their_ends(session: Session, identifiers: Sequence[str], timeout_s: float) -> list[Message]:
    """Print how each of many messages ended, until all have; DeadlineError when that takes too long."""
    names = [session.name("messages", one) for one in identifiers]
    ended = {}
    for message in follow_all(session.client, names, timeout_s):
        session.printer.say(short(message.name), "bold")
        _print_end(session.printer, message)
        ended[message.name] = message
    return [ended[name] for name in names]


def _print_end(printer: Printer, message: Message) -> None:
    state = enum_text(message, "state")
    if is_sent(message):
        printer.say(f"{state.capitalize()} to {', '.join(one.address for one in message.recipients)}", "green")
        return
    printer.say(f"{state.capitalize()}:", "red")
    for recipient in message.recipients:
        printer.say(f"  {recipient.address}: {enum_text(recipient, 'state')} {reply_text(recipient)}")
    printer.say(f"`postroad messages get {short(message.name)}` shows all of it")


def _print_to_the_end(printer: Printer, events: Generator[DeliveryEvent, None, Message]) -> Message:
    while True:
        try:
            printer.say(f"  {event_line(next(events))}")
        except StopIteration as end:
            message: Message = end.value
            return message


def event_line(event: DeliveryEvent) -> str:
    """One event as one line of a timeline."""
    parts = [clock_text(event.event_time), enum_text(event, "type").ljust(9)]
    if event.type == DELIVERY_EVENT_TYPE_ACCEPTED:
        parts.append(f"by {short(event.node)}" if event.node else "by API")
    if event.recipient:
        parts.append(event.recipient)
    parts += _attempt_parts(event)
    return "  ".join(part for part in parts if part)


def _attempt_parts(event: DeliveryEvent) -> Iterator[str]:
    if event.attempt:
        yield f"attempt {event.attempt}"
    if event.provider:
        yield f"via {short(event.provider)}"
    if event.remote_host:
        yield f"to {event.remote_host}, {event.tls or 'no TLS'}"
    yield reply_text(event)
    if event.type == DELIVERY_EVENT_TYPE_SENT:
        times = event.stage_times
        stages = (times.queued_ms, times.waiting_ms, times.connecting_ms, times.transferring_ms)
        yield "(queued {} ms, waited {} ms, connected {} ms, transferred {} ms)".format(*stages)


def reply_text(one: Any) -> str:
    """The last reply of an event or a recipient, or our own reason."""
    code = str(one.reply_code) if one.reply_code else ""
    # A reply's text usually begins with its enhanced code already.
    enhanced = "" if one.reply_text.startswith(one.enhanced_code) else one.enhanced_code
    return " ".join(part for part in (code, enhanced, one.reply_text) if part)


def is_sent(message: Message) -> bool:
    """Whether the message is over and every recipient was sent."""
    return is_over(message) and enum_text(message, "state") == State.SENT
