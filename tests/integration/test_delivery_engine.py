"""The delivery engine against next hops on loopback: what is sent, what is settled, what is told."""

from __future__ import annotations

import asyncio

import pytest

from dataplane.core.config import Account, Denials, RetryPolicy, Rule, Target
from dataplane.core.envelope import RecipientRow, make_queue_key
from dataplane.core.policy import compile_account
from dataplane.core.queue import State
from dataplane.delivery.scheduler import READ_COUNT
from support.delivery import ACCOUNT, ACCOUNT_UID, CONTENT, HELD_BYTES, KEY_A, A, B, Bench, delivery_bench
from support.next_hop import STALL, Behaviour, next_hop

KEY_B = make_queue_key(ACCOUNT, B)
CREDENTIAL = f"{ACCOUNT}/smtpCredentials/app"
EVERY_KIND = [
    Denials(1, accounts={ACCOUNT: 0}),
    Denials(1, providers={A: 0}),
    Denials(1, credentials={CREDENTIAL: 0}, credentials_since={CREDENTIAL: 0}),
    Denials(1, destinations={"destinations/example.net": 0}),
]
"""All that operators can suspend, each of them about what `Bench.submit` submits."""


async def waiting(bench: Bench) -> list[State]:
    """States of all recipients that the spool still has."""
    found = []
    for head in await bench.spool.keys():
        for due in await bench.spool.heads(head.queue_key, None, 100):
            stored = await bench.spool.load(due.message_id)
            assert stored is not None
            found += [row.state for row in stored.recipients if row.index == due.index]
    return found


async def come_to_wait(bench: Bench, count: int) -> list[State]:
    """The same, once the spool has so many: what is cut is put back a moment later."""
    async with asyncio.timeout(10):
        while len(found := await waiting(bench)) < count:  # noqa: ASYNC110 - a spool tells nobody of its rows
            await asyncio.sleep(0.001)
    return found


async def test_a_message_settled_in_time_is_one_record() -> None:
    async with next_hop() as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        envelope = await bench.submit("b@example.net", "c@example.net")
        (event,) = await bench.events_come(1)
        (taken,) = hop.messages
        assert taken.content == CONTENT
        assert (taken.sender, taken.recipients) == ("app@example.com", ["b@example.net", "c@example.net"])
        (record,) = bench.records
        assert record.accepted is envelope
        assert record.recipients_accepted == ("b@example.net", "c@example.net")
        assert bench.states() == ["SENT", "SENT"]
        assert event.indexes == (0, 1)
        assert (event.attempt, event.provider, event.rule) == (1, A, f"{ACCOUNT}/routingRules/r")
        assert (event.bundle_revision, event.reply_code) == (7, 250)
        assert event.remote_host == f"127.0.0.1[127.0.0.1]:{hop.port}"
        assert await bench.spool.load(envelope.message_id) is None
        assert bench.engine.counters.window_bytes == 0


async def test_messages_follow_each_other_on_one_connection_up_to_its_limit() -> None:
    async with next_hop() as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port, max_connections=1, max_messages_per_connection=3)
        bench.config.route_to(A)
        for _ in range(7):
            await bench.submit()
        await bench.events_come(7)
        assert hop.connections == 3
        assert bench.engine.counters.sent == 7


async def test_an_acceptance_that_is_not_settled_in_time_is_recorded_alone_and_once() -> None:
    async with next_hop(Behaviour(final=lambda _: STALL)) as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        envelope = await bench.submit()
        await hop.stalled.wait()
        bench.clock.advance(0.4)
        await bench.until(lambda: bool(bench.records))
        assert bench.records[0].accepted is envelope
        assert bench.records[0].events == ()
        await bench.engine.stop(0.0)
        assert bench.types() == ["UNCERTAIN"]
        assert [record.accepted for record in bench.records[1:]] == [None]


async def test_a_message_that_is_read_back_before_it_is_watched_is_recorded_once() -> None:
    async with next_hop() as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        envelope = bench.envelope()
        row = RecipientRow(0, "b@example.net", State.QUEUED, 0, bench.clock.wall_ms(), envelope.priority, KEY_A)
        await bench.spool.accept(envelope, CONTENT, [row])
        bench.engine.wake(KEY_A)
        await bench.events_come(1)

        bench.engine.queued(envelope, [row])
        await bench.engine.stop(0.0)

        assert [record.accepted for record in bench.records] == [envelope]


