"""What can be read of a damaged or doubtful `spool.db`, copied into a new one; the old one is kept in `quarantine/`.

Inputs are the folder, which this process has locked, and the reason; the output is a report, also kept as
`quarantine/<incarnation>/report.json`. A row counts as readable when SQLite returns it and its checksum holds. Messages
are kept whole or not at all: one that lost its row, its content or all of its recipients is named as lost. A record
that is lost leaves an empty one in its place, so that numbers have no gaps: the control plane puts it aside. When it is
in doubt whether an envelope was recorded it is recorded again.

    on disk                                      what opening does
    spool.db and the file `failed`               salvages (anew, if it was interrupted)
    spool.db.new, no spool.db                    the copy was whole: moves it into place
    spool.db alone                               nothing

Raises apsw's errors when the new file cannot be written; the old one is untouched then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import apsw
import orjson

from dataplane.adapters.spool_sqlite import schema
from dataplane.adapters.spool_sqlite.codec import (
    DamagedRowError,
    KeyRow,
    Recipient,
    check_recipient,
    decode_envelope,
    decode_key,
    message_checksum,
)
from dataplane.adapters.spool_sqlite.contents import Contents
from dataplane.adapters.spool_sqlite.errors import translate
from dataplane.adapters.spool_sqlite.identity import sync_folder, write_file
from dataplane.adapters.spool_sqlite.schema import Row
from dataplane.core.ids import MessageId, format_message_id
from dataplane.ports import SpoolFullError, SpoolIdentity, SpoolLosses

MARKER = "failed"
QUARANTINE = "quarantine"
NAMED_LOSSES = 1_000
_REPORT = "report.json"
_NEW = "spool.db.new"
_DAMAGE = (apsw.CorruptError, apsw.NotADBError, apsw.IOError, apsw.SQLError, TypeError)
_ROWS = 32
_ID_BYTES = 16
_INDEX_BITS = 32


@dataclass(frozen=True, slots=True)
class SalvageReport:
    """What became of a damaged file: ids of lost messages and numbers of lost records, as far as they can be known.

    `quarantine` is the folder with the old file. `damaged_places` counts stretches that could not be read; when it is
    not zero there may be losses that nobody can name.
    """

    reason: str
    quarantine: Path
    messages_kept: int
    lost_messages: tuple[str, ...]
    lost_records: tuple[int, ...]
    damaged_places: int


def open_database(
    folder: Path, identity: SpoolIdentity, vfs: str | None = None
) -> tuple[apsw.Connection, SalvageReport | None]:
    """Open the writing connection; salvage first when the file is doubtful, or cannot be used.

    SpoolError for a file of a newer layout or another spool; apsw's errors for a disk that fails.
    """
    path = folder / schema.DATABASE
    report = _finish_swap(folder, identity)
    if (folder / MARKER).exists() and path.exists():
        report = salvage(folder, identity, vfs)
    try:
        return _open(path, identity, vfs), report
    except _DAMAGE as error:
        if isinstance(translate(error), SpoolFullError):
            raise
        leave_marker(folder, f"spool.db cannot be opened: {type(error).__name__}")
        report = salvage(folder, identity, vfs)
        return _open(path, identity, vfs), report


def _open(path: Path, identity: SpoolIdentity, vfs: str | None) -> apsw.Connection:
    connection = schema.open_writer(path, vfs)
    try:
        schema.prepare(connection, identity.spool)
    except BaseException:
        connection.close()
        raise
    return connection


def leave_marker(folder: Path, reason: str) -> None:
    """Tell the next start to salvage; a disk that cannot even take this will show its faults then too."""
    with contextlib.suppress(OSError):
        write_file(folder / MARKER, reason.encode())


def salvage(folder: Path, identity: SpoolIdentity, vfs: str | None = None) -> SalvageReport:
    """Copy what is readable into a new file and put it in the place of the old one."""
    try:
        reason = (folder / MARKER).read_text()
    except OSError:
        reason = "unknown"
    quarantine = folder / QUARANTINE / str(identity.incarnation)
    (quarantine / "content").mkdir(mode=0o700, parents=True, exist_ok=True)
    for leftover in folder.glob(f"{_NEW}*"):
        leftover.unlink()
    new = schema.open_writer(folder / _NEW, vfs)
    try:
        schema.prepare(new, identity.spool)
        copy = _Copy(new, Contents(folder))
        with contextlib.suppress(apsw.Error):
            _copy_from(folder, copy, vfs)
        report = copy.finish(reason, quarantine)
        new.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    finally:
        new.close()
    for leftover in (folder / f"{_NEW}-wal", folder / f"{_NEW}-shm"):
        leftover.unlink(missing_ok=True)
    for message_id in copy.unowned:
        Contents(folder).move(message_id, quarantine / "content")
    _save_report(report)
    _swap(folder, quarantine)
    return report


def _finish_swap(folder: Path, identity: SpoolIdentity) -> SalvageReport | None:
    """End what a crash interrupted between moving the old file away and the new one into place."""
    quarantine = folder / QUARANTINE / str(identity.incarnation)
    if (folder / schema.DATABASE).exists() or not (quarantine / schema.DATABASE).exists():
        return None
    _swap(folder, quarantine)
    return _load_report(quarantine)


def _swap(folder: Path, quarantine: Path) -> None:
    """Move the old file away before its WAL, so that neither is ever used without the other."""
    for name in (schema.DATABASE, f"{schema.DATABASE}-wal", f"{schema.DATABASE}-shm"):
        if (folder / name).exists():
            (folder / name).rename(quarantine / name)
            sync_folder(folder)
            sync_folder(quarantine)
    (folder / _NEW).rename(folder / schema.DATABASE)
    sync_folder(folder)
    (folder / MARKER).unlink(missing_ok=True)
    sync_folder(folder)


def _save_report(report: SalvageReport) -> None:
    fields = {
        "reason": report.reason,
        "messages_kept": report.messages_kept,
        "lost_messages": report.lost_messages,
        "lost_records": report.lost_records,
        "damaged_places": report.damaged_places,
    }
    write_file(report.quarantine / _REPORT, orjson.dumps(fields, option=orjson.OPT_INDENT_2))
    sync_folder(report.quarantine)


def _load_report(quarantine: Path) -> SalvageReport:
    fields = orjson.loads((quarantine / _REPORT).read_bytes())
    return SalvageReport(
        reason=fields["reason"],
        quarantine=quarantine,
        messages_kept=fields["messages_kept"],
        lost_messages=tuple(fields["lost_messages"]),
        lost_records=tuple(fields["lost_records"]),
        damaged_places=fields["damaged_places"],
    )


def read_losses(folder: Path) -> SpoolLosses:
    """What the reports that the folder keeps tell of all salvages together; one that cannot be read is skipped."""
    messages: list[str] = []
    record_count = damaged_places = 0
    for file in sorted((folder / QUARANTINE).glob(f"*/{_REPORT}")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            report = _load_report(file.parent)
            messages += report.lost_messages
            record_count += len(report.lost_records)
            damaged_places += report.damaged_places
    lost = list(dict.fromkeys(messages))
    return SpoolLosses(tuple(lost[:NAMED_LOSSES]), len(lost), record_count, damaged_places)


def _copy_from(folder: Path, copy: _Copy, vfs: str | None) -> None:
    """Walk all tables of the old file. apsw's errors when not even its first page can be read."""
    old = apsw.Connection(str(folder / schema.DATABASE), flags=apsw.SQLITE_OPEN_READWRITE, vfs=vfs)
    old.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    try:
        copy.read_ids(old)
        copy.copy_recipients(old)
        copy.copy_messages(old)
        copy.copy_unreported(old)
        copy.copy_outbox(old)
        copy.copy_quarantine(old)
        copy.copy_keys(old)
        copy.copy_openings(old)
    finally:
        old.close()


