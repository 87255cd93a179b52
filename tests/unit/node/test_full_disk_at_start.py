"""A worker that finds its spool's disk full when it starts: it is not taken for one that crashes."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from dataplane.listening_sockets import bind_listeners
from dataplane.process import EXIT_NO_SPACE, EXIT_UNAVAILABLE
from dataplane.settings import ListenerSettings, Settings
from dataplane.supervisor import NO_SPACE_WAIT_S, Child, Supervisor
from support.ingress import Log


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Supervisor:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spool" / "one").mkdir(parents=True)
    listener = ListenerSettings(address="127.0.0.1", port=0, mode="plain")
    made = Supervisor(Settings(data_dir=tmp_path, hostname="h", listeners=(listener,)), Path(), None, Log())
    (bound,) = bind_listeners(made._settings.listeners, 1)
    made._workers = [Child("worker-0", ["worker"], bound, spools=["one"]), Child("worker-1", ["worker"])]
    return made


def test_a_worker_without_space_is_started_again_and_keeps_its_spool(supervisor: Supervisor) -> None:
    worker = supervisor._workers[0]
    for _ in range(5):
        supervisor._plan_restart(worker, 0.5, EXIT_NO_SPACE)
    assert not worker.given_up
    assert worker.start_due is not None
    assert worker.start_due <= time.monotonic() + NO_SPACE_WAIT_S
    assert not list(Path("spool/one").iterdir()), "nothing marks it"
    for bound in worker.sockets:
        bound.close()


def test_who_waits_for_it_is_answered_and_its_socket_stays(supervisor: Supervisor) -> None:
    worker = supervisor._workers[0]
    address = worker.sockets[0].getsockname()
    for _ in range(2):
        with socket.create_connection(address, 10) as waiting, waiting.makefile("rb") as answer:
            supervisor._plan_restart(worker, 0.5, EXIT_NO_SPACE)
            assert answer.read().startswith(b"421 4.3.2 ")
    worker.sockets[0].close()


def test_a_worker_that_cannot_begin_for_another_reason_is_left_out(supervisor: Supervisor) -> None:
    worker = supervisor._workers[0]
    for _ in range(3):
        supervisor._plan_restart(worker, 0.5, EXIT_UNAVAILABLE)
    assert worker.given_up
