"""The node's side of the ledger stream: opening, windows, going back, refusals."""

from __future__ import annotations

from dataplane import link
from dataplane.adapters.ledger_codec import encode_statement
from dataplane.agent import ledger_machine as lm
from dataplane.core.waiting import Tally, WaitingStatement
from dataplane.link import LedgerRecords, SpoolState
from postroad.node.v1.ledger_service_pb2 import LedgerCursor, LedgerQuestion, LedgerRefusal, ReportLedgerResponse

S = "spool-a"


def state(spool: str = S, incarnation: int = 1, acknowledged: int = 0, last: int = 0) -> SpoolState:
    return SpoolState(spool, incarnation, acknowledged, acknowledged + 1, last, 0)


def cursor(number: int, spool: str = S) -> ReportLedgerResponse:
    return ReportLedgerResponse(cursor=LedgerCursor(spool=spool, cursor=number))


def refusal(reason: LedgerRefusal.Reason.ValueType, spool: str = S) -> ReportLedgerResponse:
    return ReportLedgerResponse(refusal=LedgerRefusal(spool=spool, reason=reason, detail="why"))


def records(first: int, count: int = 1, size: int = 1, incarnation: int = 1) -> LedgerRecords:
    return LedgerRecords(S, incarnation, first, [b"r" * size] * count)


def reporting(at: int = 0) -> lm.LedgerMachine:
    machine = lm.LedgerMachine()
    machine.connected()
    machine.spool_opened(state())
    machine.receive(cursor(at))
    return machine


def batches(actions: list[lm.LedgerAction]) -> list[tuple[int, int]]:
    return [
        (action.request.batch.first_record, len(action.request.batch.records))
        for action in actions
        if isinstance(action, lm.SendLedger)
    ]


def test_a_spool_opens_before_it_reports_and_starts_behind_the_cursor() -> None:
    machine = lm.LedgerMachine()
    machine.spool_opened(state(acknowledged=3, last=9))
    (opened,) = machine.connected()
    assert isinstance(opened, lm.SendLedger)
    message = opened.request.open
    assert (message.spool, message.incarnation, message.acknowledged, message.last_record) == (S, 1, 3, 9)
    assert machine.receive(cursor(5)) == [lm.Stored(S, 5), lm.Pull(S, 5)]


def test_a_spool_says_which_openings_its_disk_knows() -> None:
    machine = lm.LedgerMachine()
    machine.connected()
    known = state(incarnation=3)._replace(opening="0f" * 16, former_openings=(("1e" * 16, 7), ("2d" * 16, 9)))
    (opened,) = machine.spool_opened(known)
    assert isinstance(opened, lm.SendLedger)
    message = opened.request.open
    assert message.opening_id == b"\x0f" * 16
    assert [(one.id, one.last_record) for one in message.former_openings] == [(b"\x1e" * 16, 7), (b"\x2d" * 16, 9)]


def test_records_go_on_as_they_came_and_the_next_are_pulled() -> None:
    machine = reporting()
    actions = machine.records(records(1, 3))
    assert batches(actions) == [(1, 3)]
    assert actions[-1] == lm.Pull(S, 3)


def test_at_most_eight_batches_are_unanswered() -> None:
    machine = reporting()
    pulled = True
    sent = 0
    while pulled:
        sent += 1
        actions = machine.records(records(sent))
        pulled = lm.Pull(S, sent) in actions
    assert sent == 8
    assert machine.receive(cursor(1)) == [lm.Stored(S, 1), lm.Pull(S, 8)]


def test_bytes_in_flight_are_bounded_over_all_spools_and_a_cursor_frees_them() -> None:
    machine = reporting()
    machine.spool_opened(state("spool-b"))
    machine.receive(cursor(0, "spool-b"))
    big = lm.MAX_UNANSWERED_BYTES // 2
    machine.records(records(1, size=big))
    assert lm.Pull(S, 2) not in machine.records(records(2, size=big))
    assert machine.unanswered_bytes == lm.MAX_UNANSWERED_BYTES
    assert lm.Pull(S, 2) in machine.receive(cursor(2))


def test_a_cursor_that_goes_back_makes_the_spool_send_again() -> None:
    machine = reporting()
    machine.records(records(1, 10))
    machine.receive(cursor(10))
    assert machine.receive(cursor(4)) == [lm.Stored(S, 4), lm.Pull(S, 4)]
    assert batches(machine.records(records(5, 6))) == [(5, 6)]