async def test_a_queued_message_is_recorded_and_read_back_when_there_is_room() -> None:
    async with next_hop() as hop, delivery_bench(window_bytes=0) as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        envelope = await bench.submit()
        bench.clock.advance(0.4)
        await bench.until(lambda: bool(bench.records))
        assert bench.records[0].accepted is envelope
        assert await waiting(bench) == [State.QUEUED]
        assert hop.messages == []


async def test_the_window_bounds_what_is_handed_over_and_what_is_read_back() -> None:
    size = HELD_BYTES
    async with next_hop() as hop, delivery_bench(window_bytes=2 * size) as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        peak = 0
        for _ in range(20):
            await bench.submit()
            peak = max(peak, bench.engine.counters.window_bytes)
        await bench.events_come(20)
        assert len(hop.messages) == 20
        assert peak <= 3 * size  # the window and the one message that was being read back
        assert bench.engine.counters.window_bytes == 0


async def test_each_recipient_gets_its_own_end_and_only_the_deferred_one_is_tried_again() -> None:
    replies = {"sent": b"250 ok\r\n", "later": b"450 4.2.1 later\r\n", "never": b"550 5.1.1 who\r\n"}
    behaviour = Behaviour(recipient=lambda address: replies[address.partition("@")[0]])
    async with next_hop(behaviour) as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        await bench.submit("sent@x.test", "later@x.test", "never@x.test")
        await bench.events_come(3)
        assert dict(zip([event.indexes for event in bench.events], bench.types(), strict=True)) == {
            (0,): "SENT",
            (1,): "DEFERRED",
            (2,): "BOUNCED",
        }
        assert len(bench.records) == 1
        replies["later"] = b"250 ok\r\n"
        await bench.retry()
        await bench.events_come(4)
        assert [taken.recipients for taken in hop.messages] == [["sent@x.test"], ["later@x.test"]]
        assert (bench.events[3].indexes, bench.events[3].attempt) == ((1,), 2)
        assert bench.records[-1].accepted is None
        assert await bench.spool.keys() == []


async def test_a_deferred_recipient_waits_as_the_retry_policy_says() -> None:
    async with next_hop(Behaviour(mail=lambda _: b"451 4.3.0 later\r\n")) as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        await bench.submit()
        await bench.events_come(1)
        (update,) = bench.updates
        assert update.next_attempt_ms == bench.clock.wall_ms() + 30_000
        await bench.retry(29.0)
        assert len(bench.events) == 1
        await bench.retry(1.0)
        await bench.events_come(2)
        assert bench.events[1].attempt == 2
        assert bench.updates[1].next_attempt_ms == bench.clock.wall_ms() + 60_000


async def test_lifetime_over_at_the_end_of_a_failed_attempt_is_expired() -> None:
    async with next_hop(Behaviour(mail=lambda _: b"451 4.3.0 later\r\n")) as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        envelope = await bench.submit()
        await bench.events_come(1)
        await bench.retry(RetryPolicy().lifetime_s)
        await bench.events_come(2)
        assert bench.types() == ["DEFERRED", "EXPIRED"]
        assert bench.events[1].reply_code == 451
        assert await bench.spool.load(envelope.message_id) is None


async def test_one_failed_probe_ends_everything_whose_lifetime_is_over() -> None:
    async with next_hop(Behaviour(greeting=b"554 5.3.2 no\r\n")) as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port, max_connections=1)
        bench.config.route_to(A)
        for _ in range(10):
            await bench.submit()
        await bench.events_come(1)
        assert hop.connections == 1
        bench.clock.advance(6 * 86_400)
        await bench.submit("fresh@example.net")
        bench.engine.config_changed()
        await bench.until(lambda: bench.engine.counters.expired == 10)
        assert "4.4.7" in [event.enhanced_code for event in bench.events]
        await bench.until(lambda: bench.engine._settler.pending_count == 0 and not bench.engine.counters.window_bytes)
        assert hop.connections == 2
        assert await waiting(bench) in ([State.QUEUED], [State.DEFERRED])


async def test_what_a_revoked_credential_submitted_expires_unsent() -> None:
    async with next_hop() as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        ends_ms = bench.clock.wall_ms() + 31 * 86_400_000
        bench.config.denials = Denials(1, credentials={bench.envelope().credential: ends_ms})
        await bench.submit()
        bench.clock.advance(6 * 86_400)
        bench.engine.denials_changed()
        (event,) = await bench.events_come(1)
        assert (event.type.name, event.enhanced_code, event.attempt) == ("EXPIRED", "4.7.1", 0)
        assert hop.connections == 0


