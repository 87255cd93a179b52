"""Submission over real sockets: what was answered 250 is in the spool, and nothing else is."""

from __future__ import annotations

import asyncio
import smtplib
import socket
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest

from dataplane.adapters.spool_ram import RamSpool
from dataplane.core.config import Denials, Rule, Target
from dataplane.core.envelope import COMMITTING_BYTES, Envelope, RecipientRow, recipient_bytes
from dataplane.core.queue import State
from dataplane.core.session import Session
from dataplane.ingress.admission import Admission
from dataplane.ingress.listeners import Mode
from dataplane.ingress.protocol import Timeouts
from dataplane.ports import Grant, SpoolError, SpoolFailedError, SpoolFullError
from support.ingress import ACCOUNT, Clock, Node, Peer, make_node, running, until, with_settings

EHLO = b"EHLO client.example\r\n"
MAIL = b"MAIL FROM:<app@example.com>\r\n"
RCPT = b"RCPT TO:<someone@example.net>\r\n"
BODY = b"From: App <app@example.com>\r\nSubject: hello\r\n\r\nbody\r\n"
TAKEN = b"250 2.0.0 queued as "
OPEN = recipient_bytes("someone@example.net")
COMMITTING = OPEN + COMMITTING_BYTES


async def open_data(peer: Peer, mail: bytes = MAIL) -> None:
    assert (await peer.ask(EHLO)).startswith(b"250-relay.example")
    assert (await peer.ask(mail + RCPT + b"DATA\r\n", 3)).startswith(b"354 ")


async def submit(peer: Peer, body: bytes = BODY) -> bytes:
    await open_data(peer)
    return await peer.ask(body + b".\r\n")


class GatedSpool(RamSpool):
    """Holds commits until the test lets them go, or fails them."""

    def __init__(self) -> None:
        super().__init__(Clock())
        self.asked = asyncio.Event()
        self.futures: list[asyncio.Future[None]] = []

    def accept(self, envelope: Envelope, content: bytes, recipients: Sequence[RecipientRow]) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.futures.append(future)
        self.asked.set()
        return future


async def test_a_message_is_stored_before_its_250_and_handed_on() -> None:
    async with running(make_node()) as node:
        peer = await node.greeted()
        answer = await submit(peer)
        assert answer.startswith(TAKEN)
        envelope, content, rows = node.delivery.delivered[0]
        stored = await node.spool.load(envelope.message_id)
        assert stored is not None
        assert stored.content == content
        assert content.endswith(BODY)
        assert content.startswith(b"Received: from client.example ([127.0.0.1])\r\n\tby relay.example with ESMTP id ")
        assert [(row.state, row.attempt, row.queue_key) for row in rows] == [
            (State.SENDING, 1, "accounts/demo\tproviders/inbox")
        ]
        assert envelope.sender == "app@example.com"
        assert envelope.subject == "hello"
        assert envelope.size_bytes == len(content)
        assert node.counters.messages_enqueued == 1
        assert "message.accepted" in node.log.events()
        assert node.counters.content_bytes == 0


async def test_smtplib_sends_to_several_recipients_on_one_connection() -> None:
    async with running(make_node()) as node:

        def send() -> None:
            with smtplib.SMTP("127.0.0.1", node.ports[Mode.PLAIN], timeout=10) as client:
                for number in range(3):
                    recipients = [f"{number}@example.net", "other@example.net"]
                    client.sendmail("app@example.com", recipients, f"From: app@example.com\r\n\r\n.{number}\r\n..\r\n")

        await asyncio.to_thread(send)
        assert len(node.delivery.delivered) == 3
        assert node.delivery.delivered[2][1].endswith(b"\r\n\r\n.2\r\n..\r\n")


async def test_where_delivery_takes_nothing_rows_are_committed_as_queued() -> None:
    node = make_node()
    node.delivery.open = False
    async with running(node):
        peer = await node.greeted()
        assert (await submit(peer)).startswith(TAKEN)
        _, rows = node.delivery.waiting[0]
        assert [(row.state, row.attempt) for row in rows] == [(State.QUEUED, 0)]
        assert not node.delivery.delivered


