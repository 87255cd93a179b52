"""What each verb makes of a recipient in each state, and which recipients a filter means."""

from __future__ import annotations

import pytest

from dataplane.core.commands import CONCERNED, EVERY_ACCOUNT, Filter, Other, Outcome, attempts_of, decide
from dataplane.core.envelope import make_queue_key, pinned_provider
from dataplane.core.queue import MOVES, TERMINAL, State, Verb
from support.spools import KEY, NOW_MS, OTHER_KEY, make_row

OTHER = "providers/other"
LATE, NOTHING = Other.TOO_LATE, Other.NOTHING_TO_DO
LATER_MS = NOW_MS + 60_000
WAITING = (State.SCHEDULED, State.QUEUED, State.DEFERRED, State.HELD)

# What a recipient that is due later becomes.
BECOMES: dict[Verb, dict[State, State | Other]] = {
    Verb.CANCEL: dict.fromkeys(WAITING, State.CANCELLED) | {State.SENDING: LATE},
    Verb.BOUNCE: dict.fromkeys(WAITING, State.FAILED) | {State.SENDING: LATE},
    Verb.HOLD: dict.fromkeys(WAITING[:3], State.HELD) | {State.HELD: NOTHING, State.SENDING: LATE},
    Verb.RELEASE: dict.fromkeys((*WAITING[:3], State.SENDING), NOTHING) | {State.HELD: State.QUEUED},
    Verb.RETRY: dict.fromkeys(WAITING[:3], State.QUEUED) | {State.HELD: NOTHING, State.SENDING: LATE},
    Verb.REROUTE: {state: state for state in WAITING} | {State.SENDING: LATE},
}


@pytest.mark.parametrize(("verb", "state"), [(verb, state) for verb, by_state in BECOMES.items() for state in by_state])
def test_a_verb_does_to_a_state_what_the_table_says(verb: Verb, state: State) -> None:
    row = make_row(state=state, attempt=2, due_ms=LATER_MS)
    found = decide(verb, row, OTHER, NOW_MS)
    expected = BECOMES[verb][state]
    assert (found.row.state if isinstance(found, Outcome) else found) == expected
    assert (state in CONCERNED[verb]) == (expected is not NOTHING)


def test_every_move_of_a_verb_is_in_the_table_of_states() -> None:
    for verb, by_state in BECOMES.items():
        for state, new in by_state.items():
            assert isinstance(new, Other) or new == state or new in MOVES[state], (verb, state)
    assert set(BECOMES) == set(Verb)
    assert all(set(by_state) == set(State) - TERMINAL for by_state in BECOMES.values())


def test_a_hold_takes_a_number_that_is_no_attempt_and_release_gives_it_back() -> None:
    row = make_row(state=State.DEFERRED, attempt=3, due_ms=LATER_MS)
    held = decide(Verb.HOLD, row, "", NOW_MS)
    assert isinstance(held, Outcome)
    assert (held.row.attempt, held.attempts, attempts_of(held.row)) == (4, 3, 3)
    released = decide(Verb.RELEASE, held.row, "", NOW_MS)
    assert released == Outcome(row._replace(state=State.QUEUED, due_ms=NOW_MS), 3)
    cancelled = decide(Verb.CANCEL, held.row, "", NOW_MS)
    assert isinstance(cancelled, Outcome)
    assert (cancelled.row.attempt, cancelled.attempts) == (4, 3)


def test_what_is_due_is_not_retried() -> None:
    assert decide(Verb.RETRY, make_row(due_ms=NOW_MS), "", NOW_MS) is NOTHING
    assert decide(Verb.RETRY, make_row(state=State.DEFERRED, due_ms=NOW_MS - 1), "", NOW_MS) is NOTHING


@pytest.mark.parametrize("due_ms", [LATER_MS, NOW_MS - 1])
def test_what_is_scheduled_is_retried_whatever_its_time_is_by_the_other_clock(due_ms: int) -> None:
    row = make_row(state=State.SCHEDULED, due_ms=due_ms)
    assert decide(Verb.RETRY, row, "", NOW_MS) == Outcome(row._replace(state=State.QUEUED, due_ms=NOW_MS), 0)


def test_what_was_scheduled_is_due_when_it_is_released() -> None:
    row = make_row(state=State.SCHEDULED, due_ms=LATER_MS)
    held = decide(Verb.HOLD, row, "", NOW_MS)
    assert isinstance(held, Outcome)
    released = decide(Verb.RELEASE, held.row, "", NOW_MS)
    assert released == Outcome(row._replace(state=State.QUEUED, due_ms=NOW_MS), 0)


def test_a_reroute_binds_to_the_provider_once_and_leaves_the_time_alone() -> None:
    row = make_row(state=State.DEFERRED, attempt=1, due_ms=LATER_MS)
    found = decide(Verb.REROUTE, row, OTHER, NOW_MS)
    assert isinstance(found, Outcome)
    assert found.row == row._replace(queue_key=make_queue_key("accounts/demo", OTHER, pinned=True))
    assert decide(Verb.REROUTE, found.row, OTHER, NOW_MS) is NOTHING
    # Who waits for it by the rules' choice only is bound all the same: the rules may change.
    assert isinstance(decide(Verb.REROUTE, make_row(queue_key=OTHER_KEY), OTHER, NOW_MS), Outcome)


@pytest.mark.parametrize("priority", [-9, 0, 4])
def test_a_reroute_keeps_the_priority_and_goes_from_one_provider_to_another(priority: int) -> None:
    row = make_row(priority=priority, queue_key=make_queue_key("accounts/demo", "providers/inbox", priority))
    bound = decide(Verb.REROUTE, row, OTHER, NOW_MS)
    assert isinstance(bound, Outcome)
    assert bound.row.queue_key == make_queue_key("accounts/demo", OTHER, priority, pinned=True)
    assert decide(Verb.REROUTE, bound.row, OTHER, NOW_MS) is NOTHING
    again = decide(Verb.REROUTE, bound.row, "providers/third", NOW_MS)
    assert isinstance(again, Outcome)
    assert pinned_provider(again.row.queue_key) == "providers/third"


@pytest.mark.parametrize(
    ("wanted", "account", "expected"),
    [
        (Filter(0), "accounts/demo", True),
        (Filter(0), EVERY_ACCOUNT, True),
        (Filter(0), "accounts/other", False),
        (Filter(0), "accounts/dem", False),
        (Filter(0, provider="providers/inbox"), "accounts/demo", True),
        (Filter(0, provider="providers/other"), EVERY_ACCOUNT, False),
        (Filter(0, states=(State.HELD, State.QUEUED)), "accounts/demo", True),
        (Filter(0, states=(State.HELD,)), "accounts/demo", False),
    ],
)
def test_a_filter_means_what_has_all_that_it_names(wanted: Filter, account: str, *, expected: bool) -> None:
    assert wanted.wants(account, State.QUEUED, KEY) is expected


def test_a_filter_compares_the_whole_domain() -> None:
    wanted = Filter(0, recipient_domain="example.net")
    assert wanted.wants_address("a@b@example.net")
    assert not wanted.wants_address("a@sub.example.net")
    assert Filter(0).wants_address("anything")
