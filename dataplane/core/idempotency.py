"""Idempotent submission: what a key names, and what makes two submissions the same.

Contract. Pure functions and values. A key belongs to its account: the hash covers the account's uid, so that the same
key of another account, or of one that was deleted and made anew, is another key. Two submissions are the same when
sender, recipients in their order and content are, the content as it was sent without the field `Idempotency-Key` and
without what Postroad adds. The key itself is kept nowhere.

    a key                            what a submission with it gets
    is new                           stored
    is being stored                  451, and 550 for another content
    was stored in the last 24 hours  the 250 of then, and 550 for another content
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import NamedTuple

KEY_WINDOW_MS = 24 * 3_600_000
"""For so long a stored submission answers for its key."""

PENDING_MS = 5 * 60_000
"""For so long a submission that nobody ended holds its key in the fleet."""

HASH_BYTES = 32


class SubmissionKey(NamedTuple):
    """A message's key: SHA-256 of account and key, and of the submission.

    `checked` says that the fleet was asked, and knew of no other message with the key; otherwise this spool alone was.
    """

    key_hash: bytes
    content_hash: bytes
    checked: bool = False


class Submitted(NamedTuple):
    """What is known of a key: the submission that has it, and the id of its message."""

    content_hash: bytes
    message_id: bytes


def hash_key(account_uid: str, key: bytes) -> bytes:
    """Return what stands for the key of an account."""
    return sha256(account_uid.encode() + b"\0" + key).digest()


class SubmissionHash:
    """Takes a submission in pieces. No address is empty but a null sender, and none has a NUL."""

    __slots__ = ("_hash",)

    def __init__(self, sender: str, recipients: Sequence[str]) -> None:
        self._hash = sha256("\0".join((sender, *recipients, "", "")).encode())

    def add(self, *pieces: bytes) -> None:
        """Take more of the content."""
        for piece in pieces:
            self._hash.update(piece)

    def digest(self) -> bytes:
        """Return the hash of what was taken."""
        return self._hash.digest()
