"""Log lines of a node: one JSON object a line, prepared in one step and written with the others of its loop turn.

Contract. `configure_logging` sends our lines and those of libraries to standard error; `get_logger` gives the EventLog
of a process; `set_log_level` changes the level of every logger at once, `name_node` puts the node's name into all
lines. A field that by its name may hold a secret or
content is not written, and what looks like one of our keys is struck out. A line below the level costs a comparison.

    info and below, on a running loop   kept until the turn of the loop ends, then one write for all of them
    warning and above, or 64 KiB kept   written at once, with what was kept before it
    without a loop, in another thread   written at once
    an event of NOISY                   at most NOISY_PER_S lines a second, then one `log.suppressed` with the count

Nothing here raises. A line that cannot be written (the disk is full, the reader of a pipe left) is lost; so are, when
the process is killed, the lines of the turn that it died in: logs are not the record.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import re
import sys
import time
import traceback
from threading import get_ident
from typing import Protocol

import orjson

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
NOISY = frozenset(
    {
        "auth.failed",
        "connection.failed",
        "connection.refused",
        "delivery.dial_broken",
        "delivery.settle_failed",
        "delivery.slot_lost",
        "delivery.spool_read_failed",
        "listener.paused",
        "message.limited",
        "message.repeated",
        "message.not_stored",
        "queue.unreadable",
        "session.failed",
    }
)
NOISY_PER_S = 10
SUPPRESSED_AFTER_S = 1.0
KEPT_BYTES = 64 * 1024

NEVER_WRITTEN = frozenset(
    {"password", "secret", "token", "authorization", "key", "content", "body", "data", "argument", "arguments"}
)
_OUR_KEYS = re.compile(rb"pr[ks]_[A-Za-z0-9_-]+")
# Heads are kept for this many events: there are fewer, and a caller with made-up names must not fill the memory.
_HEADS = 500
_DEBUG, _INFO, _WARNING, _ERROR = LEVELS.values()


class ByteStream(Protocol):
    """Where lines go; `write` may take less than it was given, or nothing (None) where it would have to wait."""

    def write(self, data: bytes, /) -> int | None:
        """Write."""
        ...


class _StandardError:
    """Standard error without Python's buffer, which would write a refused line again with every later one."""

    def write(self, data: bytes) -> int:
        return os.write(2, data)