@pytest.mark.parametrize("denials", EVERY_KIND, ids=["account", "provider", "credential", "destination"])
async def test_what_operators_hold_back_waits_for_them_however_long(denials: Denials) -> None:
    async with next_hop() as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        bench.config.denials = denials
        await bench.submit()
        bench.clock.advance(6 * 86_400)
        bench.engine.denials_changed()
        await bench.until(lambda: bench.engine._scheduler.is_idle and bench.engine._settler.pending_count == 0)
        assert (await waiting(bench), bench.events) == ([State.QUEUED], [])


async def test_a_jump_of_the_wall_clock_neither_expires_nor_sends_early() -> None:
    async with next_hop(Behaviour(mail=lambda _: b"451 4.3.0 later\r\n")) as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        await bench.submit()
        await bench.events_come(1)
        bench.clock.now_ms += 400 * 86_400_000
        bench.engine.wake(KEY_A)
        await bench.until(lambda: bench.engine._scheduler.is_idle)
        assert len(bench.events) == 1
        await bench.retry(60.0)
        await bench.events_come(2)
        assert bench.types() == ["DEFERRED", "DEFERRED"]


async def test_cut_after_the_dot_is_uncertain_and_tried_again() -> None:
    behaviour = Behaviour(final=lambda _: None)
    async with next_hop(behaviour) as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        await bench.submit()
        await bench.events_come(1)
        assert (bench.types(), bench.states()) == (["UNCERTAIN"], ["DEFERRED"])
        behaviour.final = lambda _: b"250 ok\r\n"
        await bench.retry()
        await bench.events_come(2)
        assert bench.types() == ["UNCERTAIN", "SENT"]


async def test_cut_before_the_dot_is_interrupted_and_tried_again_with_one_copy() -> None:
    behaviour = Behaviour(data=None)
    async with next_hop(behaviour) as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        await bench.submit()
        await bench.events_come(1)
        assert (bench.types(), bench.states()) == (["INTERRUPTED"], ["DEFERRED"])
        behaviour.data = b"354 go\r\n"
        await bench.retry()
        await bench.events_come(2)
        assert len(hop.messages) == 1


async def test_a_connection_closed_while_idle_costs_no_attempt() -> None:
    async with next_hop(Behaviour(hang_up_after_final=True)) as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port, max_connections=1)
        bench.config.route_to(A)
        for _ in range(5):
            await bench.submit()
        await bench.events_come(5)
        assert bench.types() == ["SENT"] * 5
        assert len(hop.messages) == 5


@pytest.mark.parametrize("stray", [b"250 2.0.0 ok\r\n", b"421 bye\r\n", b"550 no\r\n", b"\0"])
async def test_a_stray_line_never_becomes_the_verdict_of_the_next_message(stray: bytes) -> None:
    behaviour = Behaviour(
        after_final=stray,
        final=lambda number: b"250 2.0.0 queued as %d\r\n" % number,
        recipient=lambda address: b"550 5.1.1 who\r\n" if address.startswith("bad") else b"250 ok\r\n",
    )
    async with next_hop(behaviour) as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port, max_connections=1)
        bench.config.route_to(A)
        wanted = {}
        for number in range(12):
            name = f"{'bad' if number % 3 == 1 else 'good'}{number}@x.test"
            envelope = await bench.submit(name)
            wanted[envelope.message_id] = "BOUNCED" if name.startswith("bad") else "SENT"
        for _ in range(4):
            await bench.until(lambda: bench.engine.pools.busy_count == 0)
            await bench.retry()
        await bench.until(lambda: sum(name in ("SENT", "BOUNCED") for name in bench.types()) == 12)
        ends = {record.message_id: record.events[-1].type.name for record in bench.records if record.events}
        assert ends == wanted
        assert len({taken.recipients[0] for taken in hop.messages}) == len(hop.messages)


async def test_a_refused_connection_fails_over_to_the_next_target_at_once() -> None:
    async with next_hop() as hop, next_hop() as gone, delivery_bench() as bench:
        bench.config.add_provider(B, hop.port)
        bench.config.route_to(A, B)
        closed = gone.port
        bench.config.add_provider(A, closed)
        async with next_hop(Behaviour(greeting=b"421 4.3.2 no\r\n")) as full:
            bench.config.add_provider(A, full.port)
            await bench.submit()
            (event,) = await bench.events_come(1)
        assert (event.type.name, event.provider, event.attempt) == ("SENT", B, 1)
        assert len(hop.messages) == 1


