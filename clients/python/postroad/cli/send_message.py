"""`postroad messages send`: send a message by API, of parts or a whole one from a file, and watch it to its end.

Contract. A file is sent as it is, but for two things: its lines get CR LF, as mail has them and files on a disk often
have not, and a Bcc field is left out, whose addresses get the message. Sender and recipients are those of its header
unless options name others. Without a file a message is made of the options.
"""

from __future__ import annotations

import mimetypes
import uuid
from datetime import UTC, datetime, timedelta
from email.errors import MessageError
from email.parser import BytesHeaderParser
from email.policy import SMTPUTF8
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from postroad.cli.given_files import read_bytes, read_text
from postroad.cli.messages import FOLLOW_TIMEOUT_S, follow_to_the_end, is_sent
from postroad.cli.output import short
from postroad.cli.problems import FAILED
from postroad.cli.session import Session, session_of
from postroad.cli.submission import canonical
from postroad.cli.times import SPAN, later_option, seconds_of, timestamp
from postroad.control.v1.message_service_pb2 import SendMessageRequest, SendMessageResponse
from postroad.control.v1.outgoing_message_pb2 import (
    Attachment,
    EmailAddress,
    HeaderField,
    MessageContent,
    OutgoingMessage,
)
from postroad.sdk import DeadlineError, InternalError, UnavailableError

_RECIPIENT_FIELDS = ("To", "Cc", "Bcc")

Addresses = list[str] | None


class _Envelope(NamedTuple):
    sender: str
    recipients: list[str]


def send_message(
    context: typer.Context,
    *,
    file: Annotated[Path | None, typer.Argument(help="File with a whole message; `-` is stdin")] = None,
    sender: Annotated[
        str, typer.Option("--from", help="Author and sender: `a@b.example` or `Name <a@b.example>`")
    ] = "",
    to: Annotated[Addresses, typer.Option("--to", help="Recipient; repeatable, as the next two")] = None,
    cc: Annotated[Addresses, typer.Option("--cc", help="Recipient shown in Cc")] = None,
    bcc: Annotated[Addresses, typer.Option("--bcc", help="Recipient who is not shown")] = None,
    reply_to: Annotated[Addresses, typer.Option("--reply-to", help="Where answers go; repeatable")] = None,
    subject: Annotated[str, typer.Option("--subject", help="Subject")] = "",
    text: Annotated[str, typer.Option("--text", help="Plain text")] = "",
    text_file: Annotated[Path | None, typer.Option("--text-file", help="File with it; `-` is stdin")] = None,
    html: Annotated[str, typer.Option("--html", help="HTML")] = "",
    html_file: Annotated[Path | None, typer.Option("--html-file", help="File with it; `-` is stdin")] = None,
    attach: Annotated[list[Path] | None, typer.Option("--attach", help="File to attach; repeatable")] = None,
    header: Annotated[list[str] | None, typer.Option("--header", help="`Name: value`; repeatable")] = None,
    at: Annotated[datetime | None, later_option("--at", "When it goes out, UTC")] = None,
    wait_s: Annotated[
        int | None,
        typer.Option("--in", parser=seconds_of, metavar=SPAN, help="After so long, such as 90s, 10m, 2h or 1d"),
    ] = None,
    priority: Annotated[
        int, typer.Option("--priority", min=-9, max=9, help="Among the account's mail the highest goes first")
    ] = 0,
    tag: Annotated[list[str] | None, typer.Option("--tag", help="Tag; repeatable")] = None,
    metadata: Annotated[list[str] | None, typer.Option("--metadata", help="`key=value`; repeatable")] = None,
    request_id: Annotated[
        str, typer.Option("--request-id", help="A UUID under which the message is sent once, however often it is sent")
    ] = "",
    dry_run: Annotated[bool, typer.Option("--validate-only", help="Check everything, send nothing")] = False,
    follow_: Annotated[
        bool | None, typer.Option("--follow/--no-follow", help="Watch to the end; by default not what is held")
    ] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", min=1, help="Seconds to watch")] = FOLLOW_TIMEOUT_S,
) -> None:
    """Send a message by API: of these options, or a whole one from FILE.

    Status 0 when it was sent to every recipient (with --no-follow: accepted), 1 when it ended otherwise.
    """
    shown = {"to": to or [], "cc": cc or [], "bcc": bcc or []}
    parts = {"reply_to": reply_to, "subject": subject, "text": text or text_file, "html": html or html_file}
    if file is not None and any([*parts.values(), attach, header]):
        raise typer.BadParameter("a whole message from a file has its own header and parts")
    if file is not None:
        message = _whole(read_bytes(file), sender, shown)
    else:
        message = _made(sender, shown, subject, _text(text, text_file), _text(html, html_file))
        message.content.reply_to.extend(_address("--reply-to", one) for one in reply_to or ())
        message.content.headers.extend(_header(one) for one in header or ())
        message.content.attachments.extend(_attachment(one) for one in attach or ())
    message.tags.extend(tag or ())
    message.metadata.update(_pair(one) for one in metadata or ())
    message.priority = priority
    moment = _moment(at, wait_s)
    if moment is not None:
        message.send_time.CopyFrom(timestamp(moment))
    session = session_of(context)
    request = SendMessageRequest(
        parent=session.account, message=message, request_id=request_id or str(uuid.uuid4()), validate_only=dry_run
    )
    answer = _send(session, request, moment)
    if dry_run:
        count = answer.recipient_count
        session.printer.say(f"It would go to {count} recipient{'' if count == 1 else 's'}")
    else:
        again = " before" if answer.repeated_request else ""
        session.printer.say(f"Accepted{again} {short(answer.message)}", "bold")
    held = moment is not None
    if dry_run or not (follow_ or (follow_ is None and not held)):
        if session.printer.is_json:
            session.printer.json(MessageToDict(answer))
        return
    _watch(session, answer, timeout_s)


