"""Mail that is held until its time, and mail that goes before other mail: from MAIL to the next hop.

The clock is the test's: nothing here waits for time to pass.
"""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from typing import Any

import aiosmtplib
import pytest

from dataplane.core.config import RetryPolicy, Rule, Target
from dataplane.core.datetimes import format_date_time
from dataplane.core.envelope import Envelope, RecipientRow, make_queue_key
from dataplane.core.policy import compile_account
from dataplane.core.queue import EventType, State
from dataplane.core.session_contract import MAX_HOLD_S
from dataplane.ports import Spool
from support.delivery import ACCOUNT, ACCOUNT_UID, CONTENT, KEY_A, A, Bench, Config, delivery_bench
from support.ingress import Node, make_node, running
from support.next_hop import STALL, Behaviour, NextHop, next_hop
from support.spools import ManualClock, open_durable

HOUR_S = 3_600
HOUR_MS = 3_600_000
BODY = b"From: App <app@example.com>\r\nSubject: hello\r\n\r\nbody\r\n"
RECIPIENT = "someone@example.net"


async def put(bench: Bench, *, hold_s: float = 0, priority: int = 0, to: str = "b@example.net") -> Envelope:
    """A message as ingress commits one that is not handed over."""
    now_ms = bench.clock.wall_ms()
    send_time_ms = now_ms + int(hold_s * 1000) if hold_s else 0
    envelope = bench.envelope(send_time_ms=send_time_ms, priority=priority)
    state = State.SCHEDULED if hold_s else State.QUEUED
    row = RecipientRow(0, to, state, 0, envelope.released_ms, priority, make_queue_key(ACCOUNT, A, priority))
    await bench.spool.accept(envelope, CONTENT, [row])
    bench.engine.queued(envelope, [row])
    return envelope


async def nothing_happens(bench: Bench) -> None:
    """Let everything happen that happens without time passing, with the scheduler woken as well."""
    bench.engine.wake(KEY_A)
    for _ in range(200):
        await asyncio.sleep(0)
    assert bench.engine.counters.attempts == 0


def use(bench: Bench, hop: NextHop, **options: Any) -> None:
    bench.config.add_provider(A, hop.port, **options)
    bench.config.route_to(A)


# --- held ------------------------------------------------------------------------------------------------------------


async def test_a_message_held_for_an_hour_goes_when_the_clock_passes_and_not_before() -> None:
    async with next_hop() as hop, delivery_bench() as bench:
        use(bench, hop)
        envelope = await put(bench, hold_s=HOUR_S)
        await nothing_happens(bench)
        bench.clock.advance(HOUR_S - 0.001)
        await nothing_happens(bench)
        assert bench.engine.counters.window_bytes == 0  # it is not held in memory
        bench.clock.advance(0.001)
        bench.engine.wake(KEY_A)
        (event,) = await bench.events_come(1)
        assert (event.type, event.attempt, event.queued_ms) == (EventType.SENT, 1, 0)
        assert [taken.content for taken in hop.messages] == [CONTENT]
        assert await bench.spool.load(envelope.message_id) is None


async def test_the_timer_alone_releases_it_within_a_second() -> None:
    async with next_hop() as hop, delivery_bench() as bench:
        use(bench, hop)
        await put(bench, hold_s=0.2)
        # The clock is put to the time while the loop's own timer runs: nobody wakes the scheduler.
        bench.clock.advance(0.2)
        started_s = asyncio.get_running_loop().time()
        await bench.events_come(1)
        assert asyncio.get_running_loop().time() - started_s < 1


@pytest.mark.parametrize("is_large", [False, True])
async def test_a_restart_keeps_it_until_its_time(tmp_path: Path, *, is_large: bool) -> None:
    clock, config = ManualClock(), Config()
    folder = tmp_path / str(uuid.uuid4())
    async with next_hop() as hop:
        spool: Spool = await open_durable(folder, clock)
        async with delivery_bench(spool, clock=clock, config=config) as bench:
            use(bench, hop)
            now_ms = clock.wall_ms()
            envelope = bench.envelope(send_time_ms=now_ms + HOUR_MS)
            row = RecipientRow(0, "b@example.net", State.SCHEDULED, 0, now_ms + HOUR_MS, 0, KEY_A)
            content = CONTENT * (20_000 if is_large else 1)
            await spool.accept(envelope, content, [row])
            bench.engine.queued(envelope, [row])
        await spool.close()

        spool = await open_durable(folder, clock)
        async with delivery_bench(spool, clock=clock, config=config) as bench:
            await nothing_happens(bench)
            stored = await spool.load(envelope.message_id)
            assert stored is not None
            assert [(one.state, one.due_ms) for one in stored.recipients] == [(State.SCHEDULED, now_ms + HOUR_MS)]
            clock.advance(HOUR_S)
            bench.engine.wake(KEY_A)
            await bench.events_come(1)
            assert [taken.content for taken in hop.messages] == [content]
        await spool.close()


