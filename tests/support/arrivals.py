"""What arrives in the inbox of a local stack, and whether it is what was submitted below the documented headers.

An expectation is exact: the bytes that a client sent follow, unchanged, fields that are named one by one.
"""

from __future__ import annotations

import email.utils
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from postroad.inbox import Inbox, ReceivedMail
from support.local_stack import LocalStack

_TIMEOUT_S = 30.0
_POLL_S = 0.02

CLIENT_NAME = "client.example.com"
ALL_ADDED = ("Received", "Date", "Message-ID")


class Arrivals:
    """Mails of an inbox by Postroad's message id; each file is read once."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._seen: set[str] = set()
        self._mails: dict[str, list[ReceivedMail]] = {}

    def wait(self, message: str) -> tuple[ReceivedMail, bytes]:
        """The mail with this id and its content; AssertionError when it does not come, or came twice."""
        self._wait(lambda: message in self._mails, message)
        (mail,) = self._mails[message]
        return mail, self._inbox.content(mail)

    def wait_for(self, is_it: Callable[[ReceivedMail], bool]) -> tuple[ReceivedMail, bytes]:
        """The one mail that `is_it` says yes to, and its content."""
        self._wait(lambda: any(map(is_it, self._all())), "what is waited for")
        (mail,) = filter(is_it, self._all())
        return mail, self._inbox.content(mail)

    def repeated(self) -> list[str]:
        """Ids that arrived more than once for the same recipient, as far as the inbox knows now.

        A message of which a part was held, or whose recipients have several next hops, comes in several copies.
        """
        self._look()
        return [
            message
            for message, mails in self._mails.items()
            if message and max(Counter(name for mail in mails for name in set(mail.recipients)).values()) > 1
        ]

    def check_once(self, stack: LocalStack) -> None:
        """AssertionError when a message arrived more than once, with what arrived and what was recorded."""
        told = [
            {"copies": [(mail.receive_time, mail.recipients) for mail in self._mails[message]]}
            | {"recorded": stack.json("messages", "get", message)}
            for message in self.repeated()
        ]
        assert told == [], stack.logs()

    def _wait(self, has_come: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _TIMEOUT_S
        while not has_come():
            assert time.monotonic() < deadline, f"{what} has not arrived"
            time.sleep(_POLL_S)
            self._look()

    def _all(self) -> list[ReceivedMail]:
        return [mail for mails in self._mails.values() for mail in mails]

    def _look(self) -> None:
        numbers = {path.stem for path in self._inbox.folder.glob("*.json")} - self._seen
        for number in sorted(numbers):
            (mail,) = self._inbox.find(number)
            self._mails.setdefault(mail.message, []).append(mail)
        self._seen |= numbers


@dataclass(frozen=True, slots=True)
class Expected:
    """How an arrived mail must begin: the fields that were added, and what Received says."""

    message: str
    added: tuple[str, ...] = ALL_ADDED
    protocol: str = "ESMTPSA"
    recipient: str = ""
    body_only: bool = False
    client: str = CLIENT_NAME


def check_content(arrived: bytes, submitted: bytes, expected: Expected) -> None:
    """AssertionError unless `arrived` is `submitted` below exactly the expected fields."""
    top, rest = arrived[: len(arrived) - len(submitted)], arrived[len(arrived) - len(submitted) :]
    assert rest == submitted
    if expected.body_only:
        assert top.endswith(b"\r\n\r\n")
        top = top[:-2]
    assert top.endswith(b"\r\n")
    fields = [line.partition(": ") for line in _unfolded(top)]
    assert tuple(name for name, _, _ in fields) == expected.added
    values = {name: value for name, _, value in fields}
    date = _check_received(values["Received"], expected)
    assert values.get("Date", date) == date
    assert values.get("Message-ID", f"<{expected.message}@localhost>") == f"<{expected.message}@localhost>"


def _unfolded(header: bytes) -> list[str]:
    text = header.decode("utf-8").removesuffix("\r\n")
    return re.sub(r"\r\n(?=[ \t])", "", text).split("\r\n")


def _check_received(value: str, expected: Expected) -> str:
    """Check the line's every word; its date is returned."""
    found = re.fullmatch(
        r"from (\S+) \(\[127\.0\.0\.1\]\) \(TLSv1\.[23]\)\tby localhost with (\S+) id (\S+?)(?:\tfor <(.*)>)?;\t(.*)",
        value,
    )
    assert found is not None, value
    client, protocol, message, recipient, date = found.groups(default="")
    assert (client, protocol, message, recipient) == (
        expected.client,
        expected.protocol,
        expected.message,
        expected.recipient,
    )
    assert abs(email.utils.parsedate_to_datetime(date).timestamp() - time.time()) < 3_600
    return date
