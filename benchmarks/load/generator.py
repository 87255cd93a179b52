"""One load process: many SMTP sessions on one epoll, each message's latencies, and a ledger of what was answered.

Run by `python -m benchmarks.load.generator`, which reads a job (job.py) from its first line of input, prints
`{"ready": true}`, and begins at the next line. It prints a line a second, and at the end one with `end`: why it ended.
Counts in lines are sums so far, latencies what came since the last line. At the end the ledger file holds one byte a
message by number, 1 where it was answered with 250.

Latencies: `connect` from connect() to the greeting; `dot` from the final dot to its reply; `message` from the moment a
message was meant to be sent to its reply. With a rate that moment is on the schedule, not when a session became free:
a server that stalls is charged for the messages it kept from being sent (no coordinated omission). In a closed loop it
is the moment the session became free, or its connect() where every message has a connection of its own.

A message that is refused or whose session is lost is not repeated: it counts by its reply code, or as `lost`.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import json
import resource
import select
import socket
import ssl
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.load.content import make_mark, make_rest
from benchmarks.load.dialog import Access, Dialog, Envelope, Step
from benchmarks.load.job import Job, job_from_json
from benchmarks.load.latency import Timeline

_NS = 1_000_000_000
_READ_BYTES = 65_536
# After a lost connection, and in a closed loop after a refusal, a session waits: a server that refuses gets no flood.
_PAUSE_NS = 200_000_000
_GOODBYE_NS = 1_000_000_000
_BIND_ADDRESS_NO_PORT = 24


class _Work(NamedTuple):
    """A message to be sent: its number, and when it was meant to be."""

    number: int
    intended_ns: int


class _Session:
    """A place for a connection, used for one after the other."""

    __slots__ = ("connect_ns", "dialog", "dot_ns", "greeted", "left", "socket", "tls_pending", "unsent", "work")

    def __init__(self) -> None:
        self.socket: socket.socket | None = None
        self.dialog: Dialog | None = None
        self.work: _Work | None = None
        self.connect_ns = 0
        self.dot_ns = 0
        self.left = 0
        self.greeted = False
        self.tls_pending = False
        self.unsent: memoryview | None = None


class Generator:
    """Runs one job; see the module."""

    def __init__(self, job: Job, say: Callable[[dict[str, object]], None]) -> None:
        self._job = job
        self._say = say
        self._envelope = Envelope(job.sender, job.recipient, job.pipelining)
        self._access = Access(job.tls, job.username, job.password)
        self._rest = make_rest(job.size_bytes, job.sender, job.recipient) + b".\r\n"
        self._tls = ssl.create_default_context(cafile=job.ca_file) if job.tls else None
        self._epoll = select.epoll()
        self._sessions: dict[int, _Session] = {}
        self._free: deque[_Session] = deque()
        self._waiting: deque[_Work] = deque()
        self._timers: list[tuple[int, int, Callable[[], None]]] = []
        self._timer_count = 0
        self._ledger = bytearray()
        self._answered = 0
        self._last_ns = 0
        self._open = 0
        self._in_flight = 0
        self._errors: Counter[str] = Counter()
        self._connect, self._dot, self._message = Timeline(), Timeline(), Timeline()
        self._step_ns = int(_NS / job.rate) if job.rate else 0
        self._begin_ns = self._held_ns = 0
        self._next_ns = 0
        self._stop_ns = 0
        self._leaving = False

    def run(self) -> None:
        """Send everything; returns when all is answered or a bound is reached."""
        begin, cpu_s = time.monotonic_ns(), time.process_time()
        deadline_ns = begin + int(self._job.deadline_s * _NS)
        # Without a time only the number of messages ends it in order.
        self._stop_ns = begin + int(self._job.seconds * _NS) if self._job.seconds else deadline_ns + _NS
        self._begin_ns = begin
        self._next_ns = begin + self._step_at(begin)
        spread_ns = int(self._job.connect_over_s * _NS / self._job.sessions)
        for number in range(self._job.sessions):
            session = _Session()
            if spread_ns:
                self._at(begin + number * spread_ns, lambda session=session: self._become_free(session))  # type: ignore[misc]
            else:
                self._become_free(session)
        report_ns = begin + _NS
        end = "deadline"
        now = time.monotonic_ns()
        while now < deadline_ns:
            self._tick(now, min(report_ns, deadline_ns))
            now = time.monotonic_ns()
            if now >= report_ns:
                self._report()
                report_ns += _NS
            if self._is_finished(now):
                end = "done"
                break
        self._leave(min(deadline_ns, time.monotonic_ns() + _GOODBYE_NS))
        Path(self._job.ledger_file).write_bytes(self._ledger)
        self._report(end=end, unanswered=self._in_flight, cpu_s=time.process_time() - cpu_s)

    # --- time -------------------------------------------------------------------------------------

    def _tick(self, now: int, until_ns: int) -> None:
        if self._step_ns:
            self._schedule(now)
            until_ns = min(until_ns, self._next_ns)
        if self._timers:
            until_ns = min(until_ns, self._timers[0][0])
        for descriptor, event in self._epoll.poll(max(until_ns - now, 0) / _NS):
            session = self._sessions.get(descriptor)
            if session is not None:
                self._on_event(session, event)
        if self._timers:
            now = time.monotonic_ns()
            while self._timers and self._timers[0][0] <= now:
                heapq.heappop(self._timers)[2]()

    def _at(self, when_ns: int, action: Callable[[], None]) -> None:
        self._timer_count += 1
        heapq.heappush(self._timers, (when_ns, self._timer_count, action))

    def _schedule(self, now: int) -> None:
        """Hand out the messages whose time has come, to free sessions or to the line of those that wait."""
        while self._next_ns <= now and self._has_more(self._next_ns):
            work = self._make_work(self._next_ns)
            self._next_ns += self._step_at(self._next_ns)
            if self._free:
                self._begin(self._free.popleft(), work)
            else:
                self._waiting.append(work)
        if not self._has_more(self._next_ns):
            self._next_ns = self._stop_ns

    def _step_at(self, when_ns: int) -> int:
        """Return the pause to the next message; while sessions are being opened the rate grows with them."""
        ramp_ns = self._job.connect_over_s * _NS
        elapsed_ns = when_ns - self._begin_ns
        if elapsed_ns >= ramp_ns:
            return self._step_ns
        return int(self._step_ns * ramp_ns / max(elapsed_ns, ramp_ns / self._job.sessions))

    def _has_more(self, when_ns: int) -> bool:
        job = self._job
        return not job.idle and when_ns < self._stop_ns and (not job.messages or len(self._ledger) < job.messages)

    def _is_finished(self, now: int) -> bool:
        if self._in_flight or self._waiting:
            return False
        if self._step_ns:
            return not self._has_more(max(self._next_ns, now))
        return self._is_held_out(now) if self._job.idle else not self._has_more(now)

    def _is_held_out(self, now: int) -> bool:
        """Whether all idle sessions together have been ready for the time."""
        if len(self._free) < self._job.sessions:
            self._held_ns = now
        return now >= self._held_ns + int(self._job.seconds * _NS)

    def _make_work(self, intended_ns: int) -> _Work:
        self._ledger.append(0)
        self._in_flight += 1
        return _Work(len(self._ledger) - 1, intended_ns)

    # --- sessions ---------------------------------------------------------------------------------

    def _become_free(self, session: _Session) -> None:
        """The place has nothing to do: give it the next message, or let it connect, or let it wait."""
        if self._leaving:
            return
        if self._job.messages_per_connection == 0 and session.dialog is None:
            self._connect_session(session)
        elif self._waiting:
            self._begin(session, self._waiting.popleft())
        elif self._step_ns or self._job.idle:
            self._free.append(session)
        elif self._has_more(now := time.monotonic_ns()):
            self._begin(session, self._make_work(now))

    def _begin(self, session: _Session, work: _Work) -> None:
        session.work = work
        if session.dialog is None:
            self._connect_session(session)
        else:
            self._send_message(session, work)

    def _send_message(self, session: _Session, work: _Work) -> None:
        dialog = session.dialog
        assert dialog is not None
        session.left -= 1
        dialog.begin(make_mark(self._job.stream, work.number, work.intended_ns) + self._rest)
        self._flush(session, dialog)

    def _connect_session(self, session: _Session) -> None:
        made = socket.socket()
        made.setblocking(False)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._job.source_address:
            made.setsockopt(socket.IPPROTO_IP, _BIND_ADDRESS_NO_PORT, 1)
            made.bind((self._job.source_address, 0))
        session.socket = made
        session.dialog = Dialog(self._envelope, self._access)
        session.greeted = session.tls_pending = False
        session.left = self._job.messages_per_connection
        session.unsent = None
        session.connect_ns = time.monotonic_ns()
        problem = made.connect_ex(("127.0.0.1", self._job.port))
        self._open += 1
        self._sessions[made.fileno()] = session
        self._epoll.register(made.fileno(), select.EPOLLIN)
        if problem not in (0, errno.EINPROGRESS):
            self._lose(session, "connect")

    def _on_event(self, session: _Session, event: int) -> None:
        try:
            if session.tls_pending:
                self._shake_hands(session)
                return
            if event & select.EPOLLOUT:
                self._write(session)
            if event & ~select.EPOLLOUT:
                self._read(session)
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        except (OSError, ValueError):
            self._lose(session, "lost" if session.greeted else "connect")

    def _read(self, session: _Session) -> None:
        dialog, connection = session.dialog, session.socket
        assert dialog is not None
        assert connection is not None
        data = connection.recv(_READ_BYTES)
        if not data:
            self._lose(session, "lost" if session.greeted else "connect")
            return
        step = dialog.receive(data)
        if not session.greeted and dialog.greeted:
            session.greeted = True
            now = time.monotonic_ns()
            self._connect.record(now, now - session.connect_ns)
        if step is Step.DOT and self._job.drip_bytes:
            self._drip(session, memoryview(dialog.output))
            return
        if dialog.output:
            if step is Step.DOT:
                session.dot_ns = time.monotonic_ns()
            self._flush(session, dialog)
        if step is Step.DONE:
            self._finish(session, dialog)
        elif step is Step.READY:
            self._on_ready(session)
        elif step is Step.START_TLS:
            self._start_tls(session, connection)
        elif step is Step.CLOSED:
            self._lose(session, str(dialog.code) if dialog.code else "")

    def _on_ready(self, session: _Session) -> None:
        if session.work is not None:
            self._send_message(session, session.work)
        else:
            self._become_free(session)

    def _finish(self, session: _Session, dialog: Dialog) -> None:
        now = time.monotonic_ns()
        work = session.work
        assert work is not None
        session.work = None
        self._in_flight -= 1
        if dialog.code == 250:
            self._ledger[work.number] = 1
            self._answered += 1
            self._last_ns = now
            self._dot.record(now, now - session.dot_ns)
            self._message.record(now, now - work.intended_ns)
        else:
            self._errors[str(dialog.code)] += 1
        if self._job.messages_per_connection and session.left <= 0:
            dialog.quit()
            self._flush(session, dialog)
        elif dialog.code == 250 or self._step_ns:
            self._become_free(session)
        else:
            self._at(now + _PAUSE_NS, lambda: self._become_free(session))

    def _lose(self, session: _Session, reason: str) -> None:
        """The connection is over; without a reason it ended as it should."""
        connection = session.socket
        assert connection is not None
        del self._sessions[connection.fileno()]
        connection.close()
        session.socket = session.dialog = session.unsent = None
        self._open -= 1
        with contextlib.suppress(ValueError):
            self._free.remove(session)
        if session.work is not None:
            session.work = None
            self._in_flight -= 1
        if reason and not self._leaving:
            self._errors[reason] += 1
            self._at(time.monotonic_ns() + _PAUSE_NS, lambda: self._become_free(session))
        else:
            self._become_free(session)

    # --- bytes ------------------------------------------------------------------------------------

    def _flush(self, session: _Session, dialog: Dialog) -> None:
        data, dialog.output = dialog.output, b""
        connection = session.socket
        assert connection is not None
        try:
            sent = connection.send(data)
        except (BlockingIOError, ssl.SSLWantWriteError):
            sent = 0
        except OSError:
            # What the peer said before it left is still to be read: that shows the end, too.
            return
        if sent < len(data):
            session.unsent = memoryview(data)[sent:]
            self._epoll.modify(connection.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def _write(self, session: _Session) -> None:
        connection, unsent = session.socket, session.unsent
        assert connection is not None
        if unsent is not None:
            try:
                unsent = unsent[connection.send(unsent) :]
            except ssl.SSLWantWriteError:
                return
            session.dot_ns = time.monotonic_ns()
        session.unsent = unsent or None
        if session.unsent is None:
            self._epoll.modify(connection.fileno(), select.EPOLLIN)

    def _drip(self, session: _Session, rest: memoryview) -> None:
        connection = session.socket
        if connection is None or self._leaving:
            return
        with contextlib.suppress(OSError):
            rest = rest[connection.send(rest[: self._job.drip_bytes]) :]
        now = time.monotonic_ns()
        if rest:
            self._at(now + int(self._job.drip_interval_s * _NS), lambda: self._drip(session, rest))
        elif session.dialog is not None:
            session.dialog.output = b""
            session.dot_ns = now

    def _start_tls(self, session: _Session, connection: socket.socket) -> None:
        assert self._tls is not None
        session.socket = self._tls.wrap_socket(connection, server_hostname="localhost", do_handshake_on_connect=False)
        session.tls_pending = True
        self._shake_hands(session)

    def _shake_hands(self, session: _Session) -> None:
        connection, dialog = session.socket, session.dialog
        assert isinstance(connection, ssl.SSLSocket)
        assert dialog is not None
        connection.do_handshake()
        session.tls_pending = False
        dialog.tls_started()
        self._flush(session, dialog)

    # --- the end ----------------------------------------------------------------------------------

    def _leave(self, until_ns: int) -> None:
        """Say QUIT on every session that is free, and close the others."""
        self._leaving = True
        for session in list(self._sessions.values()):
            dialog = session.dialog
            if dialog is None or dialog.is_sending or session.work is not None or not session.greeted:
                self._drop(session)
            else:
                dialog.quit()
                self._flush(session, dialog)
        while self._sessions and (now := time.monotonic_ns()) < until_ns:
            for descriptor, event in self._epoll.poll((until_ns - now) / _NS):
                if descriptor in self._sessions:
                    self._on_event(self._sessions[descriptor], event)
        for session in list(self._sessions.values()):
            self._drop(session)

    def _drop(self, session: _Session) -> None:
        connection = session.socket
        assert connection is not None
        del self._sessions[connection.fileno()]
        connection.close()
        self._open -= 1

    def _report(self, **more: object) -> None:
        self._say(
            {
                "begun": len(self._ledger),
                "answered": self._answered,
                "last_ns": self._last_ns,
                "open": self._open,
                "errors": dict(self._errors),
                "connect": self._connect.take(),
                "dot": self._dot.take(),
                "message": self._message.take(),
                **more,
            }
        )


def raise_descriptor_limit() -> None:
    """Use as many descriptors as we may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def say(line: dict[str, object]) -> None:
    """Print a line for the parent."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Run the job from standard input; see the module."""
    raise_descriptor_limit()
    job = job_from_json(sys.stdin.readline())
    generator = Generator(job, say)
    say({"ready": True})
    if sys.stdin.readline():
        generator.run()


if __name__ == "__main__":
    main()