async def with_a_backlog(bench: Bench, hop_port: int, dead_port: int) -> tuple[Target, ...]:
    """A is dead and more than a turn's worth of mail waits for it alone; returns the targets of `@both.test`."""
    bench.config.add_provider(A, dead_port)
    bench.config.add_provider(B, hop_port)
    both = (Target(A), Target(B))
    rules = (
        Rule(f"{ACCOUNT}/routingRules/both", 1, both, recipient_patterns=("@both.test",)),
        Rule(f"{ACCOUNT}/routingRules/one", 2, (Target(A),)),
    )
    bench.config.accounts[ACCOUNT] = compile_account(Account(ACCOUNT, ACCOUNT_UID, revision=7, rules=rules))
    for _ in range(READ_COUNT + 1):
        await bench.submit("a@one.test")
    await bench.events_come(1)
    return both


async def test_mail_with_another_target_passes_what_waits_for_a_dead_one() -> None:
    dead = Behaviour(greeting=b"554 5.3.2 no\r\n")
    async with next_hop() as hop, next_hop(dead) as gone, delivery_bench() as bench:
        targets = await with_a_backlog(bench, hop.port, gone.port)
        found = bench.engine.next_hop(ACCOUNT, targets)
        assert found == B
        await bench.submit("b@both.test", key=make_queue_key(ACCOUNT, found))
        await bench.until(lambda: bench.engine.counters.sent == 1)
        assert hop.messages[0].recipients == ["b@both.test"]


async def test_mail_that_the_other_target_deferred_does_not_wait_behind_the_dead_one() -> None:
    dead, busy = Behaviour(greeting=b"554 5.3.2 no\r\n"), Behaviour(mail=lambda _: b"451 4.3.0 later\r\n")
    async with next_hop(busy) as hop, next_hop(dead) as gone, delivery_bench() as bench:
        await with_a_backlog(bench, hop.port, gone.port)
        await bench.submit("b@both.test", key=KEY_B)
        await bench.events_come(2)
        busy.mail = lambda _: b"250 ok\r\n"
        await bench.retry(40.0, KEY_B)
        await bench.until(lambda: bench.engine.counters.sent == 1)


async def test_without_a_usable_target_mail_waits_for_the_first_and_a_denied_one_is_not_usable() -> None:
    async with next_hop() as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port)
        targets = (Target(A), Target(B))
        assert bench.engine.next_hop(ACCOUNT, targets) == A
        assert bench.engine.next_hop(ACCOUNT, targets[::-1]) == A
        bench.config.add_provider(B, hop.port)
        bench.config.denials = Denials(1, providers={A: 0})
        assert bench.engine.next_hop(ACCOUNT, targets) == B
        bench.config.denials = Denials(2, providers={A: 0, B: 0})
        assert bench.engine.next_hop(ACCOUNT, targets) == A


async def test_all_targets_dead_is_deferred_by_one_probe_and_the_rest_is_not_even_tried() -> None:
    async with next_hop(Behaviour(greeting=b"554 5.3.2 no\r\n")) as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        for _ in range(10):
            await bench.submit()
        await bench.events_come(1)
        await bench.until(lambda: bench.engine._settler.pending_count == 0)
        assert bench.types() == ["DEFERRED"]
        assert bench.events[0].reply_code == 554
        assert sorted(await waiting(bench)) == sorted([State.QUEUED] * 9 + [State.DEFERRED])
        assert not bench.engine.admit(1, KEY_A)
        assert hop.connections <= 20


async def test_a_destination_that_comes_back_takes_everything_that_waited() -> None:
    behaviour = Behaviour(greeting=b"421 4.3.2 no\r\n")
    async with next_hop(behaviour) as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port, max_connections=2)
        bench.config.route_to(A)
        for _ in range(30):
            await bench.submit()
        await bench.events_come(1)
        behaviour.greeting = b"220 sink\r\n"
        bench.clock.advance(100.0)
        bench.engine.config_changed()
        await bench.until(lambda: bench.engine.counters.sent == 30)
        assert await bench.spool.keys() == []


async def test_a_rule_that_names_nothing_known_defers_and_never_fails() -> None:
    async with delivery_bench() as bench:
        bench.config.route_to("providers/unknown")
        await bench.submit()
        await bench.events_come(1)
        assert (bench.types(), bench.states()) == (["DEFERRED"], ["DEFERRED"])


