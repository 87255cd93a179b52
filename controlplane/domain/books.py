"""Books: what a spool accepted for an account and what became of it, and what is wrong with them. Plain values.

Contract. A book balances when what was accepted has ended or waits, as the ledger counted it while it stored records
against the rows that wait now. It agrees when the spool's own digest of who waits, as of the same record, is the
ledger's. `compare_names` says who is missing on which side. Accounts are ids without collection (`demo`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import NamedTuple
from uuid import UUID

from dataplane.core.waiting import Tally, Waiting

MOST_NAMED = 100


class FindingKind(IntEnum):
    """What is wrong; the numbers are those of postroad.control.v1.BookFinding.Kind."""

    MISSING_IN_SPOOL = 1
    MISSING_IN_LEDGER = 2
    NO_DEADLINE = 3
    UNBALANCED = 4
    SPOOL_SILENT = 5
    QUARANTINED = 6


class Entries(NamedTuple):
    """Recipients that a spool accepted, and those of them that ended, by how."""

    accepted: int = 0
    sent: int = 0
    bounced: int = 0
    failed: int = 0
    expired: int = 0
    cancelled: int = 0

    @property
    def ended(self) -> int:
        """All that are terminal."""
        return sum(self) - self.accepted


class LedgerSide(NamedTuple):
    """A spool's account in the ledger; `earlier` of those that wait are of messages older than the books."""

    entries: Entries = Entries()
    waiting: Tally = Tally()
    earlier: int = 0

    @property
    def balances(self) -> bool:
        """Whether all that was accepted ended or waits."""
        return self.entries.accepted == self.entries.ended + self.waiting.count - self.earlier


class Book(NamedTuple):
    """Both sides of an account in a spool as of a record."""

    account: str
    spool: str
    node: str
    as_of_record: int
    compare_time: datetime
    ledger: LedgerSide
    spool_waiting: Tally

    @property
    def agrees(self) -> bool:
        """Whether the same recipients wait on both sides."""
        return self.ledger.waiting == self.spool_waiting


class Finding(NamedTuple):
    """Something wrong; without a message id it is about the account as a whole."""

    kind: FindingKind
    account: str
    message_id: str | None
    recipient_index: int | None
    detail: str


@dataclass(frozen=True, slots=True)
class StoredFinding:
    """A finding, where and since when; `resolve_time` None while it is still so."""

    finding: int
    spool: str
    node: str
    what: Finding
    first_seen_time: datetime
    last_seen_time: datetime
    resolve_time: datetime | None


class Comparison(NamedTuple):
    """What a round found in one spool. Of `unjudged` accounts nobody knows: what was found before stays as it is."""

    spool: str
    node: str
    as_of_record: int
    books: tuple[Book, ...]
    findings: tuple[Finding, ...]
    unjudged: tuple[str, ...]


def differing(first: Mapping[int, Tally], second: Mapping[int, Tally]) -> list[int]:
    """Buckets whose tallies are not the same, in order."""
    return sorted(one for one in first.keys() | second.keys() if first.get(one, Tally()) != second.get(one, Tally()))


def unbalanced(book: Book) -> Iterator[Finding]:
    """The finding of a book that does not balance."""
    if not book.ledger.balances:
        entries, waiting = book.ledger.entries, book.ledger.waiting.count - book.ledger.earlier
        detail = f"{entries.accepted} accepted, {entries.ended} ended and {waiting} waiting"
        yield Finding(FindingKind.UNBALANCED, book.account, None, None, detail)


def compare_names(
    account: str, ledger: Collection[Waiting], spool: Collection[Waiting], quarantined: Collection[bytes]
) -> list[Finding]:
    """Name who waits on one side only: at most MOST_NAMED of each, and how many more there are."""
    here, there = set(ledger), set(spool)
    aside = {one for one in here - there if one.message_id in quarantined}
    return [
        *_named(FindingKind.MISSING_IN_SPOOL, account, here - there - aside, "waits in the ledger only"),
        *_named(FindingKind.MISSING_IN_LEDGER, account, there - here, "waits in the spool only"),
        *_named(FindingKind.QUARANTINED, account, aside, "waits in the ledger, and the spool has set it aside"),
    ]


def name_waiting(kind: FindingKind, account: str, recipients: Collection[Waiting], detail: str) -> list[Finding]:
    """A finding for each of the recipients, at most MOST_NAMED, and one for how many more there are."""
    return list(_named(kind, account, recipients, detail))


def _named(kind: FindingKind, account: str, found: Collection[Waiting], detail: str) -> Iterator[Finding]:
    for message_id, index in sorted(found)[:MOST_NAMED]:
        yield Finding(kind, account, str(UUID(bytes=message_id)), index, detail)
    if len(found) > MOST_NAMED:
        yield more_of(kind, account, len(found) - MOST_NAMED)


def more_of(kind: FindingKind, account: str, count: int) -> Finding:
    """The finding that says how many are not named."""
    return Finding(kind, account, None, None, f"{count} more")
