"""A content that goes into its file while the message arrives, so that memory holds only what is being written.

`ports.Incoming` on a file `content/<id>.part`. All file work runs in the spool's threads, one job at a time for each
content: a job takes every piece that gathered while the last one ran. The file gets its final name once it is durable,
and the folder is synced, before the row is written.

    state    write        accept                              discard          a job fails
    OPEN     gathers      ENDING: last pieces, sync, rename   ENDED, removed   ENDED, removed; waiting writes fail
    ENDING   SpoolError   SpoolError                          nothing          ENDED, removed; the accept fails
    ENDED    the error    the error                           nothing          -

A full disk ends this content only; any other failure of the disk is the end of the spool. A `.part` that nobody in this
process writes belongs to nobody: the next sweep removes it.
"""

from __future__ import annotations

import asyncio
import enum
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from zlib import crc32

from dataplane.adapters.spool_sqlite.contents import Contents
from dataplane.adapters.spool_sqlite.errors import translate
from dataplane.core.envelope import Envelope, RecipientRow
from dataplane.core.ids import MessageId
from dataplane.failpoints import failpoint
from dataplane.ports import SpoolError, SpoolFullError


class Host(Protocol):
    """The spool, as far as a content on its way needs it."""

    def in_file_thread(self, function: Callable[..., Any], *arguments: object) -> asyncio.Future[Any]:
        """Run a function that blocks; the spool does not close before it is over."""
        ...

    def promise(self, size_bytes: int) -> bool:
        """Whether so many bytes more, which are about to be written, fit on the disk."""
        ...

    def prepare_accept(
        self,
        incoming: SqliteIncoming,
        future: asyncio.Future[None],
        envelope: Envelope,
        recipients: Sequence[RecipientRow],
    ) -> None:
        """Keep the write of the message, which `future` waits for, until `content_ended`. SpoolError."""
        ...

    def content_ended(self, incoming: SqliteIncoming, error: SpoolError | None) -> None:
        """The content is durable under its final name, or `error` ended it; its file is gone or about to go."""
        ...


class _State(enum.Enum):
    OPEN = enum.auto()
    ENDING = enum.auto()
    ENDED = enum.auto()