class _Copy:
    """The new file as it fills."""

    def __init__(self, new: apsw.Connection, contents: Contents) -> None:
        self._new = new
        self._contents = contents
        self._known: set[MessageId] = set()
        self._lost_records: list[int] = []
        self._damaged = 0
        self._doubtful_reports = False
        self.unowned: list[MessageId] = []

    def _walk(self, fetch: Callable[[int, int], list[tuple[int, Row]]], last: int) -> Iterator[Row]:
        """Rows in the order of an integer position up to `last`; stretches that cannot be read are stepped over."""
        position = -1
        while position < last:
            try:
                rows = _fetch_some(fetch, position)
            except apsw.Error:
                self._damaged += 1
                beyond = _find_readable(fetch, position, last)
                if beyond is None:
                    return
                position = beyond
                continue
            if not rows:
                return
            for position, row in rows:  # noqa: B007 - the last one is where the walk goes on
                yield row

    def read_ids(self, old: apsw.Connection) -> None:
        """The index of ids is a tree of its own: it knows of messages whose rows are gone."""

        def fetch(position: int, limit: int) -> list[tuple[int, Row]]:
            sql = "SELECT id FROM message INDEXED BY sqlite_autoindex_message_1 WHERE id > ? ORDER BY id LIMIT ?"
            rows = schema.fetch(old, sql, (_position_id(position), limit))
            return [(int.from_bytes(row[0], "big"), row) for row in rows]

        self._known.update(row[0] for row in self._walk(fetch, 1 << 128))

    def copy_recipients(self, old: apsw.Connection) -> None:
        """Rows whose checksum holds."""
        columns = "message_id, idx, state, attempt, due_ms, rank, incarnation, checksum, queue_key"

        def fetch(position: int, limit: int) -> list[tuple[int, Row]]:
            after = (_position_id(position >> _INDEX_BITS), position & ((1 << _INDEX_BITS) - 1))
            if position < 0:
                after = (b"", -1)
            sql = (
                f"SELECT {columns} FROM recipient NOT INDEXED "  # noqa: S608 - made of constants
                "WHERE (message_id, idx) > (?, ?) ORDER BY message_id, idx LIMIT ?"
            )
            rows = schema.fetch(old, sql, (*after, limit))
            return [((int.from_bytes(row[0], "big") << _INDEX_BITS) | row[1], row) for row in rows]

        insert = f"INSERT OR IGNORE INTO recipient ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608
        with self._new:
            for row in self._walk(fetch, 1 << (128 + _INDEX_BITS)):
                self._known.add(row[0])
                with contextlib.suppress(DamagedRowError):
                    check_recipient(Recipient(*row))
                    self._new.execute(insert, row)

    def copy_messages(self, old: apsw.Connection) -> None:
        """Rows that hold together with their content, if any of their recipients could be read."""
        columns = "number, id, checksum, content_bytes, envelope, content"

        def fetch(position: int, limit: int) -> list[tuple[int, Row]]:
            sql = f"SELECT {columns} FROM message WHERE number > ? ORDER BY number LIMIT ?"  # noqa: S608
            rows = schema.fetch(old, sql, (position, limit))
            return [(row[0], row) for row in rows]

        insert = f"INSERT OR IGNORE INTO message ({columns}) VALUES (?, ?, ?, ?, ?, ?)"  # noqa: S608
        with self._new:
            for row in self._walk(fetch, (1 << 63) - 1):
                self._known.add(row[1])
                if self._holds(row) and self._has_recipients(row[1]):
                    self._new.execute(insert, row)

    def _holds(self, row: Row) -> bool:
        _, message_id, checksum, _, encoded, content = row
        try:
            decode_envelope(message_id, encoded)
            whole = self._contents.read(message_id) if content is None else content
        except (DamagedRowError, OSError):
            return False
        return bool(message_checksum(message_id, encoded, whole) == checksum)

    def _has_recipients(self, message_id: MessageId) -> bool:
        return bool(
            schema.scalar(self._new, "SELECT EXISTS (SELECT 1 FROM recipient WHERE message_id = ?)", (message_id,))
        )

    def copy_unreported(self, old: apsw.Connection) -> None:
        """The marks; when some cannot be read, all messages count as not recorded."""

        def fetch(position: int, limit: int) -> list[tuple[int, Row]]:
            sql = "SELECT message_id FROM unreported WHERE message_id > ? ORDER BY message_id LIMIT ?"
            rows = schema.fetch(old, sql, (_position_id(position), limit))
            return [(int.from_bytes(row[0], "big"), row) for row in rows]

        before = self._damaged
        insert = "INSERT INTO unreported SELECT id FROM message WHERE id = ?"
        with self._new:
            for row in self._walk(fetch, 1 << 128):
                self._new.execute(insert, row)
            if self._damaged > before:
                self._new.execute("INSERT OR IGNORE INTO unreported SELECT id FROM message")

    def copy_outbox(self, old: apsw.Connection) -> None:
        """Records with what numbers they had; the lost ones are empty."""

        def fetch(position: int, limit: int) -> list[tuple[int, Row]]:
            sql = "SELECT first, count, checksum, records FROM outbox WHERE first > ? ORDER BY first LIMIT ?"
            rows = schema.fetch(old, sql, (position, limit))
            return [(row[0], row) for row in rows]

        kept = _Outbox(self._new)
        try:
            sql = "SELECT outbox_first, outbox_last, acknowledged FROM state"
            first, last, acknowledged = old.execute(sql).get
            kept.next = first
        except (apsw.Error, TypeError):
            first = last = acknowledged = None
        with self._new:
            for pack_first, count, checksum, packed in self._walk(fetch, (1 << 63) - 1):
                if kept.next is None:
                    kept.next = pack_first
                if pack_first >= kept.next and crc32(packed) == checksum:
                    self._lost_records += kept.fill(pack_first)
                    kept.add(count, packed)
            if last is not None:
                self._lost_records += kept.fill(last + 1)
            begin = first if first is not None else kept.first
            self._new.execute(
                "UPDATE state SET outbox_first = ?, outbox_last = ?, outbox_bytes = ?, acknowledged = ?",
                (begin, (kept.next or begin) - 1, kept.bytes, begin - 1 if acknowledged is None else acknowledged),
            )

    def copy_quarantine(self, old: apsw.Connection) -> None:
        """What was set aside before stays aside."""

        def fetch(position: int, limit: int) -> list[tuple[int, Row]]:
            sql = "SELECT * FROM quarantine WHERE id > ? ORDER BY id LIMIT ?"
            rows = schema.fetch(old, sql, (_position_id(position), limit))
            return [(int.from_bytes(row[0], "big"), row) for row in rows]

        with self._new:
            for row in self._walk(fetch, 1 << 128):
                self._new.execute("INSERT OR IGNORE INTO quarantine VALUES (?, ?, ?, ?, ?, ?)", row)

    def copy_keys(self, old: apsw.Connection) -> None:
        """Submission keys whose checksum holds; one that is lost may be used again."""
        if not schema.scalar(old, "SELECT count(*) FROM sqlite_schema WHERE name = 'submission_key'"):
            return
        columns = "key_hash, content_hash, message_id, time_ms, checksum"

        def fetch(position: int, limit: int) -> list[tuple[int, Row]]:
            sql = f"SELECT number, {columns} FROM submission_key WHERE number > ? ORDER BY number LIMIT ?"  # noqa: S608
            return [(row[0], row[1:]) for row in schema.fetch(old, sql, (position, limit))]

        insert = f"INSERT OR IGNORE INTO submission_key ({columns}) VALUES (?, ?, ?, ?, ?)"  # noqa: S608
        with self._new:
            for row in self._walk(fetch, (1 << 63) - 1):
                with contextlib.suppress(DamagedRowError):
                    decode_key(KeyRow(*row))
                    self._new.execute(insert, row)

    def copy_openings(self, old: apsw.Connection) -> None:
        """What tells the spool from a copy; where it is lost the control plane takes the spool for one."""
        if not schema.scalar(old, "SELECT count(*) FROM sqlite_schema WHERE name = 'opening'"):
            return

        def fetch(position: int, limit: int) -> list[tuple[int, Row]]:
            sql = "SELECT incarnation, id, last_record FROM opening WHERE incarnation > ? ORDER BY incarnation LIMIT ?"
            return [(row[0], row) for row in schema.fetch(old, sql, (position, limit))]

        with self._new:
            for row in self._walk(fetch, (1 << 63) - 1):
                self._new.execute("INSERT OR IGNORE INTO opening VALUES (?, ?, ?)", row)
            # Unknown, it is 0: then all of them are kept.
            with contextlib.suppress(apsw.Error):
                self._new.execute("UPDATE state SET answered = ?", (schema.scalar(old, "SELECT answered FROM state"),))

    def finish(self, reason: str, quarantine: Path) -> SalvageReport:
        """Drop recipients without a message, count what is there, and say what is not."""
        with self._new:
            orphans = self._new.execute(
                "SELECT DISTINCT message_id FROM recipient AS r "
                "WHERE NOT EXISTS (SELECT 1 FROM message WHERE id = r.message_id)"
            ).fetchall()
            self._new.executemany("DELETE FROM recipient WHERE message_id = ?", orphans)
            self._new.execute("UPDATE state SET waiting_count = (SELECT count(*) FROM recipient)")
        for message_id in self._contents.stored():
            if not schema.scalar(self._new, _OWNS_CONTENT, (message_id,)):
                self.unowned.append(message_id)
                self._known.add(message_id)
        owned = "SELECT EXISTS (SELECT 1 FROM message WHERE id = ?)"
        lost = sorted(key for key in self._known if not schema.scalar(self._new, owned, (key,)))
        return SalvageReport(
            reason=reason,
            quarantine=quarantine,
            messages_kept=schema.scalar(self._new, "SELECT count(*) FROM message"),
            lost_messages=tuple(format_message_id(message_id) for message_id in lost),
            lost_records=tuple(self._lost_records),
            damaged_places=self._damaged,
        )


