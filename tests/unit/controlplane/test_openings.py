"""Which disks go on from what is stored of a spool, and which are old copies."""

from __future__ import annotations

import pytest

from controlplane.domain.openings import Openings, is_old_copy, resume_after

FIRST, SECOND, THIRD, OTHER = (bytes([number]) * 16 for number in range(4))
STORED = 100


@pytest.mark.parametrize(
    ("stored_opening", "openings", "last_record", "is_old"),
    [
        # Nothing is known of it yet: its records are all that can be compared.
        (None, Openings(FIRST), STORED, False),
        (None, Openings(FIRST), STORED - 1, True),
        (None, Openings(), STORED, False),
        # The same opening, on another stream.
        (FIRST, Openings(FIRST), STORED, False),
        (FIRST, Openings(FIRST), STORED - 1, True),
        # The same disk, opened again, once and often; the last answer may have been lost.
        (FIRST, Openings(SECOND, ((FIRST, STORED),)), STORED, False),
        (FIRST, Openings(SECOND, ((FIRST, STORED + 7),)), STORED + 9, False),
        (FIRST, Openings(THIRD, ((FIRST, STORED), (SECOND, STORED))), STORED, False),
        # A copy of before the opening that is stored, opened as often and with more records since.
        (SECOND, Openings(OTHER, ((FIRST, STORED),)), STORED + 50, True),
        (SECOND, Openings(OTHER), STORED + 50, True),
        # A copy of a disk in use: it knows the opening, which ended sooner there.
        (FIRST, Openings(OTHER, ((FIRST, STORED - 1),)), STORED + 50, True),
        # A node that is too old to tell.
        (FIRST, Openings(), STORED, True),
    ],
)
def test_what_is_an_old_copy(
    stored_opening: bytes | None, openings: Openings, last_record: int, *, is_old: bool
) -> None:
    assert is_old_copy(stored_opening, STORED, openings, last_record) is is_old


@pytest.mark.parametrize(
    ("stored_opening", "openings", "resumed"),
    [
        # The newest disk, refused for what a copy was: whatever it had heard.
        (FIRST, Openings(SECOND, ((FIRST, STORED + 7),)), STORED),
        (FIRST, Openings(SECOND, ((FIRST, STORED),)), STORED),
        # A copy that was made in the midst of the opening, and one that was made before it.
        (FIRST, Openings(OTHER, ((FIRST, 90),)), 80),
        (SECOND, Openings(OTHER, ((FIRST, 90),)), 80),
        (None, Openings(FIRST), 80),
        (FIRST, Openings(), 80),
        # A machine that was put back together with its memory has records of its own under the opening.
        (FIRST, Openings(FIRST), 80),
    ],
)
def test_where_the_ledger_goes_on_with_a_disk_that_is_accepted(
    stored_opening: bytes | None, openings: Openings, resumed: int
) -> None:
    assert resume_after(stored_opening, STORED, openings, 80) == resumed


def test_the_ledger_goes_on_behind_no_record_that_it_has_not() -> None:
    assert resume_after(FIRST, STORED, Openings(OTHER), STORED + 9) == STORED