async def test_a_clock_put_back_puts_it_off_and_what_is_due_behind_it_goes_all_the_same() -> None:
    async with next_hop() as hop, delivery_bench() as bench:
        use(bench, hop)
        for _ in range(100):  # more than one reading of the queue
            await put(bench, hold_s=600)
        bench.clock.now_ms -= HOUR_MS
        bench.clock.advance(601)  # their time by the steady clock
        await nothing_happens(bench)
        bench.clock.now_ms += 1  # accepted behind them
        await put(bench, to="now@example.net")
        await bench.events_come(1)
        assert [taken.recipients for taken in hop.messages] == [["now@example.net"]]
        bench.clock.advance(HOUR_S)
        bench.engine.wake(KEY_A)
        await bench.events_come(101)


async def test_a_clock_put_ahead_is_followed_when_the_queues_are_read_anew() -> None:
    async with next_hop() as hop, delivery_bench() as bench:
        use(bench, hop)
        await put(bench, hold_s=HOUR_S)
        await nothing_happens(bench)
        bench.clock.now_ms += HOUR_MS
        bench.clock.advance(60)
        bench.engine.wake(make_queue_key("accounts/nobody", "providers/nobody"))
        await bench.events_come(1)


async def test_its_lifetime_counts_from_its_release() -> None:
    async with next_hop(Behaviour(final=lambda _: b"451 4.3.0 not now\r\n")) as hop, delivery_bench() as bench:
        use(bench, hop)
        account = bench.config.accounts[ACCOUNT].account
        policy = RetryPolicy(lifetime_s=2 * HOUR_S)
        bench.config.accounts[ACCOUNT] = compile_account(
            type(account)(ACCOUNT, ACCOUNT_UID, revision=7, rules=account.rules, retry_policy=policy)
        )
        await put(bench, hold_s=24 * HOUR_S)
        bench.clock.advance(24 * HOUR_S)
        bench.engine.wake(KEY_A)
        await bench.events_come(1)
        bench.clock.advance(2 * HOUR_S - 1)
        bench.engine.wake(KEY_A)
        await bench.events_come(2)
        bench.clock.advance(2 * HOUR_S)
        bench.engine.wake(KEY_A)
        await bench.events_come(3)
        assert bench.types() == ["DEFERRED", "DEFERRED", "EXPIRED"]


async def test_the_record_of_its_acceptance_says_when_it_goes() -> None:
    async with next_hop() as hop, delivery_bench() as bench:
        use(bench, hop)
        envelope = await put(bench, hold_s=HOUR_S, priority=4)
        bench.engine._reporter.look(everything=True)
        (record,) = bench.records
        assert record.accepted is not None
        assert (record.accepted.send_time_ms, record.accepted.priority) == (envelope.send_time_ms, 4)
        assert record.updates == ()


# --- priority --------------------------------------------------------------------------------------------------------


async def test_the_highest_priority_goes_first_when_one_connection_drains_a_backlog() -> None:
    async with next_hop() as hop, delivery_bench(start=False) as bench:
        use(bench, hop, max_connections=1, max_messages_per_connection=1_000)
        for number in range(100):
            await put(bench, to=f"{number}@usual.test")
        for number in range(30):
            await put(bench, priority=5, to=f"{number}@urgent.test")
            await put(bench, priority=-3, to=f"{number}@idle.test")
        await bench.engine.start()
        await bench.events_come(160)
        order = [taken.recipients[0] for taken in hop.messages]
        assert order == [
            f"{number}@{kind}.test"
            for kind, count in (("urgent", 30), ("usual", 100), ("idle", 30))
            for number in range(count)
        ]


async def test_what_is_urgent_passes_what_waits_for_a_connection() -> None:
    replies = [STALL]
    stalled = Behaviour(final=lambda _: replies.pop() if replies else b"250 2.0.0 ok\r\n")
    async with next_hop(stalled) as hop, delivery_bench() as bench:
        use(bench, hop, max_connections=1)
        for number in range(10):
            await bench.submit(f"{number}@usual.test")
        await hop.stalled.wait()
        urgent = make_queue_key(ACCOUNT, A, 9)
        await bench.submit("0@urgent.test", envelope=bench.envelope(priority=9), key=urgent)
        await put(bench, priority=7, to="1@urgent.test")
        for _ in range(200):
            await asyncio.sleep(0)
        pool = bench.engine.pools.find(A)
        assert pool is not None
        (connection,) = pool._jobs
        connection.abort("the test lets the others go on")
        await bench.events_come(12)
        order = [taken.recipients[0] for taken in hop.messages if taken.recipients[0] != "0@usual.test"]
        assert order == ["0@urgent.test", "1@urgent.test", *[f"{number}@usual.test" for number in range(1, 10)]]


