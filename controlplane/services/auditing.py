"""Compares the ledger with the spools of a node, over the stream on which the node reports.

Contract. `Auditor.attend` makes a `Comparer` for one stream; `run` goes round its spools until it is cancelled, which
leaves what is stored whole. Each round reads the ledger in one snapshot, up to some record of each spool, and asks
the spool who waited there as of that very record: both sides may move meanwhile. Where digests differ, two more
questions follow, each as of a record of its own: which buckets differ, and who is in them. What both sides agree on
costs one question a round. A round takes at most a twentieth of the time, but for one that takes longer than the one
before, as when a node stood still in its midst, and one round at a time reads the ledger. A round in which a question
was not answered is followed by the next one soon, and by more of them after twice the time each: the question was
lost with the spool's worker, or it is too much for it.

    the spool does not answer, or cannot      reported; its books stay as they were, and grow old
    PostgreSQL is away                        reported; the next round tries again
    too many differ to be looked at           as many as MOST_ACCOUNTS and MOST_BUCKETS allow are named, the rest are
                                              counted and wait for a later round
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from itertools import count
from typing import NamedTuple

from controlplane.domain.books import (
    Book,
    Comparison,
    Finding,
    FindingKind,
    LedgerSide,
    compare_names,
    differing,
    name_waiting,
    unbalanced,
)
from controlplane.domain.errors import UnavailableError
from controlplane.ports_fleet import BookStore, LedgerBooks
from dataplane.core.waiting import Tally, WaitingQuestion, WaitingStatement

ANSWER_S = 30.0
REST_TIMES = 19.0
MOST_ACCOUNTS = 8
MOST_BUCKETS = 16

Ask = Callable[[WaitingQuestion], Awaitable[None]]
Report = Callable[[str, str], None]
"""Told which spool could not be compared, and why."""


class _NoAnswerError(Exception):
    """The spool could not say; the text is why."""


class _SilentError(_NoAnswerError):
    """It said nothing."""


class _Named(NamedTuple):
    findings: list[Finding]
    complete: bool


class Auditor:
    """See the module. `concluded` is told of each comparison."""

    def __init__(
        self,
        store: BookStore,
        clock: Callable[[], datetime],
        *,
        interval_s: float,
        report: Report,
        concluded: Callable[[Comparison], None],
        answer_s: float = ANSWER_S,
    ) -> None:
        self.store = store
        self.clock = clock
        self.interval_s = interval_s
        self.report = report
        self.concluded = concluded
        self.answer_s = answer_s
        self.reading = asyncio.Lock()

    def attend(self, node_id: str, ask: Ask) -> Comparer:
        """Begin with a stream of a node, on which `ask` sends a question."""
        return Comparer(self, node_id, ask)


class Comparer:
    """One stream's part; see the module."""

    def __init__(self, auditor: Auditor, node_id: str, ask: Ask) -> None:
        self._auditor = auditor
        self._node_id = node_id
        self._ask = ask
        self._numbers = count(1)
        self._spools: set[str] = set()
        self._asked: dict[int, asyncio.Future[WaitingStatement]] = {}

    def reports(self, spool: str, *, taken: bool) -> None:
        """The spool reports on this stream, or its records are not taken."""
        (self._spools.add if taken else self._spools.discard)(spool)

    def answered(self, statement: WaitingStatement) -> None:
        """A statement came; one that nobody waits for is passed over."""
        future = self._asked.get(statement.number)
        if future is not None and not future.done():
            future.set_result(statement)

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        rest_s = self._auditor.interval_s
        silent_rounds = 0
        took_s = math.inf
        while True:
            await asyncio.sleep(rest_s)
            began_s = loop.time()
            answered = await self._round()
            former_s, took_s = took_s, loop.time() - began_s
            rest_s = max(self._auditor.interval_s, REST_TIMES * min(took_s, former_s))
            silent_rounds = 0 if answered else silent_rounds + 1
            if not answered:
                rest_s = min(rest_s, self._auditor.interval_s * 2**silent_rounds)

    async def _round(self) -> bool:
        """Compare each spool; whether all of them said something."""
        spools = sorted(self._spools)
        answered = True
        if not spools:
            return answered
        try:
            async with self._auditor.reading:
                ledgers = await self._auditor.store.read_books(spools)
            for spool, ledger in ledgers.items():
                answered &= await self._compare(spool, ledger)
        except UnavailableError as error:
            self._auditor.report("", error.text)
        return answered

    async def _compare(self, spool: str, ledger: LedgerBooks) -> bool:
        try:
            statement = await self._question(spool, ledger.as_of_record)
            now = self._auditor.clock()
            waiting = {account: total for account, _, total in statement.totals}
            books = self._books(spool, ledger, waiting, now)
            comparison = Comparison(spool, self._node_id, ledger.as_of_record, books, (), ())
            findings = [finding for book in books for finding in unbalanced(book)]
            for account in {account for account, _ in statement.without_deadline}:
                late = [one for owner, one in statement.without_deadline if owner == account]
                findings += name_waiting(FindingKind.NO_DEADLINE, account, late, "waits without a time it is due")
            unjudged = []
            different = [book.account for book in books if not book.agrees]
            for place, account in enumerate(different):
                named = await self._name(spool, account) if place < MOST_ACCOUNTS else _Named([], complete=False)
                findings += named.findings
                if not named.complete:
                    unjudged.append(account)
        except _NoAnswerError as error:
            self._auditor.report(spool, str(error))
            return not isinstance(error, _SilentError)
        comparison = comparison._replace(findings=tuple(findings), unjudged=tuple(unjudged))
        await self._auditor.store.conclude(comparison, now)
        self._auditor.concluded(comparison)
        return True

    def _books(self, spool: str, ledger: LedgerBooks, waiting: Mapping[str, Tally], now: datetime) -> tuple[Book, ...]:
        accounts = sorted(ledger.accounts.keys() | waiting.keys())
        return tuple(
            Book(
                account,
                spool,
                self._node_id,
                ledger.as_of_record,
                now,
                ledger.accounts.get(account, LedgerSide()),
                waiting.get(account, Tally()),
            )
            for account in accounts
        )

    async def _name(self, spool: str, account: str) -> _Named:
        """Who of the account waits on one side only, as of records that come after the one that showed it."""
        store = self._auditor.store
        record, ledger = await store.waiting_by_bucket(spool, account)
        totals = (await self._question(spool, record, account)).totals
        different = differing(ledger, {bucket: total for _, bucket, total in totals})
        buckets = tuple(different[:MOST_BUCKETS])
        if not buckets:
            return _Named([], complete=True)
        record, here = await store.waiting_by_name(spool, account, buckets)
        statement = await self._question(spool, record, account, buckets)
        there = [recipient for _, recipient in statement.recipients]
        findings = compare_names(account, here, there, frozenset(statement.quarantined))
        return _Named(findings, complete=len(different) <= MOST_BUCKETS)

    async def _question(
        self, spool: str, record: int, account: str = "", buckets: tuple[int, ...] = ()
    ) -> WaitingStatement:
        number = next(self._numbers)
        future = self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            await self._ask(WaitingQuestion(spool, number, record, account, buckets))
            async with asyncio.timeout(self._auditor.answer_s):
                statement: WaitingStatement = await future
        except TimeoutError:
            raise _SilentError("no answer") from None
        finally:
            del self._asked[number]
        if statement.error:
            raise _NoAnswerError(statement.error)
        return statement
