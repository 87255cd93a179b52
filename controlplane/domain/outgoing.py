"""A message that is to be sent by API, as plain values, and the checks that need nothing but itself.

Contract. An adapter makes an `Outgoing` of a request; `where` is the path of the message in it, so that errors name
what the caller wrote. `check_notes` and `envelope_of` raise InvalidArgumentError for the field that is wrong and change
nothing. Addresses come back as SMTP keeps them: domains in lower case and A-labels; each recipient once, where it stood
first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import NamedTuple

from controlplane.domain.errors import invalid
from controlplane.domain.messages import milliseconds_at
from dataplane.core.address import AddressError, Mailbox, parse_mailbox, parse_recipient
from dataplane.core.session_contract import MAX_HOLD_S

MAX_BATCH = 500
MAX_TAGS = 20
MAX_TAG_CHARS = 64
MAX_METADATA = 50
MAX_METADATA_CHARS = 500
# They are in each of the many events of a message.
MAX_NOTES_BYTES = 4_096
PRIORITIES = range(-9, 10)
NULL_SENDER = "<>"

_Parse = Callable[[str, bool], Mailbox]


class ShownAddress(NamedTuple):
    """An address with the name beside it, as header fields show it."""

    address: str
    display_name: str = ""


class Attachment(NamedTuple):
    """A file; with a content id the HTML shows it."""

    file_name: str
    content_type: str
    data: bytes
    content_id: str = ""


@dataclass(frozen=True, slots=True)
class Content:
    """A message in parts."""

    author: ShownAddress
    to: tuple[ShownAddress, ...] = ()
    cc: tuple[ShownAddress, ...] = ()
    bcc: tuple[ShownAddress, ...] = ()
    reply_to: tuple[ShownAddress, ...] = ()
    subject: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    text: str = ""
    html: str = ""
    attachments: tuple[Attachment, ...] = ()

    @property
    def size_bytes(self) -> int:
        """About what it takes; what is made of it is larger."""
        return len(self.text) + len(self.html) + sum(len(one.data) for one in self.attachments)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One message of a request: `raw` or `content`. `fingerprint` is SHA-256 of all of it but its request id."""

    where: str
    sender: str = ""
    recipients: tuple[str, ...] = ()
    raw: bytes | None = None
    content: Content | None = None
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    priority: int = 0
    send_time: datetime | None = None
    request_id: str = ""
    fingerprint: bytes = b""
    is_rehearsal: bool = False

    def path(self, name: str) -> str:
        """Return the path of a field in the request."""
        return f"{self.where}.{name}"


class Addressed(NamedTuple):
    """Whom a message is from, empty for the null sender, and whom it goes to."""

    sender: str
    sender_domain: str
    recipients: tuple[str, ...]


def check_notes(outgoing: Outgoing) -> None:
    """Refuse tags, metadata and a priority that cannot be kept."""
    _check_tags(outgoing)
    _check_metadata(outgoing)
    notes = (*outgoing.tags, *outgoing.metadata, *outgoing.metadata.values())
    if sum(len(one.encode()) for one in notes) > MAX_NOTES_BYTES:
        raise invalid(outgoing.path("metadata"), f"must have at most {MAX_NOTES_BYTES} bytes together with tags")
    if outgoing.priority not in PRIORITIES:
        raise invalid(outgoing.path("priority"), "must be -9 to 9")


def _check_tags(outgoing: Outgoing) -> None:
    if len(outgoing.tags) > MAX_TAGS:
        raise invalid(outgoing.path("tags"), f"must be at most {MAX_TAGS}")
    for number, tag in enumerate(outgoing.tags):
        if not _is_word(tag):
            raise invalid(outgoing.path(f"tags[{number}]"), f"must have 1 to {MAX_TAG_CHARS} printable characters")
    if len(set(outgoing.tags)) < len(outgoing.tags):
        raise invalid(outgoing.path("tags"), "must not hold one twice")


def _check_metadata(outgoing: Outgoing) -> None:
    if len(outgoing.metadata) > MAX_METADATA:
        raise invalid(outgoing.path("metadata"), f"must have at most {MAX_METADATA} entries")
    for key, value in outgoing.metadata.items():
        if not _is_word(key):
            raise invalid(outgoing.path("metadata"), f"keys must have 1 to {MAX_TAG_CHARS} printable characters")
        if len(value) > MAX_METADATA_CHARS or not value.isprintable():
            text = f"must have at most {MAX_METADATA_CHARS} printable characters"
            raise invalid(outgoing.path(f"metadata.{key}"), text)


def send_time_ms(outgoing: Outgoing, now_ms: int) -> int:
    """Return until when it is held, 0 for a message that is due now."""
    if outgoing.send_time is None:
        return 0
    wanted_ms = milliseconds_at(outgoing.send_time)
    if wanted_ms > now_ms + MAX_HOLD_S * 1_000:
        raise invalid(outgoing.path("send_time"), f"must be at most {timedelta(seconds=MAX_HOLD_S).days} days ahead")
    return wanted_ms if wanted_ms > now_ms else 0


def envelope_of(outgoing: Outgoing, max_recipients: int) -> Addressed:
    """Return sender and recipients."""
    sender = _sender(outgoing)
    found: dict[str, None] = {}
    for path, address in _recipients(outgoing):
        found.setdefault(_parse(parse_recipient, address, path).text)
    if not found:
        raise invalid(outgoing.path("recipients"), "there is none")
    if len(found) > max_recipients:
        raise invalid(outgoing.path("recipients"), f"must be at most {max_recipients}")
    return Addressed("" if sender is None else sender.text, "" if sender is None else sender.domain, tuple(found))


def mailbox(address: str, path: str) -> Mailbox:
    """Return the mailbox of an address in a header field."""
    return _parse(parse_mailbox, address, path)


def _sender(outgoing: Outgoing) -> Mailbox | None:
    if outgoing.sender == NULL_SENDER:
        return None
    if not outgoing.sender and outgoing.content is not None:
        return mailbox(outgoing.content.author.address, outgoing.path("content.author.address"))
    if not outgoing.sender:
        raise invalid(outgoing.path("sender"), "is required with raw; `<>` is nobody")
    return mailbox(outgoing.sender, outgoing.path("sender"))


def _recipients(outgoing: Outgoing) -> Iterator[tuple[str, str]]:
    for number, address in enumerate(outgoing.recipients):
        yield outgoing.path(f"recipients[{number}]"), address
    if outgoing.recipients or outgoing.content is None:
        return
    content = outgoing.content
    for name, shown in (("to", content.to), ("cc", content.cc), ("bcc", content.bcc)):
        for number, one in enumerate(shown):
            yield outgoing.path(f"content.{name}[{number}].address"), one.address


def _parse(parse: _Parse, address: str, path: str) -> Mailbox:
    try:
        return parse(address, True)
    except AddressError as error:
        raise invalid(path, str(error)) from error


def _is_word(text: str) -> bool:
    return 0 < len(text) <= MAX_TAG_CHARS and text.isprintable()
