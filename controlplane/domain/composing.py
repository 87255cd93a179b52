"""Makes a MIME message of its parts: header fields by the standard library's email package with policy SMTP.

Contract. `compose` returns a content with CR LF line ends, without Date and Message-ID (whoever accepts it adds them)
and without Bcc. The same parts and boundary give the same octets. Text is encoded so that every next hop takes it:
ASCII in short lines as it is, other text as quoted-printable or base64. Header fields hold UTF-8 only where an address
cannot be written without it (RFC 6532); names and subject are encoded words otherwise. InvalidArgumentError names the
field that cannot stand in a message: nothing that a caller gives can end a header field or begin another.

    parts                           becomes
    text, or html, or neither       text/plain, text/html, an empty text/plain
    text and html                   multipart/alternative
    files that the html shows       multipart/related beside it
    other files                     multipart/mixed around all

Bodies do not go through the package, which takes them apart line by line in Python: that would cost more than all the
rest of sending a message.
"""

from __future__ import annotations

import re
from base64 import encodebytes
from binascii import b2a_qp
from collections.abc import Sequence
from email.errors import MessageError
from email.headerregistry import Address, BaseHeader, HeaderRegistry, UnstructuredHeader
from email.message import EmailMessage, MIMEPart
from email.policy import SMTP, SMTPUTF8, EmailPolicy, Policy
from typing import Any, ClassVar, Literal

from controlplane.domain.errors import invalid
from controlplane.domain.outgoing import Attachment, Content, ShownAddress, mailbox

MAX_HEADERS = 100
MAX_HEADER_NAME_CHARS = 100
MAX_SUBJECT_CHARS = 500
MAX_DISPLAY_NAME_CHARS = 200
MAX_FILE_NAME_CHARS = 255
_MADE_BY_OTHERS = frozenset(
    {"from", "to", "cc", "bcc", "reply-to", "subject", "mime-version", "received", "return-path", "idempotency-key"}
)
_MADE_PREFIXES = ("content-", "resent-")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_FIELD_NAME = re.compile(r"[!-9;-~]+")
_CONTENT_TYPE = re.compile(r"([a-z0-9][a-z0-9!#$&^_.+-]{0,63})/([a-z0-9][a-z0-9!#$&^_.+-]{0,63})")
_NOT_FILES = frozenset({"multipart", "message"})
# How the package may meet values that it does not understand.
_REFUSED = (MessageError, ValueError, IndexError, KeyError, AttributeError, TypeError)
_LINE_ENDS = re.compile(r"\r\n|\r")
_LINE_CHARS = 78
# Enough to see what script a text is in.
_SAMPLE_BYTES = 2_048


class _AsWritten(UnstructuredHeader, BaseHeader):
    """A field of the caller's own: folded at spaces, and otherwise as it was written, where it is ASCII.

    The package would cut a word that is too long for a line into encoded words, and a URL in `List-Unsubscribe` is none
    any more then.
    """

    def fold(self, *, policy: Policy[Any]) -> str:
        """Return the lines of the field."""
        if not str(self).isascii():
            return super().fold(policy=policy)
        lines, line = [], f"{self.name}:"
        for word in str(self).split(" "):
            if word and line.strip() and len(line) + 1 + len(word) > _LINE_CHARS and line != f"{self.name}:":
                lines.append(line)
                line = ""
            line += " " + word
        return policy.linesep.join([*lines, line]) + policy.linesep


class _AsWrittenOnce(_AsWritten):
    """The same, for a field that may be there once."""

    max_count: ClassVar[Literal[1] | None] = 1


class _Registry(HeaderRegistry):
    """Remembers the classes that it makes: the package's own makes one for each field of each message."""

    def __init__(self) -> None:
        super().__init__(default_class=_AsWritten)
        self._made: dict[type, type[BaseHeader]] = {}

    def __getitem__(self, name: str) -> type[BaseHeader]:
        """Return the class of a field."""
        found = self.registry.get(name.lower(), self.default_class)
        made = self._made.get(found)
        if made is None:
            made = self._made[found] = super().__getitem__(name)
        return made


def _policy(base: EmailPolicy[Any]) -> EmailPolicy[Any]:
    registry = _Registry()
    registry.map_to_type("message-id", _AsWrittenOnce)
    return base.clone(cte_type="7bit", header_factory=registry)


_POLICY, _POLICY_UTF8 = _policy(SMTP), _policy(SMTPUTF8)


def compose(content: Content, field: str, boundary: str) -> bytes:
    """Return the message; `field` is the path of `content`, and nobody can know `boundary` beforehand."""
    shown = (content.author, *content.to, *content.cc, *content.reply_to)
    international = not all(one.address.isascii() for one in shown)
    policy = _POLICY_UTF8 if international else _POLICY
    message = EmailMessage(policy=policy)
    _add_addresses(message, "From", (content.author,), field, "author", listed=False)
    _add_addresses(message, "To", content.to, field, "to")
    _add_addresses(message, "Cc", content.cc, field, "cc")
    _add_addresses(message, "Reply-To", content.reply_to, field, "reply_to")
    _add_subject(message, content.subject, f"{field}.subject")
    _add_headers(message, content.headers, field)
    # Without a payload it is its header and the blank line.
    header = message.as_bytes().removesuffix(b"\r\n")
    return header + b"MIME-Version: 1.0\r\n" + _body(content, field, _Boundaries(boundary), policy)


class _Boundaries:
    """Gives each multipart another boundary."""

    def __init__(self, secret: str) -> None:
        self._secret = secret
        self._count = 0

    def next(self) -> str:
        self._count += 1
        return f"=_{self._secret}-{self._count}"


