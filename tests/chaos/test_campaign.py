"""Kills, cut links, a full and a failing disk while mail flows: what got its 250 arrives, and every copy is explained.

Everything is real and durable. The number of faults is small here; `make chaos` runs seeds with more of them.
"""

from __future__ import annotations

import pytest

from support.chaos.campaign import Step, draw_steps, run_campaign
from support.chaos.fleet_stack import NODES, PARTITIONS, SECOND_SERVERS
from support.chaos.stack import LINKS, SERVERS

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

# Nodes cut off, a clock that jumps, a failover, a killed worker: what is quick of both halves.
_SHORT_SEED, _SHORT_STEPS = 21373, 4


def test_a_short_campaign_breaks_no_promise() -> None:
    result = run_campaign(_SHORT_SEED, _SHORT_STEPS, half=2)
    assert not result.violations, result.report()
    assert result.numbers["acknowledged"] > 100


def test_the_same_seed_draws_the_same_faults() -> None:
    assert draw_steps(7, 50) == draw_steps(7, 50)
    assert draw_steps(7, 50) != draw_steps(8, 50)
    assert draw_steps(7, 50, 2) == draw_steps(7, 50, 2)


def test_twenty_seeds_kill_every_server_and_break_every_link() -> None:
    drawn = {step[:2] for seed in range(1, 21) for step in draw_steps(seed, 12)}
    assert {("server", server) for server in SERVERS} | {("link", link) for link in LINKS} <= drawn
    assert {Step("disk", how)[:2] for how in ("full", "late", "fsync")} <= drawn


def test_twenty_seeds_break_all_that_two_nodes_add() -> None:
    drawn = {step[:2] for seed in range(1, 21) for step in draw_steps(seed, 12, 2)}
    assert {("server", server) for server in SECOND_SERVERS} | {("partition", one) for one in PARTITIONS} <= drawn
    assert {("failover", "postgres")} | {("clock", node) for node in NODES} <= drawn
    assert {(kind, "node-2") for kind in ("old disk", "drain", "lease", "lost node")} <= drawn


@pytest.mark.nightly
@pytest.mark.parametrize("half", [1, 2])
@pytest.mark.parametrize("seed", range(1, 21))
def test_a_campaign_breaks_no_promise(seed: int, half: int) -> None:
    result = run_campaign(seed, half=half)
    assert not result.violations, result.report()
