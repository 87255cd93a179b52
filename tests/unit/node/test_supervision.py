"""Restarts, spool folders and waits: the decisions of the supervisor without processes."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

import pytest

from dataplane.backoff import Backoff
from dataplane.lifecycle import DrainPlan, close_behind, report_held
from dataplane.restarts import LONGEST_WAIT_S, Restarts
from dataplane.spool_folders import (
    assign_spools,
    is_refused,
    lift_quarantines,
    mark_refused,
    quarantine_spool,
)
from support.ingress import Log


def test_waits_double_up_to_a_bound_while_it_ends_quickly() -> None:
    restarts = Restarts()
    waits = [restarts.ended(1.0) for _ in range(12)]
    assert waits[:4] == [0.1, 0.2, 0.4, 0.8]
    assert waits[-1] == LONGEST_WAIT_S


def test_three_quick_ends_are_failing_and_a_long_run_clears_them() -> None:
    restarts = Restarts()
    seen = [(restarts.ended(ran_for_s), restarts.is_failing) for ran_for_s in (1.0, 29.0, 1.0, 31.0)]
    assert seen == [(0.1, False), (0.2, False), (0.4, True), (0.1, False)]
    assert restarts.count == 4


def test_the_first_start_makes_a_spool_for_each_worker(tmp_path: Path) -> None:
    spools = assign_spools(tmp_path / "spool", 3)
    assert [len(names) for names in spools] == [1, 1, 1]
    assert all((tmp_path / "spool" / str(uuid.UUID(names[0]))).is_dir() for names in spools)
    assert assign_spools(tmp_path / "spool", 3) == spools


def test_more_workers_get_more_spools_and_fewer_leave_some_that_only_deliver(tmp_path: Path) -> None:
    names = sorted(name for names in assign_spools(tmp_path / "spool", 2) for name in names)
    more = assign_spools(tmp_path / "spool", 4)
    assert [len(names) for names in more] == [1, 1, 1, 1]
    assert set(names) < {name for (name,) in more}
    fewer = assign_spools(tmp_path / "spool", 3)
    assert [len(names) for names in fewer] == [2, 1, 1]
    assert sorted(name for names in fewer for name in names) == sorted(name for (name,) in more)


def test_a_refused_spool_takes_mail_only_where_there_is_no_other(tmp_path: Path) -> None:
    (first,), (second,) = assign_spools(tmp_path / "spool", 2)
    mark_refused(tmp_path / "spool" / first, refused=True)
    assert assign_spools(tmp_path / "spool", 1) == [[second, first]]


def test_files_and_foreign_folders_are_no_spools(tmp_path: Path) -> None:
    assign_spools(tmp_path / "spool", 1)
    (tmp_path / "spool" / "lost+found").mkdir()
    (tmp_path / "spool" / str(uuid.uuid4())).write_text("")
    assert len(assign_spools(tmp_path / "spool", 1)[0]) == 1


def test_a_quarantine_lasts_until_the_next_start(tmp_path: Path) -> None:
    ((name,),) = assign_spools(tmp_path / "spool", 1)
    quarantine_spool(tmp_path / "spool" / name, "ended three times")
    assert lift_quarantines(tmp_path / "spool") == [name]
    assert lift_quarantines(tmp_path / "spool") == []


def test_a_refusal_lasts_until_it_is_lifted(tmp_path: Path) -> None:
    mark_refused(tmp_path, refused=True)
    assert is_refused(tmp_path)
    mark_refused(tmp_path, refused=False)
    mark_refused(tmp_path, refused=False)
    assert not is_refused(tmp_path)


@pytest.mark.parametrize("random", [0.0, 0.5, 1.0])
def test_backoff_is_full_jitter_under_a_growing_bound_and_never_nothing(random: float) -> None:
    backoff = Backoff(lambda: random, base_s=1.0, cap_s=60.0)
    waits = [backoff.next_wait_s(0.0) for _ in range(9)]
    bounds = [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert waits == [max(bound * random, 0.1) for bound in bounds]


def test_backoff_is_forgotten_after_a_minute_of_health_and_not_before() -> None:
    backoff = Backoff(lambda: 1.0, base_s=1.0, cap_s=60.0)
    backoff.next_wait_s(0.0)
    assert backoff.next_wait_s(59.0) == 2.0
    assert backoff.next_wait_s(60.0) == 1.0


@pytest.mark.parametrize("timeout_s", [0.5, 5.0, 30.0, 600.0])
def test_every_part_of_a_drain_ends_within_its_time_and_before_what_needs_it(timeout_s: float) -> None:
    plan = DrainPlan.of(timeout_s)
    assert 0 < plan.sessions_s < plan.deliveries_s < plan.ledger_s < plan.workers_killed_s < plan.node_s == timeout_s


async def test_what_still_holds_a_drain_up_is_said_by_kind_again_and_again() -> None:
    counts = [{"sessions": 3, "transactions": 0}, {"sessions": 1, "transactions": 2}]
    enough, log = asyncio.Event(), Log()

    async def held() -> dict[str, int]:
        if len(counts) == 1:
            enough.set()
        return counts.pop(0) if counts else {}

    reporter = asyncio.create_task(report_held(held, log, interval_s=0.0))
    await enough.wait()
    await asyncio.sleep(0)
    reporter.cancel()
    assert log.lines[:2] == [
        ("drain.waiting", {"sessions": 3}),
        ("drain.waiting", {"sessions": 1, "transactions": 2}),
    ]


async def test_spools_close_when_nobody_asks_them_any_more() -> None:
    told: list[str] = []
    asked = asyncio.Event()

    async def service() -> None:
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            # The answer that a service waits for when it is told to end.
            await asyncio.sleep(0)
            told.append("service ended")

    class Spool:
        async def close(self) -> None:
            told.append("spool closed")

    task = asyncio.create_task(service())
    await asked.wait()
    await close_behind([task], [Spool()])
    assert told == ["service ended", "spool closed"]
