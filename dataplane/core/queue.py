"""The states of a recipient, and the one table of moves between them.

A message has no state of its own: it is derived from its recipients. All that changes a state goes through
`check_move`.

    state      who may act           on disk                      what a crash leaves behind
    scheduled  timer, operator       row with due time            the same
    queued     scheduler, operator   row with due time            the same
    sending    the attempt alone     row, attempt number          queued again; `uncertain` if the dot may have left
    deferred   timer, operator       row with next attempt        the same
    held       operator              row without due time         the same
    terminal   nobody                no row; outcome in outbox    the same: the record is sent again until acknowledged

The attempt number is a fencing token: an outcome names the attempt it belongs to, and one that is not the row's present
attempt changes nothing. `MARKS` are facts added to a terminal state; they never change it.
"""

from __future__ import annotations

from enum import IntEnum


class State(IntEnum):
    """State of one recipient; the numbers are stored and sent, and never change."""

    SCHEDULED = 1
    QUEUED = 2
    SENDING = 3
    DEFERRED = 4
    HELD = 5
    SENT = 6
    BOUNCED = 7
    FAILED = 8
    EXPIRED = 9
    CANCELLED = 10


class EventType(IntEnum):
    """What happened; the numbers are stored and sent, and never change."""

    ACCEPTED = 1
    SENT = 2
    DEFERRED = 3
    BOUNCED = 4
    FAILED = 5
    EXPIRED = 6
    CANCELLED = 7
    UNCERTAIN = 8
    CONFLICTING_OUTCOME = 9
    INTERRUPTED = 10
    HELD = 11
    RELEASED = 12
    RETRIED = 13
    REROUTED = 14


class Verb(IntEnum):
    """What a command on waiting mail does; the numbers are stored and sent, and never change."""

    CANCEL = 1
    HOLD = 2
    RELEASE = 3
    RETRY = 4
    BOUNCE = 5
    REROUTE = 6


class Mark(IntEnum):
    """Facts learnt about a recipient after `sent`."""

    RETURNED = 1
    COMPLAINED = 2
    OPENED = 3
    CLICKED = 4


TERMINAL = frozenset({State.SENT, State.BOUNCED, State.FAILED, State.EXPIRED, State.CANCELLED})
WAITING = frozenset({State.SCHEDULED, State.QUEUED, State.DEFERRED, State.HELD})

_STOPPED = frozenset({State.HELD, State.CANCELLED, State.FAILED, State.EXPIRED})

MOVES: dict[State, frozenset[State]] = {
    State.SCHEDULED: _STOPPED | {State.QUEUED},
    State.QUEUED: _STOPPED | {State.SENDING},
    State.SENDING: frozenset({State.SENT, State.DEFERRED, State.BOUNCED, State.FAILED, State.EXPIRED, State.QUEUED}),
    State.DEFERRED: _STOPPED | {State.QUEUED, State.SENDING},
    State.HELD: frozenset({State.QUEUED, State.CANCELLED, State.FAILED, State.EXPIRED}),
    State.SENT: frozenset(),
    State.BOUNCED: frozenset(),
    State.FAILED: frozenset(),
    State.EXPIRED: frozenset(),
    State.CANCELLED: frozenset(),
}

MARKS: dict[State, frozenset[Mark]] = {s: frozenset(Mark) if s is State.SENT else frozenset() for s in State}


class ForbiddenMoveError(Exception):
    """A recipient was asked to make a move that the table does not have: our own bug, never the submitter's."""


def check_move(old: State, new: State) -> None:
    """Raise ForbiddenMoveError unless `old` may become `new`."""
    if new not in MOVES[old]:
        msg = f"{old.name} cannot become {new.name}"
        raise ForbiddenMoveError(msg)
