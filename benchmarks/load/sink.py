"""A sink process: takes mail as fast as it comes, and keeps a ledger of what arrived by the marks of content.py.

Run by `python -m benchmarks.load.sink [options]`, it prints `{"port": …}` when it listens, and then, when something
changed, at most every 50 ms: `{"streams": {stream: [messages, duplicates, time of the last]}, "strangers": …,
"connections": …}`, and with the first line of a second `arrival`: for each stream the latencies from the moment a
message was meant to be sent to its arrival. `ledger STREAM FILE` on its input writes how often each number arrived, a
byte each, and answers `{"ledger": STREAM}` with all of the above. It ends when its input does.

Misbehaviour on wish: `--delay-ms` before each final reply, `--fail-every N` answers 451, `--drop-every N` answers 250
and forgets the message, as a relay that loses mail would; `--silent` accepts connections and says nothing at all.
`--capture FILE` keeps the content of everything that was taken, as it came.
"""

from __future__ import annotations

import argparse
import heapq
import json
import select
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from benchmarks.load.content import find_mark
from benchmarks.load.generator import raise_descriptor_limit, say
from benchmarks.load.latency import Timeline

_READ_BYTES = 262_144
_BACKLOG = 4_096
_SAY_NS = 50_000_000
_NS = 1_000_000_000
_POLL_S = 1.0
_EHLO = b"250-sink.example.org\r\n250-PIPELINING\r\n250-SIZE 104857600\r\n250-SMTPUTF8\r\n250 8BITMIME\r\n"
_REPLIES = {
    b"HELO": b"250 sink.example.org\r\n",
    b"EHLO": _EHLO,
    b"MAIL": b"250 2.1.0 ok\r\n",
    b"RCPT": b"250 2.1.5 ok\r\n",
    b"RSET": b"250 2.0.0 ok\r\n",
    b"NOOP": b"250 2.0.0 ok\r\n",
    b"DATA": b"354 go on\r\n",
    b"QUIT": b"221 2.0.0 bye\r\n",
}
_TAKEN = b"250 2.0.0 taken\r\n"
_FAILED = b"451 4.3.0 failing on wish\r\n"


class Ledger:
    """How often each message of each stream arrived, and when."""

    def __init__(self) -> None:
        self.seen: dict[int, bytearray] = {}
        self.counts: dict[int, list[int]] = {}
        self.arrival: dict[int, Timeline] = {}
        self.strangers = 0
        self.last_ns = 0

    def note(self, content: bytes, now_ns: int) -> None:
        """Note one message; without a mark it is a stranger."""
        self.last_ns = now_ns
        mark = find_mark(content)
        if mark is None:
            self.strangers += 1
            return
        seen = self.seen.get(mark.stream)
        if seen is None:
            seen = self.seen[mark.stream] = bytearray()
            self.counts[mark.stream] = [0, 0, 0]
            self.arrival[mark.stream] = Timeline()
        if mark.number >= len(seen):
            seen.extend(bytes(mark.number + 1_000 - len(seen)))
        counts = self.counts[mark.stream]
        if seen[mark.number]:
            counts[1] += 1
        else:
            counts[0] += 1
            counts[2] = now_ns
            self.arrival[mark.stream].record(now_ns, now_ns - mark.time_ns)
        seen[mark.number] = min(seen[mark.number] + 1, 255)


class Wishes:
    """How the sink shall misbehave; counts its own messages."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.delay_ns = int(arguments.delay_ms * 1_000_000)
        self.is_silent: bool = arguments.silent
        self._fail_every: int = arguments.fail_every
        self._drop_every: int = arguments.drop_every
        self._capture: BinaryIO | None = arguments.capture.open("wb") if arguments.capture else None
        self._count = 0

    def take(self, content: bytes, ledger: Ledger) -> bytes:
        """Return the reply to a message, after it was noted or was not."""
        self._count += 1
        if self._fail_every and self._count % self._fail_every == 0:
            return _FAILED
        if not self._drop_every or self._count % self._drop_every:
            ledger.note(content, time.monotonic_ns())
            if self._capture:
                self._capture.write(content)
                self._capture.flush()
        return _TAKEN


class Dialog:
    """A server's half of SMTP that agrees to everything: `receive` returns what to answer."""

    __slots__ = ("_chunks", "_in_data", "_pending", "_tail", "_take", "is_over", "took")

    def __init__(self, take: Callable[[bytes], bytes]) -> None:
        self._take = take
        self._pending = b""
        self._chunks: list[bytes] = []
        self._tail = b""
        self._in_data = False
        self.is_over = False
        self.took = False

    def receive(self, data: bytes) -> bytes:
        """Take bytes; `took` says whether a message ended in them."""
        self.took = False
        replies: list[bytes] = []
        while data:
            data = self._receive_content(data, replies) if self._in_data else self._receive_command(data, replies)
        return b"".join(replies)

    def _receive_command(self, data: bytes, replies: list[bytes]) -> bytes:
        if self._pending:
            data, self._pending = self._pending + data, b""
        end = data.find(b"\n")
        if end < 0:
            self._pending = data
            return b""
        verb = data[:4].upper()
        replies.append(_REPLIES.get(verb, b"502 5.5.2 what?\r\n"))
        if verb == b"DATA":
            # A dot right away ends an empty message.
            self._in_data, self._tail = True, b"\r\n"
        elif verb == b"QUIT":
            self.is_over = True
        return data[end + 1 :]

    def _receive_content(self, data: bytes, replies: list[bytes]) -> bytes:
        joined = self._tail + data
        end = joined.find(b"\r\n.\r\n")
        if end < 0:
            self._chunks.append(data)
            self._tail = joined[-4:]
            return b""
        used = end + 5 - len(self._tail)
        self._chunks.append(data[:used])
        content = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks, self._in_data = [], False
        self.took = True
        replies.append(self._take(content))
        return data[used:]


