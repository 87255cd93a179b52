"""What tests of a spool need: messages to put into it, settlements, and a clock that a test moves."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataplane.adapters.spool_sqlite import SqliteSpool
from dataplane.core.envelope import Envelope, RecipientRow, make_queue_key
from dataplane.core.ids import MessageId, new_message_id
from dataplane.core.queue import State
from dataplane.ports import Clock, RecipientChange, Settlement, SpoolFailedError

NOW_MS = 1_790_000_000_000
KEY = make_queue_key("accounts/demo", "providers/inbox")
OTHER_KEY = make_queue_key("accounts/demo", "providers/other")

_numbers = itertools.count(1)


class ManualClock:
    """`ports.Clock` that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now_ms = NOW_MS
        self.now_s = 1_000.0

    def wall_ms(self) -> int:
        return self.now_ms

    def monotonic(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
        self.now_ms += int(seconds * 1_000)


def fail_test(failure: SpoolFailedError) -> None:
    """`on_failed` where nothing may fail; raised in the loop, it shows in the log of the test that awaits the write."""
    raise failure


async def open_durable(folder: Path, clock: Clock, node: str = "node-1", **options: Any) -> SqliteSpool:
    """Open a durable spool; a failure raises unless the test says what it does."""
    options.setdefault("on_failed", fail_test)
    return await SqliteSpool.open(folder, node, clock, **options)


def copy_as_it_lies(source: Path, target: Path) -> None:
    """Copy what a crash would leave; a file that is removed meanwhile is one that was removed."""
    (target / "content").mkdir(parents=True)
    for path in [*source.glob("spool.db*"), source / "identity", *source.glob("content/*")]:
        if not path.name.endswith("-shm"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(path, target / path.relative_to(source))


def make_id(at_ms: int = NOW_MS) -> MessageId:
    """An id that no other call returns, later than all before it for the same millisecond."""
    return new_message_id(at_ms, b"\0\0" + next(_numbers).to_bytes(8, "big"))


def make_envelope(
    message_id: MessageId | None = None, *, accepted_ms: int = NOW_MS, subject: str = "Hello"
) -> Envelope:
    return Envelope(
        message_id=message_id or make_id(accepted_ms),
        account="accounts/demo",
        account_uid="4e3b0c7e-0d2b-4a53-9f3c-3a6ad1a5b1b8",
        credential="accounts/demo/smtpCredentials/app",
        sender="app@example.com",
        size_bytes=4096,
        accepted_ms=accepted_ms,
        session="s-1",
        client_address="192.0.2.7",
        client_helo="client.example",
        client_tls="TLSv1.3",
        header_message_id="<1@example.com>",
        subject=subject,
        smtputf8=False,
        body_8bit=False,
        headers={"list-id": ("news.example.com",), "x-tag": ("a", "b")},
    )


def make_row(
    index: int = 0,
    *,
    state: State = State.QUEUED,
    attempt: int = 0,
    due_ms: int = NOW_MS,
    priority: int = 0,
    queue_key: str = KEY,
) -> RecipientRow:
    return RecipientRow(index, f"user{index}@example.net", state, attempt, due_ms, priority, queue_key)


def change(
    row: RecipientRow,
    state: State,
    *,
    attempt: int | None = None,
    new_attempt: int | None = None,
    due_ms: int | None = None,
    queue_key: str | None = None,
) -> RecipientChange:
    """A change of `row`; what is not given stays as it is."""
    return RecipientChange(
        row.index,
        row.attempt if attempt is None else attempt,
        state,
        row.attempt if new_attempt is None else new_attempt,
        row.due_ms if due_ms is None else due_ms,
        row.queue_key if queue_key is None else queue_key,
    )


def settlement(
    message_id: MessageId,
    changes: Sequence[RecipientChange],
    record: bytes | None = None,
    *,
    reported: bool = False,
) -> Settlement:
    return Settlement(message_id, changes, record, reported)
