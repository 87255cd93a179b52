"""Settler, deadlines, connection timers, transforms and the table of outcomes."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from dataplane.adapters.spool_ram import RamSpool
from dataplane.core.client import BLOCK_TIMEOUT_S, Client
from dataplane.core.config import RetryPolicy, TlsPolicy
from dataplane.core.ledger import LedgerRecord
from dataplane.core.queue import ForbiddenMoveError, State
from dataplane.core.transaction import Verdict, VerdictKind
from dataplane.delivery.attempt import Message
from dataplane.delivery.connection import TRANSACTION_LIMIT_S, Connection
from dataplane.delivery.counters import DeliveryCounters
from dataplane.delivery.deadlines import Deadlines
from dataplane.delivery.outcome import Concluder, Facts, Moment, put_back
from dataplane.delivery.settler import Settler
from dataplane.delivery.transforms import NO_TRANSFORMS, apply_transforms
from dataplane.ports import Settlement, SpoolError, SpoolFailedError
from support.ingress import Log
from support.smtp_script import EHLO_ALL, GREETING, transaction
from support.spools import NOW_MS, ManualClock, make_envelope, make_row

NOW = Moment(NOW_MS, NOW_MS)
SENDING = make_row(state=State.SENDING, attempt=1)


# --- outcome


class Records(list[LedgerRecord]):
    """An encoder that keeps what it is given."""

    def __call__(self, record: LedgerRecord) -> bytes:
        self.append(record)
        return b""


def conclude(kind: VerdictKind, *, age_s: float = 0, moment: Moment = NOW) -> tuple[list[str], list[str], Settlement]:
    records = Records()
    concluder = Concluder(records)
    message = Message(
        make_envelope(accepted_ms=NOW_MS - int(age_s * 1000)), b"", ("user0@example.net",), reported=False
    )
    ends = [(SENDING, Verdict(kind, 0, "", "text"))]
    conclusion = concluder.conclude(message, ends, Facts(), RetryPolicy(), moment, 0.5)
    events = [event.type.name for event in records[0].events]
    return [update.state.name for update in records[0].updates], events, conclusion.settlement


@pytest.mark.parametrize(
    ("kind", "state", "event"),
    [
        (VerdictKind.SENT, "SENT", "SENT"),
        (VerdictKind.PERMANENT, "BOUNCED", "BOUNCED"),
        (VerdictKind.REFUSED, "FAILED", "FAILED"),
        (VerdictKind.TEMPORARY, "DEFERRED", "DEFERRED"),
        (VerdictKind.INTERRUPTED, "DEFERRED", "INTERRUPTED"),
        (VerdictKind.UNCERTAIN, "DEFERRED", "UNCERTAIN"),
    ],
)
def test_each_verdict_has_its_state_and_event(kind: VerdictKind, state: str, event: str) -> None:
    assert conclude(kind)[:2] == ([state], [event])


@pytest.mark.parametrize(
    ("kind", "events"),
    [
        (VerdictKind.TEMPORARY, ["EXPIRED"]),
        (VerdictKind.INTERRUPTED, ["EXPIRED"]),
        (VerdictKind.UNCERTAIN, ["UNCERTAIN", "EXPIRED"]),
    ],
)
def test_lifetime_over_expires_and_never_hides_an_uncertain_end(kind: VerdictKind, events: list[str]) -> None:
    assert conclude(kind, age_s=RetryPolicy().lifetime_s)[:2] == (["EXPIRED"], events)


def test_due_times_follow_the_steady_clock_and_the_ledger_shows_the_wall() -> None:
    records = Records()
    concluder = Concluder(records)
    message = Message(make_envelope(), b"", (), reported=True)
    moment = Moment(NOW_MS + 3_600_000, NOW_MS)
    ends = [(SENDING, Verdict(VerdictKind.TEMPORARY, 450, "", ""))]
    conclusion = concluder.conclude(message, ends, Facts(), RetryPolicy(), moment, 0.5)
    assert conclusion.settlement.changes[0].due_ms == NOW_MS + 30_000
    assert records[0].updates[0].next_attempt_ms == NOW_MS + 3_630_000
    assert records[0].accepted is None


def test_a_terminal_recipient_cannot_be_concluded_again() -> None:
    concluder = Concluder(lambda _: b"")
    message = Message(make_envelope(), b"", (), reported=True)
    ends = [(make_row(state=State.SENT), Verdict(VerdictKind.PERMANENT, 550, "", ""))]
    with pytest.raises(ForbiddenMoveError):
        concluder.conclude(message, ends, Facts(), RetryPolicy(), NOW, 0.5)


def test_what_is_put_back_counts_no_attempt_and_tells_nobody() -> None:
    settlement = put_back(Message(make_envelope(), b"", (), reported=False), [SENDING], NOW_MS)
    (changed,) = settlement.changes
    assert (changed.attempt, changed.new_attempt, changed.state) == (1, 0, State.QUEUED)
    assert (settlement.record, settlement.reported) == (None, False)


# --- settler


class RefusingSpool(RamSpool):
    """Refuses settlements with the errors it is given, in order."""

    errors: list[SpoolError]

    def settle(self, settlement: Settlement) -> asyncio.Future[int]:
        if self.errors:
            future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            future.set_exception(self.errors.pop(0))
            return future
        return super().settle(settlement)


async def settled(monkeypatch: pytest.MonkeyPatch, *errors: SpoolError) -> tuple[list[int], DeliveryCounters]:
    monkeypatch.setattr("dataplane.delivery.settler.AGAIN_S", 0.001)
    spool = RefusingSpool(ManualClock())
    spool.errors = []
    envelope = make_envelope()
    await spool.accept(envelope, b"x\r\n", [SENDING])
    spool.errors = list(errors)
    counters = DeliveryCounters()
    settler = Settler(spool, counters, Log())
    results: list[int] = []
    settler.settle(put_back(Message(envelope, b"", (), reported=False), [SENDING], 0), results.append)
    await settler.drained()
    return results, counters


async def test_a_settlement_that_is_refused_is_tried_until_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    results, counters = await settled(monkeypatch, SpoolError("full"), SpoolError("full"))
    assert (results, counters.settle_failures) == ([1], 2)


async def test_a_spool_that_failed_for_good_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    results, counters = await settled(monkeypatch, SpoolFailedError("broken"))
    assert (results, counters.settle_failures) == ([0], 1)


# --- timers of a connection


class Wire(asyncio.Transport):
    """A transport whose buffer the test fills and empties."""

    def __init__(self) -> None:
        # The kernel never has anything of it.
        self.socket = socket.socket()
        super().__init__({"socket": self.socket})
        self.unsent_bytes = 0
        self.ended = ""

    def is_closing(self) -> bool:
        return bool(self.ended)

    def write(self, data: Any) -> None:
        return

    def writelines(self, list_of_data: Any) -> None:
        return

    def get_write_buffer_size(self) -> int:
        return self.unsent_bytes

    def close(self) -> None:
        self.ended = self.ended or "closed"

    def abort(self) -> None:
        self.ended = self.ended or "aborted"


class Wired:
    """A connection in the middle of a transaction."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.deadlines = Deadlines(self.clock)
        self.wire = Wire()
        self.connection = Connection(Client("relay.test", TlsPolicy.NONE), "peer", self.clock, self.deadlines)
        self.connection.connection_made(self.wire)
        self.connection.data_received(GREETING)
        self.connection.data_received(EHLO_ALL)
        self.ends: list[Verdict] = []
        self.connection.on_done = lambda _, verdicts: self.ends.extend(verdicts)

    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.deadlines.sweep()

    def close(self) -> None:
        self.deadlines.close()
        self.wire.socket.close()