class Sink:
    """Listens and serves until its input ends; see the module."""

    def __init__(self, wishes: Wishes, port: int) -> None:
        self._wishes = wishes
        self.ledger = Ledger()
        self._listener = socket.create_server(("127.0.0.1", port), backlog=_BACKLOG)
        self._listener.setblocking(False)
        self.port = int(self._listener.getsockname()[1])
        self._epoll = select.epoll()
        self._epoll.register(self._listener.fileno(), select.EPOLLIN)
        self._epoll.register(sys.stdin.fileno(), select.EPOLLIN)
        self._peers: dict[int, tuple[socket.socket, Dialog]] = {}
        self._delayed: list[tuple[int, int, bytes]] = []
        self._connection_count = 0
        self._said_ns = 0
        self._arrival_ns = 0
        self._said_last_ns = 0

    def run(self) -> None:
        """Serve."""
        is_running = True
        while is_running:
            now = time.monotonic_ns()
            for descriptor, _ in self._epoll.poll(self._patience_s(now)):
                if descriptor == self._listener.fileno():
                    self._accept()
                elif descriptor == sys.stdin.fileno():
                    is_running = self._obey(sys.stdin.readline())
                elif descriptor in self._peers:
                    self._read(descriptor)
            now = time.monotonic_ns()
            while self._delayed and self._delayed[0][0] <= now:
                _, descriptor, reply = heapq.heappop(self._delayed)
                if descriptor in self._peers:
                    self._send(descriptor, reply)
            if self.ledger.last_ns != self._said_last_ns and now - self._said_ns >= _SAY_NS:
                self._report(now)

    def _patience_s(self, now: int) -> float:
        until_ns = self._delayed[0][0] if self._delayed else now + int(_POLL_S * _NS)
        if self.ledger.last_ns != self._said_last_ns:
            until_ns = min(until_ns, self._said_ns + _SAY_NS)
        return max(until_ns - now, 0) / _NS

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        descriptor = connection.fileno()
        self._connection_count += 1
        self._peers[descriptor] = (connection, Dialog(lambda content: self._wishes.take(content, self.ledger)))
        self._epoll.register(descriptor, select.EPOLLIN)
        if not self._wishes.is_silent:
            self._send(descriptor, b"220 sink.example.org ESMTP\r\n")

    def _read(self, descriptor: int) -> None:
        connection, dialog = self._peers[descriptor]
        try:
            data = connection.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._close(descriptor)
            return
        if self._wishes.is_silent:
            return
        reply = dialog.receive(data)
        if dialog.took and self._wishes.delay_ns:
            heapq.heappush(self._delayed, (time.monotonic_ns() + self._wishes.delay_ns, descriptor, reply))
        elif reply:
            self._send(descriptor, reply)
        if dialog.is_over:
            self._close(descriptor)

    def _send(self, descriptor: int, reply: bytes) -> None:
        # Replies are a few bytes: a peer that leaves no room for them has left.
        try:
            self._peers[descriptor][0].send(reply)
        except OSError:
            self._close(descriptor)

    def _close(self, descriptor: int) -> None:
        peer = self._peers.pop(descriptor, None)
        if peer:
            peer[0].close()

    def _obey(self, line: str) -> bool:
        if not line:
            return False
        _, stream, file = line.rstrip("\n").split(" ", 2)
        Path(file).write_bytes(self.ledger.seen.get(int(stream), b""))
        self._report(time.monotonic_ns(), with_arrival=True, ledger=int(stream))
        return True

    def _report(self, now: int, *, with_arrival: bool = False, **more: object) -> None:
        line: dict[str, object] = {
            "streams": self.ledger.counts,
            "strangers": self.ledger.strangers,
            "connections": self._connection_count,
            **more,
        }
        if with_arrival or now - self._arrival_ns >= _NS:
            self._arrival_ns = now
            line["arrival"] = {stream: timeline.take() for stream, timeline in self.ledger.arrival.items()}
        say(line)
        self._said_ns, self._said_last_ns = now, self.ledger.last_ns


def main() -> None:
    """Listen and serve; see the module."""
    parser = argparse.ArgumentParser(description="an SMTP sink that keeps a ledger")
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="wait before each final reply")
    parser.add_argument("--fail-every", type=int, default=0, help="answer every N-th message with 451")
    parser.add_argument("--drop-every", type=int, default=0, help="answer every N-th message with 250 and forget it")
    parser.add_argument("--silent", action="store_true", help="accept connections and say nothing")
    parser.add_argument("--capture", type=Path, help="append all content there")
    raise_descriptor_limit()
    arguments = parser.parse_args()
    sink = Sink(Wishes(arguments), arguments.port)
    sys.stdout.write(json.dumps({"port": sink.port}) + "\n")
    sys.stdout.flush()
    sink.run()


if __name__ == "__main__":
    main()
