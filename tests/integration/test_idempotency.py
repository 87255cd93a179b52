"""Messages with an Idempotency-Key over real sockets: each is stored once, however often and wherever it is sent."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import redis

from dataplane.adapters.claims_redis import RedisClaims
from dataplane.adapters.limiter_local import LocalLimiter
from dataplane.adapters.limiter_redis import RedisLimiter
from dataplane.adapters.spool_ram import RamSpool
from dataplane.core.envelope import Envelope, RecipientRow
from dataplane.core.ids import MessageId
from dataplane.core.policy import compile_networks
from dataplane.ports import Claim, Claimed, SpoolError, SpoolFailedError
from postroad.localstack import ValkeyServer
from support.ingress import ACCOUNT, Clock, Node, Peer, make_node, running, until
from support.spools import open_durable

EHLO = b"EHLO client.example\r\n"
MAIL = b"MAIL FROM:<app@example.com>\r\n"
RCPT = b"RCPT TO:<someone@example.net>\r\n"
OTHER_RCPT = b"RCPT TO:<other@example.net>\r\n"
BODY = b"From: App <app@example.com>\r\nSubject: hello\r\nMessage-ID: <1@example.com>\r\n\r\nbody\r\n"
LARGE = BODY + (b"x" * 78 + b"\r\n") * 12_500
KEY = b"Idempotency-Key: order-4711\r\n"
PENDING = b"451 4.7.1 A message with this Idempotency-Key is being stored, try again\r\n"
TAKEN = b"550 5.7.0 This Idempotency-Key was used for another message\r\n"
DAY_S = 24 * 3_600


async def greeted(node: Node) -> Peer:
    peer = await node.greeted()
    await peer.ask(EHLO)
    return peer


async def submit(node: Node, content: bytes, mail: bytes = MAIL, recipients: bytes = RCPT) -> bytes:
    """Send a message over a session of its own; return the answer to its dot."""
    peer = await greeted(node)
    assert (await peer.ask(mail + recipients + b"DATA\r\n", 2 + recipients.count(b"\r\n"))).startswith(b"354")
    answer = await peer.ask(content + b".\r\n")
    await peer.close()
    return answer


def id_of(answer: bytes) -> bytes:
    found = re.fullmatch(rb"250 2\.0\.0 queued as ([0-9a-f-]{36})\r\n", answer)
    assert found is not None, answer
    return found[1]


def stored(node: Node) -> list[Envelope]:
    """What was handed on."""
    return [each[0] for each in node.delivery.delivered] + [each[0] for each in node.delivery.waiting]


def is_checked(node: Node) -> list[bool]:
    return [envelope.submission_key.checked for envelope in stored(node) if envelope.submission_key is not None]


def counts(node: Node) -> dict[str, float]:
    rows = {name: value for metric, name, value in node.counters.samples() if metric == "smtp_submission_keys_total"}
    return {name[0]: value for name, value in rows.items() if isinstance(value, int) and value}


# --- one worker ---


async def test_a_message_that_is_sent_again_is_answered_as_before_and_not_stored_again() -> None:
    async with running(make_node()) as node:
        answers = [await submit(node, KEY + BODY) for _ in range(3)]
        assert len({id_of(answer) for answer in answers}) == 1
        assert len(stored(node)) == 1
        assert counts(node) == {"unchecked": 1, "repeated": 2}
        assert node.counters.messages_enqueued == 1
        assert node.log.events().count("message.accepted") == 1
        assert node.log.events().count("message.repeated") == 2


async def test_the_field_goes_no_further_and_the_rest_stays() -> None:
    async with running(make_node()) as node:
        await submit(node, BODY.replace(b"Subject", KEY + b"Subject"))
        _, content, _ = node.delivery.delivered[0]
        assert content.endswith(BODY.removeprefix(b"From"))
        assert b"dempotency" not in content
        assert "order-4711" not in repr(node.log.lines) + repr(stored(node))


async def test_a_day_later_the_key_is_new() -> None:
    async with running(make_node()) as node:
        first = id_of(await submit(node, KEY + BODY))
        node.clock.seconds += DAY_S - 1
        assert id_of(await submit(node, KEY + BODY)) == first
        node.clock.seconds += 1
        assert id_of(await submit(node, KEY + BODY)) != first


@pytest.mark.parametrize(
    ("mail", "recipients", "content"),
    [
        (MAIL, RCPT, BODY + b"more\r\n"),
        (MAIL, RCPT, BODY.replace(b"hello", b"Hello")),
        (MAIL, RCPT + OTHER_RCPT, BODY),
        (MAIL, OTHER_RCPT, BODY),
        (b"MAIL FROM:<other@example.com>\r\n", RCPT, BODY),
        (b"MAIL FROM:<>\r\n", RCPT, BODY),
    ],
)
async def test_another_message_under_the_same_key_is_refused(mail: bytes, recipients: bytes, content: bytes) -> None:
    async with running(make_node()) as node:
        await submit(node, KEY + BODY)
        assert await submit(node, KEY + content, mail, recipients) == TAKEN
        assert len(stored(node)) == 1
        assert (counts(node)["conflicting"], node.counters.messages_refused) == (1, 1)
        id_of(await submit(node, KEY.replace(b"4711", b"4712") + content, mail, recipients))


async def test_the_order_of_recipients_counts_and_where_the_field_stands_does_not() -> None:
    async with running(make_node()) as node:
        first = await submit(node, KEY + BODY, recipients=RCPT + OTHER_RCPT)
        moved = BODY.replace(b"Subject", b"IDEMPOTENCY-KEY:\r\n\torder-4711 \r\nSubject")
        assert await submit(node, moved, recipients=RCPT + OTHER_RCPT) == first
        assert await submit(node, KEY + BODY, recipients=OTHER_RCPT + RCPT) == TAKEN


@pytest.mark.parametrize(
    ("field", "text"),
    [
        (b"Idempotency-Key:\r\n", b"The Idempotency-Key is not 1 to 255 visible ASCII characters"),
        (b"Idempotency-Key: a b\r\n", b"The Idempotency-Key is not 1 to 255 visible ASCII characters"),
        (b"Idempotency-Key: " + b"x" * 256 + b"\r\n", b"The Idempotency-Key is not 1 to 255 visible ASCII characters"),
        (KEY + KEY, b"The header has more than one Idempotency-Key field"),
    ],
)
@pytest.mark.parametrize("body", [BODY, LARGE], ids=["small", "large"])
async def test_a_key_that_is_none_is_refused_and_never_passed_over(field: bytes, text: bytes, body: bytes) -> None:
    async with running(make_node()) as node:
        assert await submit(node, field + body) == b"550 5.6.0 " + text + b"\r\n"
        assert stored(node) == []
        assert node.counters.messages_refused == 1
        assert node.counters.content_bytes == 0


async def test_another_accounts_key_is_another_key() -> None:
    node = make_node(networks=("127.0.0.1/32",))
    other = replace(ACCOUNT, name="accounts/other", uid="uid-other")
    node.config.set_account(other)
    node.config.networks = compile_networks([("127.0.0.1/32", ACCOUNT.name), ("127.0.0.2/32", other.name)])
    async with running(node):
        first = id_of(await submit(node, KEY + BODY))
        peer = await node.greeted(local_addr=("127.0.0.2", 0))
        await peer.ask(EHLO + MAIL + RCPT + b"DATA\r\n", 4)
        second = id_of(await peer.ask(KEY + BODY + b".\r\n"))
        assert first != second
        assert [envelope.account for envelope in stored(node)] == ["accounts/demo", "accounts/other"]
        # Made anew under its name, an account does not meet the keys of the one before.
        node.config.set_account(replace(ACCOUNT, uid="uid-demo-2"))
        assert id_of(await submit(node, KEY + BODY)) not in {first, second}


async def test_what_was_granted_for_a_message_that_was_stored_before_is_given_back() -> None:
    async with running(make_node()) as node:
        await submit(node, KEY + BODY)
        assert node.limiter.refunds == []
        await submit(node, KEY + BODY)
        assert node.limiter.refunds == node.limiter.takes[1:]


class GatedSpool(RamSpool):
    """Stores when the test lets it."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.gate = asyncio.Event()
        self.asked = asyncio.Event()
        self.error: Exception | None = None

    def accept(self, envelope: Envelope, content: bytes, recipients: Sequence[RecipientRow]) -> asyncio.Future[None]:
        self.asked.set()
        return asyncio.ensure_future(self._accept_later(envelope, content, recipients))

    async def _accept_later(self, envelope: Envelope, content: bytes, recipients: Sequence[RecipientRow]) -> None:
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        await super().accept(envelope, content, recipients)


