"""Log lines of a node: their shape, what is never in them, when they are written, and what is held back."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import logging
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import structlog

import controlplane.telemetry
from dataplane import event_log
from dataplane.event_log import (
    KEPT_BYTES,
    NOISY_PER_S,
    NoiseFilter,
    configure_logging,
    flush_log,
    get_logger,
    name_node,
    set_log_level,
)


class Stream:
    """Keeps each write apart."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []

    def write(self, data: bytes) -> int:
        self.writes.append(data)
        return len(data)

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in b"".join(self.writes).splitlines()]


@pytest.fixture
def stream() -> Iterator[Stream]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = Stream()
    configure_logging("info", "worker-0", stream)
    yield stream
    flush_log()
    configure_logging("info", "")
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_line_is_json_with_event_process_and_fields(stream: Stream) -> None:
    get_logger("worker-0").info("message.accepted", message="m1", account="accounts/demo", recipients=(0, 1))
    (line,) = stream.lines
    assert (line["event"], line["process"], line["message"], line["level"], line["recipients"]) == (
        "message.accepted",
        "worker-0",
        "m1",
        "info",
        [0, 1],
    )
    assert line["time"].endswith("Z")
    assert len(line["time"]) == len("2026-11-20T13:30:48.123456Z")


def test_every_line_names_the_node_as_soon_as_it_is_known(stream: Stream) -> None:
    # A test that ran an agent in this process may have left a name behind.
    name_node("")
    log = get_logger("worker-0")
    log.info("spool.opened")
    name_node("nodes/n1")
    log.info("spool.opened")
    name_node("")
    assert [line.get("node") for line in stream.lines] == [None, "nodes/n1"]


def test_a_line_without_fields_is_json(stream: Stream) -> None:
    get_logger("worker-0").info("drain.ended")
    assert stream.lines[0]["event"] == "drain.ended"


def test_fields_that_may_hold_secrets_and_our_keys_are_not_written(stream: Stream) -> None:
    log = get_logger("worker-0")
    log.info("x", password="hush", content=b"hush", error="AUTH with prs_hushhush failed", token="hush")
    assert b"hush" not in b"".join(stream.writes)
    assert stream.lines[0]["error"] == "AUTH with *** failed"


@pytest.mark.parametrize("value", ["\ud800", 1 << 80, object(), b"\xff", {1: 2}, {"a": "\ud800"}])
def test_a_value_without_a_json_form_costs_neither_the_line_nor_the_caller(stream: Stream, value: object) -> None:
    get_logger("worker-0").info("x", odd=value)
    assert stream.lines[0]["event"] == "x"


def test_a_secret_in_a_value_without_a_json_form_is_not_written(stream: Stream) -> None:
    get_logger("worker-0").info("x", odd="\ud800", password="hush", error="prs_hushhush")
    assert b"hush" not in b"".join(stream.writes)


def test_an_exception_is_written_with_its_trace(stream: Stream) -> None:
    get_logger("worker-0").warning("session.failed", exc_info=ValueError("odd"))
    assert stream.lines[0]["exception"].endswith("ValueError: odd")
    assert "exc_info" not in stream.lines[0]


def test_lines_of_one_turn_of_the_loop_leave_in_one_write(stream: Stream) -> None:
    async def turns() -> list[int]:
        log = get_logger("worker-0")
        log.info("a")
        log.info("b")
        before = len(stream.writes)
        await asyncio.sleep(0)
        after = len(stream.writes)
        log.info("c")
        await asyncio.sleep(0)
        return [before, after, len(stream.writes)]

    assert asyncio.run(turns()) == [0, 1, 2]
    assert [line["event"] for line in stream.lines] == ["a", "b", "c"]


def test_a_warning_is_written_at_once_and_after_what_came_before(stream: Stream) -> None:
    async def turn() -> None:
        log = get_logger("worker-0")
        log.info("a")
        log.warning("b")
        assert [line["event"] for line in stream.lines] == ["a", "b"]

    asyncio.run(turn())


