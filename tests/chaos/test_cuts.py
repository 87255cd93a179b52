"""A conversation cut after every octet, on both sides of the node and in both directions: nothing is lost, nothing is
taken that was not finished, and each extra copy is one that Postroad counted.

Every test run cuts at each seventh octet, from an offset that the day's seed would choose; the nightly run cuts at all.
"""

from __future__ import annotations

import random
from itertools import cycle
from pathlib import Path

import pytest

from support.chaos.application import Message
from support.chaos.judge import check, summary
from support.chaos.sink import POLITE, Manners
from support.chaos.small_node import SmallNode, small_node
from support.fault_proxy import Fault, Kind

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

_KINDS = (Kind.CUT, Kind.RESET, Kind.HALF_CLOSE)
_STRIDE = 7
_OFFSET = random.Random(20261120).randrange(_STRIDE)


def message(name: str) -> Message:
    """Names have the same length, so that each conversation has."""
    return Message(name, (f"to-{name}@example.net", f"more-{name}@example.net"), b".dot\r\n..dots\r\nlast\r\n")


async def measure(node: SmallNode) -> tuple[tuple[int, int], tuple[int, int]]:
    """Octets of one conversation: client to node and back, node to next hop and back."""
    assert await node.submit(message("0000"), 1) == 250
    await node.deliver_all()
    return (node.submission.passed[0], node.submission.passed[1]), (node.next_hop.passed[0], node.next_hop.passed[1])


async def clean(node: SmallNode) -> dict[str, int]:
    """What happened, judged; the metrics of both windows count at least as much."""
    numbers = dict(summary(check(await node.case())))
    assert numbers["w1"] <= node.node.counters.answers_lost
    assert numbers["w2"] <= node.engine.counters.uncertain
    return numbers


async def cut_submissions(node: SmallNode, lengths: tuple[int, int], kind: Kind, places: slice) -> int:
    """Cut a submission at each of these octets of both directions; submit again whatever got no 250."""
    count = 0
    for upstream, length in zip((True, False), lengths, strict=True):
        for place in range(1, length + 1)[places]:
            count += 1
            made = message(f"{count:04}")
            if await node.submit(made, 1, Fault(kind, place, upstream)) != 250:
                assert await node.submit(made, 2) == 250
    await node.deliver_all()
    return count


async def cut_deliveries(node: SmallNode, lengths: tuple[int, int], kind: Kind, places: slice) -> int:
    """Cut the first attempt of a message at each of these octets of both directions."""
    count = 0
    for upstream, length in zip((True, False), lengths, strict=True):
        for place in range(1, length + 1)[places]:
            count += 1
            faults = [Fault(kind, place, upstream)]
            node.next_hop.plan = lambda faults=faults: faults.pop() if faults else None  # type: ignore[misc]  # bound
            assert await node.submit(message(f"{count:04}"), 1) == 250
            await node.deliver_all()
    return count


@pytest.mark.parametrize("kind", _KINDS)
async def test_a_submission_cut_anywhere_is_stored_whole_or_not_at_all(tmp_path: Path, kind: Kind) -> None:
    async with small_node(tmp_path) as node:
        lengths, _ = await measure(node)
        count = await cut_submissions(node, lengths, kind, slice(_OFFSET, None, _STRIDE))
        numbers = await clean(node)
        assert count > 20
        assert numbers["acknowledged"] == count + 1


@pytest.mark.parametrize("kind", _KINDS)
async def test_a_delivery_cut_anywhere_is_made_good_and_extra_copies_are_counted(tmp_path: Path, kind: Kind) -> None:
    async with small_node(tmp_path) as node:
        _, lengths = await measure(node)
        count = await cut_deliveries(node, lengths, kind, slice(_OFFSET, None, _STRIDE))
        await clean(node)
        assert node.next_hop.struck >= count // 2


async def test_a_lost_answer_to_the_dot_is_both_windows_and_nothing_else(tmp_path: Path) -> None:
    async with small_node(tmp_path) as node:
        lengths, onward = await measure(node)
        reply = len(b"250 2.0.0 queued as 01990000-0000-7000-8000-000000000001\r\n")
        bye = len(b"221 2.0.0 Bye\r\n")
        assert (
            await node.submit(message("0001"), 1, Fault(Kind.CUT, lengths[1] - bye - reply // 2, upstream=False)) == 0
        )
        assert await node.submit(message("0001"), 2) == 250
        await node.deliver_all()
        faults = [Fault(Kind.CUT, onward[1] - len(b"221 bye\r\n") - 4, upstream=False)]
        node.next_hop.plan = lambda: faults.pop() if faults else None
        assert await node.submit(message("0002"), 1) == 250
        await node.deliver_all()
        numbers = await clean(node)
        assert (numbers["w1"], numbers["w2"]) == (1, 2), "one message again, one copy more for each of two recipients"
        assert node.engine.counters.uncertain == 2
        assert node.node.counters.answers_lost == 1


async def test_a_client_that_only_half_closed_behind_its_dot_gets_its_reply(tmp_path: Path) -> None:
    async with small_node(tmp_path) as node:
        lengths, _ = await measure(node)
        to_the_dot = lengths[0] - len(b"QUIT\r\n")
        assert await node.submit(message("0001"), 1, Fault(Kind.HALF_CLOSE, to_the_dot)) == 250
        await node.deliver_all()
        await clean(node)


async def test_a_client_that_leaves_behind_its_dot_leaves_its_message_whole_and_on_its_way(tmp_path: Path) -> None:
    async with small_node(tmp_path) as node:
        lengths, _ = await measure(node)
        to_the_dot = lengths[0] - len(b"QUIT\r\n")
        for number in range(1, 11):
            kind = Kind.RESET if number % 2 else Kind.CUT
            assert await node.submit(message(f"{number:04}"), 1, Fault(kind, to_the_dot)) == 0
        await node.deliver_all()
        await clean(node)


async def test_a_line_too_many_of_the_next_hop_is_no_verdict_of_another_message(tmp_path: Path) -> None:
    async with small_node(tmp_path, messages_per_connection=100) as node:
        node.sink.pipelining = False
        stray = Manners(after_reply=b"550 5.7.1 of another message\r\n")
        manners = cycle((stray, POLITE, POLITE))
        node.sink.manners = lambda: next(manners)
        for number in range(1, 13):
            assert await node.submit(message(f"{number:04}"), 1) == 250
            await node.deliver_all()
        numbers = await clean(node)
        assert (numbers["copies"], numbers["w2"]) == (12, 0)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", _KINDS)
async def test_a_submission_cut_at_every_octet(tmp_path: Path, kind: Kind) -> None:
    async with small_node(tmp_path) as node:
        lengths, _ = await measure(node)
        assert await cut_submissions(node, lengths, kind, slice(None)) == sum(lengths)
        await clean(node)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", _KINDS)
async def test_a_delivery_cut_at_every_octet(tmp_path: Path, kind: Kind) -> None:
    async with small_node(tmp_path) as node:
        _, lengths = await measure(node)
        assert await cut_deliveries(node, lengths, kind, slice(None)) == sum(lengths)
        await clean(node)
