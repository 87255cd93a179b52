"""The durable spool: `ports.Spool` on one folder, opened by one process.

Inputs and outputs are those of the port. Writes go through `group_commit`, reads through a read-only connection on the
loop's thread, files of large contents through a small pool of threads. Opening takes the lock, salvages the file if the
last owner left it doubtful, and counts the incarnation up before anything is accepted. No room is SpoolFullError and
passes by itself; a disk that fails or a damaged file is SpoolFailedError for all that waits and all that comes, leaves
the marker that makes the next start salvage, and is told to `on_failed` once: the process must end. What was answered
with an error may still be there after a restart, when the WAL had it already (a duplicate of window W1 if it is sent
again).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import apsw

from dataplane.adapters.spool_sqlite import schema
from dataplane.adapters.spool_sqlite.codec import (
    DamagedRowError,
    Recipient,
    encode_envelope,
    encode_key,
    encode_recipient,
    message_checksum,
)
from dataplane.adapters.spool_sqlite.contents import ORPHAN_AGE_S, Contents
from dataplane.adapters.spool_sqlite.depth import DepthCounter
from dataplane.adapters.spool_sqlite.errors import is_full, translate
from dataplane.adapters.spool_sqlite.group_commit import GroupCommit
from dataplane.adapters.spool_sqlite.identity import lock_folder, read_identity, write_identity
from dataplane.adapters.spool_sqlite.incoming import SqliteIncoming, content_error
from dataplane.adapters.spool_sqlite.limits import SpoolLimits
from dataplane.adapters.spool_sqlite.openings import ID_BYTES, begin_opening
from dataplane.adapters.spool_sqlite.reader import Loaded, Reader
from dataplane.adapters.spool_sqlite.room import Room, free_bytes
from dataplane.adapters.spool_sqlite.salvage import SalvageReport, leave_marker, open_database
from dataplane.adapters.spool_sqlite.statement import make_statement
from dataplane.adapters.spool_sqlite.transaction import (
    Accept,
    Acknowledge,
    ForgetKeys,
    Give,
    Operation,
    Quarantine,
    Settle,
    Take,
    WriteRecord,
)
from dataplane.core.envelope import Envelope, RecipientRow
from dataplane.core.idempotency import KEY_WINDOW_MS, Submitted
from dataplane.core.ids import MessageId, format_message_id, message_id_time_ms
from dataplane.core.queue import TERMINAL
from dataplane.core.transaction import is_canonical
from dataplane.core.waiting import WaitingQuestion, WaitingStatement
from dataplane.failpoints import failpoint
from dataplane.files import Reserve
from dataplane.ports import (
    Clock,
    Cursor,
    Due,
    KeyHead,
    Openings,
    QueueDepth,
    Settlement,
    SpoolError,
    SpoolFailedError,
    SpoolFullError,
    SpoolIdentity,
    SpoolStats,
    StoredMessage,
    WalkedRow,
)

Result = TypeVar("Result")

RESERVE = "reserve"
_PAGE_OF_KEYS = 100
_PAGE_OF_IDS = 500
_KEYS_A_COMMIT = 100
# Several, so that one that waits for the disk to sync a file does not hold up those that append or read.
_FILE_THREADS = 4


class SqliteSpool:
    """`ports.Spool` on disk; make it with `open`, end it with `close`. To be used from one loop."""

    retains: ClassVar[bool] = True
    durable: ClassVar[bool] = True

    def __init__(
        self,
        folder: Path,
        begun: tuple[SpoolIdentity, Openings],
        lock: int,
        connections: tuple[apsw.Connection, apsw.Connection],
        clock: Clock,
        limits: SpoolLimits,
        on_failed: Callable[[SpoolFailedError], None],
        room: Room,
    ) -> None:
        self._folder = folder
        self._identity, self._openings = begun
        self._lock = lock
        self._clock = clock
        self._limits = limits
        self._on_failed = on_failed
        self._room = room
        self._loop = asyncio.get_running_loop()
        self._contents = Contents(folder)
        self._files = ThreadPoolExecutor(_FILE_THREADS, thread_name_prefix="spool-files")
        self._file_work: set[asyncio.Future[Any]] = set()
        # Writes of messages whose content is on its way to a file wait behind it.
        self._behind: dict[MessageId, list[Operation]] = {}
        self._incoming: dict[MessageId, SqliteIncoming] = {}
        self._removing: set[MessageId] = set()  # messages whose files a thread is about to remove
        self._reader = Reader(connections[1])
        self._reserve = Reserve(folder / RESERVE, limits.reserve_bytes)
        self._commits = GroupCommit(
            connections[0],
            self._identity.incarnation,
            clock,
            limits,
            self._note_failure,
            self._remove_files,
            self._give_up_reserve,
        )
        self._depth = DepthCounter(folder / schema.DATABASE, self.in_file_thread, clock)
        self._closing: asyncio.Task[None] | None = None
        self.salvage: SalvageReport | None = None
        self._sweeper = self._loop.create_task(self._sweep_hourly())

    @classmethod
    async def open(
        cls,
        folder: Path,
        node: str,
        clock: Clock,
        *,
        on_failed: Callable[[SpoolFailedError], None],
        limits: SpoolLimits | None = None,
        ask_free_bytes: Callable[[], int] | None = None,
        vfs: str | None = None,
    ) -> SqliteSpool:
        """Open the folder `spool/<uuid>`, making what is missing; `salvage` tells if the old file had to be replaced.

        SpoolError when another process, another node or another spool owns it, or a newer version wrote it;
        SpoolFullError and SpoolFailedError when the disk does not let it. Blocks the loop: nothing is served yet.
        """
        limits = limits or SpoolLimits()
        lock = lock_folder(folder)
        try:
            try:
                begun, writer, report = _open_writer(folder, node, vfs)
            except (apsw.Error, OSError) as error:
                if not (is_full(error) and Reserve(folder / RESERVE, limits.reserve_bytes).give_up()):
                    raise
                begun, writer, report = _open_writer(folder, node, vfs)
            connections = (writer, schema.open_reader(folder / schema.DATABASE, vfs))
            room = Room(ask_free_bytes or partial(free_bytes, folder), limits.floor_bytes, clock)
            spool = cls(folder, begun, lock, connections, clock, limits, on_failed, room)
        except (apsw.Error, OSError) as error:
            os.close(lock)
            raise translate(error) from error
        except BaseException:
            os.close(lock)
            raise
        spool.salvage = report
        return spool

    @property
    def identity(self) -> SpoolIdentity:
        """UUID, node and incarnation."""
        return self._identity

    @property
    def openings(self) -> Openings:
        """As this process found and began them."""
        return self._openings

    # --- writes ---

    def has_room(self, size_bytes: int) -> bool:
        """Whether disk and WAL would take a message of this size."""
        return self._refusal is None and self._commits.wal_has_room() and self._room.has(size_bytes)

    @property
    def strained(self) -> bool:
        """Whether half of what the WAL may grow to is used up, because checkpoints do not keep pace or are held up."""
        return 2 * self._commits.wal_bytes > self._limits.wal_cap_bytes

    def receive(self, message_id: MessageId) -> SqliteIncoming:
        """Begin a content that goes to its file while it arrives."""
        refusal = self._refusal
        if refusal is None and (message_id in self._incoming or message_id in self._behind):
            refusal = SpoolError("a content of this id was begun already")
        if refusal is None and len(self._incoming) >= self._limits.incoming_count:
            refusal = SpoolError("too many large contents at once")
        incoming = SqliteIncoming(self, self._contents, message_id, refusal)
        if refusal is None:
            self._incoming[message_id] = incoming
        return incoming

    def accept(self, envelope: Envelope, content: bytes, recipients: Sequence[RecipientRow]) -> asyncio.Future[None]:
        """Store a message with the next commit; a large content goes to its file first."""
        future: asyncio.Future[None] = self._loop.create_future()
        try:
            operation = self._make_accept(future, envelope, content, recipients)
        except SpoolError as error:
            future.set_exception(error)
            return future
        self._room.promise(len(content))
        if operation.has_file:
            self._store_content(operation, content)
        else:
            self._commits.submit(operation)
        return future

    def _make_accept(
        self, future: asyncio.Future[None], envelope: Envelope, content: bytes, recipients: Sequence[RecipientRow]
    ) -> Accept:
        row, rows = self._rows(envelope, content, recipients)
        return Accept(future, row, rows, encode_key(envelope))

    def _rows(
        self, envelope: Envelope, content: bytes, recipients: Sequence[RecipientRow]
    ) -> tuple[tuple[MessageId, int, int, bytes, bytes | None], list[Recipient]]:
        message_id = envelope.message_id
        encoded, rows = self._encode(envelope, recipients, len(content))
        checksum = message_checksum(message_id, encoded, content)
        inline = content if len(content) <= self._limits.inline_bytes else None
        return (message_id, checksum, len(content), encoded, inline), rows

    def _encode(
        self, envelope: Envelope, recipients: Sequence[RecipientRow], unwritten_bytes: int
    ) -> tuple[bytes, list[Recipient]]:
        """Return envelope and recipients as they are stored, if the message may be."""
        self._check_open()
        if not recipients or any(row.state in TERMINAL for row in recipients):
            raise SpoolError("a message needs recipients, and none of them terminal")
        message_id = envelope.message_id
        if message_id in self._behind:
            raise SpoolError("a message of this id is stored already")
        if not (self._commits.wal_has_room() and self._room.has(unwritten_bytes)):
            raise SpoolFullError("the spool's disk is full")
        try:
            encoded = encode_envelope(envelope, recipients)
            rows = [encode_recipient(message_id, row, self._identity.incarnation) for row in recipients]
        except (TypeError, ValueError) as error:
            raise SpoolError(f"the message cannot be written: {type(error).__name__}") from error
        return encoded, rows

    def settle(self, settlement: Settlement) -> asyncio.Future[int]:
        """Apply changes and write the record with the next commit, after a message that is still being stored."""
        future: asyncio.Future[int] = self._loop.create_future()
        operation = Settle(future, settlement)
        if behind := self._behind.get(settlement.message_id):
            behind.append(operation)
        else:
            self._submit(operation)
        return future

    def write_record(self, record: bytes) -> asyncio.Future[int]:
        """Write a record that belongs to no message."""
        future: asyncio.Future[int] = self._loop.create_future()
        self._submit(WriteRecord(future, record))
        return future

    def acknowledge(self, number: int) -> asyncio.Future[None]:
        """Move the mark and trim the tail with the next commit."""
        future: asyncio.Future[None] = self._loop.create_future()
        self._submit(Acknowledge(future, number))
        return future

    def give(
        self, message_id: MessageId, recipients: Sequence[RecipientRow], records: Sequence[bytes]
    ) -> asyncio.Future[int]:
        """Give a message up: it leaves the queue, and the records that hold it are written, with one commit.

        The result is the number of the last record; 0, and nothing is done, unless these are all recipients that it
        has, each with this attempt and none of them being sent. SpoolError.
        """
        future: asyncio.Future[int] = self._loop.create_future()
        self._submit(Give(future, message_id, [(row.index, row.attempt) for row in recipients], records))
        return future

    def take(
        self, envelope: Envelope, content: bytes, recipients: Sequence[RecipientRow], record: bytes
    ) -> asyncio.Future[int]:
        """Store a message that another spool gave up, and the record that says so, with one commit; that one's number.

        The same contract as `accept`, but for a submission key that another message has: then this one goes without.
        """
        future: asyncio.Future[int] = self._loop.create_future()
        try:
            row, rows = self._rows(envelope, content, recipients)
        except SpoolError as error:
            future.set_exception(error)
            return future
        operation = Take(future, row, rows, encode_key(envelope), record)
        self._room.promise(len(content))
        if operation.has_file:
            self._store_content(operation, content)
        else:
            self._commits.submit(operation)
        return future

    def _submit(self, operation: Operation) -> None:
        if error := self._refusal:
            operation.future.set_exception(error)
        else:
            self._commits.submit(operation)

    # --- files ---

    def _store_content(self, operation: Accept, content: bytes) -> None:
        message_id = operation.row[0]
        self._behind[message_id] = [operation]
        work = self.in_file_thread(self._contents.write, message_id, content)
        work.add_done_callback(partial(self._content_written, message_id, content))

    def _content_written(self, message_id: MessageId, content: bytes, work: asyncio.Future[None]) -> None:
        error = work.exception()
        try:
            is_in_the_way = isinstance(error, FileExistsError) and self._is_orphan(message_id)
        except apsw.Error as failure:
            self._content_stored(message_id, self._give_up(failure))
            return
        if is_in_the_way:
            # A crash, of a message that is claimed or handed over once more.
            work = self.in_file_thread(self._contents.write_over_orphan, message_id, content)
            work.add_done_callback(partial(self._content_written_over, message_id))
        else:
            self._content_stored(message_id, None if error is None else content_error(error))

    def _content_written_over(self, message_id: MessageId, work: asyncio.Future[None]) -> None:
        error = work.exception()
        self._content_stored(message_id, None if error is None else content_error(error))

    def _is_orphan(self, message_id: MessageId) -> bool:
        """Whether no row needs the file of this message or is about to, and nobody is removing it."""
        return not (
            message_id in self._removing
            or self._commits.has_accept(message_id)
            or self._reader.owns_content(message_id)
        )

    def _content_stored(self, message_id: MessageId, told: SpoolError | None) -> None:
        """The file of a message is durable, or it failed: write what waits behind it, or fail it."""
        operations = self._behind.pop(message_id)
        failpoint("spool.content_stored")
        if told is None:
            for operation in operations:
                self._commits.submit(operation)
            return
        for operation in operations:
            if not operation.future.done():
                operation.future.set_exception(type(told)(*told.args))
        if isinstance(told, SpoolFailedError):
            self._commits.fail(told)

    # --- incoming.Host

    def promise(self, size_bytes: int) -> bool:
        """Whether a piece of a content may be written, and note that it will be."""
        if self._refusal is not None or not self._room.has(size_bytes):
            return False
        self._room.promise(size_bytes)
        return True

    def prepare_accept(
        self,
        incoming: SqliteIncoming,
        future: asyncio.Future[None],
        envelope: Envelope,
        recipients: Sequence[RecipientRow],
    ) -> None:
        """See `incoming.Host`; the row's checksum is not known yet."""
        message_id = envelope.message_id
        if message_id != incoming.message_id:
            raise SpoolError("the content was begun for another message")
        encoded, rows = self._encode(envelope, recipients, 0)
        row = (message_id, 0, incoming.size_bytes, encoded, None)
        self._behind[message_id] = [Accept(future, row, rows, encode_key(envelope))]

    def content_ended(self, incoming: SqliteIncoming, error: SpoolError | None) -> None:
        """See `incoming.Host`."""
        message_id = incoming.message_id
        del self._incoming[message_id]
        if message_id in self._behind:
            accept = self._behind[message_id][0]
            if error is None and isinstance(accept, Accept):
                accept.complete(incoming.checksum)
            self._content_stored(message_id, error)
        elif isinstance(error, SpoolFailedError):
            self._commits.fail(error)

    def _give_up_reserve(self) -> None:
        """A commit found no room: what delivery settles is to be written all the same, with one of the next commits."""
        self.in_file_thread(self._reserve.give_up).add_done_callback(asyncio.Future.exception)

    def _remove_files(self, message_ids: list[MessageId]) -> asyncio.Future[None]:
        """After the commit that removed the rows; a file that stays behind is an orphan."""
        self._removing.update(message_ids)
        work = self.in_file_thread(self._contents.remove, message_ids)
        work.add_done_callback(partial(self._files_removed, message_ids))
        return work

    def _files_removed(self, message_ids: list[MessageId], work: asyncio.Future[None]) -> None:
        self._removing.difference_update(message_ids)
        if not work.cancelled():
            work.exception()

    def in_file_thread(self, function: Callable[..., Result], *arguments: object) -> asyncio.Future[Result]:
        """Run what blocks; `close` waits for it."""
        work = self._loop.run_in_executor(self._files, function, *arguments)
        self._file_work.add(work)
        work.add_done_callback(self._file_work.discard)
        return work

    async def sweep(self) -> int:
        """Remove files that no row needs and that are older than any writer, and parts nobody writes; return how many.

        Cancelling it leaves the rest for the next sweep. OSError.
        """
        # Which of them are in use is asked after they were listed: a part that begins in between is none of these.
        parts = await self.in_file_thread(self._contents.parts)
        in_use = {self._contents.part_path(message_id) for message_id in self._incoming}
        left = [path for path in parts if path not in in_use]
        if left:
            await self.in_file_thread(self._contents.remove_parts, left)
        before_s = self._clock.wall_ms() / 1000 - ORPHAN_AGE_S
        aged = await self.in_file_thread(lambda: list(self._contents.aged(before_s)))
        orphan_count = 0
        for message_id in aged:
            if message_id not in self._behind and self._is_orphan(message_id):
                await self._remove_files([message_id])
                orphan_count += 1
            await asyncio.sleep(0)
        return len(left) + orphan_count

    async def forget_keys(self) -> int:
        """Remove submission keys that are older than 24 hours, some in each commit; return how many. SpoolError."""
        forgotten = 0
        while True:
            before_ms = self._clock.wall_ms() - KEY_WINDOW_MS
            if not self._read(self._reader.has_aged_key, before_ms):
                return forgotten
            future: asyncio.Future[int] = self._loop.create_future()
            self._submit(ForgetKeys(future, before_ms, _KEYS_A_COMMIT))
            forgotten += await future

    async def _sweep_hourly(self) -> None:
        while True:
            with contextlib.suppress(OSError, apsw.Error):
                await self.sweep()
                await self.in_file_thread(self._reserve.hold)
            with contextlib.suppress(SpoolError):
                await self.forget_keys()
            await asyncio.sleep(ORPHAN_AGE_S)

    # --- reads ---

    async def load(self, message_id: MessageId) -> StoredMessage | None:
        """Read a message back, None when it is gone. SpoolError when it is damaged, and it is quarantined.

        Cancelling it changes nothing.
        """
        try:
            loaded = self._read(self._reader.load, message_id)
            if loaded is None:
                return None
            if loaded.content is None:
                content, canonical = await self.in_file_thread(_read_content, self._contents, message_id, loaded)
            else:
                content, canonical = loaded.content, False
        except DamagedRowError as error:
            raise await self._set_aside(message_id, str(error)) from error
        except FileNotFoundError:
            # Settled meanwhile: then the row is gone too.
            if self._read(self._reader.load, message_id) is None:
                return None
            raise await self._set_aside(message_id, "the file of the content is gone") from None
        except OSError as error:
            raise SpoolError("a content cannot be read") from error
        return StoredMessage(loaded.envelope, content, loaded.recipients, loaded.reported, canonical)

    async def describe(self, message_id: MessageId) -> StoredMessage | None:
        """Read a message back without its content. SpoolError when that is damaged, and it is quarantined."""
        try:
            return self._read(self._reader.describe, message_id)
        except DamagedRowError as error:
            raise await self._set_aside(message_id, str(error)) from error

    async def walk(self, after: tuple[MessageId, int], before: MessageId, limit: int) -> list[WalkedRow]:
        """The next recipients by message and index."""
        return self._read(self._reader.walk, after, before, limit)

    async def _set_aside(self, message_id: MessageId, reason: str) -> SpoolError:
        future: asyncio.Future[None] = self._loop.create_future()
        self._submit(Quarantine(future, message_id, reason, self._clock.wall_ms()))
        await future
        return SpoolError(f"message {format_message_id(message_id)} is quarantined: {reason}")

    def submitted(self, key_hash: bytes) -> Submitted | None:
        """What was stored under a submission key in the last 24 hours. A damaged row fails the spool."""
        try:
            return self._read(self._reader.submitted, key_hash, self._clock.wall_ms() - KEY_WINDOW_MS)
        except DamagedRowError as error:
            raise self._give_up(apsw.CorruptError(str(error))) from error

    async def keys(self) -> list[KeyHead]:
        """Every queue key with sendable recipients, sorted; a page of keys at a time, so others get their turns."""
        found: list[KeyHead] = []
        start = ""
        while True:
            page = self._read(self._reader.keys, start, _PAGE_OF_KEYS)
            found += page
            if len(page) < _PAGE_OF_KEYS:
                return found
            start = page[-1].queue_key + "\0"
            await asyncio.sleep(0)

    async def heads(self, queue_key: str, after: Cursor | None, limit: int) -> list[Due]:
        """The next sendable recipients of a key."""
        return self._read(self._reader.heads, queue_key, after, limit)

    async def unreported(self, limit: int) -> list[MessageId]:
        """Messages whose envelope is in no record yet, oldest first."""
        return self._read(self._reader.unreported, limit)

    async def interrupted(self) -> list[MessageId]:
        """Messages with attempts that a former incarnation began."""
        found: list[MessageId] = []
        after = b""
        while True:
            page = self._read(self._reader.interrupted, self._identity.incarnation, after, _PAGE_OF_IDS)
            found += page
            if len(page) < _PAGE_OF_IDS:
                return found
            after = page[-1]
            await asyncio.sleep(0)

    async def records(self, after: int, max_records: int, max_bytes: int) -> tuple[int, list[bytes]]:
        """Records that follow `after`, at least one if there is any. Damaged ones fail the spool."""
        try:
            return self._read(self._reader.records, after, max_records, max_bytes)
        except DamagedRowError as error:
            raise self._give_up(apsw.CorruptError(str(error))) from error

    async def depth(self) -> QueueDepth:
        """Recipients by state, counted beside the loop."""
        self._check_open()
        return await self._depth.count()

    async def waiting(self, question: WaitingQuestion) -> WaitingStatement:
        """Who waits as of a record; see `statement`. Cancelling it changes nothing."""
        database = self._folder / schema.DATABASE
        return await self.in_file_thread(make_statement, database, question, self._clock.wall_ms())

    async def stats(self) -> SpoolStats:
        """Counters as of the last commit."""
        oldest = self._read(self._reader.oldest)
        counters = self._commits.counters
        return SpoolStats(
            waiting_count=counters.waiting_count,
            oldest_accepted_ms=message_id_time_ms(oldest) if oldest else 0,
            outbox_first=counters.outbox_first,
            outbox_last=counters.outbox_last,
            acknowledged=counters.acknowledged,
            database_bytes=(self._folder / schema.DATABASE).stat().st_size,
            wal_bytes=self._commits.wal_bytes,
            commits=self._commits.commits,
            quarantined_count=self._commits.quarantined_count,
        )

    def _read(self, query: Callable[..., Result], *arguments: object) -> Result:
        self._check_open()
        try:
            return query(*arguments)
        except apsw.Error as error:
            raise self._give_up(error) from error

    def _give_up(self, error: apsw.Error) -> SpoolError:
        """What a failed read is told; damage is the end of the spool, as for a failed write."""
        told = translate(error)
        if isinstance(told, SpoolFailedError):
            self._commits.fail(told)
        return told

    # --- end ---

    async def close(self) -> None:
        """Commit what gathered, checkpoint, unlock. Cancelled, it goes on; a second call waits for the first."""
        if self._closing is None:
            self._closing = self._loop.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._sweeper.cancel()
        await asyncio.wait([self._sweeper])
        for incoming in list(self._incoming.values()):
            incoming.discard()
        while self._file_work or self._behind:
            await asyncio.wait(set(self._file_work))
            # The callbacks of finished work may begin more of it.
            await asyncio.sleep(0)
        await self._commits.drain()
        while self._file_work:
            await asyncio.wait(set(self._file_work))
        self._files.shutdown()
        self._reader.close()
        try:
            self._commits.close()
        finally:
            os.close(self._lock)

    @property
    def _refusal(self) -> SpoolError | None:
        return SpoolError("the spool is closed") if self._closing else self._commits.refusal

    def _check_open(self) -> None:
        if error := self._refusal:
            raise error

    def _note_failure(self, failure: SpoolFailedError) -> None:
        leave_marker(self._folder, str(failure))
        self._on_failed(failure)