async def test_a_pipelined_batch_of_messages_is_answered_in_order() -> None:
    async with running(make_node()) as node:
        peer = await node.greeted()
        await peer.ask(EHLO)
        group = MAIL + RCPT + b"DATA\r\n"
        await peer.ask(group, 3)
        for _ in range(20):
            assert (await peer.ask(BODY + b".\r\n" + group, 4)).startswith(b"354")
        assert (await peer.ask(b".\r\nQUIT\r\n", 2)).startswith(b"221")
        assert await peer.end() == b""
        assert node.counters.messages_enqueued == 21


async def test_a_client_that_half_closes_after_the_dot_gets_its_reply() -> None:
    node = make_node(spool=GatedSpool())
    spool = node.spool
    assert isinstance(spool, GatedSpool)
    async with running(node):
        peer = await node.greeted()
        await open_data(peer)
        peer.writer.write(BODY + b".\r\n")
        peer.writer.write_eof()
        await spool.asked.wait()
        spool.futures[0].set_result(None)
        assert (await peer.end()).startswith(TAKEN)
        assert node.counters.messages_enqueued == 1


async def test_a_client_that_leaves_after_the_dot_does_not_cancel_the_commit() -> None:
    node = make_node(spool=GatedSpool())
    spool = node.spool
    assert isinstance(spool, GatedSpool)
    async with running(node):
        peer = await node.greeted()
        await open_data(peer)
        peer.writer.write(BODY + b".\r\n")
        await spool.asked.wait()
        assert node.counters.content_bytes == len(BODY) + COMMITTING
        peer.reset()
        await gone(node)
        assert not spool.futures[0].cancelled()
        spool.futures[0].set_result(None)
        await node.delivery.arrived.wait()
        assert node.counters.messages_enqueued == 1
        assert node.counters.content_bytes == 0


async def gone(node: Node) -> None:
    """Until no session is left."""
    async with asyncio.timeout(10):
        await node.ingress.service._empty.wait()


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (SpoolFullError("full"), b"452 4.3.1"),
        (SpoolError("no"), b"451 4.3.0 Storing"),
        (SpoolFailedError("io"), b"451 4.3.0 Storing"),
        (RuntimeError("secret detail"), b"451 4.3.0 Internal error"),
    ],
)
async def test_a_commit_that_fails_is_temporary_and_the_session_lives(error: Exception, answer: bytes) -> None:
    node = make_node(spool=GatedSpool())
    spool = node.spool
    assert isinstance(spool, GatedSpool)
    async with running(node):
        peer = await node.greeted()
        await open_data(peer)
        peer.writer.write(BODY + b".\r\n")
        await spool.asked.wait()
        spool.futures[0].set_exception(error)
        reply = await peer.ask(b"")
        assert reply.startswith(answer)
        assert b"detail" not in reply
        assert not node.delivery.delivered
        assert (await peer.ask(b"NOOP\r\n")).startswith(b"250")


async def test_a_commit_over_its_deadline_is_answered_451_and_stored_all_the_same() -> None:
    node = make_node(spool=GatedSpool())
    spool = node.spool
    assert isinstance(spool, GatedSpool)
    async with running(node):
        peer = await node.greeted()
        await open_data(peer)
        peer.writer.write(BODY + b".\r\n")
        await spool.asked.wait()
        node.clock.seconds += 31
        node.ingress.service.wheel.advance()
        assert (await peer.ask(b"")).startswith(b"451 4.3.0 Storing took too long")
        assert node.counters.commits_late == 1
        assert node.counters.content_bytes == len(BODY) + COMMITTING
        assert (await peer.ask(MAIL)).startswith(b"250")
        spool.futures[0].set_result(None)
        await node.delivery.arrived.wait()
        assert node.counters.content_bytes == 0
        # The late answer is nobody's: the next reply is the next command's.
        assert (await peer.ask(RCPT)).startswith(b"250 2.1.5")


async def test_a_late_commit_never_answers_for_the_next_message() -> None:
    node = make_node(spool=GatedSpool())
    spool = node.spool
    assert isinstance(spool, GatedSpool)
    async with running(node):
        peer = await node.greeted()
        await open_data(peer)
        peer.writer.write(BODY + b".\r\n")
        await spool.asked.wait()
        await expire(node, 31)
        assert (await peer.ask(b"")).startswith(b"451 4.3.0")
        assert (await peer.ask(MAIL + RCPT + b"DATA\r\n", 3)).startswith(b"354")
        peer.writer.write(BODY + b".\r\n")
        await until(lambda: len(spool.futures) == 2)
        spool.futures[0].set_result(None)
        await until(lambda: len(node.delivery.delivered) == 1)
        spool.futures[1].set_exception(SpoolError("no"))
        assert (await peer.ask(b"")).startswith(b"451 4.3.0 Storing failed")
        assert node.counters.messages_enqueued == 1


