"""What Postroad must know of a message's header, found in one pass, and the fields it adds on top.

Contract. `scan` takes the content as accepted (CRLF line ends, dots unstuffed) and never raises: what is wrong
stands in `HeaderScan.problem`, a reply's code, enhanced code and text. `prepare` returns the content with
`Received` first and `Date` and `Message-ID` where they were missing (RFC 6409, 8.1 to 8.3); every byte of the
content follows unchanged, Bcc fields too. One field is ours and goes no further: `without_key` takes out
`Idempotency-Key`, its folding with it and nothing else.

    content                                 header block             what `prepare` does
    fields, blank line, body                up to the blank line     puts fields on top
    fields only                             all of it                the same
    begins with the blank line              none                     the same
    first line is no field ("only a body")  none                     puts fields and a blank line on top
    empty                                   none                     fields only

Where readers of mail disagree about what a header says, it is refused, since a forged author hides there: a line
that is no field, spaces in or behind a field's name, folding lines of white space only, CR or LF alone, two From
or two Sender fields, and authors that cannot be read (`dataplane.core.authors`). So is an `Idempotency-Key` that
is not one field of 1 to 255 visible ASCII characters: who sends one relies on it.
A missing From is no problem here: `has_from` says so.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from dataplane.core.authors import UnreadableAuthorsError, author_domains
from dataplane.core.config import RULE_HEADER_NAMES, RULE_HEADER_PREFIX

MAX_HEADER_FIELDS = 1_000
MAX_HEADER_BYTES = 262_144
MAX_RECEIVED = 100
MAX_SUBJECT_CHARS = 200
MAX_MESSAGE_ID_OCTETS = 998
MAX_RULE_VALUE_CHARS = 1_000
MAX_RULE_VALUES = 50
MAX_KEY_CHARS = 255

_NAME_OCTETS = bytes(octet for octet in range(33, 127) if octet != ord(":"))
_WHITE = frozenset({b" ", b"\t"})
_RULE_PREFIX = RULE_HEADER_PREFIX.encode("ascii")
_KEY = b"idempotency-key"
_NAMES_READ = frozenset({b"received", b"date", b"message-id", b"from", b"sender", _KEY}) | frozenset(
    {name.encode("ascii") for name in RULE_HEADER_NAMES}
)
_VISIBLE_OCTETS = bytes(range(33, 127))

_ENCODED_WORD = re.compile(r"=\?([A-Za-z0-9_.:-]{1,40})(?:\*[A-Za-z0-9-]{1,40})?\?([bBqQ])\?([^? ]*+)\?=")
_BETWEEN_WORDS = re.compile(r"(\?=)[ \t]++(?==\?)")
_CHARSETS = ("utf-8", "us-ascii", "iso-", "iso8859", "windows-", "koi8", "gb", "big5", "euc-", "shift_jis", "ks_c_")
# Enough octets of encoded words for MAX_SUBJECT_CHARS characters of any script.
_SUBJECT_OCTETS = 2_400

_HELO = re.compile(r"[A-Za-z0-9._:\[\]-]{1,255}")
_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("", "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


class HeaderProblem(NamedTuple):
    """Why a message is refused: reply code, enhanced status code and text, which repeats nothing of the message."""

    code: int
    enhanced_code: str
    text: str


class HeaderScan(NamedTuple):
    """What a header says.

    `header_bytes` counts the fields without the blank line. `author_domains` are the domains of From and Sender,
    each once, A-labels in lower case. `subject` is decoded and cut, `message_id` is empty above 998 octets; both
    and `rule_values` (by lower-case name, unfolded, Subject decoded, cut at 1,000 characters) hold no control
    characters. `body_only` says that the first line is no field. `idempotency_key` is empty without that field. With
    a problem the rest may be incomplete.
    """

    header_bytes: int
    field_count: int
    received_count: int
    has_date: bool
    has_message_id: bool
    has_from: bool
    body_only: bool
    author_domains: tuple[str, ...]
    subject: str
    message_id: str
    rule_values: dict[str, tuple[str, ...]]
    problem: HeaderProblem | None
    idempotency_key: bytes = b""


_TOO_LARGE = HeaderProblem(552, "5.3.4", "the header is larger than 262144 bytes")
_TOO_MANY = HeaderProblem(552, "5.3.4", "the header has more than 1000 fields")
_MALFORMED = HeaderProblem(550, "5.6.0", "the header has a line that is no field")
_LOOP = HeaderProblem(554, "5.4.6", "too many Received fields: the message goes in a circle")
_MANY_AUTHORS = HeaderProblem(550, "5.6.0", "the header has more than one From or Sender field")
_UNREADABLE = HeaderProblem(550, "5.6.0", "the addresses in From or Sender cannot be read")
_MANY_KEYS = HeaderProblem(550, "5.6.0", "the header has more than one Idempotency-Key field")
_BAD_KEY = HeaderProblem(550, "5.6.0", "the Idempotency-Key is not 1 to 255 visible ASCII characters")


def scan(content: bytes) -> HeaderScan:
    """Return what the header of `content` says; at most 256 KiB of it are looked at."""
    if not content or content.startswith(b"\r\n"):
        return _without_fields(0)
    end = content.find(b"\r\n\r\n", 0, MAX_HEADER_BYTES + 4)
    if end < 0:
        if len(content) > MAX_HEADER_BYTES:
            return _too_large(content)
        end = len(content) - 2 if content.endswith(b"\r\n") else len(content)
    head = content[:end]
    lines = head.split(b"\r\n")
    line_ends = len(lines) - 1
    if head.count(b"\r") != line_ends or head.count(b"\n") != line_ends or b"\0" in head:
        return _malformed(lines[0], end)
    fields = _unfold(lines) if b"\r\n " in head or b"\r\n\t" in head else lines
    if len(fields) > MAX_HEADER_FIELDS:
        return _without_fields(end, _TOO_MANY)
    values = _values(fields)
    if values is None:
        return _malformed(lines[0], end)
    return _read_values(values, end, len(fields))


def head_of(pieces: Sequence[bytes]) -> bytes:
    """Return as much of the beginning of a content in pieces as `scan` must see."""
    first = pieces[0] if pieces else b""
    if len(pieces) == 1 or len(first) > MAX_HEADER_BYTES + 4 or b"\r\n\r\n" in first:
        return first
    head: list[bytes] = []
    size_bytes = 0
    for piece in pieces:
        head.append(piece)
        size_bytes += len(piece)
        if size_bytes > MAX_HEADER_BYTES + 4:
            break
    return b"".join(head)


def _without_fields(header_bytes: int, problem: HeaderProblem | None = None) -> HeaderScan:
    return HeaderScan(header_bytes, 0, 0, False, False, False, False, (), "", "", {}, problem)


def _malformed(first_line: bytes, header_bytes: int) -> HeaderScan:
    if not _is_field(first_line):
        return _without_fields(0)._replace(body_only=True)
    return _without_fields(header_bytes, _MALFORMED)


def _too_large(content: bytes) -> HeaderScan:
    first_line = content[:MAX_HEADER_BYTES].partition(b"\r\n")[0]
    if not _is_field(first_line):
        return _without_fields(0)._replace(body_only=True)
    return _without_fields(MAX_HEADER_BYTES, _TOO_LARGE)


def _is_field(line: bytes) -> bool:
    """Whether the line begins a field: a name of printable ASCII (RFC 5322, 2.2) and a colon."""
    name, colon, value = line.partition(b":")
    return bool(colon and name) and not name.translate(None, _NAME_OCTETS) and b"\r" not in value and b"\n" not in value


def _unfold(lines: list[bytes]) -> list[bytes]:
    """Return one line a field; a folding line of white space only stays by itself, and no field is like that."""
    unfolded: list[list[bytes]] = []
    for line in lines:
        if line[:1] in _WHITE and unfolded and line.strip(b" \t"):
            unfolded[-1].append(line)
        else:
            unfolded.append([line])
    return [b"".join(parts) for parts in unfolded]


def _values(fields: list[bytes]) -> dict[bytes, list[bytes]] | None:
    """Return the values of the fields that are looked at by lower-case name; None when one is no field."""
    values: dict[bytes, list[bytes]] = {}
    names: list[bytes] = []
    for line in fields:
        raw_name, colon, value = line.partition(b":")
        name = raw_name.lower()
        if not colon or not name:
            return None
        if name in _NAMES_READ or name.startswith(_RULE_PREFIX):
            if name in values:
                values[name].append(value)
            else:
                values[name] = [value]
        names.append(name)
    return None if b"".join(names).translate(None, _NAME_OCTETS) else values


def _read_values(values: dict[bytes, list[bytes]], header_bytes: int, field_count: int) -> HeaderScan:
    message_ids = values.pop(b"message-id", None)
    received_count = len(values.pop(b"received", ()))
    has_date = values.pop(b"date", None) is not None
    from_values = values.pop(b"from", [])
    domains, problem = _authors(from_values, values.pop(b"sender", []))
    keys = values.pop(_KEY, None)
    key = b""
    if keys is not None:
        key, key_problem = _read_key(keys)
        problem = problem or key_problem
    rule_values = _rule_values(values) if values else {}
    subject = rule_values.get("subject")
    return HeaderScan(
        header_bytes,
        field_count,
        received_count,
        has_date,
        message_ids is not None,
        bool(from_values),
        False,
        domains,
        subject[0][:MAX_SUBJECT_CHARS] if subject else "",
        _text(message_ids[0]) if message_ids and len(message_ids[0]) <= MAX_MESSAGE_ID_OCTETS else "",
        rule_values,
        problem if received_count <= MAX_RECEIVED else _LOOP,
        key,
    )


def _read_key(values: list[bytes]) -> tuple[bytes, HeaderProblem | None]:
    if len(values) > 1:
        return b"", _MANY_KEYS
    key = values[0].strip(b" \t")
    if not 0 < len(key) <= MAX_KEY_CHARS or key.translate(None, _VISIBLE_OCTETS):
        return b"", _BAD_KEY
    return key, None


def _authors(from_values: list[bytes], sender_values: list[bytes]) -> tuple[tuple[str, ...], HeaderProblem | None]:
    if len(from_values) > 1 or len(sender_values) > 1:
        return (), _MANY_AUTHORS
    try:
        return author_domains(from_values + sender_values), None
    except UnreadableAuthorsError:
        return (), _UNREADABLE


def _rule_values(values: dict[bytes, list[bytes]]) -> dict[str, tuple[str, ...]]:
    """Return the values that rules may look at, within a bound: the envelope that holds them is stored."""
    room = MAX_RULE_VALUES
    kept: dict[str, tuple[str, ...]] = {}
    for raw_name, raw_values in values.items():
        name = raw_name.decode("ascii")
        if len(raw_values) == 1 and room:
            kept[name] = (_rule_value(name, raw_values[0]),)
        elif room:
            kept[name] = tuple([_rule_value(name, value) for value in raw_values[:room]])
        room -= min(room, len(raw_values))
    return kept


def _rule_value(name: str, value: bytes) -> str:
    return (_decoded_text(value) if name == "subject" else _text(value))[:MAX_RULE_VALUE_CHARS]


def _text(value: bytes) -> str:
    """Make an unfolded value safe to store: UTF-8 repaired, control characters to spaces, no outer white space."""
    return _printable(value.strip(b" \t").decode("utf-8", "replace"))


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join([char if char.isprintable() else " " for char in text]).strip()


def _decoded_text(value: bytes) -> str:
    if b"=?" not in value:
        return _text(value)
    return _printable(decode_words(_text(value[:_SUBJECT_OCTETS])))


def decode_words(text: str) -> str:
    """Return `text` with its encoded words (RFC 2047) decoded; one that cannot be decoded stays as it is."""
    return _ENCODED_WORD.sub(_decode_word, _BETWEEN_WORDS.sub(r"\1", text))


def _decode_word(word: re.Match[str]) -> str:
    charset, encoding, encoded = word[1].lower(), word[2], word[3]
    # Only charsets of mail: Python knows codecs that are no such thing, some of them slow.
    if not charset.startswith(_CHARSETS):
        return word[0]
    try:
        octets = encoded.encode("ascii")
        if encoding in "bB":
            data = binascii.a2b_base64(octets + b"=" * (-len(octets) % 4))
        else:
            data = binascii.a2b_qp(octets, header=True)
        return data.decode(charset, "replace")
    except (LookupError, ValueError):
        return word[0]


def format_date(now_ms: int) -> str:
    """Return the time (milliseconds since 1970) as RFC 5322, 3.3 writes it, in UTC and whatever the locale."""
    time = datetime.fromtimestamp(now_ms // 1000, UTC)
    return (
        f"{_DAYS[time.weekday()]}, {time.day} {_MONTHS[time.month]} {time.year} "
        f"{time.hour:02}:{time.minute:02}:{time.second:02} +0000"
    )


class Receipt(NamedTuple):
    """Where a message came from, for its Received field (RFC 5321, 4.4).

    `protocol` is a keyword of RFC 3848 or RFC 6531 (`ESMTPSA`, `UTF8SMTPS`, …). `recipient` is empty unless the
    message has one only: naming several would tell each of the others. `tls` is a version or empty. A `priority` that
    is not 0 is told (RFC 6710, 4.1).
    """

    helo: str
    client_address: str
    hostname: str
    protocol: str
    message_id: str
    date: str
    recipient: str = ""
    tls: str = ""
    priority: int = 0


def received_line(receipt: Receipt) -> bytes:
    """Return the Received field with its CRLF. What the client said is left out when it could break the line."""
    helo = receipt.helo if _HELO.fullmatch(receipt.helo) else "unknown"
    prefix = "IPv6:" if ":" in receipt.client_address else ""
    tls = f" ({receipt.tls})" if receipt.tls else ""
    recipient = f"\r\n\tfor <{receipt.recipient}>" if receipt.recipient else ""
    priority = f"\r\n\tPRIORITY {receipt.priority}" if receipt.priority else ""
    return (
        f"Received: from {helo} ([{prefix}{receipt.client_address}]){tls}\r\n"
        f"\tby {receipt.hostname} with {receipt.protocol} id {receipt.message_id}{recipient}{priority};\r\n"
        f"\t{receipt.date}\r\n"
    ).encode()


def without_key(content: bytes, scanned: HeaderScan) -> bytes:
    """Return the content without its one `Idempotency-Key` field; it must have one, in its first `header_bytes`."""
    lines = b"\r\n" + content[: scanned.header_bytes].lower() + b"\r\n"
    # What is found here stands two octets earlier in the content: behind the line end that was put in front.
    start = lines.index(b"\r\n" + _KEY + b":")
    end = lines.index(b"\r\n", start + 2)
    while lines[end + 2 : end + 3] in _WHITE:
        end = lines.index(b"\r\n", end + 2)
    return content[:start] + content[end:]


def prepare(content: bytes, scanned: HeaderScan, received: bytes, date: str, message_id: str) -> bytes:
    """Return the content with `received` (a whole field) on top, and Date and Message-ID where it has none.

    `date` is the field's value, `message_id` too, with its angle brackets.
    """
    parts = [received]
    if not scanned.has_date:
        parts.append(f"Date: {date}\r\n".encode("ascii"))
    if not scanned.has_message_id:
        parts.append(f"Message-ID: {message_id}\r\n".encode("ascii"))
    if scanned.body_only:
        parts.append(b"\r\n")
    parts.append(content)
    return b"".join(parts)
