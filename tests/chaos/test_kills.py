"""SIGKILL for each process while mail flows, and for all at once: what got its 250 arrives, and is in the ledger once.

Everything is real and durable. The number of kills is small here; the nightly run repeats them with more seeds.
"""

from __future__ import annotations

import random

import pytest

from support.application import Application, arrived_ids, judge_contents, judge_ledger, missing
from support.killable_stack import KillableStack, wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

_VICTIMS = ("worker", "agent", "supervisor", "controlplane", "postgres", "valkey", "everything")
_FLOW = 25  # messages acknowledged before a kill and after the recovery


def _kill(stack: KillableStack, victim: str) -> None:
    if victim == "everything":
        stack.kill_everything()
        stack.start()
    else:
        stack.kill_server(victim)


def _wait_for_flow(application: Application, what: str) -> None:
    wanted = application.count + _FLOW
    wait_until(lambda: application.count >= wanted, what)


def _campaign(stack: KillableStack, victims: list[str]) -> Application:
    application = Application(stack.ready)
    application.start()
    try:
        for victim in victims:
            _wait_for_flow(application, f"mail flows before {victim} is killed")
            _kill(stack, victim)
        _wait_for_flow(application, "mail flows after the last kill")
    finally:
        application.stop()
    return application


def _judge(stack: KillableStack, application: Application) -> None:
    inbox = stack.root / "inbox"
    wait_until(lambda: not missing(application, inbox), "every acknowledged message arrived", 120)
    judge_contents(inbox)
    judge_ledger(stack, set(application.acknowledged.values()) | arrived_ids(inbox))


def test_every_process_may_be_killed_while_mail_flows(killable_stack: KillableStack) -> None:
    """Each server once, in a seeded order, and everything at once."""
    victims = list(_VICTIMS)
    random.Random(20261120).shuffle(victims)
    _judge(killable_stack, _campaign(killable_stack, victims))


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_kills_in_seeded_order(killable_stack: KillableStack, seed: int) -> None:
    """A longer campaign; a failing seed is repeated with `-k` and its number."""
    chooser = random.Random(seed)
    _judge(killable_stack, _campaign(killable_stack, chooser.choices(_VICTIMS, k=15)))