async def test_another_accounts_provider_is_no_target() -> None:
    async with next_hop() as hop, delivery_bench() as bench:
        provider = bench.config.add_provider(A, hop.port)
        bench.config.providers[A] = type(provider)(A, "accounts/other", provider.endpoints, provider.tls_policy)
        bench.config.route_to(A)
        await bench.submit()
        await bench.events_come(1)
        assert bench.types() == ["DEFERRED"]
        assert hop.connections == 0


async def test_no_rule_fails_those_recipients_and_delivers_to_the_others() -> None:
    async with next_hop() as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A, recipients=("@x.test",))
        await bench.submit("a@x.test", "b@y.test")
        await bench.events_come(2)
        by_index = {event.indexes: event for event in bench.events}
        assert by_index[0,].type.name == "SENT"
        assert (by_index[1,].type.name, by_index[1,].enhanced_code) == ("FAILED", "5.4.4")
        assert [record.accepted is not None for record in bench.records] == [True, False]


@pytest.mark.parametrize("uid", [None, "another"])
async def test_mail_of_an_account_that_is_gone_fails(uid: str | None) -> None:
    async with delivery_bench() as bench:
        if uid is not None:
            bench.config.route_to(A)
        await bench.submit(envelope=bench.envelope(account_uid="former"))
        (event,) = await bench.events_come(1)
        assert (event.type.name, event.enhanced_code) == ("FAILED", "5.7.1")


@pytest.mark.parametrize(
    "denials",
    [
        Denials(1, accounts={ACCOUNT: 0}),
        Denials(1, credentials={f"{ACCOUNT}/smtpCredentials/app": 0}),
        Denials(1, providers={A: 0}),
    ],
)
async def test_denied_mail_waits_without_an_attempt_until_denials_change(denials: Denials) -> None:
    async with next_hop() as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        bench.config.denials = denials
        bench.engine.denials_changed()
        await bench.submit()
        await bench.until(lambda: bench.engine._scheduler.is_idle and bench.engine._settler.pending_count == 0)
        assert await waiting(bench) == [State.QUEUED]
        assert (hop.connections, bench.events) == (0, [])
        bench.config.denials = Denials(2)
        bench.engine.denials_changed()
        (event,) = await bench.events_come(1)
        assert (event.type.name, event.attempt) == ("SENT", 1)


async def test_what_a_credential_submitted_before_it_was_revoked_goes_on() -> None:
    later = Behaviour(mail=lambda _: b"451 4.3.0 later\r\n")
    async with next_hop(later) as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        before = bench.envelope()
        await bench.submit(envelope=before)
        await bench.events_come(1)
        bench.clock.advance(1.0)
        since_ms = bench.clock.wall_ms()
        bench.config.denials = Denials(
            1, credentials={before.credential: 0}, credentials_since={before.credential: since_ms}
        )
        bench.engine.denials_changed()
        await bench.submit()
        later.mail = lambda _: b"250 ok\r\n"
        await bench.retry()
        await bench.events_come(2)
        assert (bench.types(), len(hop.messages)) == (["DEFERRED", "SENT"], 1)
        assert await waiting(bench) == [State.QUEUED]


async def test_a_revocation_does_not_cut_what_was_submitted_before() -> None:
    async with next_hop(Behaviour(data=STALL)) as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        envelope = await bench.submit()
        await hop.stalled.wait()
        since_ms = bench.clock.wall_ms() + 1
        bench.config.denials = Denials(
            1, credentials={envelope.credential: 0}, credentials_since={envelope.credential: since_ms}
        )
        bench.engine.denials_changed()
        assert bench.engine.counters.put_back == 0
        assert bench.engine.held()["transactions"] == 1


async def test_a_denial_between_the_dial_and_mail_stops_the_attempt() -> None:
    async with next_hop() as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        await bench.submit()
        bench.config.denials = Denials(1, accounts={ACCOUNT: 0})
        await bench.until(lambda: bench.engine.counters.put_back == 1)
        assert not any(command.startswith("MAIL") for command in hop.commands)
        assert bench.events == []


