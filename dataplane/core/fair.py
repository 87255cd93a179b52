"""Whose turn it is among accounts that wait for the same thing, by weighted deficit round robin.

Deficit round robin is due to Shreedhar and Varghese ("Efficient fair queueing using deficit round robin", SIGCOMM
1995): flows that wait stand in a ring; each visit adds a quantum to what a flow may spend, it is served while that
lasts, and what it saved is lost when it has nothing left to send. The quantum is QUANTUM times the weight of the flow.
Sharing of a window follows Choudhury and Hahne ("Dynamic queue length thresholds for shared-memory packet switches",
IEEE/ACM Transactions on Networking 1998): one holds at most a multiple of what is still free.

Costs are whole numbers from 1: `message_cost` counts recipients, which is what providers count and a small transaction
takes, and one more for each 64 KiB. So a usual message costs a quantum: it waits behind at most one message of each
other account of weight 1, however many of them wait.

    FairLine    messages whose cost is known; a flow has two lanes that take turns (accepted just now, read back)
    FairTurns   turns whose cost is known afterwards: a flow goes into debt and sits out the rounds that it owes
    FlowTurns   the same for flows that consist of several names: the turns of a flow go to its highest priority

Priorities order what waits within a flow; no priority moves a flow before another one.

Pure; time is O(1) for each message of a quantum (a round that finds nobody able to spend is skipped to the next that
does, in one pass over the flows). Nothing here fails.
"""

from __future__ import annotations

from bisect import insort_left
from collections import deque
from operator import itemgetter
from typing import Generic, TypeVar

QUANTUM = 1
BLOCK_BYTES = 65_536
SHARE = 4
"""How many times what is free one may hold: alone at most four fifths of a window, so that a fifth is left."""

_priority = itemgetter(0)

Item = TypeVar("Item")


def message_cost(size_bytes: int, recipient_count: int) -> int:
    """Return what sending a message to that many recipients at once costs."""
    return recipient_count + size_bytes // BLOCK_BYTES


def may_hold(held: int, wanted: int, used: int, capacity: int) -> bool:
    """Whether one that holds `held` of a window may have `wanted` more, when `used` of its `capacity` is taken."""
    free = capacity - used
    return wanted <= free and held + wanted <= SHARE * free


_Waiting = tuple[int, int, Item]
"""Cost, priority and the item."""


class _Flow(Generic[Item]):
    """What waits of one name. `budget` is what it may still spend in this visit; `lane` is whose turn it is."""

    __slots__ = ("budget", "lane", "lanes", "name", "weight")

    def __init__(self, name: str) -> None:
        self.name = name
        self.weight = 1
        self.budget = 0
        self.lane = 0
        self.lanes: tuple[deque[_Waiting[Item]], deque[_Waiting[Item]]] = (deque(), deque())

    @property
    def next_cost(self) -> int:
        """What the next item costs; there is one."""
        return self.lanes[self.next_lane()][0][0]

    def next_lane(self) -> int:
        """Where the next item lies: where the priority is higher, else the lane whose turn it is; there is one."""
        lane = self.lane
        other = self.lanes[lane ^ 1]
        if not other:
            return lane
        mine = self.lanes[lane]
        return lane if mine and other[0][1] <= mine[0][1] else lane ^ 1