@pytest.mark.parametrize("body", [BODY, LARGE], ids=["small", "large"])
async def test_of_two_sessions_at_once_one_stores_and_the_other_comes_again(body: bytes) -> None:
    spool = GatedSpool(Clock())
    async with running(make_node(spool=spool)) as node:
        first = asyncio.create_task(submit(node, KEY + body))
        await spool.asked.wait()
        assert await submit(node, KEY + body) == PENDING
        assert await submit(node, KEY + body + b"more\r\n") == TAKEN
        spool.gate.set()
        identifier = id_of(await first)
        assert id_of(await submit(node, KEY + body)) == identifier
        assert len(stored(node)) == 1
        assert counts(node) == {"unchecked": 1, "pending": 1, "conflicting": 1, "repeated": 1}
        await until(lambda: node.counters.content_bytes == 0)


async def test_a_message_that_could_not_be_stored_leaves_its_key_free() -> None:
    spool = GatedSpool(Clock())
    spool.gate.set()
    spool.error = SpoolError("no")
    async with running(make_node(spool=spool)) as node:
        assert (await submit(node, KEY + BODY)).startswith(b"451 4.3.0")
        spool.error = None
        id_of(await submit(node, KEY + BODY + b"another\r\n"))
        assert node.limiter.refunds == node.limiter.takes[:1]
        assert node.counters.content_bytes == 0


