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


@pytest.mark.nightly
@pytest.mark.parametrize(
    "words",
    [
        ("tls-auth", "--sessions", "10", "--messages", "100"),
        ("tls-auth", "--sessions", "10", "--messages", "100", "--reconnect"),
        ("idle", "--sessions", "50", "--seconds", "4"),
        ("ramp", "--sessions", "20", "--seconds", "6", "--rate", "20"),
        ("slow", "--sessions", "10", "--seconds", "3", "--rate", "20"),
        ("dead-target", "--sessions", "10", "--seconds", "3", "--rate", "20"),
        ("flood", "--sessions", "10", "--messages", "500", "--seconds", "3", "--rate", "20"),
        (
            "flood",
            "--sessions",
            "10",
            "--messages",
            "500",
            "--seconds",
            "3",
            "--rate",
            "20",
            "--background-sessions",
            "9",
        ),
        ("limits", "--sessions", "10", "--seconds", "3"),
        ("api", "--sessions", "10", "--seconds", "3", "--rate", "20", "--api-rate", "20"),
    ],
    ids=lambda words: words[0] + ("-reconnect" if "--reconnect" in words else ""),
)
def test_every_scenario_comes_to_its_end_without_a_loss(words: tuple[str, ...], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.load", *words, "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert report["problems"] == []
    refused = {"450"} if words[0] == "limits" else set()
    assert {
        code for run in report["runs"] for stream in run["streams"].values() for code in stream["errors"]
    } == refused
    assert report["runs"][-1]["memory"] or words[0] not in {"idle", "ramp"}