async def test_a_full_spool_refuses_before_the_content() -> None:
    async with running(make_node(spool=RamSpool(Clock(), capacity_bytes=10))) as node:
        peer = await node.greeted()
        await peer.ask(EHLO)
        answer = await peer.ask(b"MAIL FROM:<app@example.com> SIZE=1000\r\n" + RCPT + b"DATA\r\n", 3)
        assert answer.startswith(b"452 4.3.1")


async def test_the_limiter_is_asked_once_a_message_and_refuses_instead_of_354() -> None:
    async with running(make_node()) as node:
        node.limiter.grant = Grant(allowed=False, wait_s=12.3, refused_key="messages", local=False)
        peer = await node.greeted()
        await peer.ask(EHLO)
        answer = await peer.ask(MAIL + RCPT + RCPT + b"DATA\r\n", 4)
        assert answer == b"450 4.7.1 Limit reached, try again in 13 s\r\n"
        assert [len(takes) for takes in node.limiter.takes] == [1]
        assert node.limiter.takes[0][0].tag == "a:accounts/demo"
        node.limiter.grant = Grant(allowed=True, wait_s=0, refused_key="", local=False)
        assert (await peer.ask(b"DATA\r\n")).startswith(b"354")
        assert (await peer.ask(BODY + b".\r\n")).startswith(TAKEN)


async def test_what_a_client_sends_while_the_limiter_is_asked_closes_the_session() -> None:
    node = make_node()
    node.limiter.gate = asyncio.Event()
    async with running(node):
        peer = await node.greeted()
        await peer.ask(EHLO)
        await peer.ask(MAIL + RCPT, 2)
        peer.writer.write(b"DATA\r\n")
        await node.limiter.asked.wait()
        assert (await peer.ask(BODY)).startswith(b"503 5.5.1")
        assert await peer.end() == b""
        node.limiter.gate.set()


@pytest.mark.parametrize(
    ("mail", "answer"),
    [
        (b"MAIL FROM:<app@example.com>\r\n", b"250 2.1.0"),
        (b"MAIL FROM:<>\r\n", b"250 2.1.0"),
        (b"MAIL FROM:<app@EXAMPLE.com>\r\n", b"250 2.1.0"),
        (b"MAIL FROM:<app@sub.example.com>\r\n", b"553 5.7.1"),
        (b"MAIL FROM:<app@example.net>\r\n", b"553 5.7.1"),
        (b"MAIL FROM:<app@[127.0.0.1]>\r\n", b"553 5.7.1"),
    ],
)
async def test_the_sender_domain_must_be_the_accounts(mail: bytes, answer: bytes) -> None:
    async with running(make_node()) as node:
        peer = await node.greeted()
        await peer.ask(EHLO)
        assert (await peer.ask(mail)).startswith(answer)


@pytest.mark.parametrize(
    ("header", "answer"),
    [
        (b"From: app@example.com\r\n", TAKEN),
        (b"Subject: no author\r\n", TAKEN),
        (b"From: app@example.net\r\n", b"550 5.7.1"),
        (b"From: app@example.com, other@example.net\r\n", b"550 5.7.1"),
        (b"From: app@example.com\r\nSender: x@example.net\r\n", b"550 5.7.1"),
        (b"From: app@example.com\r\nFrom: x@example.net\r\n", b"550 5.6.0"),
        (b"From: app@example.com\r\n" + b"Received: x\r\n" * 101, b"554 5.4.6"),
        (b"From: app@example.com\r\n" + b"A: x\r\n" * 1000, b"552 5.3.4"),
        (b"From: app@example.com\r\n" + b"".join(b"A: %s\r\n" % (b"x" * 900) for _ in range(300)), b"552 5.3.4"),
    ],
)
async def test_headers_are_held_to_their_limits_and_their_authors(header: bytes, answer: bytes) -> None:
    async with running(make_node()) as node:
        peer = await node.greeted()
        assert (await submit(peer, header + b"\r\nbody\r\n")).startswith(answer)
        assert len(node.delivery.delivered) == (answer == TAKEN)
        assert (await peer.ask(b"NOOP\r\n")).startswith(b"250")


