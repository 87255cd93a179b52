"""Limits at submission over real sockets: what is asked for a message, what is refused, what is given back."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import cast

import pytest

from dataplane.adapters.limiter_local import LocalLimiter
from dataplane.adapters.spool_ram import RamSpool
from dataplane.core.limits import Limit, LimitScope, LimitUnit
from dataplane.ingress.listeners import Mode
from dataplane.ports import SpoolError
from support.ingress import ACCOUNT, Clock, Limits, Node, Peer, make_node, running, until, with_settings

EHLO = b"EHLO client.example\r\n"
MAIL = b"MAIL FROM:<app@example.com>\r\n"
RCPT = b"RCPT TO:<someone@example.net>\r\n"
BODY = b"From: App <app@example.com>\r\nSubject: hello\r\n\r\nbody\r\n"
TAKEN = b"250 2.0.0 queued as "


def own(unit: LimitUnit, amount: int, period_s: float = 60.0) -> Limit:
    return Limit(f"accounts/demo/limits/{unit.name.lower()}", LimitScope.ACCOUNT, unit, amount, period_s, amount)


def limited(*limits: Limit, **options: object) -> Node:
    """A node whose account has these limits and no others, kept in memory by a clock that stands still."""
    node = make_node(**options)  # type: ignore[arg-type]  # as they are declared there
    limiter = LocalLimiter(lambda: 0.0)
    _use(node, limiter)
    with_settings(node, account_messages_per_hour=0, credential_messages_per_hour=0)
    node.config.set_account(replace(ACCOUNT, limits=limits))
    return node


def _use(node: Node, limiter: LocalLimiter) -> None:
    node.limiter = cast("Limits", limiter)
    service = node.ingress.service
    service.submission = replace(service.submission, limiter=limiter)


def left(node: Node, unit: str) -> int:
    """Whole tokens in a bucket of the account."""
    level, _ = cast("LocalLimiter", node.limiter)._buckets[f"a:accounts/demoaccount:{unit}"]
    return level // 1_000_000


async def offer(peer: Peer, *, mail: bytes = MAIL, recipients: int = 1) -> bytes:
    """Answer to DATA."""
    return await peer.ask(mail + RCPT * recipients + b"DATA\r\n", recipients + 2)


async def session(node: Node) -> Peer:
    peer = await node.greeted()
    await peer.ask(EHLO)
    return peer


async def test_the_answer_says_how_long_to_wait_and_the_session_goes_on() -> None:
    async with running(limited(own(LimitUnit.MESSAGE, 5))) as node:
        peer = await session(node)
        for _ in range(5):
            assert (await offer(peer)).startswith(b"354")
            assert (await peer.ask(BODY + b".\r\n")).startswith(TAKEN)
        assert await offer(peer) == b"450 4.7.1 Limit reached, try again in 12 s\r\n"
        assert (await peer.ask(b"RSET\r\n")).startswith(b"250")
        assert [event for event in node.log.events() if event == "message.limited"] == ["message.limited"]


async def test_every_recipient_counts_and_one_too_many_refuses_the_message_whole() -> None:
    async with running(limited(own(LimitUnit.RECIPIENT, 10))) as node:
        peer = await session(node)
        assert (await offer(peer, recipients=7)).startswith(b"354")
        assert (await peer.ask(BODY + b".\r\n")).startswith(TAKEN)
        assert await offer(peer, recipients=4) == b"450 4.7.1 Limit reached, try again in 6 s\r\n"
        await peer.ask(b"RSET\r\n")
        assert (await offer(peer, recipients=3)).startswith(b"354")


async def test_octets_are_taken_by_size_and_settled_by_what_came() -> None:
    async with running(limited(own(LimitUnit.BYTE, 10_000))) as node:
        peer = await session(node)
        assert (await offer(peer, mail=b"MAIL FROM:<app@example.com> SIZE=9000\r\n")).startswith(b"354")
        assert left(node, "byte") == 1_000
        assert (await peer.ask(BODY + b".\r\n")).startswith(TAKEN)
        assert left(node, "byte") == 10_000 - len(BODY)


async def test_octets_that_were_not_declared_are_taken_when_they_came() -> None:
    body = BODY + b"x" * 70 + b"\r\n"
    async with running(limited(own(LimitUnit.BYTE, 100))) as node:
        peer = await session(node)
        assert (await offer(peer)).startswith(b"354")
        assert left(node, "byte") == 99
        assert (await peer.ask(body + b".\r\n")).startswith(TAKEN)
        assert left(node, "byte") == 100 - len(body)
        # An empty bucket lets nothing come, whatever is declared.
        assert (await offer(peer)).startswith(b"450 4.7.1")


async def test_a_size_declared_too_large_lifts_no_limit() -> None:
    async with running(limited(own(LimitUnit.BYTE, 200))) as node:
        peer = await session(node)
        mail = b"MAIL FROM:<app@example.com> SIZE=500000\r\n"
        sent = 0
        while sent < 20 and (await offer(peer, mail=mail)).startswith(b"354"):
            assert (await peer.ask(BODY + b".\r\n")).startswith(TAKEN)
            sent += 1
            assert left(node, "byte") == 200 - sent * len(BODY)
        # Less than the whole bucket is there now, and so much more was declared.
        assert sent == 1


async def test_what_a_size_holds_back_is_owed_while_the_content_comes() -> None:
    async with running(limited(own(LimitUnit.BYTE, 200))) as node:
        first, second = await session(node), await session(node)
        assert (await offer(first, mail=b"MAIL FROM:<app@example.com> SIZE=1200\r\n")).startswith(b"354")
        # 1,001 are missing of 200 a minute.
        assert await offer(second) == b"450 4.7.1 Limit reached, try again in 301 s\r\n"
        assert (await first.ask(BODY + b".\r\n")).startswith(TAKEN)
        await second.ask(b"RSET\r\n")
        assert (await offer(second)).startswith(b"354")


async def test_recipients_above_the_burst_are_paid_for_before_the_next_message() -> None:
    limit = replace(own(LimitUnit.RECIPIENT, 36_000, 3_600.0), burst=10)
    async with running(limited(limit)) as node:
        peer = await session(node)
        assert (await offer(peer, recipients=50)).startswith(b"354")
        assert (await peer.ask(BODY + b".\r\n")).startswith(TAKEN)
        assert left(node, "recipient") == -40
        assert await offer(peer) == b"450 4.7.1 Limit reached, try again in 5 s\r\n"


async def test_octets_of_a_content_that_went_to_its_file_are_all_counted() -> None:
    node = limited(own(LimitUnit.BYTE, 2_000_000), spill_bytes=300_000)
    async with running(node):
        peer = await session(node)
        assert (await offer(peer)).startswith(b"354")
        body = BODY + (b"x" * 78 + b"\r\n") * 12_500
        assert (await peer.ask(body + b".\r\n")).startswith(TAKEN)
        assert left(node, "byte") == 2_000_000 - len(body)


REFUSED_CONTENTS = [
    (BODY + b"a stray \n line end\r\n.\r\n", b"550 5.6.0"),
    (b"From: App <app@example.org>\r\n\r\nnot ours\r\n.\r\n", b"550 5.7.1"),
    (BODY + b"x" * 2_000 + b"\r\n.\r\n", b"550 5.6.0"),
]


@pytest.mark.parametrize(("content", "answer"), REFUSED_CONTENTS)
async def test_what_was_granted_for_a_refused_content_is_given_back(content: bytes, answer: bytes) -> None:
    every = (own(LimitUnit.MESSAGE, 10), own(LimitUnit.RECIPIENT, 10), own(LimitUnit.BYTE, 10_000))
    async with running(limited(*every)) as node:
        peer = await session(node)
        assert (await offer(peer, recipients=3)).startswith(b"354")
        assert (left(node, "message"), left(node, "recipient")) == (9, 7)
        assert (await peer.ask(content)).startswith(answer)
        assert [left(node, unit) for unit in ("message", "recipient", "byte")] == [10, 10, 10_000]


class FailingSpool(RamSpool):
    """Never stores anything."""

    def accept(self, *arguments: object) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.set_exception(SpoolError("no"))
        return future


async def test_what_was_granted_is_given_back_when_storing_fails() -> None:
    async with running(limited(own(LimitUnit.MESSAGE, 10), spool=FailingSpool(Clock()))) as node:
        peer = await session(node)
        assert (await offer(peer)).startswith(b"354")
        assert (await peer.ask(BODY + b".\r\n")).startswith(b"451 4.3.0")
        assert left(node, "message") == 10


class BrokenSpool(RamSpool):
    """Fails as nobody foresaw."""

    def accept(self, *arguments: object) -> asyncio.Future[None]:
        raise RuntimeError("broken")


async def test_what_was_granted_is_given_back_when_accepting_breaks() -> None:
    async with running(limited(own(LimitUnit.MESSAGE, 10), spool=BrokenSpool(Clock()))) as node:
        peer = await session(node)
        assert (await offer(peer)).startswith(b"354")
        assert (await peer.ask(BODY + b".\r\n")).startswith(b"451 4.3.0 Internal error")
        assert left(node, "message") == 10


async def test_what_was_granted_is_given_back_when_the_client_leaves_before_the_dot() -> None:
    async with running(limited(own(LimitUnit.MESSAGE, 10))) as node:
        peer = await session(node)
        assert (await offer(peer)).startswith(b"354")
        peer.writer.write(BODY)
        assert left(node, "message") == 9
        peer.reset()
        await until(lambda: left(node, "message") == 10)


async def test_a_client_that_leaves_after_the_dot_has_paid() -> None:
    async with running(limited(own(LimitUnit.MESSAGE, 10))) as node:
        peer = await session(node)
        assert (await offer(peer)).startswith(b"354")
        peer.writer.write(BODY + b".\r\n")
        await node.delivery.arrived.wait()
        peer.reset()
        await until(lambda: node.counters.sessions_active == 0)
        assert left(node, "message") == 9


async def test_a_client_that_leaves_while_the_limiter_is_asked_pays_nothing() -> None:
    node = make_node()
    node.limiter.gate = asyncio.Event()
    async with running(node):
        peer = await session(node)
        await peer.ask(MAIL + RCPT, 2)
        peer.writer.write(b"DATA\r\n")
        await node.limiter.asked.wait()
        peer.reset()
        await until(lambda: node.counters.sessions_active == 0)
        node.limiter.gate.set()
        await until(lambda: bool(node.limiter.refunds))
        assert node.limiter.refunds == node.limiter.takes


async def test_a_connection_is_held_to_the_limit_that_names_its_address() -> None:
    named = Limit("limits/one", LimitScope.ADDRESS, LimitUnit.CONNECTION, 2, 60.0, 2, "127.0.0.1")
    node = limited()
    with_settings(node, limits=(named,))
    async with running(node, Mode.PLAIN):
        for _ in range(2):
            await node.greeted()
        peer = await node.connect()
        assert await peer.line() == b"421 4.7.0 Too many connections, try again in 30 s\r\n"
