"""Says who waits in a spool as of one of its records, from one snapshot of the file and beside the loop.

Everything is read in one transaction over a connection of its own, in whatever thread calls: the row `state` says up to
which record the snapshot goes, and what the records after the one that was asked for say is taken back. A message that
no record has told of yet does not count, and neither does a recipient whose message is gone: nobody can send it. What
is held under a lease is PostgreSQL's and waits nowhere here; it is always being sent.

The pass over the table is made in pages, so that SQLite adds up ids without the interpreter, whose lock is free
meanwhile: 0.5 s for 300,000 recipients, 0.06 s of them in Python, 2 ms at a time. The snapshot keeps the WAL from
starting over for as long. A question that cannot be answered is answered with an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import apsw
from google.protobuf.message import DecodeError

from dataplane.adapters.spool_sqlite.codec import DamagedRowError, unpack_records
from dataplane.adapters.spool_sqlite.reader import RECORDS
from dataplane.adapters.spool_sqlite.schema import Row, fetch, open_reader
from dataplane.core.queue import TERMINAL, State
from dataplane.core.waiting import (
    MODULUS,
    Tally,
    Waiting,
    WaitingQuestion,
    WaitingStatement,
    bucket_of,
    tally,
    tally_of_sum,
)
from postroad.node.v1.ledger_pb2 import LedgerRecord

PAGE_ROWS = 8_192
# Decoding so many takes half a second; a ledger that is further behind is asked about again when it has caught up.
MOST_RECORDS = 50_000
MOST_NAMES = 20_000
MOST_WITHOUT_DEADLINE = 100
_DAY_MS = 86_400_000
_LATEST_RETRY_MS, _LATEST_START_MS = 30 * _DAY_MS, 400 * _DAY_MS

_AFTER_ALL = (b"\xff" * 17, 0)
_NUMBERS = "SELECT outbox_first, outbox_last FROM state"
_PAGE_END = """
SELECT message_id, idx FROM recipient WHERE (message_id, idx) > (?, ?) ORDER BY message_id, idx LIMIT 1 OFFSET ?
"""
_PAGE = """
FROM recipient AS r
WHERE (message_id, idx) > (:id, :idx) AND (message_id, idx) <= (:last_id, :last_idx)
    AND EXISTS (SELECT 1 FROM message WHERE id = r.message_id)
    AND NOT EXISTS (SELECT 1 FROM unreported AS u WHERE u.message_id = r.message_id)
    AND NOT (state = 3 AND EXISTS (SELECT 1 FROM message WHERE id = r.message_id AND CASE
        WHEN instr(envelope, CAST('"epoch":' AS BLOB)) = 0 THEN 0
        WHEN json_valid(CAST(envelope AS TEXT)) THEN json_extract(CAST(envelope AS TEXT), '$.epoch') END > 0))