async def test_a_recipient_that_no_rule_can_match_is_refused_at_rcpt() -> None:
    async with running(make_node()) as node:
        peer = await node.greeted()
        await peer.ask(EHLO)
        await peer.ask(MAIL)
        assert (await peer.ask(b"RCPT TO:<x@elsewhere.example>\r\n")).startswith(b"550 5.4.4")


async def test_a_message_that_no_rule_matches_for_its_size_is_refused_at_the_dot() -> None:
    async with running(make_node()) as node:
        peer = await node.greeted()
        await peer.ask(EHLO)
        await peer.ask(MAIL + b"RCPT TO:<x@example.org>\r\nDATA\r\n", 3)
        assert (await peer.ask(BODY + b".\r\n")).startswith(b"550 5.4.4")
        assert not node.delivery.delivered


async def test_a_recipient_without_route_goes_with_the_others_under_the_empty_next_hop() -> None:
    async with running(make_node()) as node:
        peer = await node.greeted()
        await peer.ask(EHLO)
        await peer.ask(MAIL + RCPT + b"RCPT TO:<x@example.org>\r\nDATA\r\n", 4)
        assert (await peer.ask(BODY + b".\r\n")).startswith(TAKEN)
        keys = [row.queue_key for row in node.delivery.delivered[0][2]]
        assert keys == ["accounts/demo\tproviders/inbox", "accounts/demo\t"]


async def test_mail_with_several_targets_waits_for_the_one_that_delivery_names() -> None:
    node = make_node()
    targets = (Target("providers/inbox"), Target("providers/spare"))
    node.config.set_account(replace(ACCOUNT, rules=(Rule("accounts/demo/routingRules/all", 1, targets),)))
    node.delivery.dead = frozenset({"providers/inbox"})
    async with running(node):
        peer = await node.greeted()
        assert (await submit(peer)).startswith(TAKEN)
        (row,) = node.delivery.delivered[0][2]
        assert row.queue_key == "accounts/demo\tproviders/spare"


async def test_a_denial_counts_from_the_next_mail_on_and_the_transaction_under_way_ends_well() -> None:
    async with running(make_node()) as node:
        peer = await node.greeted()
        await open_data(peer)
        node.config.denials = Denials(version=1, accounts={"accounts/demo": 0})
        assert (await peer.ask(BODY + b".\r\n")).startswith(TAKEN)
        assert (await peer.ask(MAIL)).startswith(b"451 4.7.1")
        node.config.denials = Denials(version=2)
        assert (await peer.ask(MAIL)).startswith(b"250")


async def test_an_account_that_is_gone_or_unbound_sends_no_more() -> None:
    async with running(make_node()) as node:
        peer = await node.greeted()
        await peer.ask(EHLO)
        account = node.config.accounts.pop("accounts/demo")
        assert (await peer.ask(MAIL)).startswith(b"550 5.7.1")
        node.config.accounts["accounts/demo"] = account
        node.config.networks = make_node(networks=()).config.networks
        assert (await peer.ask(MAIL)).startswith(b"550 5.7.1")


async def test_the_configuration_is_pinned_at_mail() -> None:
    async with running(make_node()) as node:
        peer = await node.greeted()
        await open_data(peer)
        node.config.set_account(replace(ACCOUNT, sender_domains=("other.example",), rules=()))
        assert (await peer.ask(BODY + b".\r\n")).startswith(TAKEN)
        assert (await peer.ask(MAIL)).startswith(b"553 5.7.1")


@pytest.mark.parametrize("lines", [1, 9_000], ids=["in memory", "in its file"])
async def test_what_an_account_began_to_send_is_not_taken_for_another_one_of_its_name(lines: int) -> None:
    async with running(make_node()) as node:
        peer = await node.greeted()
        await open_data(peer)
        peer.writer.write(BODY + (b"x" * 98 + b"\r\n") * lines)
        await peer.writer.drain()
        node.config.set_account(replace(ACCOUNT, uid="uid-another"))
        assert (await peer.ask(b".\r\n")).startswith(b"550 5.7.1")
        assert node.counters.messages_enqueued == 0
        assert node.counters.content_bytes == 0
        assert (await submit(peer)).startswith(TAKEN)


