"""Many connections that say nothing, or little: what they cost, who is served beside them, and how they end."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from typing import cast

import pytest

from dataplane.adapters.spool_null import NullSpool
from dataplane.ingress.admission import Admission
from dataplane.ingress.protocol import SmtpProtocol, Timeouts
from support.ingress import Node, make_node, running, until

MANY = 1_000
# Of this code alone; transport and socket are uvloop's and the kernel's (`python -m benchmarks.idle` counts all).
MOST_BYTES_EACH = 2 * 1024
GROUP = b"MAIL FROM:<app@example.com>\r\nRCPT TO:<someone@example.net>\r\nDATA\r\n"
BODY = b"From: App <app@example.com>\r\n\r\nbody\r\n.\r\n"


class QuietTransport:
    """A transport to nowhere."""

    def write(self, data: bytes) -> None:
        return

    def pause_reading(self) -> None:
        return

    def resume_reading(self) -> None:
        return

    def is_closing(self) -> bool:
        return False

    def get_extra_info(self, name: str) -> object:
        return None


def open_sessions(node: Node, count: int) -> list[SmtpProtocol]:
    service, transport = node.ingress.service, cast("asyncio.Transport", QuietTransport())
    sessions = []
    for _ in range(count):
        submitter = service.submission.submitter("127.0.0.1")
        session = SmtpProtocol(service, submitter, service.limits, tls_available=True, tls_active=False)
        node.admission.admit("127.0.0.1", counted=True)
        session.connection_made(transport)
        sessions.append(session)
    return sessions


async def test_a_session_that_waits_holds_little_before_and_after_a_message() -> None:
    node = make_node(spool=NullSpool(), admission=Admission(100_000, 100_000))
    node.config.settings = node.config.settings.__class__(
        address_connections_per_minute=0, account_messages_per_hour=0, credential_messages_per_hour=0
    )
    warm_up = open_sessions(node, 10)
    for session in warm_up:
        session.data_received(b"EHLO client.example\r\n" + GROUP)
        session.data_received(BODY)
    await until(lambda: node.counters.messages_enqueued == len(warm_up))
    tracemalloc.start()
    try:
        gc.collect()
        before_bytes = tracemalloc.get_traced_memory()[0]
        sessions = open_sessions(node, MANY)
        for session in sessions:
            session.data_received(b"EHLO client.example\r\n")
        gc.collect()
        greeted_bytes = tracemalloc.get_traced_memory()[0] - before_bytes
        for session in sessions:
            session.data_received(GROUP)
            session.data_received(BODY)
        await until(lambda: node.counters.messages_enqueued == len(warm_up) + MANY)
        node.delivery.delivered.clear()
        node.log.lines.clear()
        gc.collect()
        waiting_bytes = tracemalloc.get_traced_memory()[0] - before_bytes
    finally:
        tracemalloc.stop()
    assert greeted_bytes / MANY < MOST_BYTES_EACH
    assert waiting_bytes / MANY < MOST_BYTES_EACH
    for session in [*warm_up, *sessions]:
        session.connection_lost(None)
    assert node.counters.content_bytes == 0


@pytest.mark.timeout(120)
async def test_who_says_nothing_is_ended_after_its_time_and_others_are_served_meanwhile() -> None:
    node = make_node(networks=(), admission=Admission(10_000, 10_000), timeouts=Timeouts(command_before_auth_s=30.0))
    async with running(node):
        idle = [await node.greeted() for _ in range(300)]
        dribbling = [await node.greeted() for _ in range(100)]
        wheel = node.ingress.service.wheel
        for _ in range(2):
            node.clock.seconds += 14.0
            for peer in dribbling:
                # An octet now and then is no command: it gains no time.
                peer.writer.write(b"E")
            wheel.advance()
            fresh = await node.greeted()
            assert (await fresh.ask(b"EHLO client.example\r\n")).startswith(b"250")
            assert (await fresh.ask(b"QUIT\r\n")).startswith(b"221")
            await fresh.close()
        assert node.counters.connections_timed_out < 1
        node.clock.seconds += 3.0
        wheel.advance()
        for peer in [*idle, *dribbling]:
            assert (await peer.line()).startswith(b"421 4.4.2")
        assert node.counters.connections_timed_out >= 400
        for peer in [*idle, *dribbling]:
            await peer.close()
        await until(lambda: node.counters.sessions_active == 0)
        assert node.admission.total == 0


async def test_a_content_that_dribbles_is_ended_and_its_memory_given_back() -> None:
    async with running(make_node()) as node:
        peer = await node.greeted()
        await peer.ask(b"EHLO client.example\r\n")
        assert (await peer.ask(GROUP, 3)).startswith(b"354")
        peer.writer.write(b"From: app@example.com\r\n\r\n" + b"x" * 100 + b"\r\n")
        await until(lambda: node.counters.content_bytes > 0)
        wheel = node.ingress.service.wheel
        node.clock.seconds += 31.0
        wheel.advance()
        assert (await peer.line()).startswith(b"421 4.4.2 Too slow")
        await until(lambda: node.counters.content_bytes == 0)