"""
_ACCOUNT = "substr(queue_key, 1, instr(queue_key, char(9)) - 1)"
_BUCKET = "substr(hex(message_id), 30, 3)"
_OF_ACCOUNT = "AND queue_key >= :account || char(9) AND queue_key < :account || char(10)"
_ACCOUNTS_PAGE = f"""
SELECT {_ACCOUNT}, '0', idx, count(*), group_concat(hex(message_id), '') {_PAGE} GROUP BY 1, 3
"""
_BUCKETS_PAGE = f"""
SELECT :account, {_BUCKET}, idx, count(*), group_concat(hex(message_id), '') {_PAGE} {_OF_ACCOUNT} GROUP BY 2, 3
"""
_NAMES_PAGE = f"""
SELECT message_id, idx {_PAGE} {_OF_ACCOUNT} AND {_BUCKET} IN (SELECT value FROM json_each(:buckets))
"""  # noqa: S608 - made of constants
_WITHOUT_DEADLINE = f"""
SELECT {_ACCOUNT}, message_id, idx FROM recipient
WHERE state IN (1, 2, 4) AND NOT due_ms BETWEEN 1 AND CASE state WHEN 1 THEN :latest_start ELSE :latest_retry END
LIMIT {MOST_WITHOUT_DEADLINE}
"""  # noqa: S608 - made of constants
_QUARANTINED = f"""
SELECT id FROM quarantine
WHERE substr(hex(id), 30, 3) IN (SELECT value FROM json_each(:buckets)) LIMIT {MOST_NAMES}
"""  # noqa: S608 - made of constants

_Key = tuple[bytes, int]


class _Turn(NamedTuple):
    """A recipient that records after the one asked for speak of: did it wait before, does it wait now."""

    account: str
    waited: bool
    waits: bool


class _UnansweredError(Exception):
    """Why there is no answer."""


def make_statement(database: Path, question: WaitingQuestion, now_ms: int) -> WaitingStatement:
    """Answer a question; blocks, and never raises for what the file holds."""
    nothing = WaitingStatement(question.spool, question.number)
    try:
        connection = open_reader(database)
        try:
            connection.execute("BEGIN")
            turns = _turns(connection, question.as_of_record)
            if question.buckets:
                return nothing._replace(
                    recipients=_names(connection, question, turns), quarantined=_quarantined(connection, question)
                )
            late = () if question.account else _without_deadline(connection, now_ms)
            return nothing._replace(totals=_totals(connection, question, turns), without_deadline=late)
        finally:
            connection.close()
    except _UnansweredError as error:
        return nothing._replace(error=str(error))
    except (apsw.Error, DamagedRowError, DecodeError) as error:
        return nothing._replace(error=f"the spool cannot be read: {type(error).__name__}")


# --- what records after the one asked for say


def _turns(connection: apsw.Connection, as_of_record: int) -> Mapping[_Key, _Turn]:
    first, last = connection.execute(_NUMBERS).get
    if as_of_record > last or as_of_record + 1 < first:
        raise _UnansweredError(f"there are records {first} to {last}, and {as_of_record} was asked for")
    if last - as_of_record > MOST_RECORDS:
        raise _UnansweredError(f"the ledger lags by {last - as_of_record} records")
    turns: dict[_Key, _Turn] = {}
    for raw in _records(connection, as_of_record + 1):
        record = LedgerRecord.FromString(raw)
        if record.epoch:
            continue
        for index, waits in _said(record):
            key = record.message_id, index
            # Who is told of as new or as taken over was not in the ledger; who is only changed waited until now.
            is_new = record.HasField("accepted") or record.HasField("taken_over")
            waited = turns[key].waited if key in turns else not is_new
            turns[key] = _Turn(record.account, waited, waits)
    return turns


def _said(record: LedgerRecord) -> Iterator[tuple[int, bool]]:
    is_handover = record.WhichOneof("handover") is not None
    updates = () if is_handover else record.recipients
    states = {update.index: State(update.state) for update in updates}
    indexes = range(len(record.accepted.recipients)) if record.HasField("accepted") else states
    for index in indexes:
        yield index, states.get(index, State.QUEUED) not in TERMINAL
    for index in record.taken_over.indexes:
        yield index, True
    for recipient in record.handed_over.recipients:
        yield recipient.index, False


def _records(connection: apsw.Connection, first: int) -> Iterator[bytes]:
    for pack_first, count, checksum, packed in fetch(connection, RECORDS, (first,)):
        if crc32(packed) != checksum:
            raise DamagedRowError("records do not match their checksum")
        yield from unpack_records(packed, count)[max(0, first - pack_first) :]


# --- the answers


def _totals(
    connection: apsw.Connection, question: WaitingQuestion, turns: Mapping[_Key, _Turn]
) -> tuple[tuple[str, int, Tally], ...]:
    totals: dict[tuple[str, int], Tally] = {}
    sql = _BUCKETS_PAGE if question.account else _ACCOUNTS_PAGE
    for account, bucket, index, count, ids in _pages(connection, sql, {"account": question.account}):
        # To add up digits to the base of 2^128 is to take the number that they are modulo 2^128 - 1.
        part = tally_of_sum(count, int(ids, 16) % MODULUS, index)
        place = account, int(bucket, 16)
        totals[place] = totals.get(place, Tally()).plus(part)
    for (message_id, index), turn in turns.items():
        if turn.waited == turn.waits or question.account not in ("", turn.account):
            continue
        place = turn.account, bucket_of(message_id) if question.account else 0
        one, total = tally(message_id, index), totals.get(place, Tally())
        totals[place] = total.plus(one) if turn.waited else total.minus(one)
    return tuple((*place, total) for place, total in totals.items() if total != Tally())


def _names(
    connection: apsw.Connection, question: WaitingQuestion, turns: Mapping[_Key, _Turn]
) -> tuple[tuple[str, Waiting], ...]:
    arguments = {"account": question.account, "buckets": _as_hex(question.buckets)}
    found: set[_Key] = set()
    for message_id, index in _pages(connection, _NAMES_PAGE, arguments):
        found.add((message_id, index))
        if len(found) > MOST_NAMES:
            raise _UnansweredError(f"more than {MOST_NAMES} recipients were asked for by name")
    buckets = frozenset(question.buckets)
    for key, turn in turns.items():
        if turn.waited != turn.waits and turn.account == question.account and bucket_of(key[0]) in buckets:
            (found.add if turn.waited else found.discard)(key)
    return tuple((question.account, Waiting(*key)) for key in found)


def _without_deadline(connection: apsw.Connection, now_ms: int) -> tuple[tuple[str, Waiting], ...]:
    latest = {"latest_start": now_ms + _LATEST_START_MS, "latest_retry": now_ms + _LATEST_RETRY_MS}
    rows = fetch(connection, _WITHOUT_DEADLINE, latest)
    return tuple((account, Waiting(message_id, index)) for account, message_id, index in rows)


def _quarantined(connection: apsw.Connection, question: WaitingQuestion) -> tuple[bytes, ...]:
    rows = fetch(connection, _QUARANTINED, {"buckets": _as_hex(question.buckets)})
    return tuple(row[0] for row in rows)


def _as_hex(buckets: tuple[int, ...]) -> str:
    return json.dumps([f"{bucket:03X}" for bucket in buckets])


def _pages(connection: apsw.Connection, sql: str, arguments: Mapping[str, str]) -> Iterator[Row]:
    last: tuple[bytes, int] = (b"", -1)
    while last != _AFTER_ALL:
        first = last
        last = connection.execute(_PAGE_END, (*first, PAGE_ROWS - 1)).get or _AFTER_ALL
        bounds = {"id": first[0], "idx": first[1], "last_id": last[0], "last_idx": last[1]}
        yield from fetch(connection, sql, {**bounds, **arguments})