@pytest.mark.parametrize("denials", EVERY_KIND, ids=["account", "provider", "credential", "destination"])
async def test_a_denial_cuts_a_transaction_whose_dot_has_not_left(denials: Denials) -> None:
    async with next_hop(Behaviour(data=STALL)) as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        await bench.submit()
        await hop.stalled.wait()
        bench.config.denials = denials
        # A worker confirms the denials when this has returned.
        bench.engine.denials_changed()
        await bench.until(lambda: bench.engine.counters.put_back == 1)
        assert (hop.messages, bench.events) == ([], [])


async def test_a_message_goes_to_its_other_recipients_while_one_destination_is_denied() -> None:
    async with next_hop() as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        bench.config.denials = Denials(1, destinations={f"{ACCOUNT}/destinations/*.example.net": 0})
        await bench.submit("a@example.net", "b@mx.example.net", "c@example.org")
        (taken,) = await hop.took(1)
        assert taken.recipients == ["a@example.net", "c@example.org"]
        # Nobody looks again before somebody resumes it, and mail behind it is not held up.
        await bench.submit("d@mx.example.net")
        await bench.submit("e@example.net")
        assert [one.recipients for one in await hop.took(2)][1:] == [["e@example.net"]]
        await bench.until(lambda: bench.engine._scheduler.is_idle and bench.engine._settler.pending_count == 0)
        assert await waiting(bench) == [State.QUEUED, State.QUEUED]

        bench.config.denials = Denials(2)
        bench.engine.denials_changed()
        taken_now = await hop.took(4)
        assert sorted(one.recipients[0] for one in taken_now[2:]) == ["b@mx.example.net", "d@mx.example.net"]
        await bench.events_come(4)
        # None of this was an attempt.
        assert {event.attempt for event in bench.events} == {1}


async def test_what_looks_again_at_a_denied_destination_remembers_it_once() -> None:
    async with next_hop() as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        bench.config.denials = Denials(1, destinations={"destinations/example.net": 0})
        await bench.submit("a@example.net", "b@example.net")
        for _ in range(3):
            await bench.until(lambda: bench.engine._scheduler.is_idle and bench.engine._settler.pending_count == 0)
            await bench.retry(600)
        await bench.until(lambda: bench.engine._scheduler.is_idle and bench.engine._settler.pending_count == 0)
        assert [len(rows) for rows in bench.engine._denied.values()] == [2]
        assert bench.engine._denied_count == 2


async def test_recipients_whose_destination_is_denied_before_mail_step_aside_and_the_others_go() -> None:
    async with next_hop() as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        await bench.submit("a@example.net", "b@example.org")
        bench.config.denials = Denials(1, destinations={"destinations/example.net": 0})
        (taken,) = await hop.took(1)
        assert taken.recipients == ["b@example.org"]
        assert bench.engine.counters.put_back == 1
        bench.config.denials = Denials(2)
        bench.engine.denials_changed()
        assert (await hop.took(2))[1].recipients == ["a@example.net"]
        await bench.events_come(2)
        assert [(event.attempt, event.indexes) for event in bench.events] == [(1, (1,)), (1, (0,))]
        assert await bench.spool.keys() == []


@pytest.mark.parametrize("denials", EVERY_KIND, ids=["account", "provider", "credential", "destination"])
async def test_after_a_denial_is_in_force_no_dot_leaves_and_all_goes_on_when_it_is_lifted(denials: Denials) -> None:
    behaviour = Behaviour(data=STALL)
    async with next_hop(behaviour) as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port, max_connections=2)
        bench.config.route_to(A)
        # Two before their dot, two that wait for a connection; one comes later.
        for number in range(4):
            await bench.submit(f"{number}@example.net")
        await bench.until(lambda: hop.commands.count("DATA") == 2)
        behaviour.data = b"354 go\r\n"
        bench.config.denials = denials
        bench.engine.denials_changed()
        # From here on the worker has confirmed them.
        await bench.submit("4@example.net")
        await bench.until(lambda: not bench.engine.pools.busy_count and bench.engine.counters.put_back >= 2)
        await bench.until(lambda: bench.engine._scheduler.is_idle and bench.engine._settler.pending_count == 0)
        await bench.retry(3_600.0)
        await bench.until(lambda: bench.engine._scheduler.is_idle and bench.engine._settler.pending_count == 0)
        assert await come_to_wait(bench, 5) == [State.QUEUED] * 5
        assert (hop.messages, bench.events) == ([], [])

        bench.config.denials = Denials(2)
        bench.engine.denials_changed()
        await bench.events_come(5)
        assert sorted(taken.recipients[0][0] for taken in hop.messages) == ["0", "1", "2", "3", "4"]
        assert {event.attempt for event in bench.events} == {1}
        assert await bench.spool.keys() == []


