"""Runs the session machine against typed SMTP lines, whole, octet by octet and cut at random, with one result.

A dialog is a list of turns: what the client sends before it waits (a legal group of RFC 2920), and what the server
answers. `run_every_way` runs it in all the ways and returns what the policy saw.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from dataplane.core import replies
from dataplane.core.address import Mailbox
from dataplane.core.replies import Reply
from dataplane.core.session import Session
from dataplane.core.session_contract import MAX_HOLD_S, Action, Limits, MailParameters

HOST = "relay.example"
NOW_MS = 1_790_000_000_000  # 2026-09-21T14:13:20Z
AUTH_PLAIN = b"AUTH PLAIN AGFwcABzZWNyZXQ=\r\n"  # app, secret
Turn = tuple[bytes, bytes]


_QUEUED = replies.queued("0")
_NO_PARAMETERS = MailParameters()


@dataclass
class Recorder:
    """A policy that lets everything pass but what its tables refuse, and writes down what it was asked."""

    sender_refusals: dict[str, Reply] = field(default_factory=dict)
    recipient_refusals: dict[str, Reply] = field(default_factory=dict)
    permit_refusal: Reply | None = None
    commit_reply: Reply = _QUEUED
    calls: list[tuple[str, ...]] = field(default_factory=list)
    messages: list[tuple[str, tuple[str, ...], bytes]] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    broken: Exception | None = None
    sender: str = ""
    recipients: list[str] = field(default_factory=list)
    parameters: MailParameters = _NO_PARAMETERS

    def authenticate(self, username: str, secret: str) -> Reply | None:
        self.calls.append(("authenticate", username, secret))
        self._break()
        return None if (username, secret) == ("app", "secret") else replies.AUTH_FAILED

    def mail(self, sender: Mailbox | None, parameters: MailParameters) -> Reply | None:
        self._break()
        self.sender = "" if sender is None else sender.text
        self.parameters = parameters
        self.calls.append(("mail", self.sender))
        return self.sender_refusals.get(self.sender)

    def recipient(self, address: Mailbox) -> Reply | None:
        self._break()
        self.calls.append(("recipient", address.text))
        refusal = self.recipient_refusals.get(address.text)
        if refusal is None:
            self.recipients.append(address.text)
        return refusal

    def latest_release_ms(self) -> int:
        return NOW_MS + MAX_HOLD_S * 1000

    def reset(self) -> None:
        self.sender, self.recipients = "", []

    def forget(self) -> None:
        self.calls.append(("forget",))
        self.reset()

    def failed(self, error: Exception) -> str:
        self.errors.append(error)
        return "ref-1"

    def _break(self) -> None:
        if self.broken is not None:
            raise self.broken


@dataclass
class Driver:
    """Does what a real driver does, at once: shakes hands, asks, stores. `hold_permit` leaves DATA unanswered."""

    session: Session
    policy: Recorder
    hold_permit: bool = False
    output: bytes = b""

    def send(self, data: bytes) -> None:
        self.session.receive(data)
        self.settle()

    def settle(self) -> None:
        session = self.session
        while session.action not in {Action.NONE, Action.CLOSE}:
            if session.action is Action.MORE:
                session.resume()
            elif session.action is Action.START_TLS:
                self.output += session.take_output()
                session.tls_started()
            elif session.action is Action.PERMIT:
                if self.hold_permit:
                    break
                session.permit(self.policy.permit_refusal)
            else:
                content = session.take_content()
                self.policy.messages.append((self.policy.sender, tuple(self.policy.recipients), content))
                session.committed(self.policy.commit_reply)
        self.output += session.take_output()

    def answer(self) -> bytes:
        output, self.output = self.output, b""
        return output


def start(policy: Recorder | None = None, limits: Limits | None = None, **options: bool) -> Driver:
    """A greeted session; by default TLS is active and the client's address may send."""
    policy = policy or Recorder()
    settings = {"tls_available": True, "tls_active": True, "authorized": True} | options
    session = Session(policy, limits or Limits(), HOST, **settings)
    session.greet()
    assert session.take_output() == b"220 relay.example ESMTP\r\n"
    return Driver(session, policy)


def cuts(data: bytes, seed: int) -> Iterator[list[bytes]]:
    """The ways to cut a group: whole, octet by octet, at random."""
    yield [data]
    yield [data[index : index + 1] for index in range(len(data))]
    dice = random.Random(seed)
    places = sorted(dice.sample(range(len(data) + 1), min(len(data), dice.randint(1, 6))))
    yield [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


def run_every_way(make: Callable[[], Driver], turns: Sequence[Turn]) -> Driver:
    """Run a dialog in every way and expect each answer to begin with, line by line, what is expected of it."""
    outcomes: list[tuple[object, ...]] = []
    driver = make()
    for way in range(6):
        driver = make()
        for sent, expected in turns:
            pieces = list(cuts(sent, way * 7919 + len(sent)))[min(way, 2)] if sent else []
            for piece in pieces:
                driver.send(piece)
            expect(driver.answer(), expected, sent)
        outcomes.append((driver.policy.calls, driver.policy.messages, driver.session.action))
    assert all(outcome == outcomes[0] for outcome in outcomes)
    return driver


def expect(answer: bytes, expected: bytes, sent: bytes = b"") -> None:
    """Compare line by line: an expected line is the beginning of the line that came."""
    got = answer.split(b"\r\n")[:-1]
    assert answer == b"" or answer.endswith(b"\r\n")
    wanted = expected.split(b"\r\n") if expected else []
    where = f"after {sent[:80]!r}: {answer!r}"
    assert len(got) == len(wanted), where
    for line, beginning in zip(got, wanted, strict=True):
        assert line.startswith(beginning), where
