"""A running node whose worker is killed at each point of acceptance and delivery: nothing is lost, nothing is half.

What a kill may leave, point by point: whether the message of the client that lost its connection was stored (W1), and
whether the next hop gets one copy more (W2).
"""

from __future__ import annotations

import random
import signal
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from support.chaos.application import Message, draw_message
from support.chaos.judge import check, summary
from support.chaos.lone_node import LoneNode, lone_node

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]

_LARGE = b"y" * 900 + b"\r\n"


def messages(count: int, *, large: bool = False) -> list[Message]:
    chooser = random.Random(20261120)
    made = [draw_message(f"m{number}", chooser, large=False) for number in range(count)]
    return [message if not large else Message(message.name, message.recipients, _LARGE * 200) for message in made]


async def end(node: LoneNode) -> dict[str, int]:
    """All mail ends, the node drains, and the judge finds nothing."""
    return dict(summary(await node.judged()))


async def test_a_kill_at_any_step_before_the_dot_stores_nothing(tmp_path: Path) -> None:
    async with lone_node(tmp_path) as node:
        steps = ("CONNECT", "EHLO", "MAIL", "RCPT", "DATA", "HALF")
        for step, message in zip(steps, messages(len(steps)), strict=True):
            assert await node.submit(message, node.kill_at(step)) == [0, 250], step
        numbers = await end(node)
        assert (numbers["w1"], numbers["w2"]) == (0, 0)


class Point(NamedTuple):
    """A failpoint, where the first pass kills, and how often each window opens: at least and at most."""

    name: str
    w1: tuple[int, int]
    w2: tuple[int, int] = (0, 0)
    large: bool = False
    read_back: bool = False
    passes: int = 1


_POINTS = [
    Point("accept.received", w1=(0, 0)),
    Point("spool.content_stored", w1=(0, 0), large=True),
    Point("spool.before_commit", w1=(0, 0)),
    # The first commit of a node belongs to no message.
    Point("spool.committed", w1=(1, 1), passes=2),
    Point("accept.stored", w1=(1, 1)),
    Point("accept.stored", w1=(1, 1), read_back=True),
    Point("accept.answered", w1=(0, 1)),
    Point("delivery.claimed", w1=(0, 1), read_back=True),
    Point("delivery.concluded", w1=(0, 1), w2=(0, 3)),
    Point("delivery.settled", w1=(0, 1)),
]


@pytest.mark.nightly
@pytest.mark.parametrize("point", _POINTS, ids=lambda point: point.name + "-read-back" * point.read_back)
async def test_a_kill_at_a_failpoint_opens_no_other_window(tmp_path: Path, point: Point) -> None:
    async with lone_node(tmp_path, f"{point.name}:{point.passes}", by_spool=point.read_back) as node:
        if point.passes > 1:
            await node.has_committed()
        for message in messages(4, large=point.large):
            assert await node.submit(message) in ([250], [0, 250])
        numbers = await end(node)
        assert node.spent == {point.name}
        assert point.w1[0] <= numbers["w1"] <= point.w1[1]
        assert point.w2[0] <= numbers["w2"] <= point.w2[1]


@pytest.mark.parametrize("by_spool", [True, pytest.param(False, marks=pytest.mark.nightly)])
async def test_kills_at_all_failpoints_one_after_another_lose_nothing(tmp_path: Path, by_spool: bool) -> None:  # noqa: FBT001 - a table
    names = {point.name for point in _POINTS if by_spool or not point.read_back or point.name == "accept.stored"}
    async with lone_node(tmp_path, ",".join(f"{name}:2" for name in sorted(names)), by_spool=by_spool) as node:
        for message in [*messages(3), *messages(6, large=True)[3:], *messages(20)[6:]]:
            assert set(await node.submit(message)) <= {0, 250}
        # A point strikes at its second passing in a process's life, which the others' kills may end before.
        for message in messages(40, large=True)[20:]:
            if node.spent == names:
                break
            assert set(await node.submit(message)) <= {0, 250}
        numbers = await end(node)
        assert node.spent == names
        assert numbers["unanswered"] >= 3


async def test_a_kill_while_the_next_hop_is_spoken_to_is_one_copy_more_only_behind_the_dot(tmp_path: Path) -> None:
    async with lone_node(tmp_path) as node:
        most = {"EHLO": 0, "MAIL": 0, "RCPT": 0, "DATA": 0, "dot": 1, "answered": 1}
        for stage, count in most.items():
            node.sink.watcher = node.kill_at(stage)
            only = Message(stage.lower(), (f"to-{stage.lower()}@example.net",), b"body\r\n")
            assert (await node.submit(only))[-1] == 250
            await node.quiet()
            copies = Counter(copy.token for copy in node.books.copies if copy.token.startswith(stage.lower()))
            assert max(copies.values()) <= 1 + count, stage
        numbers = await end(node)
        assert 1 <= numbers["w2"] <= 2


async def test_recipients_that_fare_differently_do_so_over_a_kill(tmp_path: Path) -> None:
    async with lone_node(tmp_path, "delivery.concluded:1") as node:
        addresses = ("to-m@example.net", "later-m@example.net", "refuse-m@example.net")
        assert (await node.submit(Message("m", addresses, b"body\r\n")))[-1] == 250
        numbers = await end(node)
        assert node.spent == {"delivery.concluded"}
        assert numbers["w2"] == 1, "the one that was accepted before the kill"


@pytest.mark.parametrize("step", ["HALF", "DOT", pytest.param("MAIL", marks=pytest.mark.nightly)])
async def test_sigterm_in_a_conversation_drains_and_refuses_nothing_for_good(tmp_path: Path, step: str) -> None:
    async with lone_node(tmp_path) as node:

        async def listen(heard: str) -> None:
            if heard == step:
                node.process.process.send_signal(signal.SIGTERM)

        code = await node.submit_once(Message("m", ("to-m@example.net",), b"body\r\n"), listen)
        assert await node.process.ended() == 0
        # A drain leaves time for content that is on its way, and never a client without a reply.
        assert code in ({250, 421} if step == "MAIL" else {250})
        async with node.again():
            # What was accepted in the last moment goes out now.
            await node.judged()


@pytest.mark.parametrize(
    "stage", ["dot", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("RCPT", "DATA"))]
)
async def test_sigterm_in_a_delivery_lets_it_end(tmp_path: Path, stage: str) -> None:
    async with lone_node(tmp_path) as node:

        async def listen(heard: str) -> None:
            if heard == stage:
                node.process.process.send_signal(signal.SIGTERM)

        node.sink.watcher = listen
        only = Message("m", ("to-m@example.net",), b"body\r\n")
        await node.submit_once(only)
        assert await node.process.ended() == 0
        assert summary(check(node.case()))["copies"] == 1