class PartFile:
    """The file itself: blocking functions, one at a time; errors are OSError."""

    __slots__ = ("_checksum", "_contents", "_descriptor", "_message_id")

    def __init__(self, contents: Contents, message_id: MessageId) -> None:
        self._contents = contents
        self._message_id = message_id
        self._descriptor = -1
        self._checksum = 0

    def append(self, pieces: Sequence[bytes]) -> None:
        """Write pieces behind what is there, making the file first."""
        if self._descriptor < 0:
            path = self._contents.part_path(self._message_id)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        for piece in pieces:
            self._checksum = crc32(piece, self._checksum)
            view = memoryview(piece)
            while view:
                view = view[os.write(self._descriptor, view) :]

    def complete(self, pieces: Sequence[bytes]) -> int:
        """Write the last pieces, make all of it durable under its final name; return the CRC-32 of the content."""
        self.append(pieces)
        os.fsync(self._descriptor)
        self._close()
        self._contents.complete(self._message_id)
        return self._checksum

    def remove(self) -> None:
        """Close and delete it; it may not be there."""
        self._close()
        self._contents.part_path(self._message_id).unlink(missing_ok=True)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class SqliteIncoming:
    """`ports.Incoming`; made by `SqliteSpool.receive`. `checksum` is the content's once it is complete."""

    __slots__ = (
        "_error",
        "_file",
        "_gathered",
        "_host",
        "_loop",
        "_state",
        "_waiting",
        "_working",
        "_writing",
        "checksum",
        "message_id",
        "size_bytes",
    )

    def __init__(self, host: Host, contents: Contents, message_id: MessageId, refusal: SpoolError | None) -> None:
        self.message_id = message_id
        self.size_bytes = 0
        self.checksum = 0
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._file = PartFile(contents, message_id)
        self._state = _State.OPEN if refusal is None else _State.ENDED
        self._error = refusal or SpoolError("the content was ended")
        self._gathered: list[bytes] = []
        # Who waits for pieces that gathered, and for those that a job holds.
        self._waiting: list[asyncio.Future[None]] = []
        self._writing: list[asyncio.Future[None]] = []
        self._working = False

    def write(self, *pieces: bytes) -> asyncio.Future[None]:
        """Append; done when they are in the file."""
        future: asyncio.Future[None] = self._loop.create_future()
        size_bytes = sum(map(len, pieces))
        if self._state is _State.OPEN and not self._host.promise(size_bytes):
            self._end(SpoolFullError("the spool's disk is full"))
        if self._state is not _State.OPEN:
            future.set_exception(_copy(self._error))
            return future
        self.size_bytes += size_bytes
        self._gathered += pieces
        self._waiting.append(future)
        self._work()
        return future

    def accept(self, envelope: Envelope, recipients: Sequence[RecipientRow]) -> asyncio.Future[None]:
        """Store the message with the next commit after its content is durable."""
        future: asyncio.Future[None] = self._loop.create_future()
        if self._state is not _State.OPEN:
            future.set_exception(_copy(self._error))
            return future
        try:
            self._host.prepare_accept(self, future, envelope, recipients)
        except SpoolError as error:
            self._end(error)
            future.set_exception(_copy(error))
            return future
        self._state = _State.ENDING
        self._work()
        return future

    def discard(self) -> None:
        """Remove what was written."""
        if self._state is _State.OPEN:
            self._end(self._error)

    # --- one job after the other

    def _work(self) -> None:
        if self._working or (self._state is _State.OPEN and not self._gathered):
            return
        self._working = True
        pieces, self._gathered = self._gathered, []
        self._writing, self._waiting = self._waiting, []
        if self._state is _State.ENDING:
            self._host.in_file_thread(self._file.complete, pieces).add_done_callback(self._completed)
        elif self._state is _State.OPEN:
            self._host.in_file_thread(self._file.append, pieces).add_done_callback(self._appended)
        else:
            # What cannot be removed is swept.
            self._host.in_file_thread(self._file.remove).add_done_callback(asyncio.Future.exception)

    def _appended(self, job: asyncio.Future[None]) -> None:
        self._working = False
        failpoint("spool.content_appended")
        error = job.exception()
        if self._state is _State.ENDED:
            _tell(self._writing, self._error)
        elif error is not None:
            self._fail(error)
            return
        else:
            _tell(self._writing, None)
        self._work()

    def _completed(self, job: asyncio.Future[int]) -> None:
        self._working = False
        error = job.exception()
        if error is not None:
            self._fail(error)
            return
        self.checksum = job.result()
        self._state = _State.ENDED
        _tell(self._writing, None)
        self._host.content_ended(self, None)

    def _fail(self, error: BaseException) -> None:
        writing = self._writing
        self._end(content_error(error))
        _tell(writing, self._error)

    def _end(self, error: SpoolError) -> None:
        """No more of it: what gathered is let go, what a job holds when it is over."""
        self._error = error
        self._state = _State.ENDED
        self._gathered.clear()
        waiting, self._waiting = self._waiting, []
        _tell(waiting, error)
        self._host.content_ended(self, error)
        self._work()


def _tell(waiting: list[asyncio.Future[None]], error: SpoolError | None) -> None:
    for future in waiting:
        if future.done():
            continue
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(_copy(error))


def content_error(error: BaseException) -> SpoolError:
    """Return what callers are told of a failed write of a content."""
    if isinstance(error, FileExistsError):
        return SpoolError("a content of this id is stored already")
    return translate(error if isinstance(error, Exception) else SpoolError("writing was given up"))


def _copy(error: SpoolError) -> SpoolError:
    # Raising one object in many places would chain their tracebacks.
    return type(error)(*error.args)
