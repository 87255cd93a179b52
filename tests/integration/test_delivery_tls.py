"""Sessions with next hops: TLS by policy, AUTH, endpoints and addresses; real handshakes on loopback."""

from __future__ import annotations

import asyncio
import socket
import ssl
import warnings
from pathlib import Path
from typing import Any

import pytest

from dataplane.core.config import Endpoint, SealedValue, TlsPolicy
from dataplane.core.ledger import AttemptEvent
from dataplane.delivery.transports import smtp
from support.delivery import A, Bench, delivery_bench
from support.next_hop import Behaviour, NextHop, next_hop
from support.relay_pki import RelayPki

SECRET = "prs_canary-that-is-in-no-line"
LOGIN: dict[str, Any] = {"username": "relay", "password": SealedValue("test", SECRET.encode())}
ALLOWED = ("127.0.0.0/8", "::1/128")


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> RelayPki:
    return RelayPki(tmp_path_factory.mktemp("pki"))


async def deliver(bench: Bench) -> AttemptEvent:
    bench.config.route_to(A)
    await bench.submit()
    (event,) = await bench.events_come(1)
    return event


def said(hop: NextHop, verb: str) -> bool:
    return any(command.upper().startswith(verb) for command in hop.commands)


async def test_starttls_with_a_verified_certificate_then_auth_then_mail(pki: RelayPki) -> None:
    behaviour = Behaviour(tls=pki.server(), capabilities=("PIPELINING", "AUTH PLAIN"))
    async with next_hop(behaviour) as hop, delivery_bench(allowed=ALLOWED) as bench:
        bench.config.add_provider(
            A, hop.port, host="localhost", tls_policy=TlsPolicy.REQUIRED_VERIFIED, ca_pem=pki.ca_pem, **LOGIN
        )
        event = await deliver(bench)
        assert (event.type.name, event.tls) == ("SENT", "TLSv1.3")
        assert hop.messages[0].tls == "TLSv1.3"
        assert [command.split()[0] for command in hop.commands[:4]] == ["EHLO", "STARTTLS", "EHLO", "AUTH"]


async def test_tls_from_the_first_byte(pki: RelayPki) -> None:
    async with next_hop(implicit_tls=pki.server()) as hop, delivery_bench(allowed=ALLOWED) as bench:
        bench.config.add_provider(
            A,
            hop.port,
            host="localhost",
            implicit_tls=True,
            tls_policy=TlsPolicy.REQUIRED_VERIFIED,
            ca_pem=pki.ca_pem,
        )
        event = await deliver(bench)
        assert (event.type.name, event.tls) == ("SENT", "TLSv1.3")
        assert not said(hop, "STARTTLS")


@pytest.mark.parametrize("fault", ["wrong name", "expired", "unknown CA"])
@pytest.mark.parametrize("implicit", ["implicit", "starttls"])
async def test_a_certificate_that_does_not_verify_gets_neither_credentials_nor_mail(
    pki: RelayPki, tmp_path: Path, fault: str, implicit: str
) -> None:
    context = {
        "wrong name": lambda: pki.server("elsewhere.test"),
        "expired": lambda: pki.server(expired=True),
        "unknown CA": lambda: RelayPki(tmp_path).server(),
    }[fault]()
    behaviour = Behaviour(tls=None if implicit == "implicit" else context)
    async with (
        next_hop(behaviour, implicit_tls=context if implicit == "implicit" else None) as hop,
        delivery_bench(allowed=ALLOWED) as bench,
    ):
        bench.config.add_provider(
            A,
            hop.port,
            host="localhost",
            implicit_tls=implicit == "implicit",
            tls_policy=TlsPolicy.REQUIRED_VERIFIED,
            ca_pem=pki.ca_pem,
            **LOGIN,
        )
        event = await deliver(bench)
        assert event.type.name == "DEFERRED"
        assert event.reply_text.startswith("TLS: ")
        assert not said(hop, "AUTH")
        assert not said(hop, "MAIL")


@pytest.mark.parametrize("policy", [TlsPolicy.OPPORTUNISTIC, TlsPolicy.REQUIRED])
async def test_any_certificate_will_do_where_nothing_is_verified(pki: RelayPki, policy: TlsPolicy) -> None:
    behaviour = Behaviour(tls=pki.server("elsewhere.test", expired=True))
    async with next_hop(behaviour) as hop, delivery_bench(allowed=ALLOWED) as bench:
        bench.config.add_provider(A, hop.port, tls_policy=policy)
        event = await deliver(bench)
        assert (event.type.name, event.tls) == ("SENT", "TLSv1.3")


@pytest.mark.parametrize("policy", [TlsPolicy.REQUIRED, TlsPolicy.REQUIRED_VERIFIED])
async def test_a_stripped_starttls_stops_required_tls(policy: TlsPolicy) -> None:
    async with next_hop() as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port, tls_policy=policy, **LOGIN)
        event = await deliver(bench)
        assert event.type.name == "DEFERRED"
        assert not said(hop, "AUTH")
        assert not said(hop, "MAIL")