def _body(content: Content, field: str, boundaries: _Boundaries, policy: EmailPolicy[Any]) -> bytes:
    """Return the body with the fields that speak of it, as every part of a message is written."""
    for name, text in (("text", content.text), ("html", content.html)):
        if "\0" in text:
            raise invalid(f"{field}.{name}", "must not hold the character NUL")
    shown: list[bytes] = []
    beside: list[bytes] = []
    for number, file in enumerate(content.attachments):
        path = f"{field}.attachments[{number}]"
        if file.content_id and not content.html:
            raise invalid(f"{path}.content_id", "is for files that html shows, and there is no html")
        (shown if file.content_id else beside).append(_file(file, path, policy))
    parts = [_text("plain", content.text)] if content.text or not content.html else []
    if content.html:
        parts.append(_multipart("related", [_text("html", content.html), *shown], boundaries))
    return _multipart("mixed", [_multipart("alternative", parts, boundaries), *beside], boundaries)


def _multipart(subtype: str, parts: Sequence[bytes], boundaries: _Boundaries) -> bytes:
    """Return parts in one; one alone stays what it is."""
    if len(parts) == 1:
        return parts[0]
    boundary = boundaries.next()
    line = f"--{boundary}".encode("ascii")
    header = f'Content-Type: multipart/{subtype}; boundary="{boundary}"\r\n\r\n'.encode("ascii")
    return header + b"".join([line + b"\r\n" + part + b"\r\n" for part in parts]) + line + b"--\r\n"


def _text(subtype: str, text: str) -> bytes:
    data = _LINE_ENDS.sub("\n", text).encode()
    if not data.endswith(b"\n"):
        data += b"\n"
    if data.isascii() and max(map(len, data.split(b"\n"))) <= _LINE_CHARS:
        encoding, body = "7bit", data.replace(b"\n", b"\r\n")
    elif _is_mostly_foreign(data[:_SAMPLE_BYTES]):
        encoding, body = "base64", _base64(data.replace(b"\n", b"\r\n"))
    else:
        encoding, body = "quoted-printable", b2a_qp(data, istext=True).replace(b"\n", b"\r\n")
    header = f'Content-Type: text/{subtype}; charset="utf-8"\r\nContent-Transfer-Encoding: {encoding}\r\n\r\n'
    return header.encode("ascii") + body


def _is_mostly_foreign(sample: bytes) -> bool:
    """Whether base64 takes less than quoted-printable, which takes three octets for each that is no ASCII."""
    return (len(sample) - len(sample.decode("ascii", "ignore"))) * 6 > len(sample)


def _base64(data: bytes) -> bytes:
    return encodebytes(data).replace(b"\n", b"\r\n")


def _add_addresses(
    message: EmailMessage, name: str, shown: Sequence[ShownAddress], field: str, part: str, *, listed: bool = True
) -> None:
    addresses = []
    for number, one in enumerate(shown):
        path = f"{field}.{part}[{number}]" if listed else f"{field}.{part}"
        found = mailbox(one.address, f"{path}.address")
        _check_line(one.display_name, f"{path}.display_name", MAX_DISPLAY_NAME_CHARS)
        addresses.append(Address(one.display_name, found.local, found.domain))
    if addresses:
        try:
            message[name] = addresses
        except _REFUSED as error:
            raise invalid(f"{field}.{part}", "cannot stand in a header field") from error


def _add_subject(message: EmailMessage, subject: str, path: str) -> None:
    _check_line(subject, path, MAX_SUBJECT_CHARS)
    if subject:
        message["Subject"] = subject


def _add_headers(message: EmailMessage, headers: Sequence[tuple[str, str]], field: str) -> None:
    if len(headers) > MAX_HEADERS:
        raise invalid(f"{field}.headers", f"must be at most {MAX_HEADERS}")
    for number, (name, value) in enumerate(headers):
        path = f"{field}.headers[{number}]"
        if len(name) > MAX_HEADER_NAME_CHARS or _FIELD_NAME.fullmatch(name) is None:
            raise invalid(f"{path}.name", "must be 1 to 100 visible ASCII characters without a colon")
        if name.lower() in _MADE_BY_OTHERS or name.lower().startswith(_MADE_PREFIXES):
            raise invalid(f"{path}.name", "is made by another field, or not for senders")
        _check_line(value, f"{path}.value", None)
        try:
            message[name] = value.strip()
        except _REFUSED as error:
            raise invalid(f"{path}.value", "cannot stand in this field, or the field is there already") from error


def _file(file: Attachment, path: str, policy: EmailPolicy[Any]) -> bytes:
    _check_line(file.file_name, f"{path}.file_name", MAX_FILE_NAME_CHARS)
    if "/" in file.file_name or "\\" in file.file_name:
        raise invalid(f"{path}.file_name", "must be without folders")
    kind = _CONTENT_TYPE.fullmatch(file.content_type.lower() or "application/octet-stream")
    if kind is None or kind[1] in _NOT_FILES:
        raise invalid(f"{path}.content_type", "must look like type/subtype, and be no multipart or message")
    part = MIMEPart(policy=policy)
    part["Content-Type"] = kind[0]
    part["Content-Transfer-Encoding"] = "base64"
    disposition = "inline" if file.content_id else "attachment"
    part.add_header("Content-Disposition", disposition, filename=file.file_name or None)
    if file.content_id:
        cid = mailbox(file.content_id, f"{path}.content_id").text
        if not cid.isascii():
            raise invalid(f"{path}.content_id", "must be ASCII")
        part["Content-ID"] = f"<{cid}>"
    return part.as_bytes() + _base64(file.data)


def _check_line(text: str, path: str, most: int | None) -> None:
    if _CONTROL.search(text):
        raise invalid(path, "must not hold a line end or another control character")
    if most is not None and len(text) > most:
        raise invalid(path, f"must be at most {most} characters")
