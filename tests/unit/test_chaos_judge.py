"""The judge of the chaos tests is trusted because it fails: each rule, broken once, and what it must not blame."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from support.chaos.books import Books, Copy, Strike, Try, digest, read_copy
from support.chaos.judge import BOUNCED, SENT, Case, Told, judge, summary
from support.chaos.sink import end_of

ADDRESS = "to-1@example.net"
ID = "01990000-0000-7000-8000-000000000001"
OTHER_ID = "01990000-0000-7000-8000-000000000002"
TRY = Try("a.1.1", (ADDRESS,), "sum", dot_left=True, code=250, message_id=ID)
COPY = Copy("a.1.1", ID, (ADDRESS,), "sum", "", connection=1, time_s=10.0)
AGAIN = replace(COPY, connection=2, time_s=12.0)
TOLD = Told("a.1.1", ADDRESS, SENT, [SENT])
KILL = Strike("worker", "SIGKILL", ends_worker=True, time_s=11.0)
GOOD = Case([TRY], [COPY], ledger={ID: [TOLD]}, ends_as=end_of)


def rules(case: Case) -> set[str]:
    return {violation.rule for violation in judge(case)}


def refused(code: int, text: str = "Storing took too long, try again") -> Try:
    return replace(TRY, code=code, text=text, message_id="")


def told(**changes: object) -> dict[str, list[Told]]:
    return {ID: [replace(TOLD, **changes)]}  # type: ignore[arg-type]  # a table of many fields


@pytest.mark.parametrize(
    ("case", "rule"),
    [
        (GOOD._replace(copies=[]), "lost"),
        (GOOD._replace(copies=[COPY, AGAIN]), "duplicate"),
        (GOOD._replace(copies=[COPY, AGAIN], ledger=told(uncertain_count=1), confirmed=frozenset({0})), "window"),
        (GOOD._replace(copies=[COPY, replace(COPY, token="b.1.1")]), "unknown"),
        (GOOD._replace(copies=[COPY, replace(COPY, token="")]), "unknown"),
        (GOOD._replace(copies=[replace(COPY, recipients=("somebody@else.example",))]), "unknown"),
        (GOOD._replace(copies=[replace(COPY, message_id=OTHER_ID)]), "unknown"),
        (GOOD._replace(tries=[refused(452)]), "refused"),
        (GOOD._replace(tries=[refused(451, "Configuration is out of date")]), "refused"),
        (GOOD._replace(tries=[replace(TRY, dot_left=False, code=0, message_id="")]), "unsent"),
        (GOOD._replace(copies=[replace(COPY, sha256="other")]), "mangled"),
        (GOOD._replace(copies=[replace(COPY, mangled="no Received field")]), "mangled"),
        (GOOD._replace(tries=[refused(554)], copies=[], ledger={}), "blamed"),
        (GOOD._replace(tries=[replace(TRY, code=0, half_closed=True, message_id="")]), "silent"),
        (GOOD._replace(tries=[replace(TRY, code=0, message_id="")], knows_all_strikes=True), "silent"),
        (GOOD._replace(ledger={}), "unended"),
        (GOOD._replace(ledger=told(state=4, ends=[])), "unended"),
        (GOOD._replace(ledger={**told(), OTHER_ID: [replace(TOLD, state=2, ends=[])]}), "unended"),
        (GOOD._replace(ledger=told(state=BOUNCED, ends=[BOUNCED])), "wrong end"),
        (GOOD._replace(ledger=told(ends=[SENT, BOUNCED])), "ended twice"),
        (GOOD._replace(ledger=told(ends=[SENT, SENT])), "ended twice"),
        (GOOD._replace(ledger=told(ends=[SENT, SENT], uncertain_count=1)), "ended twice"),
        (GOOD._replace(ledger=told(ends=[SENT, SENT], is_replicated=True)), "ended twice"),
        (GOOD._replace(ledger=told(ends=[SENT, BOUNCED], uncertain_count=1, is_replicated=True)), "ended twice"),
        (GOOD._replace(wrong_in_books=["accounts/demo/books/1"]), "books"),
        (GOOD._replace(left_in_spools=["a row"]), "left behind"),
    ],
)
def test_what_breaks_a_rule_is_told_by_its_name(case: Case, rule: str) -> None:
    assert rule in rules(case)


@pytest.mark.parametrize(
    "case",
    [
        GOOD,
        GOOD._replace(ledger=told(ends=[SENT, SENT], uncertain_count=1, is_replicated=True)),
        GOOD._replace(tries=[replace(TRY, code=0, message_id="")]),
        GOOD._replace(
            tries=[replace(TRY, code=0, message_id="", begun_s=9.0, time_s=12.0)],
            strikes=[KILL],
            knows_all_strikes=True,
        ),
        GOOD._replace(tries=[refused(451)]),
        GOOD._replace(tries=[refused(452)], copies=[], ledger={}),
        GOOD._replace(copies=[COPY, AGAIN], ledger=told(uncertain_count=1)),
        GOOD._replace(copies=[COPY, AGAIN], ledger=told(uncertain_count=1), confirmed=frozenset({0}), strikes=[KILL]),
        GOOD._replace(
            tries=[replace(TRY, recipients=("refuse-1@example.net",))],
            copies=[],
            ledger={ID: [Told("a.1.1", "refuse-1@example.net", BOUNCED, [BOUNCED])]},
        ),
        GOOD._replace(ledger=None),
    ],
)
def test_what_a_counted_window_explains_is_no_violation(case: Case) -> None:
    assert judge(case) == []


def test_a_kill_that_came_after_the_second_copy_explains_nothing() -> None:
    late = replace(KILL, time_s=20.0)
    case = GOOD._replace(copies=[COPY, AGAIN], ledger=told(uncertain_count=1), confirmed=frozenset({0}), strikes=[late])
    assert rules(case) == {"window"}


def test_the_summary_counts_both_windows() -> None:
    unanswered = replace(TRY, code=0, message_id="")
    numbers = summary(GOOD._replace(tries=[unanswered], copies=[COPY, AGAIN]))
    assert (numbers["w1"], numbers["w2"], numbers["unanswered"]) == (1, 1, 1)


def test_a_copy_is_told_from_the_field_that_was_added() -> None:
    submitted = b"X-Token: a.1.1\r\n\r\n.body\r\n"
    added = b"Received: from app ([127.0.0.1])\r\n\tby node with ESMTP id " + ID.encode() + b";\r\n\tsome day\r\n"
    copy = read_copy(added + submitted, (ADDRESS,), 1)
    assert (copy.token, copy.message_id, copy.sha256, copy.mangled) == ("a.1.1", ID, digest(submitted), "")
    assert read_copy(submitted, (ADDRESS,), 1).mangled
    assert read_copy(added + b"X-Extra: 1\r\n" + submitted, (ADDRESS,), 1).sha256 != digest(submitted)


def test_the_books_keep_what_was_entered_in_files_too(tmp_path: Path) -> None:
    books = Books(tmp_path)
    books.note_try(TRY)
    place = books.note_copy(b"Subject: nobody's\r\n\r\n", (ADDRESS,), 1)
    books.note_confirmed(place)
    books.note_strike(KILL)
    tries, copies, strikes, confirmed = books.snapshot()
    assert (len(tries), len(copies), len(strikes), confirmed) == (1, 1, 1, {0})
    assert books.acknowledged() == 1
    assert {path.name for path in tmp_path.iterdir()} == {"tries.jsonl", "copies.jsonl", "strikes.jsonl", "copy-1.eml"}
