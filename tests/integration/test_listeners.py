"""Listening sockets when descriptors run out, and when the worker ends."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dataplane.ingress import listeners
from dataplane.ingress.listeners import Mode
from support.ingress import make_node, until


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    """In here this process gets no new descriptor: EMFILE."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def first_line(client: socket.socket) -> bytes:
    with client.makefile("rb") as file:
        return file.readline()


async def test_accepting_goes_on_after_descriptors_ran_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners, "_PAUSE_S", 0.01)
    node = make_node()
    bound = socket.create_server(("127.0.0.1", 0))
    clients = [socket.create_connection(bound.getsockname(), 10) for _ in range(3)]
    with no_more_descriptors():
        node.ingress.start([(bound, Mode.PLAIN)])
        await until(lambda: node.log.events().count("listener.paused") > 1)
        assert node.counters.sessions_active == 0
    greetings = [await asyncio.to_thread(first_line, client) for client in clients]
    assert all(greeting.startswith(b"220 ") for greeting in greetings)
    for client in clients:
        client.close()
    await node.ingress.drain(0.2)


async def test_who_waits_when_a_worker_ends_is_answered() -> None:
    node = make_node()
    bound = socket.create_server(("127.0.0.1", 0))
    address = bound.getsockname()
    node.ingress.start([(bound, Mode.PLAIN)])
    # The loop does not turn between these two lines: nobody was accepted.
    clients = [socket.create_connection(address, 10) for _ in range(2)]
    await node.ingress.drain(0.2)
    assert [first_line(client)[:10] for client in clients] == [b"421 4.3.2 "] * 2
    for client in clients:
        client.close()
