"""What sending by API needs of the outside: the account, the queue and its keys, the buckets, and somebody to tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from controlplane.domain.acceptance import Accepted, SendingAccount
from controlplane.domain.sending_limits import Take


class KnownKey(NamedTuple):
    """The message that has a key; `content_hash` is None where a node did not tell."""

    message_id: bytes
    content_hash: bytes | None


class Denied(NamedTuple):
    """Why nothing was taken: seconds until there is enough, and the bucket that lacked most."""

    wait_s: float
    key: str


class Outbox(Protocol):
    """The replicated queue, as those use it who send by API. UnavailableError while PostgreSQL cannot be asked."""

    async def account(self, account: str) -> SendingAccount | None:
        """Return the account as it is in PostgreSQL now; None when there is none."""

    async def known(self, account: str, key_hashes: Sequence[bytes]) -> dict[bytes, KnownKey]:
        """Return who has these keys, as far as somebody had them within the window of a key."""

    async def store(self, account: str, messages: Sequence[Accepted]) -> set[bytes]:
        """Store messages with their keys in one transaction, and return the ids of those whose keys were free.

        No key is there twice. All of them are in the ledger and the queue then, the others nowhere. Cancelling leaves
        it unknown whether they are stored.
        """


class MessageBudget(Protocol):
    """The buckets that all nodes and control planes share. Never raises."""

    async def take(self, groups: Sequence[Sequence[Take]], parts: int) -> list[Denied | None]:
        """Take all or nothing of each group, one after the other; None where it was granted.

        `parts` is how many would share a bucket if each had to decide alone. Cancelling may leave tokens taken.
        """

    async def give_back(self, takes: Sequence[Take]) -> None:
        """Give back what was taken and not used."""


class SendingObserver(Protocol):
    """Told of what became of messages."""

    def accepted(self, message: Accepted) -> None:
        """A message is stored."""

    def ended(self, result: str) -> None:
        """A message ended as `accepted`, `repeated`, `refused` or `limited`."""
