"""The inbox's folder: each received mail as `<number>.eml`, byte for byte, beside `<number>.json` with its envelope.

Contract. `add` returns when both files and the folder are on the disk; it is safe to call from many threads. The
`.json` is renamed into place last, so it decides: an `.eml` without one was never acknowledged, and its number is
given out again. Numbers grow from 1 and name mails for people. Reading needs no server. Errors of the disk come
out as OSError from `add`; a mail that is asked for and is not there is an `InboxError`.
"""

from __future__ import annotations

import contextlib
import email.errors
import email.header
import email.parser
import email.policy
import json
import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from postroad.files import sync_folder

_DIGITS = 6
_SUBJECT_LIMIT = 200
_HEADER_LIMIT_BYTES = 512 * 1024
_MESSAGE_ID = re.compile(r"\bid ([0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12})\b")


class InboxError(Exception):
    """The inbox does not hold what was asked for."""


@dataclass(frozen=True, slots=True)
class ReceivedMail:
    """One mail as it arrived: envelope and what people look for; the content lies in the `.eml`.

    `message` is Postroad's id from the topmost Received line, empty for mail that came another way.
    `receive_time` is RFC 3339 in UTC.
    """

    number: int
    receive_time: str
    sender: str
    recipients: tuple[str, ...]
    size_bytes: int
    message: str
    subject: str
    helo: str
    peer: str
    options: tuple[str, ...]


class Inbox:
    """A folder of received mail. See the module for the contract."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._next: int | None = None

    # --- writing ---------------------------------------------------------------------------------

    def add(
        self,
        content: bytes,
        *,
        sender: str,
        recipients: Sequence[str],
        receive_time: str,
        helo: str = "",
        peer: str = "",
        options: Sequence[str] = (),
    ) -> ReceivedMail:
        """Store a mail durably; OSError when the disk refuses, and then the mail is not in the inbox."""
        message, subject = _header_facts(content)
        mail = ReceivedMail(
            number=self._take_number(),
            receive_time=receive_time,
            sender=sender,
            recipients=tuple(recipients),
            size_bytes=len(content),
            message=message,
            subject=subject,
            helo=helo,
            peer=peer,
            options=tuple(options),
        )
        _write_durably(self._path(mail.number, "eml"), content)
        _write_durably(self._path(mail.number, "json"), json.dumps(asdict(mail), ensure_ascii=False).encode())
        sync_folder(self.folder)
        return mail

    def _take_number(self) -> int:
        with self._lock:
            if self._next is None:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._next = max(self._numbers(), default=0) + 1
            number, self._next = self._next, self._next + 1
            return number

    # --- reading ---------------------------------------------------------------------------------

    def count(self) -> int:
        """How many mails there are."""
        return sum(1 for _ in self._numbers())

    def mails(self, last: int | None = None) -> list[ReceivedMail]:
        """All mails, or the `last` ones, oldest first."""
        numbers = sorted(self._numbers())
        return [self._read(number) for number in (numbers if last is None else numbers[-last:] if last else [])]

    def find(self, name: str) -> list[ReceivedMail]:
        """Mails by number or by Postroad's message id (`accounts/…/messages/<id>` too); InboxError when none."""
        wanted = name.rpartition("/")[2].lower()
        if wanted.isascii() and wanted.isdigit():
            if not self._path(int(wanted), "json").exists():
                raise InboxError(f"there is no mail {wanted} in {self.folder}")
            return [self._read(int(wanted))]
        found = [mail for mail in self.mails() if mail.message == wanted]
        if not found:
            raise InboxError(f"no mail in {self.folder} carries the message id {wanted}")
        return found

    def content(self, mail: ReceivedMail) -> bytes:
        """The content exactly as it came over the wire, dots unstuffed, line ends CRLF."""
        return self._path(mail.number, "eml").read_bytes()

    def _numbers(self) -> Iterator[int]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                stem, _, kind = entry.name.partition(".")
                if kind == "json" and stem.isdigit():
                    yield int(stem)

    def _read(self, number: int) -> ReceivedMail:
        values: dict[str, Any] = json.loads(self._path(number, "json").read_bytes())
        values["recipients"] = tuple(values["recipients"])
        values["options"] = tuple(values["options"])
        return ReceivedMail(**values)

    def _path(self, number: int, kind: str) -> Path:
        return self.folder / f"{number:0{_DIGITS}}.{kind}"


def _write_durably(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _header_facts(content: bytes) -> tuple[str, str]:
    """Postroad's id and the decoded subject, as far as they can be made out of whatever came."""
    head = content[:_HEADER_LIMIT_BYTES].partition(b"\r\n\r\n")[0].decode("utf-8", errors="replace")
    headers = email.parser.HeaderParser(policy=email.policy.compat32).parsestr(f"{head}\r\n\r\n")
    found = _MESSAGE_ID.search(str(headers.get("Received", "")))
    return found.group(1) if found else "", _decoded(headers.get("Subject", ""))[:_SUBJECT_LIMIT]


def _decoded(value: object) -> str:
    text = str(value)
    # An encoded word that is none, or in a charset nobody knows, is shown as it stands.
    with contextlib.suppress(email.errors.HeaderParseError, LookupError, ValueError):
        text = str(email.header.make_header(email.header.decode_header(text)))
    return " ".join(text.split())