def _watch(session: Session, answer: SendMessageResponse, timeout_s: float) -> None:
    shown: Message = answer
    try:
        shown = ended = follow_to_the_end(session, short(answer.message), timeout_s)
    finally:
        # It is accepted, whatever becomes of the look at it.
        if session.printer.is_json:
            session.printer.json(MessageToDict(shown))
    if not is_sent(ended):
        raise typer.Exit(FAILED)


def _send(session: Session, request: SendMessageRequest, moment: datetime | None) -> SendMessageResponse:
    """Send; an error after which nobody knows whether it was stored says how to repeat it without harm."""
    try:
        return session.client.messages.SendMessage(request)
    except (UnavailableError, DeadlineError, InternalError) as error:
        if not request.validate_only:
            # A span would lead to another time, and so be another message.
            time = f" --at {moment:%Y-%m-%dT%H:%M:%S.%fZ} in place of its time" if moment is not None else ""
            error.add_note(
                f"It may be stored: the same command with --request-id {request.request_id}{time} sends it once"
            )
        raise


def _made(sender: str, shown: dict[str, list[str]], subject: str, text: str, html: str) -> OutgoingMessage:
    if not sender:
        raise typer.BadParameter("give --from")
    if not any(shown.values()):
        raise typer.BadParameter("give --to, --cc or --bcc")
    content = MessageContent(author=_address("--from", sender), subject=subject, text=text, html=html)
    for name, addresses in shown.items():
        getattr(content, name).extend(_address(f"--{name}", one) for one in addresses)
    return OutgoingMessage(content=content)


def _whole(content: bytes, sender: str, shown: dict[str, list[str]]) -> OutgoingMessage:
    content = canonical(content)
    found = _envelope(content)
    given = [_address(f"--{name}", one).address for name, addresses in shown.items() for one in addresses]
    sender = _address("--from", sender).address if sender else found.sender
    if not sender:
        raise typer.BadParameter("its From names no one author: give --from")
    recipients = given or found.recipients
    if not recipients:
        raise typer.BadParameter("it names no recipients: give --to")
    return OutgoingMessage(sender=sender, recipients=recipients, raw=_without_bcc(content))


def _envelope(content: bytes) -> _Envelope:
    try:
        header = BytesHeaderParser(policy=SMTPUTF8).parsebytes(content)
        authors = [one.addr_spec for field in header.get_all("From", []) for one in field.addresses]
        found = [
            one.addr_spec for name in _RECIPIENT_FIELDS for field in header.get_all(name, []) for one in field.addresses
        ]
    except (MessageError, ValueError, IndexError, AttributeError) as error:
        raise typer.BadParameter(f"its header cannot be read: {error}") from error
    return _Envelope(authors[0] if len(authors) == 1 else "", found)


def _without_bcc(content: bytes) -> bytes:
    header, blank, body = content.partition(b"\r\n\r\n")
    kept: list[bytes] = []
    is_bcc = False
    for line in header.split(b"\r\n"):
        if not line.startswith((b" ", b"\t")):
            is_bcc = line.partition(b":")[0].strip().lower() == b"bcc"
        if not is_bcc:
            kept.append(line)
    return b"\r\n".join(kept) + blank + body


def _address(option: str, text: str) -> EmailAddress:
    try:
        found: Any = SMTPUTF8.header_factory("To", text)
        (address,) = found.addresses
        if not found.defects and address.username and address.domain:
            return EmailAddress(address=address.addr_spec, display_name=address.display_name)
    except (MessageError, ValueError, IndexError):  # IndexError is how Python's parser may meet a missing domain
        pass
    raise typer.BadParameter(f"{option}: {text!r} is no address")


def _header(text: str) -> HeaderField:
    name, colon, value = text.partition(":")
    if not colon:
        raise typer.BadParameter(f"--header: {text!r} is no `Name: value`")
    return HeaderField(name=name.strip(), value=value.strip())


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise typer.BadParameter(f"--metadata: {text!r} is no `key=value`")
    return key, value


def _attachment(file: Path) -> Attachment:
    kind, encoding = mimetypes.guess_type(file.name)
    known = kind if kind and not encoding and kind.partition("/")[0] not in {"multipart", "message"} else ""
    return Attachment(file_name=file.name, content_type=known, data=read_bytes(file))


def _moment(at: datetime | None, wait_s: int | None) -> datetime | None:
    if wait_s is None:
        return at
    if at is not None:
        raise typer.BadParameter("give --at or --in, not both")
    try:
        return datetime.now(UTC) + timedelta(seconds=wait_s)
    except OverflowError as error:
        raise typer.BadParameter("--in: it lies too far ahead") from error


def _text(given: str, file: Path | None) -> str:
    if given and file is not None:
        raise typer.BadParameter("give a text or a file with it, not both")
    return given if file is None else read_text(file)
