"""What tells a spool's disk from a copy of it: a random id for each opening, in the table `opening`.

The control plane stores the id of the opening that it took last, and takes the spool only when its disk knows that one,
with as many records as are stored. So the disk keeps every opening that may be the stored one:

    not answered by the control plane   all of them, UNANSWERED_KEPT at most: the newest stay
    the last one that was answered      as long as no later one is
    answered ones before it             ANSWERED_KEPT in all: a database that failed over may have lost the last ones

An opening is answered when something was acknowledged under it (`state.answered` is its incarnation): the control plane
acknowledges nothing before it has taken it. That is written with what is acknowledged, and openings are forgotten when
the next one begins. A copy that was made knows none that came later; one that was made while the spool was open knows
that one, too, but in the copy it ended sooner.
"""

from __future__ import annotations

import apsw

from dataplane.adapters.spool_sqlite.schema import fetch
from dataplane.ports import FormerOpening, Openings

ID_BYTES = 16
ANSWERED_KEPT = 16
UNANSWERED_KEPT = 1_000

_END = "UPDATE opening SET last_record = (SELECT outbox_last FROM state) WHERE last_record IS NULL"
_FORGET = """
DELETE FROM opening WHERE incarnation IN (
    SELECT incarnation FROM opening WHERE (incarnation <= (SELECT answered FROM state)) = ?
    ORDER BY incarnation DESC LIMIT -1 OFFSET ?
)
"""
_FORMER = "SELECT id, last_record FROM opening ORDER BY incarnation"
_INSERT = "INSERT INTO opening (incarnation, id) VALUES (?, ?)"


def begin_opening(connection: apsw.Connection, incarnation: int, opening: bytes) -> Openings:
    """End the opening before this one and note this one, inside the caller's transaction; what the disk knows then."""
    connection.execute(_END)
    connection.execute(_FORGET, (1, ANSWERED_KEPT))
    connection.execute(_FORGET, (0, UNANSWERED_KEPT))
    former = tuple(FormerOpening(*row) for row in fetch(connection, _FORMER))
    connection.execute(_INSERT, (incarnation, opening))
    return Openings(opening, former)