class FairLine(Generic[Item]):
    """Items that wait, by flow and lane (0 or 1). `len` is all of them, `counts` those of each lane."""

    __slots__ = ("_flows", "_ring", "counts")

    def __init__(self) -> None:
        self._flows: dict[str, _Flow[Item]] = {}
        self._ring: deque[_Flow[Item]] = deque()
        self.counts = [0, 0]

    def __len__(self) -> int:
        return self.counts[0] + self.counts[1]

    def count(self, name: str, lane: int) -> int:
        """How many items of this flow wait in the lane."""
        flow = self._flows.get(name)
        return len(flow.lanes[lane]) if flow is not None else 0

    def put(self, name: str, weight: int, lane: int, cost: int, item: Item, priority: int = 0) -> None:
        """Add an item behind those of its priority; the weight counts from now on for all of the flow."""
        flow = self._flows.get(name)
        if flow is None:
            flow = self._flows[name] = _Flow(name)
            flow.budget = QUANTUM * weight
            flow.lane = lane
            self._ring.append(flow)
        flow.weight = weight
        items = flow.lanes[lane]
        if not items or items[-1][1] >= priority:
            items.append((cost, priority, item))
        else:
            place = next(place for place, waiting in enumerate(items) if waiting[1] < priority)
            items.insert(place, (cost, priority, item))
        self.counts[lane] += 1

    def take(self) -> Item | None:
        """Remove and return the item whose turn it is; None when there is none."""
        ring = self._ring
        passed = 0
        while ring:
            flow = ring[0]
            lane = flow.next_lane()
            items = flow.lanes[lane]
            cost = items[0][0]
            if cost <= flow.budget:
                flow.budget -= cost
                flow.lane = lane ^ 1
                self.counts[lane] -= 1
                item = items.popleft()[2]
                if not items and not flow.lanes[lane ^ 1]:
                    ring.popleft()
                    del self._flows[flow.name]
                return item
            flow.budget += QUANTUM * flow.weight
            ring.rotate(-1)
            passed += 1
            if passed == len(ring):
                self._skip_rounds()
                passed = 0
        return None

    def drain(self) -> list[Item]:
        """Remove and return everything, those just accepted first."""
        items = [item for lane in (0, 1) for flow in self._ring for _, _, item in flow.lanes[lane]]
        self._flows.clear()
        self._ring.clear()
        self.counts = [0, 0]
        return items

    def _skip_rounds(self) -> None:
        """Nobody could spend in a whole round: give at once what the rounds would bring until somebody can."""
        rounds = min(-(-(flow.next_cost - flow.budget) // (QUANTUM * flow.weight)) for flow in self._ring)
        for flow in self._ring:
            flow.budget += max(0, rounds) * QUANTUM * flow.weight


class FairTurns:
    """Names that want turns. `take` lends one out; `give_back` or `leave` ends its turn."""

    __slots__ = ("_accounts", "_ring")

    def __init__(self) -> None:
        self._ring: deque[str] = deque()
        self._accounts: dict[str, list[int]] = {}  # weight and balance of each name, lent ones included

    def __len__(self) -> int:
        return len(self._accounts)

    def __contains__(self, name: str) -> bool:
        return name in self._accounts

    @property
    def waiting_count(self) -> int:
        """Names that wait for a turn and are not lent."""
        return len(self._ring)

    def join(self, name: str, weight: int) -> None:
        """Want turns; without effect for a name that does."""
        if name not in self._accounts:
            self._accounts[name] = [weight, 0]
            self._ring.append(name)

    def take(self, quantum: int) -> tuple[str, int]:
        """Lend the name whose turn it is, and say what it may spend; a name must wait. `quantum` is what weight 1 gets.

        The last message of a turn may cost more than is left.
        """
        ring = self._ring
        passed = 0
        while True:
            name = ring[0]
            account = self._accounts[name]
            if account[1] <= 0:
                account[1] += quantum * account[0]
            if account[1] > 0:
                ring.popleft()
                return name, account[1]
            ring.rotate(-1)
            passed += 1
            if passed == len(ring):
                self._skip_rounds(quantum)
                passed = 0

    def give_back(self, name: str, spent: int, weight: int) -> None:
        """End a turn of a name that wants another one; with something left to spend it comes first."""
        account = self._accounts[name]
        account[0] = weight
        account[1] -= spent
        if account[1] > 0:
            self._ring.appendleft(name)
        else:
            self._ring.append(name)

    def leave(self, name: str) -> None:
        """End the turn of a name that wants no other one: what it saved or owes is forgotten."""
        del self._accounts[name]

    def weight(self, name: str) -> int:
        """The weight of a name that wants turns."""
        return self._accounts[name][0]

    def _skip_rounds(self, quantum: int) -> None:
        owed = [self._accounts[name] for name in self._ring]
        rounds = min(-balance // (quantum * weight) for weight, balance in owed)
        for account in owed:
            account[1] += rounds * quantum * account[0]


class FlowTurns:
    """`FairTurns` for names that belong to flows: flows take turns, and of a flow the name of the highest priority.

    A flow has one turn at a time, so that what comes later with a higher priority waits for no more than that. Its
    names of the same priority take turns one after the other.
    """

    __slots__ = ("_flows", "_turns", "_waiting")

    def __init__(self) -> None:
        self._turns = FairTurns()
        self._flows: dict[str, tuple[str, int]] = {}  # flow and priority of each name, lent ones included
        self._waiting: dict[str, list[tuple[int, str]]] = {}  # the names of a flow that are not lent, next one last

    def __len__(self) -> int:
        return len(self._turns)

    def __contains__(self, name: str) -> bool:
        return name in self._flows

    @property
    def waiting_count(self) -> int:
        """Flows that wait for a turn and are not lent."""
        return self._turns.waiting_count

    def join(self, name: str, flow: str, priority: int, weight: int) -> None:
        """Want turns; without effect for a name that does."""
        if name not in self._flows:
            self._flows[name] = (flow, priority)
            insort_left(self._waiting.setdefault(flow, []), (priority, name), key=_priority)
            self._turns.join(flow, weight)

    def take(self, quantum: int) -> tuple[str, int]:
        """Lend a name of the flow whose turn it is, and say what it may spend; a flow must wait."""
        flow, budget = self._turns.take(quantum)
        return self._waiting[flow].pop()[1], budget

    def give_back(self, name: str, spent: int, weight: int) -> None:
        """End a turn of a name that wants another one."""
        flow, priority = self._flows[name]
        insort_left(self._waiting[flow], (priority, name), key=_priority)
        self._turns.give_back(flow, spent, weight)

    def leave(self, name: str) -> None:
        """End the turn of a name that wants no other one; with the last one of a flow its balance is forgotten."""
        flow, _ = self._flows.pop(name)
        if self._waiting[flow]:
            self._turns.give_back(flow, 0, self._turns.weight(flow))
        else:
            del self._waiting[flow]
            self._turns.leave(flow)
