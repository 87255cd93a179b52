"""A connection to a next hop: the client machine on a transport, without a task.

The dial (`transports`) opens it and waits on `opening` for READY or START_TLS; from READY on the pool gives it
transactions by `send` and hears of each end by `on_done`, and of the connection's own end by `on_closed`, exactly once,
after the last `on_done`. Timers are the machine's, renewed by each reply and not by each byte, so that a reply that
drips does not hold the connection; a transaction as a whole has TRANSACTION_LIMIT_S, whatever its parts were allowed.
A content that is not small leaves in pieces, one a turn of the loop, as the transport has room for them, and its final
dot when the kernel has sent all before it, so that the dot of a next hop that is slow is here and not in a buffer.

From the first transaction on the end of a connection is a reset, which throws away what the kernel has not sent: also
an end that the transport tells of when it has closed. Ends of which all has been sent take that back.

    the final dot is                                           `dot_is_here`   cut, it is
    in the machine, or in a buffer of this process             yes             INTERRUPTED
    in the kernel, which has not sent it as far as it says     yes             UNCERTAIN: it may just have been sent
    sent                                                       no              UNCERTAIN
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from dataplane.core.client import BLOCK_TIMEOUT_S, NOT_PERMITTED, Client, Phase, Signal
from dataplane.core.transaction import Transaction, Verdict, VerdictKind
from dataplane.delivery.deadlines import NEVER, Deadlines
from dataplane.delivery.limits import Lease
from dataplane.delivery.wire import cut_off, reset_on_close, unsent_bytes
from dataplane.ports import Clock

IDLE_S = 30.0
TRANSACTION_LIMIT_S = 3_600.0
LOOK_S = 0.001  # after which it is looked again whether the kernel has sent all before the dot; doubles up to the other
LONGEST_LOOK_S = 0.1


class ConnectionFailedError(Exception):
    """The session could not be opened. `verdict` says why, fit to be stored."""

    def __init__(self, verdict: Verdict, remote_host: str = "") -> None:
        super().__init__(verdict.text)
        self.verdict = verdict
        self.remote_host = remote_host


class Connection(asyncio.Protocol):
    """One connection. `remote_host` is `host[address]:port`, `tls` the TLS version or empty."""

    def __init__(self, client: Client, remote_host: str, clock: Clock, deadlines: Deadlines) -> None:
        self.deadline_s = NEVER
        self.remote_host = remote_host
        self.host = ""  # as the provider's settings name it
        self.lease: Lease | None = None  # of connections at once, where they are limited
        self.tls = ""
        self.connecting_ms = 0  # what opening it took
        self.transaction_count = 0
        self.on_done: Callable[[Connection, tuple[Verdict, ...]], None] | None = None
        self.on_closed: Callable[[Connection], None] | None = None
        self.opening: asyncio.Future[Signal] = asyncio.get_running_loop().create_future()
        self._client = client
        self._clock = clock
        self._deadlines = deadlines
        self._transport: asyncio.Transport | None = None
        self._wire: asyncio.Transport | None = None  # the same, or the one below TLS
        self._limit_s = NEVER  # of the transaction under way
        self._writing_paused = False
        self._piece_due = False
        self._look_s = LOOK_S
        self._dot_waits = False  # until all before it is sent
        self._unsent_bytes = 0  # seen at the last look while writing is paused, or the dot waits
        self._replies_seen = 0
        self._closed = False

    # --- what dial and pool call

    @property
    def reusable(self) -> bool:
        """Whether another transaction may follow."""
        return self._client.reusable and not self._closed

    @property
    def answered(self) -> bool:
        """Whether the last transaction got any reply: without one, an old connection may just have been stale."""
        return self._client.answered

    @property
    def dot_is_here(self) -> bool:
        """Whether a transaction is under way whose final dot has not left this machine."""
        client = self._client
        return client.phase is Phase.ENVELOPE or (
            client.phase is Phase.CONTENT and (client.content_left or self._unsent() > 0)
        )

    def wait_for_tls(self) -> asyncio.Transport:
        """Return the transport to be upgraded; what comes in clear from now on ends the session."""
        self.opening = asyncio.get_running_loop().create_future()
        return cast("asyncio.Transport", self._transport)

    def tls_started(self, transport: asyncio.Transport, version: str, *, verified: bool) -> None:
        """Go on over the upgraded transport."""
        self._transport = transport
        self.tls = version
        self._after(self._client.tls_started(verified=verified))

    def opened_under_tls(self, wire: asyncio.Transport, transport: asyncio.Transport, version: str) -> None:
        """Begin over a transport that was TLS from the first byte. What came meanwhile has been taken."""
        self._wire = wire
        self.tls = version
        self.connection_made(transport)

    def send(self, transaction: Transaction) -> None:
        """Begin a transaction; only when `reusable`. `on_done` may be called before this returns."""
        if not self.transaction_count and self._wire is not None:
            reset_on_close(self._wire, wanted=True)
        self.transaction_count += 1
        now_s = self._clock.monotonic()
        self._limit_s = now_s + TRANSACTION_LIMIT_S
        self._after(self._client.begin(transaction), moved=True)

    def rest(self) -> None:
        """Nothing to send now: close after IDLE_S."""
        self.deadline_s = self._clock.monotonic() + IDLE_S

    def leave(self) -> None:
        """Say QUIT where that is possible, and close."""
        if self._client.phase is Phase.READY and not self._closed:
            self._after(self._client.quit(), moved=True)
        else:
            self.abort("closed by us")

    def abort(self, reason: str) -> None:
        """End at once; a transaction under way ends as the machine knows it."""
        if not self._closed:
            in_content = self._client.phase is Phase.CONTENT
            is_held = self._writing_paused or (in_content and self._held() > 0)
            if in_content and self._wire is not None and self._unsent():
                cut_off(self._wire)
            else:
                self._end_in_order()
            signal = self._client.lost(reason, dot_may_have_left=not is_held)
            if self._transport is not None:
                self._transport.abort()
            self._after(signal)

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The dial succeeded."""
        self._transport = cast("asyncio.Transport", transport)
        self._wire = self._wire or self._transport
        if self._closed:
            self._transport.abort()
            return
        self._deadlines.watch(self)
        self._after(Signal.NOTHING)

    def data_received(self, data: bytes) -> None:
        """Bytes of the remote."""
        signal = self._client.receive(data)
        replies = self._client.reply_count
        moved = replies != self._replies_seen
        self._replies_seen = replies
        self._after(signal, moved=moved)

    def eof_received(self) -> None:
        """The remote says no more, and may read on: not what it has not taken. A bare FIN under TLS is not told of."""
        if self._client.phase is Phase.CONTENT and self._unsent():
            self.abort("connection lost")
        else:
            self._end_in_order()

    def connection_lost(self, exc: Exception | None) -> None:
        """The remote or the network ended it."""
        if not self._closed:
            self._after(self._client.lost("connection lost", dot_may_have_left=not self._writing_paused))
            self._close()

    def pause_writing(self) -> None:
        """The remote does not read: the time for a block counts, as long as nothing moves."""
        self._writing_paused = True
        self._unsent_bytes = self._unsent()
        self.deadline_s = min(self._clock.monotonic() + BLOCK_TIMEOUT_S, self._limit_s)

    def resume_writing(self) -> None:
        """All but little has left: the reply is what is waited for."""
        self._writing_paused = False
        self._move_deadline()
        if self._client.content_left:
            self._send_soon()

    def deadline_passed(self, now_s: float) -> None:
        """A timer ran out."""
        waits = self._writing_paused or self._dot_waits
        if waits and now_s < self._limit_s and self._unsent() != self._unsent_bytes:
            self._unsent_bytes = self._unsent()
            self.deadline_s = min(now_s + BLOCK_TIMEOUT_S, self._limit_s)
        elif self._client.phase is Phase.READY:
            self.leave()
        else:
            self.abort(f"timeout in {self._client.phase.name}")

    # --- inside

    def _after(self, signal: Signal, *, moved: bool = True) -> None:
        transport = self._transport
        if transport is not None and (output := self._client.take_output()):
            if len(output) == 1:
                transport.write(output[0])
            else:
                transport.writelines(output)
        if self._client.content_left:
            self._send_soon()
        if signal is Signal.NOTHING:
            if moved and not self._writing_paused:
                self._move_deadline()
        elif signal is Signal.DONE:
            self._finish()
        elif signal is Signal.CLOSE:
            self._close()
        elif not self.opening.done():
            self._move_deadline()
            self.opening.set_result(signal)

    def _send_soon(self) -> None:
        if not self._piece_due and not self._writing_paused:
            self._piece_due = True
            asyncio.get_running_loop().call_soon(self._send_piece)

    def _send_piece(self) -> None:
        """The next piece of the content; the dot once all before it is sent."""
        self._piece_due = False
        if self._closed or self._writing_paused or not self._client.content_left or self._transport is None:
            return
        if self._client.dot_is_next and (unsent_count := self._unsent()):
            self._look_again(unsent_count)
            return
        self._dot_waits = False
        self._look_s = LOOK_S
        if not self._client.permitted:
            self.abort(NOT_PERMITTED)
            return
        self._move_deadline()
        self._transport.write(self._client.next_piece())
        if self._client.content_left:
            self._send_soon()

    def _look_again(self, unsent_count: int) -> None:
        """The next hop has not taken the content: the dot stays here, and may be cut."""
        if not self._dot_waits:
            self._dot_waits = True
            self._unsent_bytes = unsent_count
            self.deadline_s = min(self._clock.monotonic() + BLOCK_TIMEOUT_S, self._limit_s)
        self._piece_due = True
        asyncio.get_running_loop().call_later(self._look_s, self._send_piece)
        self._look_s = min(2 * self._look_s, LONGEST_LOOK_S)

    def _move_deadline(self) -> None:
        timeout_s = self._client.timeout_s
        if timeout_s:
            self.deadline_s = min(self._clock.monotonic() + timeout_s, self._limit_s)
        else:
            self.deadline_s = NEVER

    def _finish(self) -> None:
        self._limit_s = self.deadline_s = NEVER
        outcome = self._client.outcome
        if self._client.reusable and outcome is not None and any(map(_is_failure, outcome)) and self._unsent():
            self._client.reusable = False  # what was refused before it was sent is not to be sent
        reusable = self._client.reusable
        if self.on_done is not None and outcome is not None:
            self.on_done(self, outcome)
        if not reusable:
            self._close()

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._deadlines.forget(self)
        if self._transport is not None and self._wire is not None and self._unsent():
            cut_off(self._wire)
            self._transport.abort()  # `close` would wait for a remote that does not read
        elif self._transport is not None:
            self._end_in_order()
            self._transport.close()
        if not self.opening.done():
            verdict = self._client.failure or Verdict(VerdictKind.TEMPORARY, 0, "4.4.2", "connection lost")
            self.opening.set_exception(ConnectionFailedError(verdict, self.remote_host))
            # A dial that was given up has nobody left to look at it.
            self.opening.exception()
        if self.on_closed is not None:
            self.on_closed(self)

    def _end_in_order(self) -> None:
        if self.transaction_count and self._wire is not None:
            reset_on_close(self._wire, wanted=False)

    def _held(self) -> int:
        """Octets that are still in this process."""
        if self._transport is None or self._wire is None:
            return 0
        size = self._transport.get_write_buffer_size()
        return size if self._wire is self._transport else size + self._wire.get_write_buffer_size()

    def _unsent(self) -> int:
        """Octets that have not left this machine."""
        return self._held() + (unsent_bytes(self._wire) if self._wire is not None else 0)


def _is_failure(verdict: Verdict) -> bool:
    return verdict.kind is not VerdictKind.SENT
