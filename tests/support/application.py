"""An application that submits numbered mail and remembers what was answered, and the judge that compares.

The judge's books are outside Postroad: what was answered with 250 is kept here, what arrived lies in the inbox's
folder as the inbox received it, and the ledger is read as the superuser. Every acknowledged number must have arrived
with the content that was submitted, and stand in the ledger once, as sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import smtplib
import ssl
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import asyncpg

from postroad.localstack import PostgresServer
from support.killable_stack import KillableStack, wait_until

_NUMBER = re.compile(rb"^X-Number: (\d+)\r\n", re.MULTILINE)
_RECEIVED_ID = re.compile(rb"\bid ([0-9a-f-]{36})")
_SENT = 6  # postroad.control.v1.RECIPIENT_STATE_SENT
_QUEUED = re.compile(rb"queued as ([0-9a-f-]{36})")
SENDER = "app@example.com"
RECIPIENT = "someone@example.net"


def content_of(number: int) -> bytes:
    """The message with that number; bodies differ in length, and lines begin with dots now and then."""
    lines = [f"line {line} of message {number}".encode() for line in range(number % 40)]
    head = [b"From: <app@example.com>", b"To: <someone@example.net>", f"X-Number: {number}".encode()]
    head += [b"Date: Fri, 20 Nov 2026 10:00:00 +0000", f"Message-ID: <{number}@example.com>".encode(), b""]
    return b"\r\n".join([*head, *lines, b"." * (number % 4), b""])


class Application:
    """A thread that submits mail over TLS with AUTH until `stop`, and connects anew whenever it is cut off."""

    def __init__(self, facts: dict[str, Any], first_number: int = 1) -> None:
        self._facts = facts
        self._context = ssl.create_default_context(cafile=facts["ca_file"])
        self._number = first_number - 1
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.acknowledged: dict[int, str] = {}
        """Message id by number, of everything that was answered with 250."""
        self.refused: Counter[int] = Counter()
        """Reply codes of everything that was refused."""

    @property
    def count(self) -> int:
        """How many messages were acknowledged so far."""
        return len(self.acknowledged)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Finish the message that is being submitted and end."""
        self._stopping.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "the application hangs in a submission"

    def submit(self, count: int) -> None:
        """Submit `count` messages here and now over one connection; SMTPException or OSError when it is cut."""
        with self._connect() as client:
            for _ in range(count):
                self._send(client)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                with self._connect() as client:
                    while not self._stopping.is_set():
                        self._send(client)
            except (smtplib.SMTPException, OSError) as error:
                if isinstance(error, smtplib.SMTPResponseException):
                    self.refused[error.smtp_code] += 1
                self._stopping.wait(0.05)

    @contextlib.contextmanager
    def _connect(self) -> Any:
        client = smtplib.SMTP("127.0.0.1", self._facts["ports"]["smtp"], timeout=40)
        try:
            client.starttls(context=self._context)
            client.login(self._facts["smtp_username"], self._facts["smtp_password"])
            yield client
        finally:
            client.close()

    def _send(self, client: smtplib.SMTP) -> None:
        self._number += 1
        for verb, argument, expected in (("mail", f"FROM:<{SENDER}>", 250), ("rcpt", f"TO:<{RECIPIENT}>", 250)):
            code, text = client.docmd(verb, argument)
            if code != expected:
                raise smtplib.SMTPResponseException(code, text)
        code, text = client.data(content_of(self._number))
        if code != 250:
            raise smtplib.SMTPResponseException(code, text)
        found = _QUEUED.search(text)
        assert found is not None, text
        self.acknowledged[self._number] = found.group(1).decode()


def arrived(inbox: Path) -> dict[int, list[bytes]]:
    """What the inbox holds, by number: every copy as it was received."""
    found: dict[int, list[bytes]] = {}
    for path in inbox.glob("*.eml"):
        content = path.read_bytes()
        number = _NUMBER.search(content)
        assert number is not None, f"a mail that nobody submitted: {path}"
        found.setdefault(int(number.group(1)), []).append(content)
    return found


def missing(application: Application, inbox: Path) -> set[int]:
    """Numbers that were acknowledged and have not arrived."""
    return set(application.acknowledged) - set(arrived(inbox))


def judge_contents(inbox: Path) -> None:
    """Every copy is what was submitted, byte for byte, below one Received field."""
    for number, copies in arrived(inbox).items():
        for content in copies:
            assert content.startswith(b"Received: "), number
            assert content.endswith(content_of(number)), number
            added = content[: -len(content_of(number))]
            assert len(re.findall(rb"^[A-Za-z-]+:", added, re.MULTILINE)) == 1, (number, added)


def arrived_ids(inbox: Path) -> set[str]:
    """Ids of the messages that arrived, as their Received fields name them."""
    copies = [copy for copies in arrived(inbox).values() for copy in copies]
    return {found.group(1).decode() for copy in copies if (found := _RECEIVED_ID.search(copy))}


def judge_ledger(stack: KillableStack, ids: set[str]) -> None:
    """Each of these messages is in the ledger once, with its one recipient, sent, and one event that says so."""
    wait_until(lambda: ids <= _sent_ids(stack), "every message is sent in the ledger", 120)
    assert all(row["recipients"] == 1 and row["sent"] == 1 for row in _rows(stack) if row["id"] in ids)


def _sent_ids(stack: KillableStack) -> set[str]:
    try:
        return {row["id"] for row in _rows(stack) if row["state"] == _SENT}
    except (OSError, asyncpg.PostgresError):
        return set()  # killed a moment ago, and not up again


def _rows(stack: KillableStack) -> list[asyncpg.Record]:
    server = PostgresServer(stack.root / "postgres", stack.port("postgres"))
    return asyncio.run(_fetch(server.dsn("postgres", "postroad")))


async def _fetch(dsn: str) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetch(
            "SELECT m.message_id::text AS id, min(r.state) AS state, count(DISTINCT r.recipient_index) AS recipients,"
            " count(DISTINCT e.position) FILTER (WHERE e.type = 2) AS sent"
            " FROM postroad.messages m JOIN postroad.recipients r USING (message_id)"
            " LEFT JOIN postroad.delivery_events e USING (message_id) GROUP BY 1"
        )
    finally:
        await connection.close()
