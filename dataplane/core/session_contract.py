"""What the SMTP session machine and its driver agree on: actions, deadlines, budgets, and who decides about mail.

Contract. Plain values and one protocol; `parse_parameters` reads the parameters of MAIL and answers with a refusal what
it cannot take, never with an exception.
"""

from __future__ import annotations

import re
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple, Protocol

from dataplane.core import replies
from dataplane.core.address import Mailbox
from dataplane.core.datetimes import parse_date_time
from dataplane.core.replies import Reply

MAX_HOLD_S = 30 * 86_400
"""How long a submitter may have a message held (RFC 4865)."""


class Action(IntEnum):
    """What the driver owes the machine."""

    NONE = 0
    MORE = 1
    WAIT = 2
    START_TLS = 3
    PERMIT = 4
    COMMIT = 5
    CLOSE = 6


class Timer(IntEnum):
    """Which deadline applies."""

    NONE = 0
    COMMAND = 1
    COMMAND_BEFORE_AUTH = 2
    DATA = 3


class MailParameters(NamedTuple):
    """Parameters of MAIL: `size_bytes` is 0 when not declared.

    A message is held for `hold_for_s` seconds or until `hold_until_ms` (since 1970) where one of them is not 0; a
    higher `priority` (-9 to 9) goes first.
    """

    size_bytes: int = 0
    body_8bit: bool = False
    smtputf8: bool = False
    hold_for_s: int = 0
    hold_until_ms: int = 0
    priority: int = 0


class Limits(NamedTuple):
    """Budgets of a session; lengths in octets, lines with their CR LF."""

    max_message_bytes: int = 26_214_400
    max_recipients: int = 1_000
    drain_bytes: int = 1_048_576
    command_bytes: int = 2_048
    auth_bytes: int = 12_288
    overlong_bytes: int = 1_048_576
    pending_bytes: int = 1_048_576
    commands_per_turn: int = 200
    max_errors: int = 20
    max_auth_failures: int = 3
    max_idle_commands: int = 1_000
    max_idle_commands_before_auth: int = 25


class Policy(Protocol):
    """Who may do what: answers None for yes, or the refusal. Every method returns at once, from memory."""

    def authenticate(self, username: str, secret: str) -> Reply | None:
        """Decide about a login; on None the policy knows who is sending from now on."""
        ...

    def mail(self, sender: Mailbox | None, parameters: MailParameters) -> Reply | None:
        """Decide about a sender, None for the null one; on None a transaction begins."""
        ...

    def recipient(self, address: Mailbox) -> Reply | None:
        """Decide about a recipient of the transaction; on None the policy keeps it."""
        ...

    def latest_release_ms(self) -> int:
        """The latest time until which a message may be held, in milliseconds since 1970; it never fails."""
        ...

    def reset(self) -> None:
        """Forget the transaction."""
        ...

    def forget(self) -> None:
        """Forget all that was learnt before TLS, the login included (RFC 3207, section 4.2)."""
        ...

    def failed(self, error: Exception) -> str:
        """Report an exception of a decision; the result is a reference that the client may be told."""
        ...


NO_PARAMETERS = MailParameters()
_NUMBERS = {
    "SIZE": re.compile("[0-9]{1,20}"),
    "HOLDFOR": re.compile("[1-9][0-9]{0,8}"),
    "MT-PRIORITY": re.compile("-?[1-9]|0"),
}


@lru_cache(maxsize=256)
def parse_parameters(text: str) -> MailParameters | Reply:
    """Return the parameters of MAIL, or why they cannot be taken (RFC 1870, 6152, 6531, 4954, 4865, 6710).

    Whether HOLDUNTIL lies too far ahead is for the caller to see, who has a clock.
    """
    body_8bit, smtputf8 = False, False
    numbers = {"SIZE": 0, "HOLDFOR": 0, "HOLDUNTIL": 0, "MT-PRIORITY": 0}
    seen = set()
    for parameter in text.split():
        keyword, equals, value = parameter.partition("=")
        keyword = keyword.upper()
        if keyword in seen:
            return _malformed(keyword)
        seen.add(keyword)
        if keyword in numbers:
            number = _read_number(keyword, value)
            if number is None:
                return _malformed(keyword)
            numbers[keyword] = number
        elif keyword == "BODY" and value.upper() in {"7BIT", "8BITMIME"}:
            body_8bit = value.upper() == "8BITMIME"
        elif keyword == "SMTPUTF8" and not equals:
            smtputf8 = True
        elif keyword == "AUTH" and value:
            # Taken and not believed: RFC 4954, section 5, leaves trust in it to the server.
            continue
        elif keyword in {"BODY", "SMTPUTF8", "AUTH"}:
            return replies.BAD_ARGUMENT
        else:
            return replies.UNKNOWN_PARAMETER
    if {"HOLDFOR", "HOLDUNTIL"} <= seen:
        return replies.BAD_ARGUMENT
    size_bytes, hold_for_s, hold_until_ms, priority = numbers.values()
    return MailParameters(size_bytes, body_8bit, smtputf8, hold_for_s, hold_until_ms, priority)


def _read_number(keyword: str, value: str) -> int | None:
    """Return what a parameter says, None when it is malformed or more than is offered."""
    if keyword == "HOLDUNTIL":
        try:
            return parse_date_time(value)
        except ValueError:
            return None
    number = int(value) if _NUMBERS[keyword].fullmatch(value) else None
    return None if number is not None and keyword == "HOLDFOR" and number > MAX_HOLD_S else number


def _malformed(keyword: str) -> Reply:
    return replies.BAD_PRIORITY if keyword == "MT-PRIORITY" else replies.BAD_ARGUMENT