async def test_a_changed_provider_is_used_by_the_next_message() -> None:
    async with next_hop() as old, next_hop() as new, delivery_bench() as bench:
        bench.config.add_provider(A, old.port)
        bench.config.route_to(A)
        await bench.submit()
        await bench.events_come(1)
        bench.config.add_provider(A, new.port)
        bench.engine.config_changed()
        await bench.submit()
        await bench.events_come(2)
        assert (len(old.messages), len(new.messages)) == (1, 1)


async def test_a_changed_provider_ends_idle_connections_at_once_and_busy_ones_after_their_message() -> None:
    async with next_hop() as old, next_hop() as new, delivery_bench() as bench:
        bench.config.add_provider(A, old.port, max_connections=1)
        bench.config.route_to(A)

        def change_then_accept(_: int) -> bytes:
            bench.config.add_provider(A, new.port, max_connections=1)
            bench.engine.config_changed()
            return b"250 ok\r\n"

        old.behaviour.final = change_then_accept
        await bench.submit()
        await bench.submit()
        await bench.events_come(2)
        assert (len(old.messages), len(new.messages)) == (1, 1)
        await bench.until(lambda: "QUIT" in old.commands)
        bench.config.add_provider(A, old.port)
        bench.engine.config_changed()
        await bench.until(lambda: "QUIT" in new.commands)


async def test_a_queued_message_that_is_read_back_at_once_is_told_once() -> None:
    async with next_hop() as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        envelope = bench.envelope()
        row = RecipientRow(0, "b@example.net", State.QUEUED, 0, bench.clock.wall_ms(), 0, KEY_A)
        await bench.spool.accept(envelope, CONTENT, [row])
        bench.engine.queued(envelope, [row])
        await bench.events_come(1)
        bench.clock.advance(1.0)
        bench.engine._reporter.look()
        assert [record.accepted is envelope for record in bench.records] == [True]


async def test_a_message_read_back_while_its_record_is_on_its_way_is_told_once() -> None:
    async with delivery_bench(start=False) as bench:
        bench.config.route_to(A, recipients=("@nobody.test",))
        envelope = bench.envelope()
        row = RecipientRow(0, "b@example.net", State.QUEUED, 0, bench.clock.wall_ms(), 0, KEY_A)
        await bench.spool.accept(envelope, CONTENT, [row])
        stored = await bench.spool.load(envelope.message_id)
        assert stored is not None
        bench.engine.queued(envelope, [row])
        bench.clock.advance(1.0)
        bench.engine._reporter.look()
        bench.engine.take(stored, [row])
        assert [record.accepted is not None for record in bench.records] == [True, False]
        assert bench.types() == ["FAILED"]


async def test_a_key_whose_provider_left_the_rules_is_routed_anew() -> None:
    refusing = Behaviour(mail=lambda _: b"451 later\r\n")
    async with next_hop(refusing) as first, next_hop() as second, delivery_bench() as bench:
        bench.config.add_provider(A, first.port)
        bench.config.add_provider(B, second.port)
        bench.config.route_to(A)
        await bench.submit()
        await bench.events_come(1)
        del bench.config.providers[A]
        bench.config.route_to(B)
        bench.engine.config_changed()
        await bench.retry()
        await bench.events_come(2)
        assert (bench.events[1].provider, len(second.messages)) == (B, 1)


async def test_a_silent_next_hop_is_left_when_its_timer_runs_out() -> None:
    async with next_hop(Behaviour(final=lambda _: STALL)) as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        await bench.submit()
        await hop.stalled.wait()
        bench.clock.advance(599.0)
        bench.engine._deadlines.sweep()
        assert bench.events == []
        bench.clock.advance(2.0)
        bench.engine._deadlines.sweep()
        (event,) = await bench.events_come(1)
        assert (event.type.name, event.reply_text) == ("UNCERTAIN", "timeout in CONTENT")


async def test_stop_lets_a_transaction_finish_and_puts_back_what_had_not_begun() -> None:
    async with next_hop(Behaviour(final=lambda _: STALL)) as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port, max_connections=1)
        bench.config.route_to(A)
        await bench.submit()
        await hop.stalled.wait()
        for _ in range(3):
            await bench.submit()
        await bench.engine.stop(0.01)
        assert bench.types() == ["UNCERTAIN"]
        assert sorted(await waiting(bench)) == sorted([State.QUEUED] * 3 + [State.DEFERRED])
        assert bench.engine.counters.window_bytes == 0
        assert {record.message_id for record in bench.records if record.accepted} == {
            record.message_id for record in bench.records
        }


