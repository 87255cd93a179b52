"""A process that uses a spool until it is killed: `spool_child.py FOLDER SEED MESSAGES WAY`.

WAY is `mixed`, or `accept` or `take` for one large message that comes so. It says on standard output what it was told,
one line a time, unbuffered: `accepted ID`, `settled ID`. All that it writes follows from ids and numbers, so that the
parent can tell whole from half.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from hashlib import sha256
from pathlib import Path

from dataplane.adapters.spool_sqlite import SpoolLimits
from dataplane.clock import SystemClock
from dataplane.core.envelope import RecipientRow
from dataplane.core.ids import MessageId, new_message_id
from dataplane.core.queue import State
from dataplane.ports import Settlement, Spool
from support.spools import change, make_envelope, make_row, open_durable

SENDERS = 8


def content_of(message_id: bytes) -> bytes:
    """Every fourth message is large enough for a file."""
    digest = sha256(message_id).digest()
    return digest * (4_000 if digest[0] % 4 == 0 else 100)


def rows_of(message_id: bytes) -> list[RecipientRow]:
    """One to three recipients."""
    return [make_row(index, state=State.SENDING, attempt=1) for index in range(1 + sha256(message_id).digest()[1] % 3)]


def record_of(message_id: bytes) -> bytes:
    return message_id + sha256(message_id).digest()


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


async def store(spool: Spool, message_id: MessageId, rows: list[RecipientRow]) -> None:
    """Accept the message; half of the large ones arrive in pieces."""
    envelope, content = make_envelope(message_id), content_of(message_id)
    if len(content) < 100_000 or message_id[-1] % 2:
        await spool.accept(envelope, content, rows)
        return
    incoming = spool.receive(message_id)
    for start in range(0, len(content), 50_000):
        await incoming.write(content[start : start + 50_000])
    await incoming.accept(envelope, rows)


async def send(spool: Spool, choice: random.Random, count: int) -> None:
    for _ in range(count):
        message_id = MessageId(new_message_id(SystemClock().wall_ms(), choice.randbytes(10)))
        rows = rows_of(message_id)
        await store(spool, message_id, rows)
        say(f"accepted {message_id.hex()}")
        if choice.random() < 0.6:
            changes = [change(row, State.SENT) for row in rows]
            settled = Settlement(message_id, changes, record_of(message_id), reported=True)
            assert await spool.settle(settled) == len(rows)
            say(f"settled {message_id.hex()}")


async def store_one(folder: Path, way: str) -> None:
    spool = await open_durable(folder, SystemClock())
    envelope, content, rows = make_envelope(), b"first" * 40_000, [make_row()]
    if way == "accept":
        await spool.accept(envelope, content, rows)
    else:
        await spool.take(envelope, content, rows, b"taken")
    await spool.close()


async def run(folder: Path, seed: int, count: int) -> None:
    limits = SpoolLimits(checkpoint_bytes=200_000)
    spool = await open_durable(folder, SystemClock(), limits=limits)
    choice = random.Random(seed)
    await asyncio.gather(*(send(spool, random.Random(choice.random()), count) for _ in range(SENDERS)))
    await spool.close()
    say("finished")


if __name__ == "__main__":
    if sys.argv[4] == "mixed":
        asyncio.run(run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
    else:
        asyncio.run(store_one(Path(sys.argv[1]), sys.argv[4]))
