"""Group commit: writes gather while the last commit runs, and the next one takes them all.

Inputs are operations with their futures; a future is done after the commit that holds its write. Statements run on the
loop's thread in turns of a millisecond, COMMIT and checkpoint in the committer's thread.

A commit costs the same for one message as for a few, so outcomes, for which nobody waits, wait themselves: for
PATIENCE_S, for a write that is not as patient, or until there are PATIENT_COUNT of them.

    state           who uses the writing connection    what a write does           what comes next
    idle            nobody                             begins a batch              writing
    writing         the loop, turn by turn             waits for the next batch    committing; idle after a rollback
    committing      the committer                      waits                       checkpointing or idle
    checkpointing   the committer                      waits                       idle
    failed          nobody                             SpoolFailedError            nothing: the process must end
    closed          nobody                             SpoolError                  nothing

An operation that cannot be written fails alone: its batch is rolled back and run again one by one. No room and locks
fail the batch and pass by themselves. Any other error of the disk or the file is the end: all that waits fails, and
`on_failed` is called once. Nothing is retried after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain

import apsw

from dataplane.adapters.spool_sqlite import schema
from dataplane.adapters.spool_sqlite.committer import Committer
from dataplane.adapters.spool_sqlite.errors import ISOLATED, translate
from dataplane.adapters.spool_sqlite.limits import SpoolLimits
from dataplane.adapters.spool_sqlite.transaction import Accept, Counters, Operation, Transaction
from dataplane.adapters.spool_tail import AcknowledgedTail
from dataplane.core.ids import MessageId
from dataplane.failpoints import failpoint
from dataplane.ports import Clock, SpoolError, SpoolFailedError, SpoolFullError

PATIENCE_S = 0.005
PATIENT_COUNT = 32
_TURN_S = 0.001
_BATCH_OPERATIONS = 512
_BATCH_BYTES = 8 * 1024 * 1024
_RETRY_CHECKPOINT_S = 1.0


class _State(enum.Enum):
    IDLE = enum.auto()
    WRITING = enum.auto()
    COMMITTING = enum.auto()
    CHECKPOINTING = enum.auto()
    FAILED = enum.auto()
    CLOSED = enum.auto()


class GroupCommit:
    """Owner of the writing connection.

    `on_removable` gets ids of messages whose files no row needs any more; `on_full` hears that a batch found no room.
    """

    def __init__(
        self,
        connection: apsw.Connection,
        incarnation: int,
        clock: Clock,
        limits: SpoolLimits,
        on_failed: Callable[[SpoolFailedError], None],
        on_removable: Callable[[list[MessageId]], object],
        on_full: Callable[[], object],
    ) -> None:
        self._connection = connection
        self._incarnation = incarnation
        self._clock = clock
        self._limits = limits
        self._on_failed = on_failed
        self._on_removable = on_removable
        self._on_full = on_full
        self._loop = asyncio.get_running_loop()
        self._state = _State.IDLE
        self._failure: SpoolFailedError | None = None
        self._scheduled = False
        self._patience: asyncio.TimerHandle | None = None
        self._pending: deque[Operation] = deque()
        self._batch: list[Operation] = []
        self._steps: Iterator[None] = iter(())
        self._is_single = False
        self._drained: asyncio.Future[None] | None = None
        self._vacuum = False
        self._checkpoint_tried_s = clock.monotonic()
        self.counters = Counters(*connection.execute(_COUNTERS).get)
        self.quarantined_count = schema.scalar(connection, "SELECT count(*) FROM quarantine")
        self.commits = 0
        self._tail = AcknowledgedTail(self.counters.acknowledged, clock.monotonic())
        self._transaction = self._new_transaction()
        self._wal_pages = 0
        # The WAL's length when a checkpoint was last tried: a reader may hold it, so the next try waits for growth.
        self._tried_pages = 0
        self._committer = Committer(connection)

    @property
    def wal_bytes(self) -> int:
        """Length of the WAL in use."""
        return self._wal_pages * _FRAME_BYTES

    @property
    def refusal(self) -> SpoolError | None:
        """Why nothing may be written any more."""
        if self._failure:
            return self._failure
        return SpoolError("the spool is closed") if self._state is _State.CLOSED else None

    def submit(self, operation: Operation) -> None:
        """Write it with the next commit."""
        if error := self.refusal:
            _reject(operation, error)
            return
        self._pending.append(operation)
        if self._state is _State.IDLE and not self._scheduled:
            self._schedule(at_once=not operation.is_patient)

    def has_accept(self, message_id: MessageId) -> bool:
        """Whether a message of this id gathers, or is in the commit under way."""
        operations = chain(self._batch, self._pending)
        return any(isinstance(operation, Accept) and operation.row[0] == message_id for operation in operations)

    def wal_has_room(self) -> bool:
        """Whether the WAL is below its cap; above it tries to checkpoint, at most once a second."""
        if self.wal_bytes <= self._limits.wal_cap_bytes:
            return True
        now_s = self._clock.monotonic()
        if self._state is _State.IDLE and now_s - self._checkpoint_tried_s >= _RETRY_CHECKPOINT_S:
            self._checkpoint_tried_s = now_s
            self._start_checkpoint()
        return False

    async def drain(self) -> None:
        """Wait until nothing gathers, is written or is checkpointed. Cancelling it changes nothing."""
        while self._pending or self._scheduled or self._state not in _RESTING:
            if self._state is _State.IDLE and not self._scheduled:
                self._schedule()
            self._drained = self._loop.create_future()
            await self._drained

    def close(self) -> None:
        """Checkpoint the rest, unless the spool failed, and close. SpoolFailedError from the checkpoint."""
        self._committer.stop()
        try:
            if self._state is _State.IDLE:
                self._state = _State.CLOSED
                with contextlib.suppress(apsw.BusyError, apsw.FullError):
                    self._connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        except apsw.Error as error:
            self.fail(error)
            raise translate(error) from error
        finally:
            self._connection.close()

    def fail(self, error: Exception) -> None:
        """Refuse everything from now on; what waits fails."""
        if self._failure:
            return
        told = translate(error)
        self._failure = told if isinstance(told, SpoolFailedError) else SpoolFailedError(str(told))
        # A commit under way must not change the state when it comes back.
        self._state = _State.FAILED
        for operation in [*self._batch, *self._pending]:
            _reject(operation, self._failure)
        self._batch = []
        self._pending.clear()
        self._wake_drain()
        self._on_failed(self._failure)

    # --- a batch on the loop's thread ---

    def _schedule(self, *, at_once: bool = True) -> None:
        if at_once or len(self._pending) >= PATIENT_COUNT:
            if self._patience is not None:
                self._patience.cancel()
                self._patience = None
            self._scheduled = True
            self._loop.call_soon(self._begin)
        elif self._patience is None:
            self._patience = self._loop.call_later(PATIENCE_S, self._schedule)

    def _begin(self) -> None:
        self._scheduled = False
        if self._state is not _State.IDLE or not self._pending:
            self._wake_drain()
            return
        size_bytes = 0
        while self._pending and len(self._batch) < _BATCH_OPERATIONS and size_bytes < _BATCH_BYTES:
            operation = self._pending.popleft()
            size_bytes += operation.size_bytes
            self._batch.append(operation)
        self._state = _State.WRITING
        self._is_single = False
        self._transaction = self._new_transaction()
        self._steps = self._transaction.together(self._batch, vacuum=self._vacuum)
        self._advance()

    def _advance(self) -> None:
        """Run statements for a turn; go on at the next one, or hand the transaction to the committer."""
        if self._state is not _State.WRITING:
            return
        ends_s = time.monotonic() + _TURN_S
        try:
            for _ in self._steps:
                if time.monotonic() >= ends_s:
                    self._loop.call_soon(self._advance)
                    return
        except (apsw.Error, *ISOLATED) as error:
            self._abandon(error)
            return
        failpoint("spool.before_commit")
        self._state = _State.COMMITTING
        self._committer.commit(self._committed)

    def _abandon(self, error: Exception) -> None:
        if not self._roll_back():
            self.fail(error)
        elif isinstance(error, ISOLATED) and not self._is_single:
            self._is_single = True
            self._transaction = self._new_transaction()
            self._steps = self._transaction.singly(self._batch)
            self._loop.call_soon(self._advance)
        else:
            self._reject_batch(error)

    def _reject_batch(self, error: Exception) -> None:
        told = translate(error)
        if isinstance(told, SpoolFailedError):
            self.fail(told)
            return
        if isinstance(told, SpoolFullError):
            self._on_full()
        batch, self._batch = self._batch, []
        for operation in batch:
            _reject(operation, told)
        self._remove_files_of(batch)
        self._rest()

    def _roll_back(self) -> bool:
        """End the open transaction. False when not even that works."""
        try:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        except apsw.Error:
            return False
        return True

    def _new_transaction(self) -> Transaction:
        return Transaction(self._connection, self.counters, self._incarnation, self._tail, self._clock.monotonic())

    # --- from the committer ---

    def _committed(self, error: apsw.Error | None) -> None:
        """The COMMIT is over: say so to those who wait."""
        if self._state is not _State.COMMITTING:
            return
        if error:
            if self._roll_back():
                self._reject_batch(error)
            else:
                self.fail(error)
            return
        failpoint("spool.after_commit")
        self.commits += 1
        self.counters = self._transaction.counters
        self.quarantined_count += self._transaction.quarantined_count
        batch, self._batch = self._batch, []
        for operation in batch:
            _resolve(operation)
        if self._transaction.files_to_remove:
            self._on_removable(self._transaction.files_to_remove)
        self._remove_files_of([operation for operation in batch if operation.error])
        self._measure_wal()
        if (self._wal_pages - self._tried_pages) * _FRAME_BYTES > self._limits.checkpoint_bytes:
            self._start_checkpoint()
        else:
            self._rest()

    def _start_checkpoint(self) -> None:
        self._state = _State.CHECKPOINTING
        self._committer.checkpoint(self._checkpointed)

    def _measure_wal(self) -> None:
        pages, moved = self._connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)
        # All moved: the next commit starts the WAL anew.
        self._wal_pages = 0 if pages == moved else pages
        self._tried_pages = min(self._tried_pages, self._wal_pages)

    def _checkpointed(self, error: apsw.Error | None) -> None:
        """The checkpoint is over. A full disk is no harm: the WAL keeps what was not moved."""
        if self._state is not _State.CHECKPOINTING:
            return
        if error and isinstance(translate(error), SpoolFailedError):
            self.fail(error)
            return
        self._measure_wal()
        self._tried_pages = self._wal_pages
        self._vacuum = self._has_many_free_pages()
        self._rest()

    def _has_many_free_pages(self) -> bool:
        free = schema.scalar(self._connection, "PRAGMA freelist_count")
        return free > self._limits.vacuum_pages and 2 * free > schema.scalar(self._connection, "PRAGMA page_count")

    def _rest(self) -> None:
        self._state = _State.IDLE
        if self._pending and not self._scheduled:
            self._schedule(at_once=not all(operation.is_patient for operation in self._pending))
        self._wake_drain()

    def _wake_drain(self) -> None:
        if self._drained and not self._drained.done():
            self._drained.set_result(None)

    def _remove_files_of(self, operations: list[Operation]) -> None:
        """Files of messages that were not stored after all."""
        files = [operation.row[0] for operation in operations if isinstance(operation, Accept) and operation.has_file]
        if files:
            self._on_removable(files)


_FRAME_HEADER_BYTES = 24
_FRAME_BYTES = schema.PAGE_BYTES + _FRAME_HEADER_BYTES
_RESTING = frozenset({_State.IDLE, _State.FAILED, _State.CLOSED})
_COUNTERS = "SELECT waiting_count, outbox_first, outbox_last, outbox_bytes, acknowledged, answered FROM state"


def _reject(operation: Operation, error: SpoolError) -> None:
    # Each caller gets an error of its own: raising one object in many places would chain their tracebacks.
    if not operation.future.done():
        operation.future.set_exception(type(error)(*error.args))


def _resolve(operation: Operation) -> None:
    if operation.error:
        _reject(operation, operation.error)
    elif not operation.future.done():
        operation.future.set_result(operation.result)