async def test_a_dial_that_our_own_end_cuts_says_nothing_of_the_next_hop() -> None:
    async with next_hop(Behaviour(greeting=STALL)) as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        await bench.submit()
        await hop.stalled.wait()
        await bench.engine.stop(0.01)
        assert bench.engine.counters.throttled == 0
        assert await waiting(bench) == [State.QUEUED]


async def test_haste_ends_a_stop_that_waits() -> None:
    async with next_hop(Behaviour(final=lambda _: STALL)) as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        bench.engine.hurry()
        await bench.submit()
        await hop.stalled.wait()
        stopping = asyncio.create_task(bench.engine.stop(3_600.0))
        await bench.until(lambda: bench.engine._grace is not None)
        bench.engine.hurry()
        async with asyncio.timeout(20):
            await stopping
        assert bench.types() == ["UNCERTAIN"]


async def test_a_forbidden_address_is_never_dialled() -> None:
    async with next_hop() as hop, delivery_bench(allowed=()) as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        await bench.submit()
        (event,) = await bench.events_come(1)
        assert event.type.name == "DEFERRED"
        assert hop.connections == 0


@pytest.mark.parametrize(
    "text", [b"250 \0\xff\xfe\r\n", b"250 " + b"x" * 9_000 + b"\r\n", b"250-a\r\n250 \x1b[31m\r\n"]
)
async def test_whatever_the_remote_says_the_outcome_is_stored_once(text: bytes) -> None:
    async with next_hop(Behaviour(final=lambda _: text)) as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        await bench.submit()
        (event,) = await bench.events_come(1)
        assert event.type.name == "SENT"
        assert event.reply_text.isprintable()
        assert len(hop.messages) == 1


async def test_mail_that_a_target_cannot_take_goes_to_the_next_one() -> None:
    content = "Subject: ü\r\n\r\n".encode()
    async with next_hop(Behaviour(capabilities=())) as plain, next_hop() as able, delivery_bench() as bench:
        bench.config.add_provider(A, plain.port)
        bench.config.add_provider(B, able.port)
        bench.config.route_to(A, B)
        envelope = bench.envelope(content, smtputf8=True, body_8bit=True)
        await bench.submit(content=content, envelope=envelope)
        (event,) = await bench.events_come(1)
        assert (event.type.name, event.provider) == ("SENT", B)
        bench.config.route_to(A)
        await bench.submit(content=content, envelope=bench.envelope(content, smtputf8=True))
        await bench.events_come(2)
        assert (bench.types()[1], bench.events[1].enhanced_code) == ("FAILED", "5.6.7")


async def test_without_any_configuration_nothing_fails_and_nothing_is_sent() -> None:
    async with next_hop() as hop, delivery_bench() as bench:
        bench.config.loaded = False
        await bench.submit()
        await bench.until(lambda: bench.engine._settler.pending_count == 0)
        await bench.until(lambda: bench.engine._scheduler.is_idle)
        assert await waiting(bench) == [State.QUEUED]
        assert bench.events == []
        bench.config.loaded = True
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)
        bench.engine.config_changed()
        (event,) = await bench.events_come(1)
        assert event.type.name == "SENT"


async def test_an_error_of_ours_in_an_outcome_ends_the_engine_instead_of_leaving_mail_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with next_hop() as hop, delivery_bench() as bench:
        bench.config.add_provider(A, hop.port)
        bench.config.route_to(A)

        def broken(*_: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(bench.engine._dispatcher, "_conclude", broken)
        await bench.submit()
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(asyncio.shield(bench.engine.failed), 10)


async def test_one_worker_never_opens_more_connections_than_its_limit_and_everybody_is_served() -> None:
    async with next_hop() as first, next_hop() as second, delivery_bench() as bench:
        bench.engine.pools._connection_limit = 2
        bench.config.add_provider(A, first.port)
        bench.config.add_provider(B, second.port)
        peak = 0
        for number in range(20):
            bench.config.route_to(A if number % 2 else B)
            await bench.submit()
            peak = max(peak, bench.engine.counters.connections_now)
        await bench.events_come(20)
        assert peak <= 2
        assert (len(first.messages), len(second.messages)) == (10, 10)
