"""The life of `postroad up`: what survives a restart, what Ctrl-C and SIGKILL leave behind, what errors say."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from postroad.localstack.ports import DEFAULT_PORTS, is_free
from support.local_stack import LocalStack

pytestmark = pytest.mark.timeout(400)

_ONCE = {"Keys and certificates", "Migrations", "Operator's key", "Demo account", "Enrolment of the node"}


def _processes(folder: Path) -> list[int]:
    """Processes whose command line names the folder."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and str(folder) in (entry / "cmdline").read_text(errors="replace"):
                found.append(int(entry.name))
    return [pid for pid in found if pid != os.getpid()]


def _until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "this never came true"
        time.sleep(0.05)


def _steps(stack: LocalStack) -> list[str]:
    return [event["step"] for event in stack.events if event["event"] == "up.step"]


def _remarks(stack: LocalStack) -> list[str]:
    return [event["text"] for event in stack.events if event["event"] == "up.remark"]


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        yield holder.getsockname()[1]


def test_a_second_start_keeps_all_and_does_no_setting_up(own_stack: LocalStack) -> None:
    own_stack.start()
    assert set(_steps(own_stack)) >= _ONCE
    first = own_stack.ready
    sent = own_stack.json("send", "--to", "someone@example.net")["messages"][0]["name"]
    assert own_stack.stop() == 0
    assert not _processes(own_stack.folder)
    assert all(is_free(port) for port in first["ports"].values())
    own_stack.events.clear()
    own_stack.start()
    assert not set(_steps(own_stack)) & _ONCE
    assert {**own_stack.ready, "seconds": 0} == {**first, "seconds": 0}
    assert own_stack.json("messages", "get", sent)["state"] == "RECIPIENT_STATE_SENT"
    assert own_stack.inbox.count() == 1
    assert own_stack.json("send", "--to", "someone@example.net")["messages"][0]["state"] == "RECIPIENT_STATE_SENT"


@pytest.mark.parametrize("words", [["rotate", "app"], ["revoke", "app", "--yes"]], ids=["rotated", "revoked"])
def test_a_password_that_is_not_the_kept_one_is_not_shown_and_made_anew_when_that_is_deleted(
    own_stack: LocalStack, words: list[str]
) -> None:
    own_stack.start()
    first = own_stack.ready["smtp_password"]
    own_stack.json("credentials", *words)
    own_stack.stop()
    own_stack.start()
    assert own_stack.ready["smtp_password"] == ""
    own_stack.stop()
    (own_stack.folder / ".postroad" / "keys" / "demo.json").unlink()
    own_stack.start()
    assert own_stack.ready["smtp_password"] not in {"", first}
    assert own_stack.json("send", "--to", "someone@example.net")["messages"][0]["state"] == "RECIPIENT_STATE_SENT"


def test_secrets_lie_in_files_that_only_their_owner_can_read(stack: LocalStack) -> None:
    root = stack.folder / ".postroad"
    password = stack.ready["smtp_password"]
    operator_key = (root / "keys" / "operator.key").read_text(encoding="ascii").strip()
    holders = []
    for file in root.rglob("*"):
        if file.is_file() and file.stat().st_size < 1_000_000:
            text = file.read_bytes()
            if password.encode() in text or operator_key.encode() in text:
                holders.append(file.relative_to(root).as_posix())
                assert file.stat().st_mode & 0o077 == 0, file
    assert sorted(holders) == ["cli.yaml", "keys/demo.json", "keys/operator.key"]


def test_what_dies_is_started_again(own_stack: LocalStack) -> None:
    own_stack.start()
    root = own_stack.folder / ".postroad"
    pid_files = ["run/inbox.pid", "run/controlplane.pid", "run/node-1.pid", "valkey/server.pid", "postgres/server.pid"]
    for name in pid_files:
        os.kill(int((root / name).read_text(encoding="ascii")), signal.SIGKILL)
    _until(lambda: sum("runs again" in text for text in _remarks(own_stack)) == len(pid_files), 120)
    assert own_stack.json("send", "--to", "someone@example.net")["messages"][0]["state"] == "RECIPIENT_STATE_SENT"


@pytest.mark.chaos
@pytest.mark.parametrize(
    "step",
    [
        "Migrations",
        "ready",
        *(
            pytest.param(step, marks=pytest.mark.nightly)
            for step in (
                "PostgreSQL",
                "Keys and certificates",
                "Operator's key",
                "Demo account",
                "Enrolment of the node",
            )
        ),
    ],
)
def test_a_start_that_was_killed_goes_on_at_the_next_one(own_stack: LocalStack, step: str) -> None:
    own_stack.launch()
    _until(lambda: step in _steps(own_stack) or (step == "ready" and bool(own_stack.ready)), 120)
    own_stack.kill()
    own_stack.start()
    assert own_stack.json("send", "--to", "someone@example.net")["messages"][0]["state"] == "RECIPIENT_STATE_SENT"


def test_ctrl_c_while_starting_stops_what_runs(own_stack: LocalStack) -> None:
    own_stack.launch()
    _until(lambda: "PostgreSQL" in _steps(own_stack))
    assert own_stack.stop() == 0
    assert not _processes(own_stack.folder)


@pytest.mark.parametrize("name", ["smtp", "inbox", "grpc", "postgres", "valkey"])
def test_a_taken_port_is_named_with_its_server(own_stack: LocalStack, taken_port: int, name: str) -> None:
    stack = LocalStack(own_stack.folder, ports=dict.fromkeys(DEFAULT_PORTS, 0) | {name: taken_port})
    stack.launch()
    assert stack.wait() == 3
    assert f"port {taken_port}" in stack.errors()
    assert "is taken" in stack.errors()
    assert not _processes(own_stack.folder)


def test_two_stacks_in_one_folder_are_refused(stack: LocalStack) -> None:
    result = stack.cli("up")
    assert result.returncode == 3
    assert "runs already" in result.stderr
    assert stack.is_running