def _open_writer(
    folder: Path, node: str, vfs: str | None
) -> tuple[tuple[SpoolIdentity, Openings], apsw.Connection, SalvageReport | None]:
    """Open the file, count the incarnation up and begin an opening."""
    identity = read_identity(folder, node)
    Contents(folder).prepare()
    writer, report = open_database(folder, identity, vfs)
    try:
        identity = _next_incarnation(writer, identity)
        write_identity(folder, identity)
        with writer:
            writer.execute("UPDATE state SET incarnation = ?", (identity.incarnation,))
            openings = begin_opening(writer, identity.incarnation, secrets.token_bytes(ID_BYTES))
    except BaseException:
        writer.close()
        raise
    return (identity, openings), writer, report


def _next_incarnation(writer: apsw.Connection, identity: SpoolIdentity) -> SpoolIdentity:
    """File and folder both know the incarnation, so that losing one of them does not turn it back."""
    stored = schema.scalar(writer, "SELECT incarnation FROM state")
    return SpoolIdentity(identity.spool, identity.node, max(stored, identity.incarnation) + 1)


def _read_content(contents: Contents, message_id: MessageId, loaded: Loaded) -> tuple[bytes, bool]:
    """Return a content and whether its line ends are right, which takes too long for the loop to find out."""
    content = contents.read(message_id)
    if message_checksum(message_id, loaded.envelope_bytes, content) != loaded.checksum:
        raise DamagedRowError("the file of the content does not match its checksum")
    return content, is_canonical(content)