class BrokenSpool(RamSpool):
    """Fails as nobody foresaw, once."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.is_broken = True

    def accept(self, envelope: Envelope, content: bytes, recipients: Sequence[RecipientRow]) -> asyncio.Future[None]:
        if self.is_broken:
            self.is_broken = False
            raise RuntimeError("broken")
        return super().accept(envelope, content, recipients)


async def test_a_fault_of_ours_is_a_451_and_leaves_the_key_free(valkey_url: str, start: Start) -> None:
    claims = await start(valkey_url)
    async with running(make_node(spool=BrokenSpool(Clock()), claims=claims)) as node:
        assert (await submit(node, KEY + BODY)).startswith(b"451 4.3.0 Internal error")
        await claims._call("postroad_withdraw_1", b"", "")
        id_of(await submit(node, KEY + BODY))
        assert node.counters.content_bytes == 0


async def test_a_spool_that_cannot_say_is_a_451() -> None:
    class SilentSpool(RamSpool):
        def submitted(self, key_hash: bytes) -> None:
            raise SpoolFailedError("no")

    async with running(make_node(spool=SilentSpool(Clock()))) as node:
        assert (await submit(node, KEY + BODY)).startswith(b"451 4.3.0")
        id_of(await submit(node, BODY))


# --- the 250 that is lost ---


async def test_a_message_whose_250_was_lost_is_delivered_once(valkey_url: str, start: Start) -> None:
    async with running(make_node(claims=await start(valkey_url))) as node:
        peer = await greeted(node)
        await peer.ask(MAIL + RCPT + b"DATA\r\n", 3)
        peer.writer.write(KEY + BODY + b".\r\n")
        await node.delivery.arrived.wait()
        peer.reset()
        await until(lambda: node.counters.sessions_active == 0)
        id_of(await submit(node, KEY + BODY))
        assert len(stored(node)) == 1
        assert node.counters.answers_lost == 0, "nothing comes twice of it"


@pytest.mark.parametrize("is_asked", [False, True])
async def test_a_250_that_is_lost_counts_only_where_nobody_could_be_asked(
    valkey_url: str, start: Start, *, is_asked: bool
) -> None:
    spool = GatedSpool(Clock())
    async with running(make_node(spool=spool, claims=await start(valkey_url) if is_asked else None)) as node:
        peer = await greeted(node)
        await peer.ask(MAIL + RCPT + b"DATA\r\n", 3)
        peer.writer.write(KEY + BODY + b".\r\n")
        await spool.asked.wait()
        peer.reset()
        await until(lambda: node.counters.sessions_active == 0)
        spool.gate.set()
        await node.delivery.arrived.wait()
        assert is_checked(node) == [is_asked]
        assert node.counters.answers_lost == (0 if is_asked else 1)


# --- the fleet ---

Start = Callable[..., Awaitable[RedisClaims]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts claims on a server, and closes them whatever the test comes to."""
    limiters: list[RedisLimiter] = []

    async def start(url: str, timeout_s: float = 5.0) -> RedisClaims:
        limiter = RedisLimiter(url, LocalLimiter(lambda: 0.0), timeout_s=timeout_s)
        limiters.append(limiter)
        await limiter.start()
        return RedisClaims(limiter)

    yield start
    for limiter in limiters:
        await limiter.close()