async def test_a_refused_spool_is_451_at_mail_and_says_so() -> None:
    async with running(make_node(halted=True)) as node:
        peer = await node.greeted()
        await peer.ask(EHLO)
        assert await peer.ask(MAIL) == b"451 4.3.2 No spool here may take mail, try again later\r\n"


async def test_stale_configuration_is_451_at_mail() -> None:
    async with running(make_node()) as node:
        node.config.stale = True
        peer = await node.greeted()
        await peer.ask(EHLO)
        assert (await peer.ask(MAIL)).startswith(b"451 4.3.2")


async def test_replicated_accounts_are_451_rather_than_less_than_they_ask_for() -> None:
    async with running(make_node()) as node:
        node.config.set_account(replace(ACCOUNT, replicated=True))
        peer = await node.greeted()
        await peer.ask(EHLO)
        assert (await peer.ask(MAIL)).startswith(b"451 4.3.0")


async def test_nothing_is_relayed_without_auth_for_addresses_of_nobody() -> None:
    async with running(make_node(networks=())) as node:
        peer = await node.greeted()
        assert b"AUTH" not in await peer.ask(EHLO)
        assert (await peer.ask(MAIL)).startswith(b"550 5.7.1 Only networks")
        assert (await peer.ask(b"AUTH PLAIN AGEAYg==\r\n")).startswith(b"503 5.5.1")
        assert (await peer.ask(RCPT)).startswith(b"503")


async def test_content_in_memory_is_bounded_for_the_worker() -> None:
    async with running(make_node(max_content_bytes=100_000)) as node:
        first, second = await node.greeted(), await node.greeted()
        await open_data(first)
        first.writer.write(b"From: app@example.com\r\n\r\n" + (b"x" * 98 + b"\r\n") * 990)
        await first.writer.drain()
        await until(lambda: node.counters.content_bytes > 98_000)
        await second.ask(EHLO)
        declared = b"MAIL FROM:<app@example.com> SIZE=50000\r\n"
        assert (await second.ask(declared + RCPT + b"DATA\r\n", 3)).startswith(b"452 4.3.1")
        first.writer.write((b"y" * 98 + b"\r\n") * 990)
        assert (await first.ask(b".\r\n")).startswith(b"452 4.3.1")
        assert node.counters.content_bytes == OPEN, "the recipient of the second"
        assert (await submit(second)).startswith(TAKEN)


async def test_connections_of_an_address_are_capped_and_listed_networks_are_not() -> None:
    admission = Admission(max_connections=4, max_per_address=2)
    async with running(make_node(networks=(), admission=admission)) as node:
        peers = [await node.greeted(), await node.greeted()]
        refused = await node.connect()
        assert (await refused.line()).startswith(b"421 4.7.0")
        assert await refused.end() == b""
        node.config.networks = make_node().config.networks
        peers += [await node.greeted(), await node.greeted()]
        over_total = await node.connect()
        assert (await over_total.line()).startswith(b"421 4.7.0")
        assert node.counters.connections_over_cap == 2
        for peer in (*peers, refused, over_total):
            await peer.close()
        await gone(node)
        assert admission.total == 0
        assert node.counters.sessions_active == 0


async def test_the_bucket_of_an_address_is_asked_before_the_greeting() -> None:
    async with running(make_node(networks=())) as node:
        with_settings(node, address_connections_per_minute=10)
        node.limiter.grant = Grant(allowed=False, wait_s=5.0, refused_key="connections", local=False)
        peer = await node.connect()
        assert (await peer.line()) == b"421 4.7.0 Too many connections, try again in 5 s\r\n"
        assert node.limiter.takes[0][0].tag == "ip:127.0.0.1"
        assert node.admission.total == 0


async def test_an_early_talker_is_refused() -> None:
    node = make_node(networks=())
    with_settings(node, address_connections_per_minute=10)
    node.limiter.gate = asyncio.Event()
    async with running(node):
        peer = await node.connect()
        peer.writer.write(EHLO + MAIL)
        await node.limiter.asked.wait()
        node.limiter.gate.set()
        assert (await peer.end()).startswith(b"554 5.5.1")
        assert node.counters.connections_early_talker == 1


