"""What the SMTP session machine and its driver agree on: actions, deadlines, budgets, and who decides about mail.

Contract. Plain values and one protocol; `parse_parameters` reads the parameters of MAIL and answers with a refusal what
it cannot take, never with an exception.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple, Protocol

from dataplane.core import replies
from dataplane.core.address import Mailbox
from dataplane.core.replies import Reply


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
    """Parameters of MAIL: `size_bytes` is 0 when not declared."""

    size_bytes: int = 0
    body_8bit: bool = False
    smtputf8: bool = False


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


@lru_cache(maxsize=256)
def parse_parameters(text: str) -> MailParameters | Reply:
    """Return the parameters of MAIL, or why they cannot be taken (RFC 1870, 6152, 6531, 4954)."""
    size_bytes, body_8bit, smtputf8 = 0, False, False
    seen = set()
    for parameter in text.split():
        keyword, equals, value = parameter.partition("=")
        keyword = keyword.upper()
        if keyword in seen:
            return replies.BAD_ARGUMENT
        seen.add(keyword)
        if keyword == "SIZE" and value.isascii() and value.isdigit() and len(value) <= 20:
            size_bytes = int(value)
        elif keyword == "BODY" and value.upper() in {"7BIT", "8BITMIME"}:
            body_8bit = value.upper() == "8BITMIME"
        elif keyword == "SMTPUTF8" and not equals:
            smtputf8 = True
        elif keyword == "AUTH" and value:
            # Taken and not believed: RFC 4954, section 5, leaves trust in it to the server.
            continue
        elif keyword in {"SIZE", "BODY", "SMTPUTF8", "AUTH"}:
            return replies.BAD_ARGUMENT
        else:
            return replies.UNKNOWN_PARAMETER
    return MailParameters(size_bytes, body_8bit, smtputf8)