class Pair(NamedTuple):
    """Two workers of one fleet, each with a spool of its own."""

    one: Node
    other: Node
    claims: tuple[RedisClaims, RedisClaims]

    async def told(self) -> None:
        """Return when the server has heard what was told before."""
        for claims in self.claims:
            await claims._call("postroad_withdraw_1", b"", "")


@pytest.fixture
async def pair(valkey_url: str, start: Start) -> AsyncIterator[Pair]:
    claims = (await start(valkey_url), await start(valkey_url))
    one, other = (make_node(claims=each) for each in claims)
    async with running(one), running(other):
        yield Pair(one, other, claims)


@pytest.mark.parametrize("body", [BODY, LARGE], ids=["small", "large"])
async def test_another_worker_answers_with_the_id_of_the_first(pair: Pair, body: bytes) -> None:
    first = id_of(await submit(pair.one, KEY + body))
    await pair.told()
    assert id_of(await submit(pair.other, KEY + body)) == first
    assert await submit(pair.other, KEY + body + b"more\r\n") == TAKEN
    assert (len(stored(pair.one)), len(stored(pair.other))) == (1, 0)
    assert is_checked(pair.one) == [True]
    assert counts(pair.one) == {"stored": 1}
    assert counts(pair.other) == {"repeated": 1, "conflicting": 1}
    assert pair.other.limiter.refunds == pair.other.limiter.takes
    assert pair.other.counters.content_bytes == 0


@pytest.mark.parametrize("body", [BODY, LARGE], ids=["small", "large"])
async def test_of_many_sessions_at_two_workers_exactly_one_stores(pair: Pair, body: bytes) -> None:
    nodes = [pair.one, pair.other] * 10
    answers = await asyncio.gather(*(submit(node, KEY + body) for node in nodes))
    assert len(stored(pair.one)) + len(stored(pair.other)) == 1
    ids = {id_of(answer) for answer in answers if answer != PENDING}
    assert len(ids) == 1
    await pair.told()
    assert {id_of(await submit(node, KEY + body)) for node in (pair.one, pair.other)} == ids


async def test_a_message_under_way_elsewhere_is_waited_for_and_its_failure_gives_the_key_free(
    valkey_url: str, start: Start
) -> None:
    claims, spool = await start(valkey_url), GatedSpool(Clock())
    spool.error = SpoolError("no")
    async with running(make_node(spool=spool, claims=claims)) as one, running(make_node(claims=claims)) as other:
        first = asyncio.create_task(submit(one, KEY + BODY))
        await spool.asked.wait()
        assert await submit(other, KEY + BODY) == PENDING
        assert await submit(other, KEY + BODY + b"more\r\n") == TAKEN
        spool.gate.set()
        assert (await first).startswith(b"451 4.3.0")
        id_of(await submit(other, KEY + BODY))
        assert is_checked(other) == [True]


async def test_a_message_of_which_nobody_knows_whether_it_was_stored_keeps_its_key(
    valkey_url: str, start: Start
) -> None:
    claims, spool = await start(valkey_url), GatedSpool(Clock())
    spool.gate.set()
    spool.error = SpoolFailedError("the disk")
    async with running(make_node(spool=spool, claims=claims)) as one, running(make_node(claims=claims)) as other:
        assert (await submit(one, KEY + BODY)).startswith(b"451 4.3.0")
        assert await submit(other, KEY + BODY) == PENDING


async def test_a_spool_that_has_the_message_wins_over_a_claim_that_was_left_behind(
    valkey_url: str, start: Start, tmp_path: Path
) -> None:
    clock = Clock()
    folder = tmp_path / "0191d3c0-0000-4000-8000-000000000001"
    claims = await start(valkey_url)
    spool = await open_durable(folder, clock)
    async with running(make_node(spool=spool, claims=claims)) as node:
        first = id_of(await submit(node, KEY + BODY))
    await spool.close()
    with redis.Redis.from_url(valkey_url) as client:
        client.flushall()
    key_hash = bytes.fromhex(_key_hash(node))
    assert await claims.claim(key_hash, b"c" * 32, MessageId(b"m" * 16)) == Claim(Claimed.YES)
    spool = await open_durable(folder, clock)
    async with running(make_node(spool=spool, claims=claims)) as node:
        assert id_of(await submit(node, KEY + BODY)) == first
        assert stored(node) == []
    await spool.close()


