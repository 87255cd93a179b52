"""Which of its spools a node is told to send nothing from, by what it reports and what is known of them."""

from __future__ import annotations

import pytest

from controlplane.domain.openings import Openings
from controlplane.ports_fleet import SpoolOwner, SpoolStatus
from controlplane.stream.fleet import refused_spools

S = "22222222-2222-4222-8222-222222222222"
FORMER, PRESENT = b"f" * 16, b"p" * 16


def status(last_record: int = 10, *, refused: bool = False) -> SpoolStatus:
    openings = Openings(PRESENT, ((FORMER, 10),))
    return SpoolStatus(S, 3, 5, last_record, 1, open=True, refused=refused, openings=openings)


def owner(*, accepted: bool = True, cursor: int = 10, opening: bytes | None = None) -> SpoolOwner:
    return SpoolOwner(S, "edge-1", accepted, cursor, opening)


@pytest.mark.parametrize(
    ("reported", "own", "is_refused"),
    [
        (status(), [owner()], False),
        (status(refused=True), [owner()], False),
        # Another node's, or one that moved away.
        (status(), [], True),
        (status(refused=True), [], True),
        (status(), [owner(accepted=False)], True),
        # An old copy that waits to be let send; one that is in use may be behind in what it says, not in what it did.
        (status(9, refused=True), [owner()], True),
        (status(9), [owner()], False),
        (status(refused=True), [owner(opening=FORMER)], False),
        (status(20, refused=True), [owner(cursor=11, opening=FORMER)], True),
        (status(20, refused=True), [owner(opening=b"o" * 16)], True),
        (status(20), [owner(opening=b"o" * 16)], False),
    ],
)
def test_what_is_refused(reported: SpoolStatus, own: list[SpoolOwner], *, is_refused: bool) -> None:
    assert refused_spools({S: reported}, own) == (frozenset({S}) if is_refused else frozenset())


def test_a_spool_that_no_worker_reported_yet_is_refused_by_what_is_known_of_it() -> None:
    assert refused_spools({}, [owner(accepted=False)]) == {S}
    assert refused_spools({}, [owner()]) == frozenset()
