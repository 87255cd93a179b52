"""The faults of the proxy are what they are said to be, to the octet."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from support.fault_proxy import Fault, FaultProxy, Kind

SAID = b"0123456789"


class _Echo:
    """A server that says back what it hears, and keeps it."""

    def __init__(self) -> None:
        self.heard = b""
        self.ended = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(100):
                self.heard += piece
                writer.write(piece)
                await writer.drain()
        self.ended.set()
        writer.close()


@pytest.fixture
async def echo() -> AsyncIterator[tuple[_Echo, FaultProxy]]:
    made = _Echo()
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    proxy = await FaultProxy(server.sockets[0].getsockname()[1]).start()
    yield made, proxy
    await proxy.stop()
    server.close()


async def say(proxy: FaultProxy, fault: Fault | None, *, wait_s: float = 10.0) -> bytes:
    """What comes back through the proxy until it ends; ConnectionError when it is reset, TimeoutError when it hangs."""
    proxy.plan = lambda: fault
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        writer.write(SAID)
        if fault is None or fault.kind in {Kind.DELAY, Kind.DRIP}:
            return await asyncio.wait_for(reader.readexactly(len(SAID)), wait_s)
        return await asyncio.wait_for(reader.read(), wait_s)
    finally:
        writer.transport.abort()


async def test_without_a_fault_everything_passes(echo: tuple[_Echo, FaultProxy]) -> None:
    assert await say(echo[1], None) == SAID
    await echo[1].ended()
    assert echo[1].passed == [10, 10]


@pytest.mark.parametrize("count", [1, 4, 9])
async def test_a_cut_to_the_server_lets_so_many_octets_pass_and_no_more(
    echo: tuple[_Echo, FaultProxy], count: int
) -> None:
    server, proxy = echo
    assert SAID.startswith(await say(proxy, Fault(Kind.CUT, count)))
    await asyncio.wait_for(server.ended.wait(), 10)
    assert server.heard == SAID[:count]
    assert proxy.struck == 1


@pytest.mark.parametrize("count", [1, 4, 9])
async def test_a_cut_to_the_client_lets_so_many_octets_pass_and_no_more(
    echo: tuple[_Echo, FaultProxy], count: int
) -> None:
    server, proxy = echo
    assert await say(proxy, Fault(Kind.CUT, count, upstream=False)) == SAID[:count]
    assert server.heard == SAID


async def test_a_reset_is_a_reset(echo: tuple[_Echo, FaultProxy]) -> None:
    with pytest.raises(ConnectionResetError):
        await say(echo[1], Fault(Kind.RESET, 5))


async def test_a_half_close_ends_one_direction_and_the_other_goes_on(echo: tuple[_Echo, FaultProxy]) -> None:
    server, proxy = echo
    assert await say(proxy, Fault(Kind.HALF_CLOSE, 6)) == SAID[:6]
    assert server.heard == SAID[:6]


@pytest.mark.parametrize("count", [0, 3])
async def test_a_black_hole_says_nothing_until_it_is_healed(echo: tuple[_Echo, FaultProxy], count: int) -> None:
    server, proxy = echo
    with pytest.raises(TimeoutError):
        await say(proxy, Fault(Kind.BLACK_HOLE, count), wait_s=0.2)
    assert server.heard == SAID[:count]
    await proxy.heal()
    await proxy.ended()
    assert await say(proxy, None) == SAID


@pytest.mark.parametrize("kind", [Kind.DELAY, Kind.DRIP])
async def test_what_is_slow_comes_whole(echo: tuple[_Echo, FaultProxy], kind: Kind) -> None:
    assert await say(echo[1], Fault(kind, seconds=0.001)) == SAID


async def test_a_strike_breaks_what_is_open(echo: tuple[_Echo, FaultProxy]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", echo[1].port)
    writer.write(b"x")
    assert await reader.readexactly(1) == b"x"
    assert await echo[1].strike(Fault(Kind.CUT)) == 1
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()
