"""The applications of the chaos tests: they submit, note what was answered, and submit again what was not.

A message is tried until it is acknowledged. Each try carries a token of its own in its content, so that the judge can
tell one try from another. Contents, recipients and lengths are drawn from the seed.
"""

from __future__ import annotations

import contextlib
import random
import re
import smtplib
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from support.chaos.books import Books, Try, digest

SENDER = "app@example.com"
_QUEUED = re.compile(r"queued as ([0-9a-f-]{36})")
_KINDS = ("to", "to", "to", "to", "later", "refuse")
_LARGE_BYTES = 150_000  # above what the spool keeps in a row
_TIMEOUT_S = 20.0
_PAUSE_S = 0.05


@dataclass(frozen=True, slots=True)
class Message:
    """What is to be submitted; `content` of a try carries the try's token."""

    name: str
    recipients: tuple[str, ...]
    body: bytes
    sender: str = SENDER

    def content(self, token: str) -> bytes:
        head = (
            f"From: <{self.sender}>\r\nTo: <someone@example.net>\r\n"
            f"X-Token: {token}\r\nMessage-ID: <{token}@example.com>\r\n"
            "Date: Fri, 20 Nov 2026 10:00:00 +0000\r\n\r\n"
        )
        return head.encode() + self.body


def draw_message(name: str, chooser: random.Random, *, large: bool = True, sender: str = SENDER) -> Message:
    """A message with one to three recipients; lines begin with dots now and then, and one in twenty is large."""
    recipients = tuple(
        f"{chooser.choice(_KINDS)}-{name}-{place}@example.net" for place in range(chooser.choice((1, 1, 1, 2, 3)))
    )
    lines = [b"." * chooser.randrange(4) + b"x" * chooser.randrange(70) for _ in range(chooser.randrange(40))]
    if large and chooser.random() < 0.05:
        lines += [b"y" * 900] * (_LARGE_BYTES // 900)
    return Message(name, recipients, b"\r\n".join([*lines, b""]), sender)


class Application:
    """One thread that submits until `stop`, over TLS with AUTH, and connects anew whenever it is cut off, to any of
    `ports`.
    """

    def __init__(
        self,
        books: Books,
        name: str,
        ports: Sequence[int],
        login: tuple[str, str],
        ca_file: str,
        seed: int,
        sender: str = SENDER,
    ) -> None:
        self._books = books
        self._name = name
        self._ports = ports
        self._sender = sender
        self._login = login
        self._tls = ssl.create_default_context(cafile=ca_file)
        self._chooser = random.Random(f"{seed} {name}")
        self._count = 0
        self._tries = 0
        self._message: Message | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Begin no more tries; `join` waits for the one under way."""
        self._stopping.set()

    def join(self) -> None:
        self._thread.join(6 * _TIMEOUT_S)
        assert not self._thread.is_alive(), f"{self._name} hangs in a submission"

    def submit(self, count: int) -> None:
        """Submit so many messages here and now over one connection; SMTPException or OSError when it is cut."""
        with self._connected() as client:
            for _ in range(count):
                self._try(client)

    def _run(self) -> None:
        while not self._stopping.is_set():
            with contextlib.suppress(smtplib.SMTPException, OSError), self._connected() as client:
                # Now and then a connection is left, so that others are made.
                for _ in range(self._chooser.randrange(1, 60)):
                    if self._stopping.is_set():
                        return
                    self._try(client)
            self._stopping.wait(_PAUSE_S)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[smtplib.SMTP]:
        port = self._ports[0] if len(self._ports) == 1 else self._chooser.choice(self._ports)
        client = smtplib.SMTP("127.0.0.1", port, local_hostname="app.example", timeout=_TIMEOUT_S)
        try:
            client.starttls(context=self._tls)
            client.login(*self._login)
            yield client
        finally:
            client.close()

    def _next(self) -> Message:
        if self._message is None:
            self._count += 1
            self._tries = 0
            self._message = draw_message(f"{self._name}.{self._count}", self._chooser, sender=self._sender)
        return self._message

    def _try(self, client: smtplib.SMTP) -> None:
        """One try, entered in the books whatever comes of it."""
        message = self._next()
        self._tries += 1
        token = f"{message.name}.{self._tries}"
        content = message.content(token)
        dot_left, code, text = False, 0, ""
        begun_s = time.monotonic()
        try:
            code, text = _envelope(client, message)
            if code == 354:
                code = 0
                client.send(_framed(content))
                dot_left = True
                code, text = _reply(client)
        finally:
            found = _QUEUED.search(text) if code == 250 else None
            message_id = found.group(1) if found else ""
            self._books.note_try(
                Try(token, message.recipients, digest(content), dot_left, code, text, message_id, begun_s=begun_s)
            )
        if code == 250:
            self._message = None
            return
        client.close()
        raise smtplib.SMTPResponseException(code, text)


def _envelope(client: smtplib.SMTP, message: Message) -> tuple[int, str]:
    """MAIL, RCPT for all, DATA; the reply to DATA, or the first that refuses."""
    recipients = (f"RCPT TO:<{address}>" for address in message.recipients)
    commands = [f"MAIL FROM:<{message.sender}>", *recipients, "DATA"]
    code, text = 0, ""
    for command in commands:
        client.putcmd(command)
        code, text = _reply(client)
        if code not in {250, 354}:
            break
    return code, text


def _reply(client: smtplib.SMTP) -> tuple[int, str]:
    """One reply of one line; a line that was cut off is none, though smtplib would take it for one."""
    assert client.file is not None
    line: bytes = client.file.readline(2_048)
    if not line.endswith(b"\r\n"):
        raise smtplib.SMTPServerDisconnected("cut off")
    return int(line[:3]), line[4:].decode(errors="replace").strip()


def _framed(content: bytes) -> bytes:
    stuffed = content.replace(b"\r\n.", b"\r\n..")
    return (b"." + stuffed if stuffed.startswith(b".") else stuffed) + b".\r\n"


def answers(port: int) -> bool:
    """Whether an SMTP server greets on this port."""
    with socket.socket() as probe:
        probe.settimeout(5)
        try:
            probe.connect(("127.0.0.1", port))
            return probe.recv(4) == b"220 "
        except OSError:
            return False
