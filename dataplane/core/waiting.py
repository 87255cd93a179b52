"""Which recipients wait, in 16 bytes: a digest that does not depend on order, and the words of asking for it.

The digest of a set of recipients is the sum of message id times `weight(index)`, modulo 2^128 - 1. Sums of one index
may be taken first and be weighted once, so that a database adds up ids and nobody hashes a recipient; a recipient is
added or taken back without looking at the others. Ids are random for the most part, so sets that differ by accident
have different digests; it is no defence against a spool that lies. A bucket is the lowest 12 bits of an id.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256
from typing import NamedTuple

MODULUS = (1 << 128) - 1
BUCKETS = 4096
_MOST_INDEXES = 1024


class Tally(NamedTuple):
    """How many recipients, and the digest of which."""

    count: int = 0  # type: ignore[assignment]  # hides tuple.count, which nobody calls on a tally
    digest: int = 0

    def plus(self, other: Tally) -> Tally:
        """Both sets together; they have no recipient in common."""
        return Tally(self.count + other.count, (self.digest + other.digest) % MODULUS)

    def minus(self, other: Tally) -> Tally:
        """Without those of `other`, which should all be in it."""
        return Tally(self.count - other.count, (self.digest - other.digest) % MODULUS)


class Waiting(NamedTuple):
    """A recipient that is not terminal."""

    message_id: bytes
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls on a row


class WaitingQuestion(NamedTuple):
    """Asks who waits in `spool` as of record `as_of_record`.

    Without an account a tally of each account; with one a tally of each bucket; with buckets the recipients by name.
    """

    spool: str
    number: int
    as_of_record: int
    account: str = ""
    buckets: tuple[int, ...] = ()


class WaitingStatement(NamedTuple):
    """The answer; `totals` by account and bucket (0 for a whole account). `error` says why there is none."""

    spool: str
    number: int
    error: str = ""
    totals: tuple[tuple[str, int, Tally], ...] = ()
    recipients: tuple[tuple[str, Waiting], ...] = ()
    without_deadline: tuple[tuple[str, Waiting], ...] = ()
    quarantined: tuple[bytes, ...] = ()


@lru_cache(_MOST_INDEXES)
def weight(index: int) -> int:
    """What ids count in a recipient's place."""
    return int.from_bytes(sha256(b"postroad waiting recipient %d" % index).digest()[:16]) % MODULUS


def tally(message_id: bytes, index: int) -> Tally:
    """One recipient."""
    return Tally(1, int.from_bytes(message_id) * weight(index) % MODULUS)


def tally_of_sum(count: int, ids_sum: int, index: int) -> Tally:
    """`count` recipients of one index, whose ids add up to `ids_sum`."""
    return Tally(count, ids_sum * weight(index) % MODULUS)


def bucket_of(message_id: bytes) -> int:
    """The bucket of an id."""
    return int.from_bytes(message_id[14:16]) % BUCKETS
