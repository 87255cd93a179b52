"""A node alone: no control plane, no PostgreSQL, no Valkey. It starts, accepts, delivers, is killed, starts again; and
when the others return, every message is in the ledger.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from support.application import Application, judge_contents, judge_ledger, missing
from support.killable_stack import KillableStack, wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

_COUNT = 40


class _Program:
    """One of Postroad's programs, started by hand, with a port that says when it serves."""

    def __init__(self, arguments: list[str], port: int, log: Path) -> None:
        with log.open("ab") as output:
            self._process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=output, stderr=output)
        wait_until(lambda: _answers(port), f"{arguments[0]} answers", 60)

    def end(self, number: signal.Signals) -> None:
        """Send the signal and wait for its end."""
        os.kill(self._process.pid, number)
        self._process.wait(60)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(5)
        try:
            probe.connect(("127.0.0.1", port))
            return probe.recv(4) == b"220 "
        except OSError:
            return False


def _node(stack: KillableStack) -> _Program:
    arguments = ["dataplane", "run", "--config", str(stack.root / "node-1" / "node.yaml")]
    return _Program(arguments, stack.port("smtp"), stack.folder / "node.log")


def test_a_node_alone_accepts_delivers_and_restarts_and_reports_later(killable_stack: KillableStack) -> None:
    """Promise 5: only the limits' shared count and the ledger wait for the others."""
    application = Application(killable_stack.ready)
    inbox = killable_stack.root / "inbox"
    killable_stack.stop()

    receiver = ["postroad.inbox", "--dir", str(inbox), "--port", str(killable_stack.port("inbox"))]
    inbox_server = _Program(receiver, killable_stack.port("inbox"), killable_stack.folder / "inbox.log")
    try:
        node = _node(killable_stack)
        application.submit(_COUNT)
        wait_until(lambda: not missing(application, inbox), "mail is delivered by the node alone")
        node.end(signal.SIGKILL)

        node = _node(killable_stack)
        application.submit(_COUNT)
        wait_until(lambda: not missing(application, inbox), "mail is delivered after the node's restart")
        node.end(signal.SIGTERM)
    finally:
        inbox_server.end(signal.SIGTERM)

    killable_stack.start()
    assert application.count == 2 * _COUNT
    judge_ledger(killable_stack, set(application.acknowledged.values()))
    judge_contents(inbox)