async def test_a_next_hop_that_knows_priorities_is_told_and_another_one_is_not() -> None:
    capabilities = (*Behaviour().capabilities, "MT-PRIORITY MIXER")
    for knows in (True, False):
        behaviour = Behaviour(capabilities=capabilities) if knows else Behaviour()
        async with next_hop(behaviour) as hop, delivery_bench() as bench:
            use(bench, hop)
            await put(bench, priority=-4)
            await put(bench)
            await bench.events_come(2)
            said = [command for command in hop.commands if command.startswith("MAIL")]
            assert [" MT-PRIORITY=-4" in command for command in said] == [False, knows]
            assert all("MT-PRIORITY=0" not in command for command in said)


# --- from MAIL -------------------------------------------------------------------------------------------------------


async def submitted(node: Node, *options: str) -> Envelope:
    """Submit with a client that others use, and return what was committed."""
    client = aiosmtplib.SMTP(hostname="127.0.0.1", port=next(iter(node.ports.values())), start_tls=False)
    before = len(node.delivery.waiting)
    async with client:
        await client.ehlo()
        assert not options or client.supports_extension("mt-priority")
        await client.sendmail("app@example.com", [RECIPIENT], BODY, mail_options=list(options))
    ((envelope, rows),) = node.delivery.waiting[before:]
    assert [row.queue_key for row in rows] == [make_queue_key("accounts/demo", "providers/inbox", envelope.priority)]
    stored = await node.spool.load(envelope.message_id)
    assert stored is not None
    assert stored.recipients == tuple(rows)
    return stored.envelope


async def test_what_is_held_is_committed_as_scheduled_and_never_handed_over() -> None:
    async with running(make_node()) as node:
        envelope = await submitted(node, f"HOLDFOR={HOUR_S}")
        assert envelope.send_time_ms == envelope.accepted_ms + HOUR_MS
        stored = await node.spool.load(envelope.message_id)
        assert stored is not None
        (row,) = stored.recipients
        assert (row.state, row.attempt, row.due_ms) == (State.SCHEDULED, 0, envelope.send_time_ms)
        assert node.delivery.delivered == []
        assert node.counters.content_bytes == 0
        (line,) = [fields for event, fields in node.log.lines if event == "message.accepted"]
        assert line["send_time"] == format_date_time(envelope.send_time_ms)
        assert "priority" not in line


async def test_a_time_that_is_past_is_now() -> None:
    async with running(make_node()) as node:
        node.delivery.open = False
        envelope = await submitted(node, "HOLDUNTIL=2001-01-01T00:00:00Z")
        assert envelope.send_time_ms == 0
        assert node.delivery.waiting[0][1][0].state is State.QUEUED


async def test_a_time_beyond_what_is_offered_is_refused_by_the_node_s_own_clock() -> None:
    async with running(make_node()) as node:
        node.delivery.open = False
        peer = await node.greeted()
        offered = format_date_time(node.clock.wall_ms() + MAX_HOLD_S * 1000)
        assert f"250-FUTURERELEASE {MAX_HOLD_S} {offered}\r\n".encode() in await peer.ask(b"EHLO c\r\n")
        assert (await peer.ask(f"MAIL FROM:<app@example.com> HOLDUNTIL={offered}\r\n".encode())).startswith(b"250")
        await peer.ask(b"RSET\r\n")
        node.clock.seconds -= 1
        refused = await peer.ask(f"MAIL FROM:<app@example.com> HOLDUNTIL={offered}\r\n".encode())
        assert refused.startswith(b"501 5.5.4")


async def test_a_priority_is_kept_told_in_received_and_logged() -> None:
    async with running(make_node()) as node:
        node.delivery.open = False
        envelope = await submitted(node, "MT-PRIORITY=-9")
        stored = await node.spool.load(envelope.message_id)
        assert stored is not None
        assert stored.recipients[0].priority == envelope.priority == -9
        assert b"\r\n\tfor <someone@example.net>\r\n\tPRIORITY -9;\r\n" in stored.content
        (line,) = [fields for event, fields in node.log.lines if event == "message.accepted"]
        assert line["priority"] == -9
        plain = await submitted(node)
        stored = await node.spool.load(plain.message_id)
        assert stored is not None
        assert b"PRIORITY" not in stored.content


async def test_a_large_message_is_held_too() -> None:
    node = make_node(spill_bytes=300_000)
    node.config.set_account(
        type(node.config.accounts["accounts/demo"].account)(
            name="accounts/demo",
            uid="uid-demo",
            revision=8,
            sender_domains=("example.com",),
            rules=(Rule("r", 1, (Target("providers/inbox"),)),),
        )
    )
    async with running(node):
        peer = await node.greeted()
        await peer.ask(b"EHLO c\r\n")
        group = b"MAIL FROM:<app@example.com> HOLDFOR=60\r\nRCPT TO:<someone@example.net>\r\nDATA\r\n"
        assert (await peer.ask(group, 3)).startswith(b"354")
        content = BODY + b"x" * 900 + b"\r\n"
        assert (await peer.ask(content + (b"y" * 900 + b"\r\n") * 1_000 + b".\r\n")).startswith(b"250 2.0.0 queued")
        ((envelope, rows),) = node.delivery.waiting
        assert envelope.size_bytes > 900_000
        assert rows[0].state is State.SCHEDULED