def test_a_new_stream_opens_again_and_goes_on_from_its_cursor() -> None:
    machine = reporting()
    machine.records(records(1, 10))
    assert machine.disconnected() == [lm.Pause(S)]
    assert machine.unanswered_bytes == 0
    (opened,) = machine.connected()
    assert isinstance(opened, lm.SendLedger)
    assert opened.request.open.last_record == 10
    assert machine.receive(cursor(6)) == [lm.Stored(S, 6), lm.Pull(S, 6)]


def test_answers_to_pulls_of_before_are_ignored() -> None:
    machine = reporting()
    assert machine.records(records(2)) == []
    assert machine.records(records(1, incarnation=2)) == []
    assert machine.records(LedgerRecords(S, 1, 1, [])) == []
    assert machine.records(LedgerRecords("unknown", 1, 1, [b"r"])) == []
    machine.disconnected()
    assert machine.records(records(1)) == []


def test_a_restarted_worker_opens_its_new_incarnation() -> None:
    machine = reporting()
    machine.spool_gone(S)
    (opened,) = machine.spool_opened(state(incarnation=2))
    assert isinstance(opened, lm.SendLedger)
    assert opened.request.open.incarnation == 2


def test_a_gap_opens_again() -> None:
    machine = reporting()
    machine.records(records(1, 5))
    (opened,) = machine.receive(refusal(LedgerRefusal.REASON_GAP))
    assert isinstance(opened, lm.SendLedger)
    assert machine.receive(cursor(2)) == [lm.Stored(S, 2), lm.Pull(S, 2)]


def test_a_spool_that_went_back_is_refused_until_it_is_another_incarnation() -> None:
    machine = reporting()
    assert machine.receive(refusal(LedgerRefusal.REASON_WENT_BACKWARDS)) == [lm.Pause(S), lm.Refused(S, True, "why")]
    assert machine.receive(cursor(9)) == []
    assert machine.spool_opened(state()) == []
    assert machine.spool_opened(state(incarnation=2)) != []


def test_another_nodes_spool_is_refused_and_asked_for_again_once_it_is_accepted() -> None:
    machine = reporting()
    assert machine.spool_accepted(S) == []
    assert machine.receive(refusal(LedgerRefusal.REASON_NOT_OWNED)) == [lm.Pause(S), lm.Refused(S, True, "why")]
    (opened,) = machine.spool_accepted(S)
    assert isinstance(opened, lm.SendLedger)
    assert opened.request.open.spool == S
    assert machine.receive(cursor(5)) == [lm.Stored(S, 5), lm.Pull(S, 5)]
    assert machine.spool_accepted("spool-b") == []


def test_a_refusal_that_an_acceptance_overtook_halts_nothing() -> None:
    machine = lm.LedgerMachine()
    machine.connected()
    machine.spool_opened(state())
    assert machine.spool_accepted(S) == []
    (opened,) = machine.receive(refusal(LedgerRefusal.REASON_NOT_OWNED))
    assert isinstance(opened, lm.SendLedger)
    assert machine.receive(refusal(LedgerRefusal.REASON_NOT_OWNED)) == [lm.Pause(S), lm.Refused(S, True, "why")]


def test_a_superseded_spool_reports_no_more_but_is_not_refused() -> None:
    machine = reporting()
    assert machine.receive(refusal(LedgerRefusal.REASON_SUPERSEDED)) == [lm.Pause(S), lm.Refused(S, False, "why")]
    assert machine.records(records(1)) == []


def test_a_spool_whose_worker_is_gone_is_not_pulled() -> None:
    machine = reporting()
    machine.records(records(1))
    machine.spool_gone(S)
    assert machine.receive(cursor(1)) == [lm.Stored(S, 1)]
    machine.disconnected()
    assert machine.connected() == []


def test_a_question_goes_to_the_worker_and_its_statement_back() -> None:
    machine = reporting()
    question = LedgerQuestion(spool=S, number=4, as_of_record=7, account="accounts/demo", buckets=[1, 2])

    asked = machine.receive(ReportLedgerResponse(question=question))
    statement = encode_statement(WaitingStatement(S, 4, totals=(("accounts/demo", 1, Tally(2, 3)),)))
    (sent,) = machine.statement(link.LedgerStatement(statement))

    assert asked == [lm.Ask(link.LedgerQuestion(S, 4, 7, "accounts/demo", (1, 2)))]
    assert isinstance(sent, lm.SendLedger)
    assert sent.request.statement.SerializeToString() == statement
