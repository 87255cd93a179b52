"""What the supervisor warns of: ends that nobody asked for, and what they lead to. Ends in order are information."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from dataplane import supervisor as module
from dataplane.process import EXIT_NO_SPACE
from dataplane.settings import ListenerSettings, Settings
from dataplane.supervisor import Child, Supervisor

pytestmark = pytest.mark.usefixtures("_in_data_dir")


class LevelLog:
    """Keeps the level of each line, and of the log when it was written."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self.in_force = "info"

    def info(self, event: str, **fields: object) -> None:
        if self.in_force == "info":
            self.lines.append(("info", event))

    def warning(self, event: str, **fields: object) -> None:
        self.lines.append(("warning", event))


@pytest.fixture
def _in_data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("run", "spool", "spool/one"):
        (tmp_path / name).mkdir()


@pytest.fixture
def log() -> LevelLog:
    return LevelLog()


@pytest.fixture
def supervisor(tmp_path: Path, log: LevelLog) -> Supervisor:
    listener = ListenerSettings(address="127.0.0.1", port=0, mode="plain")
    made = Supervisor(Settings(data_dir=tmp_path, hostname="h", workers=2, listeners=(listener,)), Path(), None, log)
    made._workers = [Child("worker-0", ["worker"], spools=["one"]), Child("worker-1", ["worker"])]
    made._ports = [25]
    return made


def ended(supervisor: Supervisor, program: str, *, asked_for: bool) -> None:
    child = supervisor._workers[0]
    child.process = subprocess.Popen([program])
    child.started_at = time.monotonic()
    child.process.wait(10)
    supervisor._reap(restart=not asked_for)


@pytest.mark.parametrize(
    ("program", "asked_for", "level"),
    [("true", True, "info"), ("false", True, "warning"), ("true", False, "warning"), ("false", False, "warning")],
)
def test_an_end_is_a_warning_unless_it_was_asked_for_and_in_order(
    supervisor: Supervisor, log: LevelLog, program: str, level: str, *, asked_for: bool
) -> None:
    ended(supervisor, program, asked_for=asked_for)
    assert log.lines == [(level, "process.ended")]


def test_a_worker_that_is_left_out_is_warned_of(supervisor: Supervisor, log: LevelLog) -> None:
    for _ in range(3):
        supervisor._plan_restart(supervisor._workers[0], 1.0)
    assert ("warning", "spool.quarantined") in log.lines


def test_the_only_worker_that_fails_is_warned_of(supervisor: Supervisor, log: LevelLog) -> None:
    supervisor._workers.pop()
    for _ in range(3):
        supervisor._plan_restart(supervisor._workers[0], 1.0)
    assert log.lines == [("warning", "process.failing")]


def test_a_worker_without_space_is_warned_of(supervisor: Supervisor, log: LevelLog) -> None:
    supervisor._plan_restart(supervisor._workers[0], 1.0, EXIT_NO_SPACE)
    assert log.lines == [("warning", "process.waits_for_space")]


def test_a_process_that_had_to_be_killed_is_warned_of(supervisor: Supervisor, log: LevelLog) -> None:
    child = supervisor._workers[0]
    child.process = subprocess.Popen(["/bin/sleep", "60"])
    assert not supervisor._end([child], timeout_s=-1.0)
    assert log.lines == [("warning", "process.killed"), ("warning", "process.ended")]


@pytest.mark.parametrize(("former", "later"), [("info", "warning"), ("warning", "info")])
def test_a_reload_that_changes_the_level_is_said_by_the_more_talkative_one(
    supervisor: Supervisor, log: LevelLog, monkeypatch: pytest.MonkeyPatch, former: str, later: str
) -> None:
    def set_level(level: str) -> None:
        log.in_force = level

    set_level(former)
    monkeypatch.setattr(module, "set_log_level", set_level)
    supervisor._settings = supervisor._settings.model_copy(update={"log_level": former})
    read = supervisor._settings.model_copy(update={"log_level": later})
    monkeypatch.setattr(module, "load_settings", lambda *_: read)
    supervisor._reload()
    assert log.lines == [("info", "settings.reloaded")]
    assert log.in_force == later
