"""Conversations for the client machine: what the remote says at once, and what the client is expected to say.

A script is a list of steps: `S(bytes)` the remote sends, `C(bytes)` the client must have sent by now, `Tls` the
handshake is done, `Begin` a transaction is given. `play` runs it; `cut` chooses how the remote's bytes arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dataplane.core.client import Client, Signal
from dataplane.core.config import TlsPolicy
from dataplane.core.transaction import Login, Transaction, Verdict


class S(NamedTuple):
    data: bytes


class C(NamedTuple):
    data: bytes


class Tls(NamedTuple):
    verified: bool


class Begin(NamedTuple):
    transaction: Transaction


Step = S | C | Tls | Begin
Cutter = Callable[[bytes], Iterator[bytes]]

EHLO_ALL = b"250-mx.test\r\n250-PIPELINING\r\n250-SIZE 1000000\r\n250-8BITMIME\r\n250-STARTTLS\r\n250 SMTPUTF8\r\n"
GREETING = b"220 mx.test ESMTP\r\n"
MESSAGE = b"Subject: hello\r\n\r\nbody\r\n"


def whole(data: bytes) -> Iterator[bytes]:
    yield data


def byte_by_byte(data: bytes) -> Iterator[bytes]:
    for place in range(len(data)):
        yield data[place : place + 1]


@dataclass
class Played:
    client: Client
    sent: bytes = b""
    signals: list[Signal] = field(default_factory=list)
    outcomes: list[tuple[Verdict, ...]] = field(default_factory=list)

    @property
    def kinds(self) -> list[str]:
        return [verdict.kind.name for verdict in self.outcomes[-1]]

    @property
    def codes(self) -> list[int]:
        return [verdict.code for verdict in self.outcomes[-1]]


def transaction(
    *recipients: str, content: bytes = MESSAGE, sender: str = "a@example.com", **options: Any
) -> Transaction:
    return Transaction(sender, recipients or ("b@example.net",), content, **options)


def play(
    steps: Sequence[Step],
    *,
    policy: TlsPolicy = TlsPolicy.NONE,
    login: Login | None = None,
    cut: Cutter = whole,
    tls_active: bool = False,
) -> Played:
    """Run the steps; AssertionError where the client says something else than expected."""
    client = Client("relay.test", policy, login, tls_active=tls_active, tls_verified=tls_active)
    played = Played(client)
    for step in steps:
        match step:
            case S(data):
                for piece in cut(data):
                    _note(played, client.receive(piece))
            case C(data):
                said, played.sent = played.sent, b""
                assert said == data
            case Tls(verified):
                _note(played, client.tls_started(verified=verified))
            case Begin(wanted):
                _note(played, client.begin(wanted))
    return played


def _note(played: Played, signal: Signal) -> None:
    played.sent += b"".join(played.client.take_output())
    if signal is not Signal.NOTHING:
        played.signals.append(signal)
    if signal is Signal.DONE:
        assert played.client.outcome is not None
        played.outcomes.append(played.client.outcome)
