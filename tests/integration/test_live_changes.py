"""A node whose settings change while it runs: by SIGHUP, by the control plane, and what descriptors allow."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cryptography import x509

from support.certificates import write_certificate
from support.node_mail import Connection, Sink, configure, connect, demo_snapshot, listening_sink, send, submit
from support.node_plane import WAIT_S, ControlPlane, Pki, control_plane
from support.node_process import NodeProcess, log_events, running, starting, write_settings

pytestmark = pytest.mark.timeout(180)

ASKED_AT_MOST = 200


@pytest.fixture
async def sink() -> AsyncIterator[Sink]:
    async with listening_sink() as made:
        yield made


@pytest.fixture
async def plane() -> AsyncIterator[ControlPlane]:
    async with control_plane(Pki()) as made:
        yield made


@pytest.fixture
def settings_file(tmp_path: Path, plane: ControlPlane) -> Path:
    plane.pki.write_identity(tmp_path / "data")
    return write_settings(tmp_path, plane.address, ingress={"connections": 2})


@pytest.fixture
async def connections() -> AsyncIterator[list[Connection]]:
    """What a test opens; closed at its end."""
    made: list[Connection] = []
    yield made
    for connection in made:
        connection.close()


async def greeting(node: NodeProcess, connections: list[Connection]) -> bytes:
    """What the next connection is told first."""
    connections.append(await connect(node))
    return (await connections[-1].line())[:4]


async def end(node: NodeProcess, connections: list[Connection]) -> None:
    for connection in connections:
        connection.close()
    assert await node.stop() == 0


async def reload(node: NodeProcess) -> bool:
    """SIGHUP, and whether the settings were taken."""
    node.process.send_signal(signal.SIGHUP)
    return bool((await node.wait_said("node.reloaded"))["ok"])


async def test_sighup_lifts_a_cap_and_ends_no_session(
    settings_file: Path, plane: ControlPlane, sink: Sink, connections: list[Connection]
) -> None:
    async with running(settings_file) as node:
        await configure(plane, sink)
        assert [await greeting(node, connections) for _ in range(3)] == [b"220 ", b"220 ", b"421 "]
        write_settings(
            settings_file.parent, plane.address, ingress={"connections": 3}, log_level="debug", metrics={"port": 1}
        )
        assert await reload(node)
        # Workers are told by a signal of their own and take it when their loop turns.
        for _ in range(ASKED_AT_MOST):
            if await greeting(node, connections) == b"220 ":
                break
        assert (await connections[-1].ask(b"NOOP")).startswith(b"250 ")
        for session in connections[:2]:
            assert (await session.ask(b"NOOP")).startswith(b"250 ")
        assert await greeting(node, connections) == b"421 "
        (told,) = log_events(settings_file, "settings.need_restart")
        assert told["settings"] == ["metrics.port"]
        assert log_events(settings_file, "bounds.in_force")[-1]["log_level"] == "debug"
        await end(node, connections)


async def test_a_file_that_cannot_be_used_changes_nothing_and_keeps_no_worker_from_coming_back(
    settings_file: Path, plane: ControlPlane, sink: Sink
) -> None:
    async with running(settings_file) as node:
        await configure(plane, sink)
        settings_file.write_text("workers: [")
        assert not await reload(node)
        (told,) = log_events(settings_file, "settings.not_reloaded")
        assert str(settings_file) in str(told["error"])
        os.kill(node.ready["processes"]["worker-0"], signal.SIGKILL)
        await node.wait_ready()
        await send(node, "still here")
        assert b"Subject: still here" in await sink.next()
        assert await node.stop() == 0


async def logged(settings_file: Path, event: str, count: int = 1) -> None:
    """Wait until so many lines of this event are in the log."""
    async with asyncio.timeout(WAIT_S):
        while len(log_events(settings_file, event)) < count:  # noqa: ASYNC110 - a file of another process
            await asyncio.sleep(0.001)


def served_name(port: int, offered: ssl.SSLContext) -> str:
    """The name in the certificate that a new connection is shown."""
    with (
        socket.create_connection(("127.0.0.1", port), WAIT_S) as plain,
        offered.wrap_socket(plain) as client,
    ):
        shown = client.getpeercert(binary_form=True)
    assert shown is not None
    return str(x509.load_der_x509_certificate(shown).subject.rfc4514_string())


async def test_sighup_takes_a_renewed_certificate_and_goes_on_with_the_old_one_where_it_cannot_be_used(
    settings_file: Path, plane: ControlPlane
) -> None:
    folder = settings_file.parent
    certificate, key = write_certificate(folder, "first.example")
    write_settings(
        folder,
        plane.address,
        listeners=[{"address": "127.0.0.1", "port": 0, "mode": "tls"}],
        tls={"certificate_file": str(certificate), "key_file": str(key)},
    )
    offered = ssl.create_default_context()
    offered.check_hostname, offered.verify_mode = False, ssl.CERT_NONE
    async with running(settings_file) as node:
        # As by who renews: the certificate first, and the key when somebody has looked in between.
        (folder / "renewed").mkdir()
        renewed, its_key = write_certificate(folder / "renewed", "second.example")
        certificate.write_bytes(renewed.read_bytes())
        assert await reload(node)
        await logged(settings_file, "certificate.unusable")
        key.write_bytes(its_key.read_bytes())
        assert await reload(node)
        await logged(settings_file, "certificate.replaced")
        assert await asyncio.to_thread(served_name, node.smtp_port, offered) == "CN=second.example"
        certificate.write_text("no certificate")
        assert await reload(node)
        await logged(settings_file, "certificate.unusable", 2)
        assert await asyncio.to_thread(served_name, node.smtp_port, offered) == "CN=second.example"
        assert await node.stop() == 0


async def test_sighup_ends_no_process_that_is_still_starting(settings_file: Path) -> None:
    async with starting(settings_file) as node:
        await logged(settings_file, "process.started", 2)
        assert await reload(node)
        await node.wait_ready()
        assert not log_events(settings_file, "process.ended")
        assert await node.stop() == 0


async def test_a_worker_that_starts_after_a_change_starts_with_it(
    settings_file: Path, plane: ControlPlane, connections: list[Connection]
) -> None:
    async with running(settings_file) as node:
        write_settings(settings_file.parent, plane.address, workers=2, ingress={"connections": 1})
        assert await reload(node)
        os.kill(node.ready["processes"]["worker-0"], signal.SIGKILL)
        await node.wait_ready()
        assert set(node.ready["processes"]) == {"agent", "worker-0"}
        assert [await greeting(node, connections) for _ in range(2)] == [b"220 ", b"421 "]
        await end(node, connections)


async def test_the_control_plane_changes_caps_and_log_level_over_the_nodes_settings(
    settings_file: Path, plane: ControlPlane, sink: Sink, connections: list[Connection]
) -> None:
    async with running(settings_file) as node:
        stream = await configure(plane, sink)
        assert [await greeting(node, connections) for _ in range(3)] == [b"220 ", b"220 ", b"421 "]
        # Acknowledged is what every worker has in use.
        stream.send(demo_snapshot(sink.port, "n2", max_connections=3, log_level="error"))
        await stream.ack("n2")
        assert [await greeting(node, connections) for _ in range(2)] == [b"220 ", b"421 "]
        stream.send(demo_snapshot(sink.port, "n3", max_connections=4, log_level="error"))
        await stream.ack("n3")
        assert await greeting(node, connections) == b"220 "
        for session in connections[:2]:
            assert (await session.ask(b"NOOP")).startswith(b"250 ")
        stream.send(demo_snapshot(sink.port, "n4"))
        await stream.ack("n4")
        stream.send(demo_snapshot(sink.port, "n5", log_level="info"))
        await stream.ack("n5")
        await end(node, connections)
    # Both were silent about n2 and n3, and spoke again.
    assert len(log_events(settings_file, "config.applied")) == 3
    assert len(log_events(settings_file, "config.in_use")) == 3


async def test_connections_that_descriptors_do_not_suffice_for_are_refused_before_the_system_refuses(
    settings_file: Path, plane: ControlPlane, sink: Sink, connections: list[Connection]
) -> None:
    write_settings(settings_file.parent, plane.address)
    async with running(settings_file, descriptors=128) as node:
        await configure(plane, sink)
        greetings = [await greeting(node, connections) for _ in range(160)]
        served = greetings.index(b"421 ")
        assert set(greetings[:served]) == {b"220 "}
        assert set(greetings[served:]) == {b"421 "}
        (lowered,) = log_events(settings_file, "connections.lowered")
        assert lowered["connections"] == served
        assert not log_events(settings_file, "listener.paused")
        for connection in connections:
            connection.close()
        for _ in range(ASKED_AT_MOST):
            if await greeting(node, connections) == b"220 ":
                break
        await submit(connections[-1], "room again")
        assert b"Subject: room again" in await sink.next()
        await end(node, connections)
