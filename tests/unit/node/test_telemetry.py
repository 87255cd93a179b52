"""Logs never hold secrets, and metrics are what METRICS says."""

from __future__ import annotations

import errno
import io
import json
import logging
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import structlog

import controlplane.telemetry
from dataplane.telemetry import METRICS, configure_logging, get_logger, render


@pytest.fixture
def lines() -> Iterator[io.BytesIO]:
    stream = io.BytesIO()
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    configure_logging("info", "worker-0", stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def fail(*_: object) -> int:
    raise OSError(errno.ENOSPC, "no space left on device")


def configure_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(buffer=SimpleNamespace(write=fail, flush=fail)))
    configure_logging("info", "worker-0")


def configure_control_plane(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=fail, flush=fail))
    controlplane.telemetry.configure_logging("info")


def test_a_line_is_json_with_event_process_and_fields(lines: io.BytesIO) -> None:
    get_logger("worker-0").info("message.accepted", message="m1", account="accounts/demo")
    line = json.loads(lines.getvalue())
    assert (line["event"], line["process"], line["message"], line["level"]) == (
        "message.accepted",
        "worker-0",
        "m1",
        "info",
    )
    assert line["time"].endswith("Z")


def test_fields_that_may_hold_secrets_and_our_keys_are_not_written(lines: io.BytesIO) -> None:
    log = get_logger("worker-0")
    log.info("x", password="hush", content=b"hush", error="AUTH with prs_hushhush failed", token="hush")
    assert b"hush" not in lines.getvalue()
    assert json.loads(lines.getvalue())["error"] == "AUTH with *** failed"


@pytest.mark.usefixtures("lines")
@pytest.mark.parametrize("configure", [configure_node, configure_control_plane])
def test_a_line_that_cannot_be_written_is_lost_and_raises_nothing(
    configure: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch)
    structlog.get_logger().info("message.accepted", message="m1")
    logging.getLogger("some.library").warning("odd")


def test_below_the_level_nothing_is_written(lines: io.BytesIO) -> None:
    get_logger("worker-0").debug("detail")
    assert lines.getvalue() == b""


def test_lines_of_libraries_have_the_same_shape(lines: io.BytesIO) -> None:
    logging.getLogger("some.library").warning("odd %s", "thing")
    line = json.loads(lines.getvalue())
    assert (line["event"], line["library"], line["text"]) == ("library.log", "some.library", "odd thing")


def test_samples_of_several_workers_are_added_and_some_gauges_take_the_greatest() -> None:
    text = render(
        [
            ("smtp_connections_total", ("accepted",), 2),
            ("smtp_connections_total", ("accepted",), 3),
            ("event_loop_lag_seconds", (), 0.5),
            ("event_loop_lag_seconds", (), 0.25),
        ]
    ).decode()
    assert 'smtp_connections_total{status="accepted"} 5.0' in text
    assert "event_loop_lag_seconds 0.5" in text
    assert "queue_depth" not in text


def test_a_sample_that_is_no_metric_of_ours_is_a_bug() -> None:
    with pytest.raises(KeyError):
        render([("no_such_metric", (), 1)])


def test_every_metric_can_be_exported() -> None:
    text = render([(spec.name, ("x",) * len(spec.labels), 1) for spec in METRICS]).decode()
    for spec in METRICS:
        assert f"# TYPE {spec.name} {spec.kind}" in text
