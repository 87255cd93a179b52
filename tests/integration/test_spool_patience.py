"""Outcomes ride with the next commit: they wait a moment for it, and never keep what somebody waits for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dataplane.adapters.spool_sqlite import SqliteSpool, group_commit
from dataplane.core.envelope import Envelope
from dataplane.core.queue import State
from dataplane.ports import Settlement
from support.ingress import until
from support.spools import ManualClock, change, make_envelope, make_row, open_durable, settlement

_FOR_EVER_S = 3600.0


@pytest.fixture
async def spool(tmp_path: Path) -> AsyncIterator[SqliteSpool]:
    opened = await open_durable(tmp_path / "0192f3c1-0000-4000-8000-000000000000", ManualClock())
    yield opened
    await opened.close()


@pytest.fixture
def patient_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_commit, "PATIENCE_S", _FOR_EVER_S)


async def some_turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def accepted(spool: SqliteSpool) -> Envelope:
    envelope = make_envelope()
    await spool.accept(envelope, b"x", [make_row()])
    return envelope


def changed(envelope: Envelope, state: State, record: bytes | None) -> Settlement:
    return settlement(envelope.message_id, [change(make_row(), state)], record)


async def test_an_outcome_rides_with_the_next_message(spool: SqliteSpool, patient_for_ever: None) -> None:
    del patient_for_ever
    envelope = await accepted(spool)
    before = spool._commits.commits
    outcome = spool.settle(changed(envelope, State.SENT, b"record"))
    await some_turns()
    await accepted(spool)
    assert await outcome == 1
    assert spool._commits.commits == before + 1


async def test_an_outcome_that_nothing_follows_is_written_when_its_patience_ends(spool: SqliteSpool) -> None:
    envelope = await accepted(spool)
    async with asyncio.timeout(20):
        assert await spool.settle(changed(envelope, State.SENT, b"record")) == 1


async def test_many_outcomes_wait_for_nobody(spool: SqliteSpool, patient_for_ever: None) -> None:
    del patient_for_ever
    envelopes = [await accepted(spool) for _ in range(group_commit.PATIENT_COUNT)]
    before = spool._commits.commits
    async with asyncio.timeout(20):
        outcomes = [spool.settle(changed(envelope, State.SENT, b"record")) for envelope in envelopes]
        assert await asyncio.gather(*outcomes) == [1] * len(envelopes)
    assert spool._commits.commits == before + 1


async def test_outcomes_that_come_during_a_commit_wait_too(spool: SqliteSpool, patient_for_ever: None) -> None:
    del patient_for_ever
    envelope = await accepted(spool)
    message = asyncio.ensure_future(accepted(spool))
    await until(lambda: spool._commits._state is group_commit._State.COMMITTING)
    outcome = spool.settle(changed(envelope, State.SENT, b"record"))
    await message
    before = spool._commits.commits
    await accepted(spool)
    assert await outcome == 1
    assert spool._commits.commits == before + 1


async def test_what_is_claimed_does_not_wait(spool: SqliteSpool, patient_for_ever: None) -> None:
    del patient_for_ever
    envelope = await accepted(spool)
    async with asyncio.timeout(20):
        assert await spool.settle(changed(envelope, State.SENDING, None)) == 1


async def test_acknowledged_records_ride_along(spool: SqliteSpool, patient_for_ever: None) -> None:
    del patient_for_ever
    await spool.write_record(b"record")
    before = spool._commits.commits
    acknowledged = spool.acknowledge(1)
    await some_turns()
    await accepted(spool)
    await acknowledged
    assert spool._commits.commits == before + 1
