"""SIGKILL for each process while mail flows, and for all at once: what got its 250 arrives, and is in the ledger once.

Everything is real and durable. The number of kills is small here; the nightly run repeats them with more seeds.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.application import Application, arrived_ids, judge_contents, judge_ledger, missing
from support.whole_stack import WholeStack, wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

_VICTIMS = ("worker", "agent", "supervisor", "controlplane", "postgres", "valkey", "everything")
_FLOW = 25  # messages acknowledged before a kill and after the recovery


@pytest.fixture
def whole_stack(passable_folder: Path) -> Iterator[WholeStack]:
    stack = WholeStack(passable_folder / "stack")
    stack.start()
    try:
        yield stack
    finally:
        stack.stop()


def _kill(stack: WholeStack, victim: str) -> None:
    if victim == "everything":
        stack.kill_everything()
        stack.start()
    else:
        stack.kill(victim)


def _wait_for_flow(application: Application, what: str) -> None:
    wanted = application.count + _FLOW
    wait_until(lambda: application.count >= wanted, what)


def _campaign(stack: WholeStack, victims: list[str]) -> Application:
    application = Application(stack.facts)
    application.start()
    try:
        for victim in victims:
            _wait_for_flow(application, f"mail flows before {victim} is killed")
            _kill(stack, victim)
        _wait_for_flow(application, "mail flows after the last kill")
    finally:
        application.stop()
    return application


def _judge(stack: WholeStack, application: Application) -> None:
    inbox = stack.folder / "inbox"
    wait_until(lambda: not missing(application, inbox), "every acknowledged message arrived", 120)
    judge_contents(inbox)
    judge_ledger(stack, set(application.acknowledged.values()) | arrived_ids(inbox))


def test_every_process_may_be_killed_while_mail_flows(whole_stack: WholeStack) -> None:
    """Each server once, in a seeded order, and everything at once."""
    victims = list(_VICTIMS)
    random.Random(20261120).shuffle(victims)
    _judge(whole_stack, _campaign(whole_stack, victims))


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_kills_in_seeded_order(whole_stack: WholeStack, seed: int) -> None:
    """A longer campaign; a failing seed is repeated with `-k` and its number."""
    chooser = random.Random(seed)
    _judge(whole_stack, _campaign(whole_stack, chooser.choices(_VICTIMS, k=15)))
