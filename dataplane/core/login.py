"""One exchange of AUTH PLAIN or AUTH LOGIN (RFC 4954, RFC 4616) as a machine: the client's lines in, challenges out.

Contract. `begin` takes the words behind AUTH, `take` each further line; both return a `Reply` (a challenge while the
exchange goes on, a refusal when it is over) or the `Credentials` to be checked. Nothing of the lines is kept beyond
the exchange, and none of it stands in a reply. `active` says whether the next line belongs to the exchange.

    step       the next line is                          after it
    NONE       a command                                 -
    PLAIN      identity NUL user name NUL password       NONE
    USERNAME   the user name of LOGIN                    PASSWORD
    PASSWORD   the password of LOGIN                     NONE
"""

from __future__ import annotations

import binascii
from enum import IntEnum
from typing import NamedTuple

from dataplane.core import replies
from dataplane.core.replies import Reply


class Credentials(NamedTuple):
    """What a client says it is; both empty where it could not be understood: checked and refused all the same."""

    username: str
    secret: str


class _Step(IntEnum):
    NONE = 0
    PLAIN = 1
    USERNAME = 2
    PASSWORD = 3


class LoginExchange:
    """The exchange of one session; used again for each AUTH."""

    __slots__ = ("_step", "_username")

    def __init__(self) -> None:
        self._step = _Step.NONE
        self._username = ""

    @property
    def active(self) -> bool:
        """Whether the client's next line belongs to the exchange."""
        return self._step is not _Step.NONE

    def begin(self, mechanism: str, initial: str) -> Reply | Credentials:
        """Start with a mechanism (any case) and the initial response, empty for none."""
        step = {"PLAIN": _Step.PLAIN, "LOGIN": _Step.USERNAME}.get(mechanism.upper())
        if step is None:
            return replies.UNKNOWN_MECHANISM
        self._step = step
        if initial:
            # RFC 4954, section 4: "=" is an initial response without octets.
            return self.take(b"" if initial == "=" else initial.encode())
        return replies.CHALLENGE_EMPTY if step is _Step.PLAIN else replies.CHALLENGE_USERNAME

    def take(self, line: bytes) -> Reply | Credentials:
        """Take the client's next line."""
        step = self._step
        self.cancel()
        if line == b"*":
            return replies.AUTH_CANCELLED
        try:
            response = binascii.a2b_base64(line, strict_mode=True) if line else b""
        except binascii.Error:
            return replies.BAD_BASE64
        text = response.decode("utf-8", "replace")
        if step is _Step.USERNAME:
            self._username = text
            self._step = _Step.PASSWORD
            return replies.CHALLENGE_PASSWORD
        if step is _Step.PASSWORD:
            return Credentials(self._take_username(), text)
        return _read_plain(text)

    def cancel(self) -> None:
        """End the exchange: the next line is a command."""
        self._step = _Step.NONE

    def _take_username(self) -> str:
        username, self._username = self._username, ""
        return username


def _read_plain(text: str) -> Credentials:
    """RFC 4616: nobody may act as another, so an authorization identity is empty or the user's own name."""
    fields = text.split("\0")
    if len(fields) != 3 or fields[0] not in {"", fields[1]}:
        return Credentials("", "")
    return Credentials(fields[1], fields[2])