_OWNS_CONTENT = """
SELECT EXISTS (SELECT 1 FROM message WHERE id = ?1) OR EXISTS (SELECT 1 FROM quarantine WHERE id = ?1)
"""


class _Outbox:
    """The new outbox: packs in order, without gaps."""

    def __init__(self, new: apsw.Connection) -> None:
        self._new = new
        self.next: int | None = None
        self.first = 1
        self.bytes = 0

    def fill(self, until: int) -> range:
        """Put empty records before number `until`; return their numbers."""
        lost = range(self.next or until, until)
        if lost:
            self.add(len(lost), bytes(4 * len(lost)))
        return lost

    def add(self, count: int, packed: bytes) -> None:
        """Append a pack."""
        if self.next is None:
            raise ValueError("the first pack says its number")
        self.first = self.first if self.bytes else self.next
        self.bytes += len(packed)
        row = (self.next, count, self.bytes, crc32(packed), packed)
        self._new.execute("INSERT INTO outbox (first, count, end_bytes, checksum, records) VALUES (?, ?, ?, ?, ?)", row)
        self.next += count


def _position_id(position: int) -> bytes:
    """The id at a position; before the first one it is shorter than any."""
    return b"" if position < 0 else min(position, (1 << 128) - 1).to_bytes(_ID_BYTES, "big")


def _fetch_some(fetch: Callable[[int, int], list[tuple[int, Row]]], position: int) -> list[tuple[int, Row]]:
    """Rows after a position: many, or the one before a damaged place."""
    try:
        return fetch(position, _ROWS)
    except apsw.Error:
        return fetch(position, 1)


def _find_readable(fetch: Callable[[int, int], list[tuple[int, Row]]], position: int, last: int) -> int | None:
    """The lowest position beyond a damaged place from which a row can be read, None when there is none."""

    def readable(at: int) -> bool:
        try:
            fetch(at, 1)
        except apsw.Error:
            return False
        return True

    step = 1
    while not readable(min(position + step, last)):
        if position + step >= last:
            return None
        step *= 2
    low, high = position + step // 2, min(position + step, last)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if readable(middle) else (middle, high)
    return high