async def expire(node: Node, seconds: float) -> None:
    node.clock.seconds += seconds
    node.ingress.service.wheel.advance()


async def test_a_silent_client_is_closed_after_its_deadline_and_dribbled_octets_gain_no_time() -> None:
    async with running(make_node(networks=())) as node:
        peer = await node.greeted()
        await expire(node, 20)
        assert (await peer.ask(EHLO)).startswith(b"250")
        session = next(iter(node.ingress.service._sessions)).session
        for dribbled in (b"R", b"RS", b"RSE"):
            peer.writer.write(dribbled[-1:])
            await until(partial(buffered, session, dribbled))
            await expire(node, 9)
            assert node.counters.sessions_active == 1
        await expire(node, 9)
        assert (await peer.end()).startswith(b"421 4.4.2")
        assert node.counters.connections_timed_out == 1


async def test_an_authorized_client_may_rest_for_300_s() -> None:
    async with running(make_node()) as node:
        peer = await node.greeted()
        await expire(node, 299)
        assert (await peer.ask(b"NOOP\r\n")).startswith(b"250")
        await expire(node, 302)
        assert (await peer.end()).startswith(b"421 4.4.2")


def buffered(session: Session, octets: bytes) -> bool:
    return session._buffer == octets


def all_received(session: Session, octets: int) -> bool:
    return session.received_bytes == octets


async def test_data_must_keep_its_rate_and_a_large_upload_may_take_long() -> None:
    async with running(make_node()) as node:
        peer = await node.greeted()
        await open_data(peer)
        session = next(iter(node.ingress.service._sessions)).session
        sent = 0
        for _ in range(20):
            peer.writer.write((b"x" * 98 + b"\r\n") * 160)
            sent += 16_000
            await until(partial(all_received, session, sent))
            await expire(node, 31)
        assert node.counters.sessions_active == 1
        peer.writer.write(b"x" * 98 + b"\r\n")
        await expire(node, 31)
        assert (await peer.end()).startswith(b"421 4.4.2 Too slow")


async def test_a_drain_lets_transactions_finish_and_tells_idle_sessions_at_their_next_command() -> None:
    async with running(make_node()) as node:
        idle, silent, busy = await node.greeted(), await node.greeted(), await node.greeted()
        await open_data(busy)
        drain = asyncio.create_task(node.ingress.drain(20))
        await asyncio.sleep(0)
        assert (await idle.ask(b"NOOP\r\n")).startswith(b"421 4.3.2")
        assert (await busy.ask(BODY + b".\r\n")).startswith(TAKEN)
        assert (await busy.ask(MAIL)).startswith(b"421 4.3.2")
        assert (await silent.end()).startswith(b"421 4.3.2")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", node.ports[Mode.PLAIN]), timeout=5).close()
        for peer in (idle, silent, busy):
            await peer.close()
        async with asyncio.timeout(10):
            await drain


async def test_a_flood_of_commands_neither_blocks_others_nor_grows() -> None:
    async with running(make_node()) as node:
        flood, other = await node.greeted(), await node.greeted()
        flood.writer.write(b"RSET\r\n" * 50_000)
        assert (await submit(other)).startswith(TAKEN)
        answer = await flood.end()
        assert answer.count(b"250 2.0.0") == 1_000
        assert answer.endswith(b"421 4.7.0 Too many commands without a message, closing\r\n")


async def test_a_client_that_reads_no_replies_is_read_no_more() -> None:
    async with running(make_node()) as node:
        peer = await node.greeted()
        await peer.ask(EHLO)
        await peer.ask(MAIL)
        session = next(iter(node.ingress.service._sessions))
        peer.reader._transport.pause_reading()  # type: ignore[attr-defined]  # a client that reads nothing
        peer.writer.write(b"RCPT TO:<x@elsewhere.example>\r\n" * 400_000)
        await until(lambda: session._writing_paused)
        assert session._reading_paused
        peer.reset()


async def test_listeners_with_tls_need_a_certificate() -> None:
    node = make_node(timeouts=Timeouts())
    with socket.socket() as bound, pytest.raises(ValueError, match="certificate"):
        node.ingress.start([(bound, Mode.TLS)])
