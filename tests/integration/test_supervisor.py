"""A node as processes: ports, locks, restarts, drains, and mail from end to end without the rest of the system."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import smtplib
import socket
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import apsw
import pytest

from dataplane.data_dir import LONGEST_DATA_DIR_BYTES, DataDirError, lock_data_dir, prepare_data_dir
from dataplane.listening_sockets import bind_listeners
from dataplane.settings import ListenerSettings, Settings
from dataplane.spool_folders import assign_spools
from dataplane.supervisor import READY_FILE, Child, Supervisor
from postroad.config.v1.denials_pb2 import Denial, DenialSet
from postroad.node.v1.config_stream_service_pb2 import (
    Command,
    Denials,
    Directive,
    StreamConfigResponse,
)
from postroad.node.v1.ledger_pb2 import RECIPIENT_STATE_SENT, LedgerRecord
from support.ingress import Log
from support.node_mail import Sink, configure, connected, listening_sink, send
from support.node_plane import WAIT_S, ControlPlane, Pki, control_plane
from support.node_process import log_events, running, starting, wait_gone, write_settings

pytestmark = pytest.mark.timeout(120)


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
    return write_settings(tmp_path, plane.address)


async def test_mail_goes_through_a_node_and_is_reported(settings_file: Path, plane: ControlPlane, sink: Sink) -> None:
    async with running(settings_file) as node:
        await configure(plane, sink)
        await send(node, "first")
        assert b"Subject: first" in await sink.next()
        (spool,) = [folder.name for folder in (node.data_dir / "spool").iterdir()]
        (encoded,) = await plane.wait_for_records(spool, 1)
        record = LedgerRecord.FromString(encoded)
        assert record.accepted.recipients == ["someone@example.net"]
        assert [update.state for update in record.recipients] == [RECIPIENT_STATE_SENT]
        assert await node.stop() == 0
    assert not (node.data_dir / "run" / "ready.json").exists()


async def test_a_node_starts_and_delivers_without_its_control_plane(
    settings_file: Path, plane: ControlPlane, sink: Sink
) -> None:
    async with running(settings_file) as node:
        await configure(plane, sink)
        await node.stop()
    await plane.stop()
    async with running(settings_file) as node:
        await send(node, "alone")
        assert b"Subject: alone" in await sink.next()
        assert await node.stop() == 0
    await plane.start(plane.port)


async def test_denials_stop_submission_at_the_next_mail(settings_file: Path, plane: ControlPlane, sink: Sink) -> None:
    async with running(settings_file) as node:
        stream = await configure(plane, sink)
        denied = DenialSet(version=1, denials=[Denial(account="accounts/demo")])
        stream.send(StreamConfigResponse(denials=Denials(nonce="d1", denials=denied)))
        await stream.ack("d1")
        with pytest.raises(smtplib.SMTPSenderRefused):
            await send(node, "never")
        await node.stop()


async def test_a_killed_worker_and_a_killed_agent_are_started_again(
    settings_file: Path, plane: ControlPlane, sink: Sink
) -> None:
    async with running(settings_file) as node:
        await configure(plane, sink)
        for name in ("worker-0", "agent"):
            before = node.ready
            os.kill(before["processes"][name], signal.SIGKILL)
            await node.wait_ready()
            assert node.ready["processes"][name] != before["processes"][name]
            assert node.ready["listeners"] == before["listeners"]
            await send(node, name)
            assert f"Subject: {name}".encode() in await sink.next()
        assert await node.stop() == 0


async def test_a_node_goes_on_where_its_ready_file_cannot_be_written_and_writes_it_as_soon_as_it_can(
    settings_file: Path, plane: ControlPlane, sink: Sink
) -> None:
    async with running(settings_file) as node:
        await configure(plane, sink)
        ready_file = node.data_dir / READY_FILE
        # What a full disk does, told to root as well: the file that would replace it cannot be opened.
        (in_the_way := ready_file.with_suffix(".new")).mkdir()
        former = node.ready["processes"]["worker-0"]
        os.kill(former, signal.SIGKILL)
        await node.wait_ready()
        await send(node, "after")
        assert b"Subject: after" in await sink.next()
        assert json.loads(ready_file.read_text())["processes"]["worker-0"] == former
        in_the_way.rmdir()
        async with asyncio.timeout(WAIT_S):
            while json.loads(ready_file.read_text()) != node.ready:  # noqa: ASYNC110 - a file of another process
                await asyncio.sleep(0.02)
        assert await node.stop() == 0


def plain_settings(data_dir: Path) -> Settings:
    listener = ListenerSettings(address="127.0.0.1", port=0, mode="plain")
    return Settings(data_dir=data_dir, hostname="h", listeners=(listener,))


def test_a_process_that_cannot_be_started_now_is_started_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "too many processes")

    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    monkeypatch.setattr(subprocess, "Popen", refuse)
    supervisor = Supervisor(plain_settings(Path("/x")), Path(), None, Log())
    before = descriptors()
    child = Child("agent", ["agent"])
    supervisor._try_to_start(child)
    assert child.process is None
    assert child.start_due is not None
    assert child.start_due > 0
    assert descriptors() == before


def test_who_waits_for_a_worker_that_is_left_out_is_told_so_and_not_before_its_spool_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = plain_settings(tmp_path)
    supervisor = Supervisor(settings, Path(), None, Log())
    ((bound,),) = bind_listeners(settings.listeners, 1)
    worker = Child("worker-0", ["worker"], [bound], spools=["gone"])
    supervisor._workers = [worker, Child("worker-1", ["worker"], spools=["other"])]
    for _ in range(3):
        supervisor._plan_restart(worker, 1.0)
    assert (worker.given_up, worker.start_due is not None) == (False, True)
    (tmp_path / "spool" / "gone").mkdir(parents=True)
    address = bound.getsockname()
    with socket.create_connection(address, WAIT_S) as waiting:
        supervisor._plan_restart(worker, 1.0)
        assert worker.given_up
        assert waiting.makefile("rb").read().startswith(b"421 4.3.2 ")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, WAIT_S).close()


async def test_nobody_outlives_a_killed_supervisor_and_the_node_starts_again_at_once(
    settings_file: Path, plane: ControlPlane, sink: Sink
) -> None:
    async with running(settings_file) as node:
        await configure(plane, sink)
        children = node.ready["processes"].values()
        await node.stop(signal.SIGKILL)
        for pid in children:
            await wait_gone(pid)
    fixed = [{"address": "127.0.0.1", "port": node.smtp_port, "mode": "plain"}]
    write_settings(settings_file.parent, plane.address, listeners=fixed)
    async with running(settings_file) as node:
        await node.stop(signal.SIGKILL)
        async with running(settings_file) as again:
            await send(again, "again")
            assert b"Subject: again" in await sink.next()
            assert await again.stop() == 0


async def failure(settings_file: Path) -> tuple[int, str]:
    async with starting(settings_file) as node:
        code = await node.ended()
    return code, (settings_file.parent / "node.log").read_text()


async def test_a_taken_port_is_a_clear_error(settings_file: Path, plane: ControlPlane) -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as other:
        port = other.getsockname()[1]
        write_settings(
            settings_file.parent,
            plane.address,
            listeners=[{"address": "127.0.0.1", "port": port, "mode": "plain"}],
        )
        code, said = await failure(settings_file)
    assert code == 69
    assert f"cannot listen on 127.0.0.1 port {port}" in said
    # Beside what it logs: a user whose limit of descriptors is low is told that it was raised.
    assert len([line for line in said.splitlines() if not line.startswith("{")]) == 1


async def test_a_second_node_in_the_same_folder_is_refused(settings_file: Path) -> None:
    async with running(settings_file) as node:
        async with starting(settings_file) as second:
            assert await second.ended() == 69
        assert "in use by another node" in (settings_file.parent / "node.log").read_text()
        await node.stop()


async def test_a_node_that_is_not_enrolled_is_told_so(tmp_path: Path) -> None:
    code, said = await failure(write_settings(tmp_path, "127.0.0.1:1"))
    assert code == 78
    assert "enroll --token" in said


async def test_damaged_last_known_good_does_not_keep_a_node_from_coming_back(
    settings_file: Path, plane: ControlPlane, sink: Sink
) -> None:
    async with running(settings_file) as node:
        await configure(plane, sink)
        await node.stop()
    file = node.data_dir / "last-known-good" / "config"
    file.write_bytes(file.read_bytes()[:-7])
    async with running(settings_file) as node:
        await configure(plane, sink)
        await send(node, "after damage")
        assert b"Subject: after damage" in await sink.next()
        await node.stop()
    events = [json.loads(line)["event"] for line in (settings_file.parent / "node.log").read_text().splitlines()]
    assert "config.unreadable" in events


def test_every_worker_gets_a_socket_of_its_own_on_the_same_port() -> None:
    listeners = [ListenerSettings(port=0, mode="plain"), ListenerSettings(port=0, mode="plain")]
    by_worker = bind_listeners(listeners, 3)
    try:
        ports = [[bound.getsockname()[1] for bound in sockets] for sockets in by_worker]
        assert ports[0] == ports[1] == ports[2]
        assert len(set(ports[0])) == 2
    finally:
        for bound in (bound for sockets in by_worker for bound in sockets):
            bound.close()


def test_a_data_directory_is_locked_until_its_holder_ends(tmp_path: Path) -> None:
    descriptor = lock_data_dir(tmp_path)
    with pytest.raises(DataDirError, match="another node"):
        lock_data_dir(tmp_path)
    os.close(descriptor)
    os.close(lock_data_dir(tmp_path))


def test_a_data_directory_that_lies_too_deep_for_the_spool_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["deep" * 20] * 5)
    assert len(os.fsencode(deep)) > LONGEST_DATA_DIR_BYTES
    with pytest.raises(DataDirError, match="shorter data_dir"):
        prepare_data_dir(deep)
    assert not list(tmp_path.iterdir())


async def test_a_worker_that_cannot_keep_going_is_left_out_and_the_others_serve(
    settings_file: Path, plane: ControlPlane, sink: Sink
) -> None:
    write_settings(settings_file.parent, plane.address, workers=2)
    (bad,), (good,) = assign_spools(settings_file.parent / "data" / "spool", 2)
    (settings_file.parent / "data" / "spool" / bad / "identity").write_text("of somebody else")
    async with running(settings_file) as node:
        assert node.ready["quarantined"] == [bad]
        assert set(node.ready["processes"]) == {"agent", "worker-1"}
        await configure(plane, sink)
        for number in range(5):
            await send(node, f"message {number}")
            assert f"Subject: message {number}".encode() in await sink.next()
        await plane.wait_for_records(good, 5)
        assert list(plane.records) == [good]
        assert await node.stop() == 0


async def test_an_idle_session_is_told_at_a_drain(settings_file: Path, plane: ControlPlane, sink: Sink) -> None:
    async with running(settings_file) as node:
        await configure(plane, sink)
        async with connected(node) as (reader, _):
            assert (await reader.readline()).startswith(b"220")
            node.process.send_signal(signal.SIGTERM)
            assert (await reader.readline()).startswith(b"421")
        assert await node.ended() == 0


async def test_a_second_signal_does_not_wait_for_a_message_in_progress(
    settings_file: Path, plane: ControlPlane, sink: Sink
) -> None:
    async with running(settings_file) as node:
        await configure(plane, sink)
        async with connected(node) as (reader, writer):
            for line in (b"EHLO client.example", b"MAIL FROM:<app@example.com>", b"RCPT TO:<x@example.net>", b"DATA"):
                while (await reader.readline())[3:4] == b"-":
                    pass
                writer.write(line + b"\r\n")
            assert (await reader.readline()).startswith(b"354")
            node.process.send_signal(signal.SIGTERM)
            await node.wait_said("node.draining")
            node.process.send_signal(signal.SIGTERM)
            assert await node.ended() == 0


async def fetch(port: int, path: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}{path}") as response:
        return response.status, await response.text()


async def until_missing(port: int, missing: list[str]) -> None:
    """Return when the node says that it lacks this; a worker that was started anew is unknown for a moment."""
    async with asyncio.timeout(WAIT_S):
        while True:
            status, text = await fetch(port, "/readyz")
            if json.loads(text) == {"ready": not missing, "missing": missing}:
                assert status == (503 if missing else 200)
                return


async def test_a_metrics_port_that_is_taken_is_said_in_one_line_that_names_the_setting(
    tmp_path: Path, plane: ControlPlane
) -> None:
    plane.pki.write_identity(tmp_path / "data")
    prepare_data_dir(tmp_path / "data")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings_file = write_settings(tmp_path, plane.address, metrics={"port": port})
        agent = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "dataplane", "agent", "--config", settings_file),
            cwd=tmp_path,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(WAIT_S):
            _, said = await agent.communicate()
    assert agent.returncode == 69
    line = json.loads(said.splitlines()[-1])
    assert (line["event"], line["process"]) == ("process.ends", "agent")
    assert line["error"] == (
        f"cannot listen on 127.0.0.1 port {port}: Address already in use: stop what uses it, or change `metrics.port`"
    )
    assert all(line.startswith(b"{") for line in said.splitlines())


async def test_a_refused_spool_sends_and_takes_nothing_until_it_is_accepted(
    settings_file: Path, plane: ControlPlane, sink: Sink
) -> None:
    async with running(settings_file) as node:
        stream = await configure(plane, sink)
        (spool,) = [folder.name for folder in (node.data_dir / "spool").iterdir()]
        refuse = Directive(action=Directive.ACTION_REFUSE_SPOOL, spool=spool)
        stream.send(StreamConfigResponse(directive=refuse))
        await node.wait_ready()
        with pytest.raises(smtplib.SMTPSenderRefused) as refused:
            await send(node, "never")
        assert (refused.value.smtp_code, refused.value.smtp_error) == (
            *(451, b"4.3.2 No spool here may take mail, try again later"),
        )
        missing = "a spool that may take mail: all those of 1 of 1 workers are refused"
        await until_missing(node.metrics_port, [missing])
        assert "\nconfig_stale 0.0" in (await fetch(node.metrics_port, "/metrics"))[1]
        (said,) = log_events(settings_file, "process.ends")
        assert said["error"] == f"the control plane refused spool {spool}"
        log = (settings_file.parent / "node.log").read_text(encoding="utf-8")
        assert all(line.startswith("{") for line in log.splitlines())
        accept = Directive(action=Directive.ACTION_ACCEPT_SPOOL, spool=spool)
        stream.send(StreamConfigResponse(directive=accept))
        await node.wait_ready()
        await send(node, "taken again")
        assert b"Subject: taken again" in await sink.next()
        await until_missing(node.metrics_port, [])
        assert await node.stop() == 0


async def test_what_a_damaged_spool_lost_is_named_in_the_log_and_in_the_status(
    settings_file: Path, plane: ControlPlane, sink: Sink
) -> None:
    async with running(settings_file) as node:
        await configure(plane, sink)
        sink.reply = "451 later"
        await send(node, "kept")
        await send(node, "lost")
        (spool,) = [folder.name for folder in (node.data_dir / "spool").iterdir()]
        records = await plane.wait_for_records(spool, 2)
        assert await node.stop() == 0
    decoded = map(LedgerRecord.FromString, records)
    (lost,) = [record.message_id for record in decoded if record.accepted.subject == "lost"]
    folder = node.data_dir / "spool" / spool
    connection = apsw.Connection(str(folder / "spool.db"))
    connection.execute("UPDATE message SET checksum = checksum + 1 WHERE id = ?", (lost,))
    connection.close()
    (folder / "failed").write_text("somebody doubts it")
    async with running(settings_file) as node:
        stream = await plane.next_stream()
        while not (status := (await stream.next()).status_report).spools:
            pass
        (reported,) = status.spools
        assert list(reported.lost_messages) == [str(uuid.UUID(bytes=lost))]
        assert (reported.lost_count, reported.unnamed_losses, reported.refused) == (1, False, False)
        (logged,) = log_events(settings_file, "spool.salvaged")
        assert (logged["kept"], logged["lost_messages"]) == (1, [str(uuid.UUID(bytes=lost))])
        await node.stop()


async def test_waiting_mail_is_cancelled_by_a_command(settings_file: Path, plane: ControlPlane, sink: Sink) -> None:
    async with running(settings_file) as node:
        stream = await configure(plane, sink)
        sink.reply = "451 later"
        await send(node, "cancelled")
        await sink.next()
        (spool,) = [folder.name for folder in (node.data_dir / "spool").iterdir()]
        (encoded,) = await plane.wait_for_records(spool, 1)
        message_id = LedgerRecord.FromString(encoded).message_id
        command = Command(
            command="c1", spool=spool, verb=Command.VERB_CANCEL, account="accounts/demo", message_ids=[message_id]
        )
        stream.send(StreamConfigResponse(command=command))
        async with asyncio.timeout(WAIT_S):
            count = 1
            while not (results := command_results(await plane.wait_for_records(spool, count))):
                count += 1
        assert results[0].command == "c1"
        assert await node.stop() == 0


def command_results(records: list[bytes]) -> list[Any]:
    decoded = map(LedgerRecord.FromString, records)
    return [record.command_result for record in decoded if record.HasField("command_result")]