class LineWriter:
    """Gathers lines and writes them in one piece when the loop's turn ends; see the module for when earlier."""

    __slots__ = ("_kept", "_kept_bytes", "_stream", "_thread")

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._kept: list[bytes] = []
        self._kept_bytes = 0
        self._thread = 0

    def add(self, line: bytes, *, at_once: bool) -> None:
        """Take a line, which ends in a line feed."""
        kept = self._kept
        if not kept or at_once or get_ident() != self._thread:
            try:
                loop = asyncio.get_running_loop()
            except RuntimeError:
                # No loop, or a thread beside it: what is kept belongs to the loop's thread alone.
                self._write(line)
                return
            if not kept:
                self._thread = get_ident()
                loop.call_soon(self.flush)
        kept.append(line)
        self._kept_bytes += len(line)
        if at_once or self._kept_bytes >= KEPT_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is kept."""
        if self._kept:
            text = b"".join(self._kept)
            self._kept = []
            self._kept_bytes = 0
            self._write(text)

    def _write(self, text: bytes) -> None:
        with contextlib.suppress(OSError, ValueError):
            while text and (written := self._stream.write(text)):
                text = text[written:]


class NoiseFilter:
    """Lets NOISY_PER_S lines of each event through in a second and counts the others."""

    __slots__ = ("_passed", "_second", "suppressed")

    def __init__(self) -> None:
        self._second = 0
        self._passed: dict[str, int] = {}
        self.suppressed: dict[str, int] = {}

    def passes(self, event: str, second: int) -> bool:
        """Whether a line of this event may be written in this second."""
        if second != self._second:
            self._second = second
            self._passed = {}
        passed = self._passed.get(event, 0)
        if passed >= NOISY_PER_S:
            self.suppressed[event] = self.suppressed.get(event, 0) + 1
            return False
        self._passed[event] = passed + 1
        return True

    def take_suppressed(self) -> dict[str, int]:
        """What was held back since the last call."""
        taken, self.suppressed = self.suppressed, {}
        return taken


class _Output:
    """What all loggers of the process share: the level, the stream, the second that was last put into words."""

    __slots__ = ("heads", "level", "node", "noise", "process", "second", "second_text", "telling", "writer")

    def __init__(self) -> None:
        self.level = _INFO
        self.process = ""
        self.node = ""
        self.noise = NoiseFilter()
        self.second = -1
        self.second_text = b""
        self.heads: dict[tuple[str, str, str], bytes] = {}
        self.telling = False
        self.writer = LineWriter(_StandardError())


class EventLogger:
    """The EventLog of a process; see the module."""

    __slots__ = ("_process",)

    def __init__(self, process: str) -> None:
        self._process = process

    def debug(self, event: str, **fields: object) -> None:
        """Write a line for whoever looks for a fault."""
        if _output.level <= _DEBUG:
            _emit(self._process, "debug", event, fields)

    def info(self, event: str, **fields: object) -> None:
        """Write a line that tells of a change."""
        if _output.level <= _INFO:
            _emit(self._process, "info", event, fields)

    def warning(self, event: str, **fields: object) -> None:
        """Write a line that somebody should read."""
        if _output.level <= _WARNING:
            _emit(self._process, "warning", event, fields)

    def error(self, event: str, **fields: object) -> None:
        """Write a line that somebody must act on."""
        _emit(self._process, "error", event, fields)


def configure_logging(level: str, process: str, stream: ByteStream | None = None) -> None:
    """Log from `level` on to `stream`, standard error by default; lines of libraries name the `process`."""
    _output.writer.flush()
    _output.process = process
    _output.noise = NoiseFilter()
    _output.writer = LineWriter(stream or _StandardError())
    logging.basicConfig(handlers=[_LibraryHandler()], force=True)
    set_log_level(level)


def set_log_level(level: str) -> None:
    """Log from `level` on, from now on; libraries from `warning` on at least. KeyError for what is no level."""
    _output.level = LEVELS[level]
    logging.getLogger().setLevel(max(_output.level, logging.WARNING))


def name_node(node: str) -> None:
    """Let every line from now on say which node it comes from."""
    _output.node = node
    _output.heads = {}


def get_logger(process: str) -> EventLogger:
    """A logger whose lines carry `process`."""
    return EventLogger(process)


def flush_log() -> None:
    """Write what is kept; for a process that is about to end without its last rites."""
    _output.writer.flush()


def _emit(process: str, level: str, event: str, fields: dict[str, object]) -> None:
    output = _output
    now = time.time()
    second = int(now)
    if second != output.second:
        output.second = second
        output.second_text = time.strftime('{"time":"%Y-%m-%dT%H:%M:%S', time.gmtime(second)).encode()
    if event in NOISY and not output.noise.passes(event, second):
        _tell_suppressed_later(process)
        return
    if not NEVER_WRITTEN.isdisjoint(fields):
        fields = {name: value for name, value in fields.items() if name not in NEVER_WRITTEN}
    if "exc_info" in fields:
        fields["exception"] = _trace(fields.pop("exc_info"))
    head = output.heads.get((process, level, event)) or _head(process, level, event)
    micros = int((now - second) * 1_000_000)
    line = b"%b.%06dZ%b%b" % (output.second_text, micros, head, _body(fields))
    if _OUR_KEYS.search(line):
        line = _OUR_KEYS.sub(b"***", line)
    output.writer.add(line, at_once=level != "info")


def _head(process: str, level: str, event: str) -> bytes:
    """What is the same in every line of an event, from the end of its time to its first field."""
    node = {"node": _output.node} if _output.node else {}
    head = b'",' + orjson.dumps({"level": level, **node, "process": process, "event": event})[1:-1]
    if len(_output.heads) < _HEADS:
        _output.heads[process, level, event] = head
    return head


def _body(fields: dict[str, object]) -> bytes:
    if not fields:
        return b"}\n"
    try:
        text = orjson.dumps(fields, default=str, option=orjson.OPT_APPEND_NEWLINE)
    except Exception:  # noqa: BLE001 - a value without a JSON form must not cost the line, still less the caller
        text = orjson.dumps({"fields": ascii(fields)}, option=orjson.OPT_APPEND_NEWLINE)
    return b"," + text[1:]


def _trace(exc_info: object) -> str:
    error = exc_info if isinstance(exc_info, BaseException) else sys.exc_info()[1]
    return "".join(traceback.format_exception(error)).rstrip() if error is not None else ""


def _tell_suppressed_later(process: str) -> None:
    """One line a second for all that was held back in it."""
    if not _output.telling:
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop().call_later(SUPPRESSED_AFTER_S, _tell_suppressed, process)
            _output.telling = True


def _tell_suppressed(process: str) -> None:
    _output.telling = False
    for event, count in _output.noise.take_suppressed().items():
        _emit(process, "info", "log.suppressed", {"suppressed_event": event, "count": count})


class _LibraryHandler(logging.Handler):
    """Lines of other libraries in the shape of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, object] = {"library": record.name, "text": record.getMessage()}
        if record.exc_info and record.exc_info[0]:
            fields["exc_info"] = record.exc_info[1]
        level = "error" if record.levelno >= logging.ERROR else "warning"
        _emit(_output.process, level, "library.log", fields)


_output = _Output()
atexit.register(flush_log)
