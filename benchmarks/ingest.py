"""What it costs to store the ledger: CPU of this process and of PostgreSQL per message, and messages a second.

Run: `.venv/bin/python -m benchmarks.ingest [--messages N] [--batch N] [--spools N]`. It starts a PostgreSQL of its own
with fsync on, as role postroad_fleet, and stores messages settled at once (one record: accepted, sent, one event), 4
merged batches a transaction at most. Prints one line of JSON; times are user + system, in µs a message.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import shutil
import statistics
import tempfile
import time
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import psutil  # type: ignore[import-untyped] # it ships none
import uvloop

from controlplane.adapters.postgres.fleet_database import FleetDatabase, open_pool
from controlplane.adapters.postgres.ledger import PostgresLedger
from controlplane.adapters.postgres.migrate import migrate_up
from controlplane.adapters.postgres.roles import FLEET, ensure_roles
from controlplane.ports_fleet import Cursor, RawBatch, SpoolOpening
from controlplane.services.ingest import IngestService
from postroad.localstack import PostgresServer
from postroad.node.v1.ledger_pb2 import (
    AcceptedMessage,
    AttemptEvent,
    EventType,
    LedgerRecord,
    RecipientState,
    RecipientUpdate,
)

NODE = "bench"


def record(now_ms: int) -> bytes:
    """One message that was settled within 300 ms."""
    random = uuid.uuid4().bytes
    raw_id = now_ms.to_bytes(6, "big") + b"\x70" + random[:1] + b"\x80" + random[1:8]
    return LedgerRecord(
        message_id=raw_id,
        account="accounts/demo",
        accepted=AcceptedMessage(
            accept_time_ms=now_ms,
            sender="app@example.com",
            size_bytes=4_096,
            header_message_id="<0123456789abcdef@example.com>",
            subject="Your order has been shipped",
            credential="accounts/demo/smtpCredentials/app",
            client_address="192.0.2.10",
            client_helo="app.example.com",
            client_tls="TLSv1.3",
            session="0123456789abcdef",
            recipients=["somebody@example.net"],
        ),
        recipients=[
            RecipientUpdate(index=0, state=RecipientState.RECIPIENT_STATE_SENT, attempts=1, update_ms=now_ms + 40)
        ],
        events=[
            AttemptEvent(
                indexes=[0],
                type=EventType.EVENT_TYPE_SENT,
                time_ms=now_ms + 40,
                attempt=1,
                bundle_revision=7,
                rule="accounts/demo/routingRules/default",
                provider="accounts/demo/providers/inbox",
                remote_host="inbox.example.net[192.0.2.20]:25",
                tls="TLSv1.3",
                reply_code=250,
                enhanced_code="2.0.0",
                reply_text="2.0.0 queued as 0123456789",
                queued_ms=1,
                connecting_ms=2,
                transferring_ms=3,
            )
        ],
    ).SerializeToString()


def server_cpu_s(server: PostgresServer) -> float:
    """User and system time of PostgreSQL and its backends."""
    processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def own_cpu_s() -> float:
    """User and system time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def feed(service: IngestService, batches: list[RawBatch]) -> None:
    """Report one spool as a node does: up to four batches gathered while the last transaction ran."""
    await service.open_spool(NODE, SpoolOpening(batches[0].spool, 1, 0, 1, 10**9))
    for at in range(0, len(batches), 4):
        answers = await service.store(NODE, batches[at : at + 4])
        assert all(isinstance(answer, Cursor) for answer in answers)


def make_batches(messages: int, batch: int) -> list[RawBatch]:
    """Batches of one spool."""
    spool, now_ms = str(uuid.uuid4()), int(time.time() * 1000)
    records = [record(now_ms) for _ in range(messages)]
    return [RawBatch(spool, 1, at + 1, records[at : at + batch]) for at in range(0, messages, batch)]


async def measure(server: PostgresServer, options: argparse.Namespace) -> dict[str, Any]:
    """One run."""
    pool = await open_pool(server.dsn(FLEET, password="bench"), options.spools)  # noqa: S106 - of this run
    ledger = PostgresLedger(FleetDatabase(pool), retention=timedelta(days=30))
    service = IngestService(ledger, lambda: datetime.now(UTC))
    await feed(service, make_batches(options.batch, options.batch))
    spools = [make_batches(options.messages // options.spools, options.batch) for _ in range(options.spools)]
    count = sum(len(batch.records) for batches in spools for batch in batches)
    own, theirs, begun = own_cpu_s(), server_cpu_s(server), time.perf_counter()
    await asyncio.gather(*(feed(service, batches) for batches in spools))
    seconds = time.perf_counter() - begun
    result = {
        "messages": count,
        "per_second": round(count / seconds),
        "control_plane_us": round((own_cpu_s() - own) / count * 1e6, 1),
        "postgresql_us": round((server_cpu_s(server) - theirs) / count * 1e6, 1),
    }
    await pool.close()
    return result


async def prepare(server: PostgresServer) -> None:
    """Schema, roles and the node."""
    await migrate_up(server.dsn())
    await ensure_roles(server.dsn(), {FLEET: "bench"})
    connection = await asyncpg.connect(server.dsn())
    await connection.execute("INSERT INTO postroad.node_pools (node_pool) VALUES ('default')")
    await connection.execute("INSERT INTO postroad.nodes (node, node_pool) VALUES ('bench', 'default')")
    await connection.close()


def main() -> None:
    """Three runs; the middle one of each figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=40_000)
    parser.add_argument("--batch", type=int, default=1_000)
    parser.add_argument("--spools", type=int, default=2)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="postroad-bench-"))
    folder.chmod(0o711)
    server = PostgresServer(folder / "postgres").start()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(prepare(server))
            runs = [runner.run(measure(server, options)) for _ in range(3)]
        print(json.dumps({name: statistics.median(run[name] for run in runs) for name in runs[0]} | {"runs": runs}))
    finally:
        server.destroy()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
