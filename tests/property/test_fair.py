"""Shares of accounts that wait for the same thing, whatever they send."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from dataplane.core.fair import BLOCK_BYTES, FairLine, FairTurns, FlowTurns, may_hold, message_cost

COSTS = st.lists(st.integers(1, 60), min_size=1, max_size=8)


def spent_by_a_line(flows: list[tuple[int, list[int]]], rounds: int) -> list[int]:
    """Keep every flow backlogged with its costs, over and over; what each spends until the total is reached."""
    line: FairLine[tuple[int, int]] = FairLine()
    fed = [0] * len(flows)

    def feed(flow: int) -> None:
        weight, costs = flows[flow]
        cost = costs[fed[flow] % len(costs)]
        fed[flow] += 1
        line.put(f"flow-{flow}", weight, fed[flow] % 2, cost, (flow, cost))

    for flow in range(len(flows)):
        for _ in range(4):
            feed(flow)
    spent = [0] * len(flows)
    total = rounds * sum(weight for weight, _ in flows)
    while sum(spent) < total:
        taken = line.take()
        assert taken is not None
        flow, cost = taken
        spent[flow] += cost
        feed(flow)
    return spent


def assert_shares(weights: list[int], spent: list[int], slack: int) -> None:
    """What flows spent for each unit of their weight differs by no more than `slack`."""
    shares = [cost / weight for cost, weight in zip(spent, weights, strict=True)]
    assert max(shares) - min(shares) <= slack


@given(st.lists(st.tuples(st.integers(1, 10), COSTS), min_size=1, max_size=6))
def test_long_run_shares_of_a_line_follow_the_weights_whatever_messages_cost(
    flows: list[tuple[int, list[int]]],
) -> None:
    spent = spent_by_a_line(flows, 500)
    # The bound of Shreedhar and Varghese: a quantum and the largest message on either side, whatever the time.
    assert_shares([weight for weight, _ in flows], spent, 2 * (60 + 1))


@given(st.lists(st.tuples(st.integers(1, 10), COSTS), min_size=1, max_size=6), st.integers(1, 30))
def test_long_run_shares_of_turns_follow_the_weights_whatever_they_cost(
    flows: list[tuple[int, list[int]]], quantum: int
) -> None:
    turns = FairTurns()
    for flow, (weight, _) in enumerate(flows):
        turns.join(str(flow), weight)
    spent = [0] * len(flows)
    turn_counts = [0] * len(flows)
    while sum(spent) < 500 * sum(weight for weight, _ in flows):
        name, budget = turns.take(quantum)
        flow = int(name)
        costs = flows[flow][1]
        cost = 0
        while cost < budget:
            cost += costs[turn_counts[flow] % len(costs)]
            turn_counts[flow] += 1
        spent[flow] += cost
        turns.give_back(name, cost, flows[flow][0])
    assert_shares([weight for weight, _ in flows], spent, 2 * (60 + quantum))


@given(st.integers(1, 10), st.integers(1, 20), st.integers(1, 10))
def test_a_turn_that_is_cut_short_costs_no_share(heavy: int, quantum: int, room: int) -> None:
    turns = FairTurns()
    turns.join("heavy", heavy)
    turns.join("light", 1)
    spent: Counter[str] = Counter()
    while spent.total() < 400 * (heavy + 1):
        name, budget = turns.take(quantum)
        cost = min(budget, room)
        spent[name] += cost
        turns.give_back(name, cost, heavy if name == "heavy" else 1)
    assert_shares([heavy, 1], [spent["heavy"], spent["light"]], 2 * (quantum + 1))


@given(st.integers(1, 40), st.integers(1, 5))
def test_a_message_waits_behind_one_of_each_other_account_however_many_wait(others: int, depth: int) -> None:
    line: FairLine[str] = FairLine()
    for other in range(others):
        for _ in range(depth * 100):
            line.put(f"flood-{other}", 1, 0, 1, "flood")
    for _ in range(depth):
        line.take()
    line.put("small", 1, 0, 1, "small")
    before = 0
    while line.take() != "small":
        before += 1
    assert before <= others


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1), st.integers(1, 400)), max_size=200))
def test_a_line_gives_out_everything_once_and_each_lane_of_a_flow_in_order(puts: list[tuple[int, int, int]]) -> None:
    line: FairLine[tuple[int, int, int]] = FairLine()
    for number, (flow, lane, cost) in enumerate(puts):
        line.put(str(flow), 1 + flow, lane, cost, (flow, lane, number))
    assert (len(line), sum(line.counts)) == (len(puts), len(puts))
    taken = [item for _ in puts if (item := line.take()) is not None]
    assert line.take() is None
    assert sorted(number for _, _, number in taken) == list(range(len(puts)))
    for flow in range(4):
        for lane in (0, 1):
            order = [number for one, another, number in taken if (one, another) == (flow, lane)]
            assert order == sorted(order)
    assert (len(line), line.count("0", 0)) == (0, 0)


def test_lanes_of_a_flow_take_turns_and_neither_starves() -> None:
    line: FairLine[int] = FairLine()
    for _ in range(10):
        line.put("a", 1, 0, 1, 0)
        line.put("a", 1, 1, 1, 1)
    assert [line.take() for _ in range(20)] == [0, 1] * 10


def test_an_account_that_comes_back_has_no_saved_up_credit() -> None:
    line: FairLine[str] = FairLine()
    line.put("idle", 5, 0, 1, "idle")
    for _ in range(1_000):
        line.put("busy", 1, 0, 1, "busy")
    while line.take() != "idle":
        pass
    for _ in range(500):
        assert line.take() == "busy"
    for _ in range(100):
        line.put("idle", 1, 0, 1, "idle")
    taken = [line.take() for _ in range(50)]
    assert 24 <= taken.count("idle") <= 26


def test_turns_that_were_left_are_forgotten_with_debt_and_credit() -> None:
    turns = FairTurns()
    turns.join("a", 1)
    name, _ = turns.take(4)
    turns.give_back(name, 1_000, 1)
    assert turns.take(4) == ("a", 4)
    turns.leave("a")
    assert (len(turns), turns.waiting_count, "a" in turns) == (0, 0, False)
    turns.join("a", 1)
    turns.join("a", 9)
    assert turns.take(4) == ("a", 4)


def test_a_message_that_costs_many_rounds_is_found_in_one_pass() -> None:
    line: FairLine[int] = FairLine()
    for flow in range(1_000):
        line.put(str(flow), 1, 0, 1_000_000 + flow, flow)
    assert line.take() == 0
    assert line.take() == 1


def test_cost_counts_recipients_and_blocks() -> None:
    assert message_cost(4_096, 1) == 1
    assert message_cost(BLOCK_BYTES - 1, 100) == 100
    assert message_cost(25 * 1024 * 1024, 1) == 401


@given(st.integers(1, 1_000), st.integers(1, 50))
def test_one_that_takes_all_it_may_leaves_room_for_others(capacity: int, wanted: int) -> None:
    held = 0
    while may_hold(held, wanted, held, capacity):
        held += wanted
    assert held - wanted <= capacity * 4 / 5
    # Whoever comes then may have something, unless one piece alone is more than what is left.
    assert may_hold(0, wanted, held, capacity) == (wanted <= capacity - held)


def test_a_second_one_ends_with_as_much_as_the_first() -> None:
    first, second = 800, 0
    for _ in range(10_000):
        if first and (first > second):
            first -= 1
        if may_hold(second, 1, first + second, 1_000):
            second += 1
        if may_hold(first, 1, first + second, 1_000):
            first += 1
    assert abs(first - second) <= 5
    assert first + second <= 1_000


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(-9, 9)), max_size=100))
def test_of_a_flow_the_highest_priority_goes_first_and_flows_take_turns_all_the_same(
    puts: list[tuple[int, int, int]],
) -> None:
    line: FairLine[tuple[int, int, int, int]] = FairLine()
    plain: FairLine[int] = FairLine()
    for number, (flow, lane, priority) in enumerate(puts):
        line.put(str(flow), 1, lane, 1, (flow, lane, priority, number), priority)
        plain.put(str(flow), 1, lane, 1, flow)
    taken = [item for _ in puts if (item := line.take()) is not None]
    # Whose turn it is does not depend on any priority.
    assert [flow for flow, *_ in taken] == [plain.take() for _ in puts]
    for flow in range(3):
        mine = [item for item in taken if item[0] == flow]
        assert [priority for _, _, priority, _ in mine] == sorted((one[2] for one in mine), reverse=True)
        for lane in (0, 1):
            order = [(-priority, number) for _, another, priority, number in mine if another == lane]
            assert order == sorted(order)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-9, 9)), unique=True, min_size=1, max_size=20))
def test_a_flow_gives_its_turns_to_its_best_name_and_has_no_more_of_them_for_having_many(
    names: list[tuple[int, int]],
) -> None:
    turns = FlowTurns()
    for flow, priority in names:
        turns.join(f"{flow} {priority}", str(flow), priority, 1)
        turns.join(f"{flow} {priority}", str(flow), priority, 9)
    flows = {flow for flow, _ in names}
    assert (len(turns), turns.waiting_count) == (len(flows), len(flows))
    best = {flow: max(priority for one, priority in names if one == flow) for flow in flows}
    for _ in range(3):
        round_of = [turns.take(1)[0] for _ in flows]
        assert sorted(round_of) == sorted(f"{flow} {best[flow]}" for flow in flows)
        for name in round_of:
            turns.give_back(name, 1, 1)
    left = []
    while len(turns):
        name, _ = turns.take(1)
        left.append(name)
        turns.leave(name)
        assert name not in turns
    assert sorted(left) == sorted(f"{flow} {priority}" for flow, priority in names)
    for flow in flows:
        order = [int(name.split()[1]) for name in left if name.startswith(f"{flow} ")]
        assert order == sorted(order, reverse=True)


def test_names_of_a_flow_with_the_same_priority_take_turns() -> None:
    turns = FlowTurns()
    for name in "abc":
        turns.join(name, "flow", 0, 1)
    order = []
    for _ in range(9):
        name, _ = turns.take(1)
        order.append(name)
        turns.give_back(name, 1, 1)
    assert order == list("abcabcabc")
    turns.join("first", "flow", 1, 1)
    assert turns.take(1)[0] == "first"