def _key_hash(node: Node) -> str:
    key = stored(node)[0].submission_key
    assert key is not None
    return key.key_hash.hex()


# --- without Redis ---


async def test_without_redis_each_spool_decides_for_itself_and_says_so(start: Start) -> None:
    claims = await start("redis://127.0.0.1:1/0")
    async with running(make_node(claims=claims)) as one, running(make_node(claims=claims)) as other:
        ids = {id_of(await submit(node, KEY + BODY)) for node in (one, other, one, other)}
        assert len(ids) == 2
        assert (is_checked(one), is_checked(other)) == ([False], [False])
        assert counts(one) == {"unchecked": 1, "repeated": 1}


async def test_a_server_that_falls_silent_delays_nobody_and_leaves_it_to_the_spool(
    valkey_server: ValkeyServer, valkey_url: str, start: Start
) -> None:
    claims = await start(valkey_url, 0.03)
    async with running(make_node(claims=claims)) as node:
        assert valkey_server.pid is not None
        os.kill(valkey_server.pid, signal.SIGSTOP)
        try:
            first = id_of(await submit(node, KEY + BODY))
            assert id_of(await submit(node, KEY + BODY)) == first
        finally:
            os.kill(valkey_server.pid, signal.SIGCONT)
        assert is_checked(node) == [False]


async def test_a_server_that_forgot_its_keys_is_made_up_for_by_the_spool_alone(pair: Pair, valkey_url: str) -> None:
    first = id_of(await submit(pair.one, KEY + BODY))
    await pair.told()
    with redis.Redis.from_url(valkey_url) as client:
        client.flushall()
    assert id_of(await submit(pair.one, KEY + BODY)) == first
    second = id_of(await submit(pair.other, KEY + BODY))
    assert second != first
    # Only the ledger can find this one: both were checked.
    assert is_checked(pair.one) == is_checked(pair.other) == [True]


# --- who leaves ---


class SlowClaims:
    """Answers when the test lets it."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.answer: asyncio.Future[Claim] = asyncio.get_running_loop().create_future()
        self.told: list[str] = []

    def claim(self, key_hash: bytes, content_hash: bytes, message_id: MessageId) -> asyncio.Future[Claim]:
        self.asked.set()
        return self.answer

    def stored(self, key_hash: bytes, content_hash: bytes, message_id: MessageId) -> None:
        self.told.append("stored")

    def withdraw(self, key_hash: bytes, message_id: MessageId) -> None:
        self.told.append("withdrawn")


@pytest.mark.parametrize("body", [BODY, LARGE], ids=["small", "large"])
async def test_a_client_that_leaves_while_its_key_is_asked_for_leaves_its_message(body: bytes) -> None:
    claims = SlowClaims()
    async with running(make_node(claims=claims)) as node:
        peer = await greeted(node)
        await peer.ask(MAIL + RCPT + b"DATA\r\n", 3)
        peer.writer.write(KEY + body + b".\r\n")
        await claims.asked.wait()
        peer.reset()
        await until(lambda: node.counters.sessions_active == 0)
        assert await submit(node, KEY + body) == PENDING
        claims.answer.set_result(Claim(Claimed.YES))
        await node.delivery.arrived.wait()
        message = await node.spool.load(stored(node)[0].message_id)
        assert message is not None
        assert message.content.endswith(body)
        assert [row.address for row in message.recipients] == ["someone@example.net"]
        assert claims.told == ["stored"]
        assert node.counters.content_bytes == 0


@pytest.mark.parametrize("body", [BODY, LARGE], ids=["small", "large"])
async def test_what_is_refused_for_its_key_leaves_nothing(body: bytes, tmp_path: Path) -> None:
    claims = SlowClaims()
    claims.answer.set_result(Claim(Claimed.OTHER))
    spool = await open_durable(tmp_path / "0191d3c0-0000-4000-8000-000000000001", Clock())
    async with running(make_node(spool=spool, claims=claims)) as node:
        assert await submit(node, KEY + body) == TAKEN
        assert claims.told == []
        assert node.counters.content_bytes == 0
    await spool.close()
    assert list(tmp_path.glob("*/content/*")) == []
