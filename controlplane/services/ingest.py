"""Takes what spools report into the ledger: batches that follow each other become one transaction.

Contract. `open_spool` and `store` answer with Cursor or Refusal, and raise UnavailableError while
PostgreSQL is away: then nothing was answered, and the node sends again what the cursor does not cover.
`store` takes batches in the order in which they came and answers each, in order.

A PostgreSQL that failed over may have lost what was answered. A node that has news hears of it by a GAP; for one that
has none `lost` finds out, so that it opens its spools again and sends what it still has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime

from controlplane.ports_fleet import Cursor, LedgerStore, RawBatch, Refusal, RefusalReason, SpoolOpening

# More in one transaction costs nothing less per record, and holds the spool's row and memory longer.
MERGED_RECORDS = 4_000


class Told:
    """Up to where the node of one stream was told that its spools' records are stored."""

    def __init__(self) -> None:
        self._cursors: dict[str, int] = {}

    def note(self, answer: Cursor | Refusal) -> None:
        """This was answered."""
        if isinstance(answer, Cursor):
            self._cursors[answer.spool] = answer.cursor
        else:
            self._cursors.pop(answer.spool, None)

    def copy(self) -> dict[str, int]:
        """The cursors of this moment."""
        return dict(self._cursors)


class IngestService:
    """See the module. `observe` is told how many records each transaction stored and set aside."""

    def __init__(
        self,
        store: LedgerStore,
        clock: Callable[[], datetime],
        observe: Callable[[int, int], None] = lambda _stored, _rejected: None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._observe = observe

    async def open_spool(self, node_id: str, opening: SpoolOpening) -> Cursor | Refusal:
        """A spool begins to report; answers how far its records are stored."""
        return await self._store.open_spool(node_id, opening, self._clock())

    async def store(self, node_id: str, batches: Sequence[RawBatch]) -> list[Cursor | Refusal]:
        """Store batches; cancelled in between, the answers that are missing are found by the cursor."""
        answers: list[Cursor | Refusal] = []
        for group in merge(batches):
            merged = group[0]
            if len(group) > 1:
                records = [record for batch in group for record in batch.records]
                merged = RawBatch(merged.spool, merged.incarnation, merged.first_record, records)
            stored = await self._store.store(node_id, merged, self._clock())
            self._observe(stored.stored_count, stored.rejected_count)
            answers += _answers(group, stored.answer)
        return answers

    async def lost(self, told: Told) -> list[Refusal]:
        """Spools of which less is stored than was answered. UnavailableError."""
        # Of before the look: what is stored meanwhile is told later.
        cursors = told.copy()
        stored = await self._store.cursors(list(cursors)) if cursors else {}
        return [
            Refusal(spool, RefusalReason.GAP, f"stored up to {stored.get(spool, 0)}, no more up to {cursor}")
            for spool, cursor in cursors.items()
            if stored.get(spool, 0) < cursor
        ]


def merge(batches: Iterable[RawBatch]) -> Iterator[list[RawBatch]]:
    """Groups of batches that continue each other, of at most MERGED_RECORDS records (one batch may be larger)."""
    group: list[RawBatch] = []
    count = 0
    for batch in batches:
        if group and (not _continues(group[-1], batch) or count + len(batch.records) > MERGED_RECORDS):
            yield group
            group, count = [], 0
        group.append(batch)
        count += len(batch.records)
    if group:
        yield group


def _continues(former: RawBatch, batch: RawBatch) -> bool:
    return (
        former.spool == batch.spool
        and former.incarnation == batch.incarnation
        and former.first_record + len(former.records) == batch.first_record
    )


def _answers(group: Sequence[RawBatch], answer: Cursor | Refusal) -> list[Cursor | Refusal]:
    """One answer for each batch, so that the node may count them: after its own last record, or the refusal."""
    if isinstance(answer, Refusal):
        return [answer] * len(group)
    ends = [batch.first_record + len(batch.records) - 1 for batch in group]
    return [Cursor(answer.spool, end if end < ends[-1] else answer.cursor) for end in ends]
