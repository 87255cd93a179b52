"""A large batch does not keep the loop: statements stop when a turn is over and go on after the turns of others."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest

from dataplane.adapters.spool_sqlite import group_commit
from support.spools import ManualClock, make_envelope, make_row, open_durable

_BATCH = 320
_FEWEST_TURNS = 20  # messages and recipients, 32 rows at a time


async def test_a_batch_is_written_in_as_many_turns_as_its_time_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = await open_durable(tmp_path / "0192f3c1-0000-4000-8000-000000000000", ManualClock())
    # A clock by which every statement takes longer than a turn.
    seconds = itertools.count()
    monkeypatch.setattr(group_commit, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    turn, turns = group_commit.GroupCommit._advance, 0

    def counted(self: group_commit.GroupCommit) -> None:
        nonlocal turns
        turns += 1
        turn(self)

    monkeypatch.setattr(group_commit.GroupCommit, "_advance", counted)
    await asyncio.gather(*[spool.accept(make_envelope(), b"x", [make_row()]) for _ in range(_BATCH)])
    assert turns >= _FEWEST_TURNS
    await spool.close()