@pytest.fixture
async def wired() -> Any:
    made = Wired()
    yield made
    made.close()


async def test_a_reply_that_drips_does_not_renew_its_timer(wired: Wired) -> None:
    wired.connection.send(transaction())
    for byte in b"250-2.1.0 this goes on for ev":
        wired.pass_time(10)
        wired.connection.data_received(bytes([byte]))
        assert wired.ends == []
    wired.pass_time(11)
    assert wired.ends[0].text == "timeout in ENVELOPE"
    assert wired.wire.ended == "aborted"


async def test_a_block_that_moves_has_time_and_one_that_stands_still_is_cut_before_its_dot(wired: Wired) -> None:
    wired.connection.send(transaction())
    wired.connection.data_received(b"250 ok\r\n250 ok\r\n354 go\r\n")
    wired.wire.unsent_bytes = 1_000_000
    wired.connection.pause_writing()
    for _ in range(5):
        wired.wire.unsent_bytes -= 1_000
        wired.pass_time(BLOCK_TIMEOUT_S)
        assert wired.ends == []
    wired.pass_time(BLOCK_TIMEOUT_S)
    assert wired.ends[0].kind is VerdictKind.INTERRUPTED


async def test_after_the_last_block_the_dot_has_its_own_time(wired: Wired) -> None:
    wired.connection.send(transaction())
    wired.connection.data_received(b"250 ok\r\n250 ok\r\n354 go\r\n")
    wired.connection.pause_writing()
    wired.connection.resume_writing()
    wired.pass_time(599)
    assert wired.ends == []
    wired.pass_time(2)
    assert wired.ends[0].kind is VerdictKind.UNCERTAIN


async def test_a_transaction_as_a_whole_is_bounded_whatever_its_parts_take(wired: Wired) -> None:
    recipients = tuple(f"u{number}@x.test" for number in range(100))
    wired.connection.send(transaction(*recipients))
    passed_s = 0
    while not wired.ends:
        wired.pass_time(290)
        passed_s += 290
        if not wired.ends:
            wired.connection.data_received(b"250 ok\r\n")
    assert passed_s <= TRANSACTION_LIMIT_S + 290


async def test_an_idle_connection_says_quit_and_is_closed_in_any_case(wired: Wired) -> None:
    wired.connection.rest()
    wired.pass_time(31)
    assert wired.wire.ended == ""
    wired.pass_time(6)
    assert wired.wire.ended == "aborted"


# --- transforms


def test_without_transforms_the_content_is_the_same_object() -> None:
    content = b"x\r\n"
    assert apply_transforms(NO_TRANSFORMS, make_envelope(), content) is content


def test_transforms_follow_each_other_in_order() -> None:
    transforms = (lambda _, content: content + b"1", lambda _, content: content + b"2")
    assert apply_transforms(transforms, make_envelope(), b"0") == b"012"
