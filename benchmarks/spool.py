"""What the spool costs: `python -m benchmarks.spool [--messages N] [--batch N] [--folder DIR]`.

A life is accept (4 KiB, one recipient, handed on in memory), settle with its record, and its share of an
acknowledgement; `batch` lives run side by side, each waiting for its commits. CPU counts user and system time of the
whole process, the commit thread included, and the benchmark's own callbacks (shown by the null spool). Beside a busy
loop each life also burns the given microseconds on the loop; beside a saturated loop a callback burns without pause, so
that the spool gets what the switch interval leaves. Durability is that of production: WAL, synchronous=FULL.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop

from dataplane.adapters.spool_null import NullSpool
from dataplane.adapters.spool_ram import RamSpool
from dataplane.adapters.spool_sqlite import SqliteSpool
from dataplane.clock import SystemClock
from dataplane.core.envelope import Envelope, RecipientRow, make_queue_key
from dataplane.core.ids import new_message_id
from dataplane.core.queue import State
from dataplane.ports import RecipientChange, Settlement, Spool, SpoolFailedError

CONTENT = os.urandom(4096)
KEY = make_queue_key("accounts/demo", "providers/inbox")
RECORD = os.urandom(300)


def make_message() -> tuple[Envelope, RecipientRow]:
    """An envelope of usual size and its recipient, committed as `sending`."""
    now_ms = time.time_ns() // 1_000_000
    envelope = Envelope(
        message_id=new_message_id(now_ms, os.urandom(10)),
        account="accounts/demo",
        account_uid="4e3b0c7e-0d2b-4a53-9f3c-3a6ad1a5b1b8",
        credential="accounts/demo/smtpCredentials/app",
        sender="app@example.com",
        size_bytes=len(CONTENT),
        accepted_ms=now_ms,
        session="0192f3c1a2b3",
        client_address="127.0.0.1",
        client_helo="client.example",
        client_tls="",
        header_message_id="<20261120.1234567890@example.com>",
        subject="A subject of the usual length",
        smtputf8=False,
        body_8bit=False,
    )
    return envelope, RecipientRow(0, "user@example.net", State.SENDING, 1, now_ms, 0, KEY)


def burn(seconds: float) -> None:
    """Hold the loop, as protocol code would."""
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        pass


async def live(spool: Spool, count: int, work_s: float) -> None:
    """One sender's messages, one after the other."""
    for _ in range(count):
        envelope, row = make_message()
        await spool.accept(envelope, CONTENT, [row])
        if work_s:
            burn(work_s)
        change = RecipientChange(0, 1, State.SENT, 1, 0, KEY)
        await spool.settle(Settlement(envelope.message_id, [change], RECORD, reported=True))


async def acknowledge(spool: Spool, done: asyncio.Event) -> None:
    """What the ledger's stream does: read a batch, acknowledge it."""
    number = 0
    while not done.is_set():
        first, records = await spool.records(number, 1_000, 1 << 20)
        if records:
            number = first + len(records) - 1
            await spool.acknowledge(number)
        else:
            await asyncio.sleep(0.002)


async def saturate(done: asyncio.Event) -> None:
    """A loop that never rests: 400 µs of Python in every turn."""
    while not done.is_set():
        burn(0.0004)
        await asyncio.sleep(0)


async def measure(
    open_spool: Callable[[], Awaitable[Spool]], messages: int, batch: int, work_s: float, *, saturated: bool
) -> dict[str, float]:
    """Run one variant; CPU and latency per message."""
    spool = await open_spool()
    done = asyncio.Event()
    helpers = [asyncio.create_task(acknowledge(spool, done))]
    if saturated:
        helpers.append(asyncio.create_task(saturate(done)))
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    await asyncio.gather(*(live(spool, messages // batch, work_s) for _ in range(batch)))
    took_s = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF)
    done.set()
    await asyncio.gather(*helpers)
    stats = await spool.stats()
    await spool.close()
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "lives_per_s": round(messages / took_s),
        "cpu_us_per_life": round(cpu_s / messages * 1e6, 1),
        "writes_per_commit": round(2 * messages / max(stats.commits, 1), 1),
        "ms_per_commit": round(took_s / max(stats.commits, 1) * 1e3, 2),
    }


def run(variant: str, folder: Path, messages: int, batch: int) -> dict[str, float]:
    """Run one variant on a loop of its own."""
    name, _, mode = variant.partition(" ")

    async def open_spool() -> Spool:
        if name == "null":
            return NullSpool()
        if name == "ram":
            return RamSpool(SystemClock())

        def end(failure: SpoolFailedError) -> None:
            sys.exit(str(failure))

        return await SqliteSpool.open(folder / str(uuid.uuid4()), "bench", SystemClock(), on_failed=end)

    work_s = {"100us": 1e-4, "200us": 2e-4}.get(mode, 0.0)
    saturated = mode == "saturated"
    count = messages if not saturated and not work_s else messages // 4
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(measure(open_spool, count, batch, work_s, saturated=saturated))


VARIANTS = ["null", "ram", "sqlite", "sqlite 100us", "sqlite 200us", "sqlite saturated"]


def main() -> None:
    """Print one JSON line a variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=40_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("variants", nargs="*", default=VARIANTS)
    arguments = parser.parse_args()
    sys.setswitchinterval(0.0005)
    folder = Path(tempfile.mkdtemp(prefix="postroad-bench-", dir=arguments.folder))
    try:
        for variant in arguments.variants:
            result = run(variant, folder, arguments.messages, arguments.batch)
            print(json.dumps({"variant": variant, "batch": arguments.batch, **result}), flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
