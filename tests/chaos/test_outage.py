"""A node alone: no control plane, no PostgreSQL, no Valkey. It starts, accepts, delivers, is killed, starts again; and
when the others return, every message is in the ledger.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from support.chaos.application import Application, answers
from support.chaos.books import Strike
from support.chaos.judge import SENT, Case, check
from support.chaos.sink import end_of
from support.chaos.stack import ChaosStack
from support.killable_stack import wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

_COUNT = 40


class _Node:
    """The stack's node, started by hand."""

    def __init__(self, stack: ChaosStack) -> None:
        self._stack = stack
        command = [sys.executable, "-m", "dataplane", "run", "--config", str(stack.root / "node-1" / "node.yaml")]
        with (stack.folder / "node.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **stack.extra_environment}
            )
        wait_until(lambda: answers(stack.ports["smtp"]), "the node answers", 60)

    def end(self, number: signal.Signals) -> None:
        self._stack.books.note_strike(Strike("supervisor", number.name, ends_worker=True))
        os.kill(self._process.pid, number)
        self._process.wait(60)


def _delivered(stack: ChaosStack) -> bool:
    tries, copies, _, _ = stack.books.snapshot()
    arrived = {(copy.token, address) for copy in copies for address in copy.recipients}
    return all(
        (entry.token, address) in arrived
        for entry in tries
        if entry.code == 250
        for address in entry.recipients
        if end_of(address) == SENT
    )


def _wait_delivered(stack: ChaosStack, what: str) -> None:
    try:
        wait_until(lambda: _delivered(stack), what, 120)
    except AssertionError as error:
        log = (stack.folder / "node.log").read_text(encoding="utf-8", errors="replace")
        raise AssertionError(f"{error}; left: {stack.left_in_spools()}\n{log[-4_000:]}") from error


def test_a_node_alone_accepts_delivers_and_restarts_and_reports_later(chaos_stack: ChaosStack) -> None:
    """Promise 5: only the limits' shared count and the ledger wait for the others."""
    stack, ready = chaos_stack, chaos_stack.ready
    login = (ready["smtp_username"], ready["smtp_password"])
    application = Application(stack.books, "a", [stack.ports["smtp"]], login, ready["ca_file"], 1)
    stack.stop()

    node = _Node(stack)
    application.submit(_COUNT)
    _wait_delivered(stack, "mail is delivered by the node alone")
    node.end(signal.SIGKILL)

    node = _Node(stack)
    application.submit(_COUNT)
    _wait_delivered(stack, "mail is delivered after the node's restart")
    node.end(signal.SIGTERM)

    stack.start()
    stack.wait_quiet(120)
    tries, copies, strikes, confirmed = stack.books.snapshot()
    assert [entry.code for entry in tries] == [250] * (2 * _COUNT)
    case = Case(tries, copies, strikes, frozenset(confirmed), stack.ledger(), stack.left_in_spools(), end_of)
    check(case)