async def test_a_broken_handshake_is_followed_by_a_session_in_clear_where_tls_is_opportunistic() -> None:
    # It says 220 to STARTTLS and then speaks no TLS.
    behaviour = Behaviour(capabilities=("PIPELINING", "STARTTLS"))
    async with next_hop(behaviour) as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port, tls_policy=TlsPolicy.OPPORTUNISTIC)
        event = await deliver(bench)
        assert (event.type.name, event.tls) == ("SENT", "")
        assert hop.connections == 2


async def test_a_stalled_handshake_ends_by_its_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smtp, "HANDSHAKE_TIMEOUT_S", 0.1)
    release = asyncio.Event()

    async def stall(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 x\r\n")
        await reader.readline()
        writer.write(b"250-x\r\n250 STARTTLS\r\n")
        await reader.readline()
        writer.write(b"220 go\r\n")
        await release.wait()
        writer.close()

    server = await asyncio.start_server(stall, "127.0.0.1", 0)
    async with delivery_bench() as bench:
        bench.config.add_provider(A, server.sockets[0].getsockname()[1], tls_policy=TlsPolicy.REQUIRED)
        event = await deliver(bench)
        assert event.type.name == "DEFERRED"
    release.set()
    server.close()


async def test_old_tls_is_no_tls(pki: RelayPki) -> None:
    context = pki.server()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    async with next_hop(Behaviour(tls=context)) as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port, tls_policy=TlsPolicy.REQUIRED)
        event = await deliver(bench)
        assert event.type.name == "DEFERRED"
        assert not said(hop, "MAIL")


async def test_refused_credentials_defer_and_no_other_address_is_bothered(pki: RelayPki) -> None:
    echo = f"535 5.7.8 refused {SECRET}\r\n".encode()
    behaviour = Behaviour(tls=pki.server(), capabilities=("AUTH PLAIN",), auth=echo)
    async with next_hop(behaviour) as first, next_hop() as second, delivery_bench(allowed=ALLOWED) as bench:
        bench.config.add_provider(
            A,
            first.port,
            second.port,
            host="localhost",
            tls_policy=TlsPolicy.REQUIRED_VERIFIED,
            ca_pem=pki.ca_pem,
            **LOGIN,
        )
        event = await deliver(bench)
        assert (event.type.name, event.reply_code) == ("DEFERRED", 535)
        assert second.connections == 0
        assert SECRET not in repr(bench.records)
        assert SECRET not in repr(bench.log.lines)


async def test_a_password_that_cannot_be_opened_defers(pki: RelayPki) -> None:
    async with next_hop() as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port, username="relay", password=SealedValue("lost", b"x"))
        event = await deliver(bench)
        assert event.type.name == "DEFERRED"
        assert hop.connections == 0


@pytest.mark.parametrize("greeting", [b"421 busy\r\n", b"554 no\r\n", None])
async def test_the_next_endpoint_is_tried_and_the_failed_one_goes_last_for_a_while(greeting: bytes | None) -> None:
    async with next_hop(Behaviour(greeting=greeting)) as bad, next_hop() as good, delivery_bench() as bench:
        bench.config.add_provider(A, bad.port, good.port, max_messages_per_connection=1, max_connections=1)
        event = await deliver(bench)
        assert event.type.name == "SENT"
        await bench.submit()
        await bench.submit()
        await bench.events_come(3)
        assert (bad.connections, good.connections) == (1, 3)
        bench.clock.advance(61.0)
        await bench.submit()
        await bench.events_come(4)
        assert bad.connections == 2


async def test_one_forbidden_address_forbids_the_endpoint(pki: RelayPki) -> None:
    async with next_hop() as hop, delivery_bench(allowed=()) as bench:
        provider = bench.config.add_provider(A, hop.port)
        assert provider.endpoints == (Endpoint("127.0.0.1", hop.port),)
        event = await deliver(bench)
        assert "may not be dialled" in event.reply_text
        assert hop.connections == 0


async def test_an_address_that_does_not_answer_is_given_up_in_time_and_the_next_one_is_tried() -> None:
    # A listener whose backlog is full answers no more handshakes: a black hole on loopback.
    hole = socket.socket()
    hole.bind(("127.0.0.1", 0))
    hole.listen(0)
    port = hole.getsockname()[1]
    fillers = [socket.socket() for _ in range(4)]
    for filler in fillers:
        filler.setblocking(False)
        filler.connect_ex(("127.0.0.1", port))
    async with next_hop() as hop, delivery_bench(connect_timeout_s=0.2) as bench:
        bench.config.add_provider(A, port, hop.port)
        event = await deliver(bench)
        assert event.type.name == "SENT"
        assert event.remote_host.endswith(f":{hop.port}")
    for opened in (*fillers, hole):
        opened.close()
