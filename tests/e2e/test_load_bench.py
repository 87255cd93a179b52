"""`postroad-bench` against a stack of its own: small, for its counts; never for its figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(180)

_ROOT = Path(__file__).parents[2]
_SMALL = ("closed", "--sessions", "20", "--messages", "200", "--workers", "1", "--deadline", "60")


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.load", *_SMALL, *options]
    return subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=150, check=False)


def test_what_was_answered_has_arrived_and_is_recorded(tmp_path: Path) -> None:
    done = bench("--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.svg"))
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    (run,) = report["runs"]
    load = run["streams"]["load"]
    assert load["verdict"]["answered"] == load["verdict"]["arrived"] == run["recorded"] == load["begun"] == 200
    assert (load["verdict"]["lost"], load["unanswered"], load["errors"], report["problems"]) == (0, 0, {}, [])
    assert {"worker", "agent", "supervisor", "control plane", "PostgreSQL", "Valkey", "total"} <= set(run["cpu_s"])
    assert all(load["latency_ms"][kind]["values"] == 200 for kind in ("dot", "message", "arrival"))
    assert load["latency_ms"]["connect"]["values"] == 20
    assert sum(row["answered"] for row in load["timeline"]) == 200
    assert (tmp_path / "out.svg").read_text(encoding="utf-8").startswith("<svg")


def test_a_loss_ends_it_with_a_status_and_a_sentence() -> None:
    done = bench("--drop-every", "50", "--patience", "2")
    assert done.returncode == 1
    assert "answered messages did not arrive" in done.stderr
