"""A spool that waits with a backlog: what a start reads of it are heads of keys, and never rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from benchmarks.backlog import LEFT_SENDING, NODE, Filling, fill
from benchmarks.engine import PROVIDER, account_names
from dataplane.adapters.spool_sqlite import SqliteSpool, reader, schema
from dataplane.clock import SystemClock
from dataplane.core.config import Account, Rule, Target
from dataplane.core.envelope import make_queue_key, message_bytes
from dataplane.core.policy import compile_account
from dataplane.delivery.scheduler import READ_COUNT
from support.delivery import ACCOUNT_UID, Config, delivery_bench
from support.next_hop import next_hop
from support.spools import ManualClock, fail_test

RECIPIENTS = 20_000
KEYS = 50
SPOOL = "0192f3c1-0000-4000-8000-00000000ba10"

READS = {
    "keys": (reader.KEYS, ("", 100)),
    "heads": (reader.HEADS, ("accounts/a1\tproviders/inbox", 0, 0, b"", 0, 64)),
    "unreported": (reader.UNREPORTED, (100,)),
    "interrupted": (reader.INTERRUPTED, (2, b"", 100)),
    "oldest": (reader.OLDEST, ()),
    "message": (reader.MESSAGE, (b"x" * 16,)),
    "recipients": (reader.RECIPIENTS, (b"x" * 16,)),
    "records": (reader.RECORDS, (1,)),
    "is unreported": (reader.IS_UNREPORTED, (b"x" * 16,)),
}


@pytest.fixture(scope="module")
def backlog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backlog") / SPOOL
    fill(folder, Filling(RECIPIENTS, KEYS, 256))
    return folder


@pytest.fixture(scope="module")
def connection(backlog: Path) -> Iterator[apsw.Connection]:
    made = schema.open_reader(backlog / schema.DATABASE)
    yield made
    made.close()


@pytest.mark.parametrize("name", READS)
def test_every_read_walks_an_index_from_where_it_starts(connection: apsw.Connection, name: str) -> None:
    sql, bindings = READS[name]
    plan = [str(row[3]) for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", bindings)]
    # A walk along an index in its order that stops at its limit is a scan in name only.
    walks = {"unreported": "SCAN unreported", "oldest": "SCAN message USING COVERING INDEX", "keys": "SCAN key"}
    scans = [step for step in plan if step.startswith("SCAN") and step != "SCAN CONSTANT ROW"]
    assert all(name in walks and step.startswith(walks[name]) for step in scans), plan
    assert not [step for step in plan if "TEMP B-TREE" in step], plan
    for step in plan:
        if step.startswith("SEARCH"):
            assert re.search(r"USING (COVERING INDEX|INDEX|PRIMARY KEY|INTEGER PRIMARY KEY)", step), plan


@pytest.mark.parametrize("name", ["keys", "heads", "unreported", "interrupted", "oldest"])
def test_what_a_start_reads_does_not_grow_with_the_backlog(connection: apsw.Connection, name: str) -> None:
    sql, bindings = READS[name]
    steps = 0

    def step() -> bool:
        nonlocal steps
        steps += 1
        return False

    connection.set_progress_handler(step, 100)
    try:
        found = connection.execute(sql, bindings).fetchall()
    finally:
        connection.set_progress_handler(None)
    # A hundred instructions for each row found and some to begin with; one for each row of the backlog would show.
    assert 100 * steps < 100 * (len(found) + 20) < 100 * RECIPIENTS / 100


async def test_a_start_takes_up_the_backlog_of_a_killed_process_and_keeps_keys_only(
    backlog: Path, tmp_path: Path
) -> None:
    folder = tmp_path / SPOOL
    folder.mkdir()
    for file in backlog.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "content").mkdir()
    spool = await SqliteSpool.open(folder, NODE, SystemClock(), on_failed=fail_test)
    heads = await spool.keys()
    # What the killed process was sending comes back by recovery, not by this.
    assert sorted(head.queue_key for head in heads) == sorted(
        make_queue_key(name, PROVIDER) for name in account_names(KEYS)
    )
    assert (await spool.stats()).waiting_count == RECIPIENTS
    clock = ManualClock()
    clock.now_ms = SystemClock().wall_ms()
    config = Config()
    async with next_hop() as hop:
        for name in account_names(KEYS):
            rule = Rule(f"{name}/routingRules/r", 1, (Target(PROVIDER),))
            config.accounts[name] = compile_account(Account(name, ACCOUNT_UID, revision=1, rules=(rule,)))
        config.add_provider(PROVIDER, hop.port)
        async with delivery_bench(spool, clock=clock, config=config) as bench:
            assert bench.engine.counters.recovered == LEFT_SENDING
            await bench.until(lambda: bench.engine.counters.sent >= 10 * KEYS)
            sizes = [len(value) for value in vars(bench.engine._scheduler).values() if isinstance(value, (dict, list))]
            assert max(sizes) <= KEYS
            assert bench.engine.counters.window_bytes <= READ_COUNT * message_bytes(300, ("x" * 64,))
            sent = Counter(record.account for record in bench.records if "SENT" in [e.type.name for e in record.events])
            assert min(sent[name] for name in account_names(KEYS)) >= 5
    await spool.close()
