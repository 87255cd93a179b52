"""Who runs the jobs and when: by an injected clock and a lock that comes and goes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, date, datetime, timedelta

import pytest

from controlplane.jobs.housekeeping import housekeeping_jobs
from controlplane.jobs.leader import Job, Leader

START = datetime(2026, 11, 20, 23, 59, tzinfo=UTC)


class Lock:
    """A leadership that the test gives and takes."""

    def __init__(self) -> None:
        self.free = True
        self.held = False
        self.released = 0

    async def acquire(self) -> bool:
        self.held = self.free
        return self.held

    async def is_held(self) -> bool:
        return self.held

    async def release(self) -> None:
        self.released += 1
        self.held = False


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now


def _leader(*jobs: Job) -> tuple[Leader, Lock, Clock, list[str]]:
    lock, clock, failures = Lock(), Clock(), list[str]()
    leader = Leader(lock, list(jobs), clock, report=lambda job, _error: failures.append(job))
    return leader, lock, clock, failures


def _counting(name: str, runs: list[str]) -> Job:
    async def run(_: datetime) -> None:
        runs.append(name)

    return Job(name, timedelta(minutes=10), run)


async def test_jobs_run_at_once_and_then_at_their_interval() -> None:
    runs: list[str] = []
    leader, _, clock, _ = _leader(_counting("a", runs))

    await leader.turn()
    await leader.turn()
    clock.now += timedelta(minutes=10)
    await leader.turn()

    assert runs == ["a", "a"]


async def test_who_has_not_the_lock_runs_nothing() -> None:
    runs: list[str] = []
    leader, lock, _, _ = _leader(_counting("a", runs))
    lock.free = False

    await leader.turn()

    assert runs == []


async def test_a_leader_that_lost_the_lock_stops_and_begins_anew_when_it_has_it_again() -> None:
    runs: list[str] = []
    leader, lock, _, _ = _leader(_counting("a", runs))
    await leader.turn()

    lock.held = lock.free = False
    await leader.turn()
    assert runs == ["a"]

    lock.free = True
    await leader.turn()
    assert runs == ["a", "a"]


async def test_a_job_that_fails_stops_nobody_and_runs_again_at_the_next_turn() -> None:
    runs: list[str] = []

    async def fail(_: datetime) -> None:
        runs.append("bad")
        raise RuntimeError

    leader, _, _, failures = _leader(Job("bad", timedelta(hours=1), fail), _counting("good", runs))

    await leader.turn()
    await leader.turn()

    assert runs == ["bad", "good", "bad"]
    assert failures == ["bad", "bad"]


class Store:
    """Remembers what the jobs asked for."""

    def __init__(self, left: int = 0) -> None:
        self.asked: list[tuple[object, ...]] = []
        self.left = left

    async def ensure_partitions(self, first: date, days: int) -> None:
        self.asked.append(("ensure", first, days))

    async def drop_partitions(self, before: date) -> int:
        self.asked.append(("drop", before))
        return 0

    async def delete_idempotency_keys(self, before: datetime) -> int:
        self.asked.append(("idempotency", before))
        return 0

    async def delete_submission_keys(self, before: datetime, limit: int) -> int:
        self.asked.append(("submission_keys", before, limit))
        return 0

    async def delete_enrollment_tokens(self, before: datetime) -> int:
        self.asked.append(("tokens", before))
        return 0

    async def delete_config_revisions(self, before: datetime, limit: int) -> int:
        self.asked.append(("revisions", before, limit))
        return self._forget(limit)

    def _forget(self, limit: int) -> int:
        forgotten = min(limit, self.left)
        self.left -= forgotten
        return forgotten

    async def sweep_queue(self, before: datetime) -> None:
        self.asked.append(("queue", before))

    async def expire_held(self, limit: int) -> int:
        self.asked.append(("held", limit))
        return self._forget(limit)

    async def end_left_behind(self, limit: int) -> int:
        self.asked.append(("left behind", limit))
        return 0

    async def end_given_up(self, limit: int) -> int:
        self.asked.append(("given up", limit))
        return 0

    async def run_queue_commands(self, limit: int) -> int:
        self.asked.append(("commands", limit))
        return 0

    async def delete_leases(self, before: datetime) -> None:
        self.asked.append(("leases", before))

    async def delete_denials(self, now: datetime, limit: int) -> int:
        self.asked.append(("denials", now, limit))
        return limit


@pytest.mark.parametrize(
    ("job", "asked"),
    [
        ("make_partitions", ("ensure", date(2026, 11, 19), 5)),
        ("drop_partitions", ("drop", date(2026, 10, 21))),
        ("forget_requests", ("idempotency", START - timedelta(hours=24))),
        ("forget_submission_keys", ("submission_keys", START - timedelta(days=7), 10_000)),
        ("forget_tokens", ("tokens", START - timedelta(days=1))),
        ("forget_revisions", ("revisions", START - timedelta(days=30), 200)),
        ("forget_denials", ("denials", START, 10_000)),
        ("expire_held", ("held", 5_000)),
        ("end_left_behind", ("left behind", 5_000)),
        ("end_given_up", ("given up", 2_000)),
        ("run_queue_commands", ("commands", 10)),
        ("forget_leases", ("leases", START - timedelta(days=65))),
    ],
)
async def test_housekeeping_asks_for_the_days_around_the_clock(job: str, asked: tuple[object, ...]) -> None:
    store = Store()
    run: dict[str, Callable[[datetime], Awaitable[None]]] = {
        one.name: one.run for one in housekeeping_jobs(store, retention=timedelta(days=30))
    }

    await run[job](START)

    assert store.asked == [asked]


@pytest.mark.parametrize(("old", "batches", "left"), [(399, 2, 0), (400, 3, 0), (20_001, 100, 1)])
async def test_old_revisions_go_in_batches_and_no_run_is_endless(old: int, batches: int, left: int) -> None:
    store = Store(old)
    (run,) = [
        one.run for one in housekeeping_jobs(store, retention=timedelta(days=30)) if one.name == "forget_revisions"
    ]

    await run(START)

    assert (len(store.asked), store.left) == (batches, left)


@pytest.mark.parametrize(("held", "batches", "left"), [(4_999, 1, 0), (5_500, 2, 0), (500_001, 100, 1)])
async def test_all_that_is_held_too_long_ends_in_batches(held: int, batches: int, left: int) -> None:
    store = Store(held)
    (run,) = [one.run for one in housekeeping_jobs(store, retention=timedelta(days=30)) if one.name == "expire_held"]

    await run(START)

    assert (len(store.asked), store.left) == (batches, left)
