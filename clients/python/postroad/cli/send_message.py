"""`postroad messages send`: send a message by API, of parts or a whole one from a file, and watch it to its end.

Contract. A file is sent as it is, but for two things: its lines get CR LF, as mail has them and files on a disk often
have not, and a Bcc field is left out, whose addresses get the message. Sender and recipients are those of its header
unless options name others. Without a file a message is made of the options.
"""

from __future__ import annotations

import mimetypes
import sys
from datetime import UTC, datetime, timedelta
from email.errors import MessageError
from email.parser import BytesHeaderParser
from email.policy import SMTPUTF8
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.timestamp_pb2 import Timestamp

from postroad.cli.messages import FOLLOW_TIMEOUT_S, is_sent, watch
from postroad.cli.output import short
from postroad.cli.problems import FAILED
from postroad.cli.session import session_of
from postroad.cli.submission import canonical
from postroad.control.v1.message_service_pb2 import SendMessageRequest
from postroad.control.v1.outgoing_message_pb2 import (
    Attachment,
    EmailAddress,
    HeaderField,
    MessageContent,
    OutgoingMessage,
)

_MOMENTS = ["%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%d"]
_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
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
    at: Annotated[datetime | None, typer.Option("--at", formats=_MOMENTS, help="When it goes out, UTC")] = None,
    wait: Annotated[str, typer.Option("--in", help="After so long, such as 90s, 10m, 2h or 1d")] = "",
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
        message = _whole(_read(file), sender, shown)
    else:
        message = _made(sender, shown, subject, _text(text, text_file), _text(html, html_file))
        message.content.reply_to.extend(_address("--reply-to", one) for one in reply_to or ())
        message.content.headers.extend(_header(one) for one in header or ())
        message.content.attachments.extend(_attachment(one) for one in attach or ())
    message.tags.extend(tag or ())
    message.metadata.update(_pair(one) for one in metadata or ())
    message.priority = priority
    moment = _moment(at, wait)
    if moment is not None:
        message.send_time.CopyFrom(moment)
    session = session_of(context)
    request = SendMessageRequest(parent=session.account, message=message, request_id=request_id, validate_only=dry_run)
    answer = session.client.messages.SendMessage(request)
    if dry_run:
        session.printer.say(f"It would go to {answer.recipient_count} recipients")
    else:
        again = " before" if answer.repeated_request else ""
        session.printer.say(f"Accepted{again} {short(answer.message)}", "bold")
    held = moment is not None
    if dry_run or not (follow_ or (follow_ is None and not held)):
        if session.printer.is_json:
            session.printer.json(MessageToDict(answer))
        return
    ended = watch(session, short(answer.message), timeout_s)
    if session.printer.is_json:
        session.printer.json(MessageToDict(ended))
    if not is_sent(ended):
        raise typer.Exit(FAILED)


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
    return Attachment(file_name=file.name, content_type=known, data=_read(file))


def _moment(at: datetime | None, wait: str) -> Timestamp | None:
    if at is not None and wait:
        raise typer.BadParameter("give --at or --in")
    if wait:
        if wait[-1] not in _UNITS or not wait[:-1].isdecimal():
            raise typer.BadParameter(f"--in: {wait!r} is no number with s, m, h or d")
        at = datetime.now(UTC) + timedelta(seconds=int(wait[:-1]) * _UNITS[wait[-1]])
    if at is None:
        return None
    moment = Timestamp()
    moment.FromDatetime(at.replace(tzinfo=UTC))
    return moment


def _text(given: str, file: Path | None) -> str:
    if given and file is not None:
        raise typer.BadParameter("give a text or a file with it, not both")
    return given if file is None else _read(file).decode("utf-8")


def _read(file: Path) -> bytes:
    try:
        return sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise typer.BadParameter(f"{file}: {error.strerror}") from error
