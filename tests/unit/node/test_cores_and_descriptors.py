"""What the machine allows a node: cores, and descriptors for its connections."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from dataplane.cores import available_cores
from dataplane.descriptors import connection_room, open_descriptors


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("1000 100000", 1), ("1600000 100000", 8), ("", 8)],
)
def test_a_node_uses_the_cores_it_is_scheduled_on_and_has_time_for(
    quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    file = tmp_path / "cpu.max"
    file.write_text(quota)
    assert available_cores(file) == cores


def test_without_a_control_group_the_affinity_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3}, raising=False)
    assert available_cores(tmp_path / "none") == 2


@pytest.mark.parametrize(
    ("limit", "open_now", "room"),
    [(256, 40, 152), (64, 40, 1), (1_024, 40, 728), (20_000, 40, 15_864), (1_048_576, 100, 1_044_380)],
)
def test_connections_leave_descriptors_for_deliveries(limit: int, open_now: int, room: int) -> None:
    assert connection_room(limit, open_now) == room


def test_open_descriptors_are_counted() -> None:
    before = open_descriptors()
    read, write = os.pipe()
    assert open_descriptors() == before + 2
    os.close(read)
    os.close(write)


_RAISE = """
import resource
from dataplane.descriptors import raise_descriptor_limit
from support.ingress import Log
resource.setrlimit(resource.RLIMIT_NOFILE, (200, {hard}))
raise_descriptor_limit(Log())
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def test_the_soft_limit_is_raised_to_the_hard_one() -> None:
    hard = min(1_000, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", _RAISE.format(hard=hard)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        check=True,
        text=True,
    )
    assert int(done.stdout) == hard
