"""What the leader does about the books: compares the replicated queue, names who waits in spools that say nothing,
forgets what is over, and counts.

Contract. `book_jobs` returns the jobs; each is a transaction or two and may be cut off anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from time import monotonic

from controlplane.domain.books import Comparison, Finding, FindingKind, more_of, name_waiting
from controlplane.jobs.leader import Job
from controlplane.ports_fleet import BookHealth, BookStore, SilentSpool

SILENT_AFTER = timedelta(minutes=10)
_LOOK = timedelta(minutes=5)
_COUNT = timedelta(seconds=15)
_COMPARE = timedelta(seconds=20)
# A comparison takes a twentieth of the time at most.
_REST_TIMES = 19.0
_OLD_FINDINGS = timedelta(days=30)


def book_jobs(
    store: BookStore,
    *,
    retention: timedelta,
    sampled: Callable[[BookHealth], None],
    concluded: Callable[[Comparison], None],
) -> list[Job]:
    """The jobs on `store`; `sampled` is told how the books are, `concluded` of each comparison of the queue."""
    queue_rests_until = datetime.min.replace(tzinfo=UTC)

    async def report_silent_spools(now: datetime) -> None:
        found = await store.silent_spools(now - SILENT_AFTER)
        await store.report_silent({(one.spool, one.node): findings_of(one) for one in found}, now)

    async def compare_queue(now: datetime) -> None:
        nonlocal queue_rests_until
        if now < queue_rests_until:
            return
        began_s = monotonic()
        concluded(await store.compare_queue(now))
        queue_rests_until = now + timedelta(seconds=_REST_TIMES * (monotonic() - began_s))

    async def forget_books(now: datetime) -> None:
        await store.forget_books((now - retention).date(), now - _OLD_FINDINGS)

    async def count_findings(now: datetime) -> None:
        sampled(await store.health(now))

    return [
        Job("report_silent_spools", _LOOK, report_silent_spools),
        Job("compare_queue", _COMPARE, compare_queue),
        Job("forget_books", timedelta(hours=1), forget_books),
        Job("count_findings", _COUNT, count_findings),
    ]


def findings_of(spool: SilentSpool) -> list[Finding]:
    """Who waits where nobody has heard of the spool."""
    findings = []
    for account, recipients in spool.named.items():
        findings += name_waiting(FindingKind.SPOOL_SILENT, account, recipients, "waits in a spool that says nothing")
        if spool.counts[account] > len(recipients):
            findings.append(more_of(FindingKind.SPOOL_SILENT, account, spool.counts[account] - len(recipients)))
    return findings
