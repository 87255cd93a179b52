"""The judge: compares what was answered, what arrived and what Postroad says, and lists what breaks a promise. Pure.

    rule          it is broken when
    lost          a 250 was said, and no copy arrived for a recipient that the next hop takes
    duplicate     more copies of one message for one recipient arrived than 1 + its counted windows (W2)
    window        the windows that Postroad counted have no cause outside: the sender had read the 250, and no process
                  that delivers was struck meanwhile
    unknown       something arrived that nobody submitted, or to somebody it was not meant for
    refused       something arrived that was refused; only a 451 that says that storing failed or took too long leaves
                  open whether it was stored, as no reply at all does (W1)
    unsent        something arrived whose dot had not left the client
    mangled       the content is not what was submitted, below the one field that is added
    blamed        a sound message was refused for good: the fault was ours, so it has to be 4xx
    silent        a client that had only closed its own direction got no reply, or one whose way to the node and whose
                  worker nothing had struck
    unended       a stored message's recipient has not ended, or is not in Postroad's ledger
    wrong end     a recipient ended otherwise than the next hop decided
    ended twice   a recipient has more than one terminal state, or came to it more than once; of REPLICATED mail each
                  attempt that nobody knew the end of may have had the same one
    left behind   a spool still holds recipients when all is quiet
    books         Postroad's own books do not balance, or their two sides differ, when all is quiet

W1, our 250 lost, shows as a try without a reply: it may have arrived or not, like every other try of the same message,
each under its own token; so copies by W1 are told from copies by W2 one by one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from support.chaos.books import Copy, Strike, Try

SENT, BOUNCED = 6, 7
TERMINAL = frozenset({6, 7, 8, 9, 10})
# Replies of 451 that leave open what became of the message.
AMBIGUOUS = ("Storing took too long", "Storing failed", "Internal error")
# A kill is noted when it is sent; the process may do a little more before it is gone, and the note is not atomic.
_SLACK_S = 0.5
# A link that was struck stays so for a while.
_LASTING_S = 10.0
_SHOWN = 10
VERDICT = "the judge found"


class Violation(NamedTuple):
    """One broken rule; `what` names the message."""

    rule: str
    what: str


@dataclass
class Told:
    """What Postroad says of one recipient of one message: its state now, terminal states it was ever given, and how
    many of its attempts ended with nobody knowing whether the dot had left. Of REPLICATED mail it may be told later.
    """

    token: str
    address: str
    state: int
    ends: list[int] = field(default_factory=list)
    uncertain_count: int = 0
    is_replicated: bool = False


Ledger = Mapping[str, Sequence[Told]]


class Case(NamedTuple):
    """What is judged. `ledger` is None where nobody kept one; `ends_as` says how an address must end.

    `knows_all_strikes` says that nothing was broken but what the strikes tell.
    """

    tries: Sequence[Try]
    copies: Sequence[Copy]
    strikes: Sequence[Strike] = ()
    confirmed: frozenset[int] = frozenset()
    ledger: Ledger | None = None
    left_in_spools: Sequence[str] = ()
    ends_as: Callable[[str], int] = lambda _: SENT
    knows_all_strikes: bool = False
    wrong_in_books: Sequence[str] = ()


def judge(case: Case) -> list[Violation]:
    """Every broken rule, message by message; empty when all promises were kept."""
    found = [
        *_answers(case),
        *_arrivals(case),
        *_losses(case),
        *_duplicates(case),
        *(Violation("left behind", row) for row in case.left_in_spools),
        *(Violation("books", entry) for entry in case.wrong_in_books),
    ]
    if case.ledger is not None:
        found += _ends(case, case.ledger)
    return found


def check(case: Case) -> Case:
    """The case, when nothing is broken; else AssertionError with what is."""
    found = judge(case)
    shown = "".join(f"\n  {violation.rule}: {violation.what}" for violation in found[:_SHOWN])
    if found:
        raise AssertionError(f"{VERDICT} {len(found)} violations:{shown}")
    return case


def summary(case: Case) -> Counter[str]:
    """What happened, in numbers."""
    tokens = Counter(copy.token for copy in case.copies)
    numbers: Counter[str] = Counter()
    numbers["tries"] = len(case.tries)
    numbers["acknowledged"] = sum(entry.code == 250 for entry in case.tries)
    numbers["unanswered"] = sum(entry.code == 0 and entry.dot_left for entry in case.tries)
    numbers["refused"] = sum(400 <= entry.code < 600 for entry in case.tries)
    numbers["copies"] = len(case.copies)
    numbers["w1"] = sum(entry.code == 0 and entry.dot_left and tokens[entry.token] > 0 for entry in case.tries)
    numbers["w2"] = sum(count - 1 for count in _counts(case.copies).values())
    return numbers


def _answers(case: Case) -> Iterable[Violation]:
    for entry in case.tries:
        if 500 <= entry.code < 600:
            yield Violation("blamed", f"{entry.token}: {entry.code} {entry.text}")
        if entry.dot_left and not entry.code and (entry.half_closed or not _may_be_silent(case, entry)):
            yield Violation("silent", entry.token)


def _may_be_silent(case: Case, entry: Try) -> bool:
    """Whether something was broken that can have kept the reply from a client, where that is known."""
    return not case.knows_all_strikes or any(
        (strike.ends_worker or strike.what.startswith("submission"))
        and entry.begun_s - _LASTING_S <= strike.time_s <= entry.time_s
        for strike in case.strikes
    )


def _may_arrive(entry: Try) -> bool:
    if entry.code in {0, 250}:
        return True
    return entry.code == 451 and any(text in entry.text for text in AMBIGUOUS)


def _arrivals(case: Case) -> Iterable[Violation]:
    tries = {entry.token: entry for entry in case.tries}
    for copy in case.copies:
        entry = tries.get(copy.token)
        if entry is None:
            yield Violation("unknown", f"{copy.token or 'no token'} {copy.message_id}")
            continue
        if not set(copy.recipients) <= set(entry.recipients):
            yield Violation("unknown", f"{copy.token} for {copy.recipients}, meant for {entry.recipients}")
        if entry.message_id and copy.message_id != entry.message_id:
            yield Violation("unknown", f"{copy.token} as {copy.message_id}, acknowledged as {entry.message_id}")
        if not entry.dot_left:
            yield Violation("unsent", copy.token)
        elif not _may_arrive(entry):
            yield Violation("refused", f"{copy.token}: {entry.code} {entry.text}")
        if copy.mangled or copy.sha256 != entry.sha256:
            yield Violation("mangled", f"{copy.token} {copy.mangled}")


def _counts(copies: Iterable[Copy]) -> Counter[tuple[str, str, str]]:
    return Counter((copy.token, copy.message_id, address) for copy in copies for address in copy.recipients)


def _losses(case: Case) -> Iterable[Violation]:
    arrived = {(copy.token, address) for copy in case.copies for address in copy.recipients}
    for entry in case.tries:
        if entry.code == 250:
            for address in entry.recipients:
                if case.ends_as(address) == SENT and (entry.token, address) not in arrived:
                    yield Violation("lost", f"{entry.token} {entry.message_id} for {address}")


def _duplicates(case: Case) -> Iterable[Violation]:
    by_recipient: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for place, copy in enumerate(case.copies):
        for address in copy.recipients:
            by_recipient[copy.token, copy.message_id, address].append(place)
    for (token, message_id, address), places in by_recipient.items():
        if len(places) < 2:
            continue
        what = f"{token} {message_id} for {address}: {len(places)} copies"
        if case.ledger is not None:
            told = [one for one in case.ledger.get(message_id, ()) if one.address == address]
            if len(places) > 1 + sum(one.uncertain_count for one in told):
                yield Violation("duplicate", what)
        for place, following in pairwise(places):
            if not _has_cause(case, place, following):
                yield Violation("window", f"{what}, and nothing was cut after number {place}")


def _has_cause(case: Case, place: int, following: int) -> bool:
    """Whether something outside explains that the sender did not keep what it was told."""
    if place not in case.confirmed:
        return True
    begins_s, ends_s = case.copies[place].time_s - _SLACK_S, case.copies[following].time_s + _SLACK_S
    return any(strike.ends_worker and begins_s <= strike.time_s <= ends_s for strike in case.strikes)


def _ends(case: Case, ledger: Ledger) -> Iterable[Violation]:
    tries = {entry.token: entry for entry in case.tries}
    stored = {entry.message_id: entry for entry in case.tries if entry.code == 250}
    stored |= {copy.message_id: tries[copy.token] for copy in case.copies if copy.token in tries and copy.message_id}
    for message_id, entry in stored.items():
        told = {one.address: one for one in ledger.get(message_id, ())}
        for address in entry.recipients:
            if address not in told or told[address].state not in TERMINAL:
                state = told[address].state if address in told else "not there"
                yield Violation("unended", f"{entry.token} {message_id} for {address}: {state}")
    for message_id, rows in ledger.items():
        for one in rows:
            what = f"{one.token} {message_id} for {one.address}"
            if len(set(one.ends)) > 1 or len(one.ends) > 1 + one.is_replicated * one.uncertain_count:
                yield Violation("ended twice", f"{what}: {one.ends}")
            if one.state not in TERMINAL:
                if message_id not in stored:
                    yield Violation("unended", f"{what}: {one.state}")
            elif one.state != case.ends_as(one.address):
                yield Violation("wrong end", f"{what}: {one.state}")
