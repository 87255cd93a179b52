"""The judge's own ledgers, outside Postroad: what was answered, what arrived, what was broken when.

Every entry is appended to a file as it is made, so that a run that was cut off can still be looked at, and kept in
memory for the judge. Nothing is ever changed or removed. To be used from any thread.

    Try     one attempt of the application to hand over a message, and the reply to its dot, if any
    Copy    one transaction that the next hop took: it read the dot, whatever became of its 250
    Strike  one fault: what was broken, and when
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

_TOKEN = re.compile(rb"^X-Token: ([0-9a-z.-]+)\r\n", re.MULTILINE)
_RECEIVED = re.compile(rb"\AReceived: from [^\r\n]*\r\n(?:[ \t][^\r\n]*\r\n)+")
_RECEIVED_ID = re.compile(rb"\bid ([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\b")


def digest(content: bytes) -> str:
    """How contents are compared."""
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True, slots=True)
class Try:
    """`token` is this try's own and stands in its content. `code` is the reply to the dot, or to what was refused
    before it; 0 when none came. `dot_left` says that all octets were given to the network, `half_closed` that the
    client closed its own direction behind the dot and waited for the reply.
    """

    token: str
    recipients: tuple[str, ...]
    sha256: str
    dot_left: bool
    code: int
    text: str = ""
    message_id: str = ""
    half_closed: bool = False
    begun_s: float = 0.0
    time_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Copy:
    """`message_id` is Postroad's, from the Received field; `token` and `sha256` are of what lies below that field.

    `mangled` says what is wrong with the field, or is empty. `recipients` are those that this transaction delivered.
    """

    token: str
    message_id: str
    recipients: tuple[str, ...]
    sha256: str
    mangled: str
    connection: int
    time_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Strike:
    """`what` is a server or a link, `how` the fault; `ends_worker` when it may end a process that delivers."""

    what: str
    how: str
    ends_worker: bool = False
    time_s: float = 0.0


class Books:
    """The three ledgers of one run, in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._lock = threading.Lock()
        self.tries: list[Try] = []
        self.copies: list[Copy] = []
        self.strikes: list[Strike] = []
        self.confirmed: set[int] = set()
        """Places in `copies` whose sender showed that it had read the 250: it went on with the connection."""

    def note_try(self, entry: Try) -> None:
        with self._lock:
            self.tries.append(self._write("tries", entry))

    def note_copy(self, content: bytes, recipients: tuple[str, ...], connection: int) -> int:
        """Enter what a next hop took, as it came; returns the copy's place."""
        entry = read_copy(content, recipients, connection)
        with self._lock:
            self.copies.append(self._write("copies", entry))
            if entry.mangled or not entry.token:
                (self._folder / f"copy-{len(self.copies)}.eml").write_bytes(content)
            return len(self.copies) - 1

    def note_confirmed(self, place: int) -> None:
        with self._lock:
            self.confirmed.add(place)

    def note_strike(self, entry: Strike) -> None:
        with self._lock:
            self.strikes.append(self._write("strikes", entry))

    def acknowledged(self) -> int:
        """How many tries were answered with 250 so far."""
        with self._lock:
            return sum(entry.code == 250 for entry in self.tries)

    def snapshot(self) -> tuple[list[Try], list[Copy], list[Strike], set[int]]:
        """Everything so far."""
        with self._lock:
            return list(self.tries), list(self.copies), list(self.strikes), set(self.confirmed)

    def _write(self, name: str, entry: Any) -> Any:
        made = replace(entry, time_s=time.monotonic())
        with (self._folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(made)) + "\n")
        return made


def read_copy(content: bytes, recipients: tuple[str, ...], connection: int) -> Copy:
    """Tell the field that Postroad adds from what was submitted."""
    field = _RECEIVED.match(content)
    below = content[field.end() :] if field else content
    token = _TOKEN.search(below)
    found_id = _RECEIVED_ID.search(field.group()) if field else None
    mangled = "" if field and found_id else "it does not begin with one Received field that names an id"
    return Copy(
        token=token.group(1).decode() if token else "",
        message_id=found_id.group(1).decode() if found_id else "",
        recipients=recipients,
        sha256=digest(below),
        mangled=mangled,
        connection=connection,
    )
