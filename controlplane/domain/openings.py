"""Whether a spool is the one that reported last, or an old copy of its disk.

Pure. A spool draws a random id each time it is opened; what reported last is known by the id of its opening. A disk
that knows the id, and has all that was stored until that opening ended, goes on from there. One that does not is a copy
that was made before, however often it was opened since and however much it recorded.

    stored id      what the spool tells of it             it is
    none yet       anything                               believed, with as many records as are stored
    its present    as many records as are stored          the same opening
    a former one   it ended with as many as are stored    the same disk, opened again
    either         it had fewer                           a copy that was made in the midst of that opening
    any            nothing                                a copy that was made before that opening
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

ID_BYTES = 16
MAX_FORMER = 2_000


class Openings(NamedTuple):
    """What a spool tells of its openings; `present` is empty where its node is too old to tell. `former` are ids and
    the last record written before the next opening.
    """

    present: bytes = b""
    former: tuple[tuple[bytes, int], ...] = ()

    def ends(self, last_record: int) -> Mapping[bytes, int]:
        """With which record each opening ended; the present one is as far as `last_record`."""
        return {**dict(self.former), self.present: last_record} if self.present else {}


def is_old_copy(stored_opening: bytes | None, cursor: int, openings: Openings, last_record: int) -> bool:
    """Whether a disk lacks what is stored of its spool up to `cursor`, under `stored_opening`."""
    if last_record < cursor:
        return True
    if stored_opening is None:
        return False
    return openings.ends(last_record).get(stored_opening, -1) < cursor


def resume_after(stored_opening: bytes | None, cursor: int, openings: Openings, acknowledged: int) -> int:
    """The last record that this disk and the ledger, which has `cursor` records, surely have in common.

    All of them, where the opening that is stored is a former one that ended with as many. Else they parted in the midst
    of an opening, and all that is known is what the disk had heard to be stored: where a machine was put back together
    with its memory, the opening went on with records of its own.
    """
    ended = dict(openings.former).get(stored_opening, -1) if stored_opening else -1
    return cursor if ended >= cursor else min(cursor, acknowledged)