def test_what_is_kept_within_a_turn_is_bounded(stream: Stream) -> None:
    async def turn() -> None:
        log = get_logger("worker-0")
        for _ in range(4):
            log.info("a", text="x" * (KEPT_BYTES // 3))
        assert len(stream.writes) == 1

    asyncio.run(turn())
    flush_log()
    assert len(stream.lines) == 4


def test_lines_that_a_loop_left_behind_are_written_at_the_end(stream: Stream) -> None:
    async def turn() -> None:
        asyncio.get_running_loop().stop()
        get_logger("worker-0").info("last")

    loop = asyncio.new_event_loop()
    task = loop.create_task(turn())
    loop.run_forever()
    loop.close()
    flush_log()
    assert task.done()
    assert [line["event"] for line in stream.lines] == ["last"]


def test_a_thread_beside_the_loop_writes_its_lines_itself(stream: Stream) -> None:
    async def turn() -> None:
        log = get_logger("worker-0")
        log.info("kept")
        thread = threading.Thread(target=log.info, args=("from.thread",))
        thread.start()
        thread.join()
        assert [line["event"] for line in stream.lines] == ["from.thread"]
        await asyncio.sleep(0)

    asyncio.run(turn())
    assert [line["event"] for line in stream.lines] == ["from.thread", "kept"]


class ShortStream(Stream):
    def write(self, data: bytes) -> int:
        return super().write(data[:7])


def test_a_stream_that_takes_a_part_is_given_the_rest() -> None:
    stream = ShortStream()
    configure_logging("info", "worker-0", stream)
    get_logger("worker-0").info("a")
    assert stream.lines[0]["event"] == "a"


class FullStream:
    def write(self, data: bytes) -> int:
        raise OSError(errno.ENOSPC, f"no space for {len(data)} bytes")


@pytest.mark.usefixtures("stream")
def test_a_line_that_cannot_be_written_is_lost_and_raises_nothing() -> None:
    configure_logging("info", "worker-0", FullStream())
    get_logger("worker-0").info("message.accepted", message="m1")
    logging.getLogger("some.library").warning("odd")


@pytest.mark.usefixtures("stream")
def test_a_line_of_the_control_plane_that_cannot_be_written_is_lost_too(monkeypatch: pytest.MonkeyPatch) -> None:
    full = FullStream()
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=full.write, flush=lambda: full.write(b"")))
    controlplane.telemetry.configure_logging("info")
    structlog.get_logger().info("config.acked")
    logging.getLogger("some.library").warning("odd")
    structlog.reset_defaults()


def test_below_the_level_nothing_is_written(stream: Stream) -> None:
    get_logger("worker-0").debug("detail")
    assert stream.writes == []


def test_the_level_changes_for_loggers_that_exist(stream: Stream) -> None:
    log = get_logger("worker-0")
    set_log_level("debug")
    log.debug("seen")
    set_log_level("warning")
    log.info("unseen")
    log.warning("seen.too")
    assert [line["event"] for line in stream.lines] == ["seen", "seen.too"]


def test_a_level_that_is_none_changes_nothing(stream: Stream) -> None:
    with pytest.raises(KeyError):
        set_log_level("loud")
    get_logger("worker-0").info("a")
    assert len(stream.lines) == 1


def test_lines_of_libraries_have_the_same_shape(stream: Stream) -> None:
    logging.getLogger("some.library").warning("odd %s", "thing")
    (line,) = stream.lines
    assert (line["event"], line["library"], line["text"], line["process"]) == (
        "library.log",
        "some.library",
        "odd thing",
        "worker-0",
    )


def test_a_flood_of_a_noisy_event_leaves_a_few_lines_and_a_count(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_log, "SUPPRESSED_AFTER_S", 0.0)
    told = asyncio.Event()
    write = stream.write

    def noticing(data: bytes) -> int:
        if b"log.suppressed" in data:
            told.set()
        return write(data)

    async def flood() -> None:
        log = get_logger("worker-0")
        for _ in range(1000):
            log.info("auth.failed", session="s")
        async with asyncio.timeout(5):
            await told.wait()

    monkeypatch.setattr(stream, "write", noticing)
    asyncio.run(flood())
    written = [line for line in stream.lines if line["event"] == "auth.failed"]
    (suppressed,) = [line for line in stream.lines if line["event"] == "log.suppressed"]
    assert NOISY_PER_S <= len(written) <= 2 * NOISY_PER_S  # the second may have turned
    assert (suppressed["suppressed_event"], suppressed["count"]) == ("auth.failed", 1000 - len(written))


def test_an_event_of_a_message_is_never_held_back(stream: Stream) -> None:
    for _ in range(100):
        get_logger("worker-0").info("message.accepted")
    assert len(stream.lines) == 100


def test_each_noisy_event_has_each_second_for_itself() -> None:
    noise = NoiseFilter()
    assert [noise.passes("auth.failed", 1) for _ in range(NOISY_PER_S + 1)] == [True] * NOISY_PER_S + [False]
    assert noise.passes("message.limited", 1)
    assert noise.passes("auth.failed", 2)
    assert noise.take_suppressed() == {"auth.failed": 1}
    assert noise.take_suppressed() == {}


def test_any_binary_file_can_take_the_lines() -> None:
    file = io.BytesIO()
    configure_logging("info", "worker-0", file)
    get_logger("worker-0").info("a")
    assert json.loads(file.getvalue())["event"] == "a"
