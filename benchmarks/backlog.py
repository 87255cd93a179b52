"""How soon mail goes out after a restart with a backlog: `python -m benchmarks.backlog [--recipients N] [--keys K]`.

Fills a spool with that many recipients in the layout of the spool itself, a message each, as a worker leaves it that
was killed: a WAL that no checkpoint has moved, recipients left `sending`, and messages that no record has told of.
The keys (account and provider, in equal parts) are all due. Then it starts a process that opens the spool and runs the
delivery engine on it, and measures from that start to the first message at a sink, and what follows for some seconds.
Prints one JSON line: seconds of each step, memory at the first delivery and at the end, messages a second. What a
whole worker does beside (its configuration, its listeners) is not in it. `--folder` keeps the spool for another run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import apsw
import uvloop

from benchmarks.client import Peer
from benchmarks.engine import PROVIDER, PlainConfig, account_names
from benchmarks.spool import make_message
from dataplane.adapters.resolver import CheckingResolver
from dataplane.adapters.spool_sqlite import SqliteSpool, schema
from dataplane.adapters.spool_sqlite.codec import encode_envelope, encode_recipient, message_checksum
from dataplane.adapters.spool_sqlite.identity import write_identity
from dataplane.clock import SystemClock
from dataplane.core.envelope import Envelope, RecipientRow, make_queue_key
from dataplane.core.ids import new_message_id
from dataplane.core.queue import State
from dataplane.delivery.engine import DeliveryEngine, Surroundings
from dataplane.ports import SpoolFailedError, SpoolIdentity

NODE = "bench"
BATCH = 20_000
LEFT_SENDING = 200
LEFT_UNREPORTED = 200
AGE_MS = 3_600_000
_SEED = 20


@dataclass(frozen=True, slots=True)
class Filling:
    """What is put into a spool. The last batch stays in the WAL."""

    recipients: int
    keys: int
    content_bytes: int


def fill(folder: Path, filling: Filling) -> None:
    """Make the spool in `folder`, which is named by a UUID, as a killed worker leaves it."""
    folder.mkdir(parents=True)
    (folder / "content").mkdir()
    writer = schema.open_writer(folder / schema.DATABASE)
    try:
        schema.prepare(writer, folder.name)
        writer.execute("PRAGMA synchronous = OFF")
        writer.execute("PRAGMA cache_size = -500000")
        rows = _rows(filling)
        left = filling.recipients
        while left:
            count = min(BATCH, left)
            left -= count
            _store(writer, [next(rows) for _ in range(count)])
            if left:
                writer.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        writer.execute("UPDATE state SET incarnation = 1, waiting_count = ?", (filling.recipients,))
    finally:
        writer.close()
    write_identity(folder, SpoolIdentity(folder.name, NODE, 1))


_Stored = tuple[Envelope, RecipientRow, bytes]


def _rows(filling: Filling) -> Iterator[_Stored]:
    template, row = make_message()
    now_ms = time.time_ns() // 1_000_000
    content = b"Subject: x\r\n\r\n" + b"x" * (filling.content_bytes - 16) + b"\r\n"
    keys = [(name, make_queue_key(name, PROVIDER)) for name in account_names(filling.keys)]
    draw = random.Random(_SEED)
    for number in range(filling.recipients):
        account, queue_key = keys[number % filling.keys]
        accepted_ms = now_ms - AGE_MS + number * AGE_MS // filling.recipients
        envelope = replace(
            template,
            message_id=new_message_id(accepted_ms, draw.randbytes(10)),
            account=account,
            credential=f"{account}/smtpCredentials/app",
            accepted_ms=accepted_ms,
            size_bytes=len(content),
        )
        is_sending = number >= filling.recipients - LEFT_SENDING
        yield (
            envelope,
            row._replace(
                state=State.SENDING if is_sending else State.QUEUED,
                attempt=int(is_sending),
                due_ms=accepted_ms,
                queue_key=queue_key,
            ),
            content,
        )


def _store(writer: apsw.Connection, stored: list[_Stored]) -> None:
    messages = []
    recipients = []
    for envelope, row, content in stored:
        encoded = encode_envelope(envelope, [row])
        checksum = message_checksum(envelope.message_id, encoded, content)
        messages.append((envelope.message_id, checksum, len(content), encoded, content))
        recipients.append(encode_recipient(envelope.message_id, row, 1))
    unreported = [message[:1] for message in messages[-LEFT_UNREPORTED:]]
    with writer:
        writer.executemany(
            "INSERT INTO message (id, checksum, content_bytes, envelope, content) VALUES (?,?,?,?,?)", messages
        )
        writer.executemany("INSERT INTO recipient VALUES (?,?,?,?,?,?,?,?,?)", recipients)
        writer.execute("DELETE FROM unreported")
        writer.executemany("INSERT INTO unreported VALUES (?)", unreported)


# --- the process that is measured


class NoLog:
    """`ports.EventLog` that writes nothing: what is recovered is told line by line."""

    def info(self, event: str, **fields: object) -> None:
        """Write nothing."""

    def warning(self, event: str, **fields: object) -> None:
        """Write nothing."""


def _fail(failure: SpoolFailedError) -> None:
    sys.exit(str(failure))


async def _serve(folder: Path, port: int, keys: int) -> None:
    begin = time.monotonic()
    clock = SystemClock()
    spool = await SqliteSpool.open(folder, NODE, clock, on_failed=_fail)
    opened_s = time.monotonic() - begin
    template, _ = make_message()
    config = PlainConfig(port, keys, template.account_uid)
    engine = DeliveryEngine(
        Surroundings(
            spool,
            config,
            CheckingResolver(clock, ["127.0.0.0/8"]),
            lambda _: b"record" * 50,
            clock,
            random.random,
            NoLog(),
            "bench.example",
        )
    )
    begin = time.monotonic()
    await engine.start()
    print(json.dumps({"open_s": round(opened_s, 3), "start_s": round(time.monotonic() - begin, 3)}), flush=True)
    await asyncio.Event().wait()


# --- the one that measures


class _Sink(Peer):
    times: list[float]
    first: asyncio.Event

    def taken(self) -> None:
        self.times.append(time.monotonic())
        self.first.set()


def _memory_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0])


async def _measure(folder: Path, keys: int, seconds: float) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    _Sink.times, _Sink.first = [], asyncio.Event()
    server = await loop.create_server(_Sink, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    begin = time.monotonic()
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.backlog",
        "--serve",
        str(port),
        "--folder",
        str(folder),
        "--keys",
        str(keys),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(600):
            await _Sink.first.wait()
        memory_first = _memory_kib(child.pid)
        await asyncio.sleep(seconds)
        memory_end = _memory_kib(child.pid)
        assert child.stdout is not None
        steps = json.loads(await child.stdout.readline())
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()
        server.close()
    return {
        "first_delivery_s": round(_Sink.times[0] - begin, 3),
        **steps,
        "memory_first_mib": round(memory_first / 1024, 1),
        "memory_end_mib": round(memory_end / 1024, 1),
        "messages_per_s": round(len(_Sink.times) / seconds) if seconds else 0,
    }


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipients", type=int, default=1_000_000)
    parser.add_argument("--keys", type=int, default=1_000, help="accounts, each with a queue of its own")
    parser.add_argument("--size", type=int, default=1_024, help="octets of a message")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to go on after the first delivery")
    parser.add_argument(
        "--folder", type=Path, help="a spool's folder, named by its UUID; kept, and used if it is there"
    )
    parser.add_argument("--serve", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if arguments.serve:
            runner.run(_serve(arguments.folder, arguments.serve, arguments.keys))
            return
        parent = Path(tempfile.mkdtemp(prefix="postroad-bench-"))
        folder = arguments.folder or parent / str(uuid.uuid4())
        try:
            begin = time.monotonic()
            if not folder.exists():
                fill(folder, Filling(arguments.recipients, arguments.keys, arguments.size))
            filled_s = time.monotonic() - begin
            os.sync()
            result = runner.run(_measure(folder, arguments.keys, arguments.seconds))
            size_mib = (folder / schema.DATABASE).stat().st_size // 1024**2
        finally:
            shutil.rmtree(parent)
    shape = {"recipients": arguments.recipients, "keys": arguments.keys, "size_bytes": arguments.size}
    print(json.dumps({**shape, "fill_s": round(filled_s, 1), "spool_mib": size_mib, **result}))


if __name__ == "__main__":
    main()
