"""Nodes on their streams: who is let in, what is recorded of them, and how news from the database reaches them.

Contract. `admit` → `greet` → any number of `heartbeat` and `record` → `leave` is the life of a stream; the
adapter that carries messages calls them. `scan` is what the change feed runs: it reads what is new and puts
it into the hub. Both judge a node's spools, and one may be overtaken by the other while it reads: a judgement
counts only when none was made since its reading began, and is made anew otherwise. Everything raises
UnavailableError while PostgreSQL is away, and the next call finds out what was missed; nothing of a node that
was admitted is undone by that. `NotAdmittedError` tells why a node is not let in. After `look_anew` the next
scan reads everything: what it knew may be lost since.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta

from controlplane.domain.openings import is_old_copy
from controlplane.ports_fleet import (
    BundleVersion,
    ConfigReport,
    FleetRepository,
    NodeHealth,
    NodeHello,
    NodeRecord,
    NodeState,
    PoolConfig,
    SpoolCommand,
    SpoolOwner,
    SpoolStatus,
)
from controlplane.stream.hub import Hub, Slot, close
from controlplane.stream.session import DESTINATION_DENIALS, CloseCode, Hello, Session

# While no scan succeeds.
REMEMBERED = timedelta(seconds=30)
_CLOCKS_DIFFER_S = 3_600


class NotAdmittedError(Exception):
    """The node's certificate is not, or no longer, the node's."""


class FleetService:
    """See the module. `replica` names this process among its peers."""

    def __init__(self, repository: FleetRepository, hub: Hub, clock: Callable[[], datetime], replica: str) -> None:
        self._repository = repository
        self._hub = hub
        self._clock = clock
        self._replica = replica
        self._mark = 0
        self._anew = False
        self._denials_version = 0
        # Who calls, by certificate: as of when it is known.
        self._admitted: dict[tuple[str, str], tuple[datetime, NodeRecord]] = {}
        self._reported: dict[Slot, ConfigReport] = {}
        # Whose nodes shall drain.
        self._drains: dict[Slot, bool] = {}

    # --- a stream -------------------------------------------------------------------------------------------------

    async def check(self, node_id: str, certificate_serial: str) -> NodeRecord:
        """The node of a verified certificate; NotAdmittedError when it was revoked, replaced or deleted."""
        node = await self._repository.get_node(node_id)
        if node is None or not _is_good(node, certificate_serial):
            raise NotAdmittedError
        return node

    async def admitted(self, node_id: str, certificate_serial: str) -> NodeRecord:
        """As `check`, for calls that are too many to ask each time: what a scan found is good for REMEMBERED."""
        key, now = (node_id, certificate_serial), self._clock()
        known = self._admitted.get(key)
        if known is not None and now - known[0] < REMEMBERED:
            return known[1]
        self._admitted.pop(key, None)
        node = await self.check(*key)
        self._admitted[key] = (now, node)
        return node

    async def admit(self, node_id: str, certificate_serial: str, wake: Callable[[], None]) -> Slot:
        """Open the node's slot; NotAdmittedError, TooManyStreamsError. To be followed by `leave`, whatever happens."""
        node = await self.check(node_id, certificate_serial)
        slot = Slot(node_id, node.pool, certificate_serial, Session(f"nodes/{node_id}"), wake)
        self._drains[slot] = node.drains
        self._hub.attach(slot)
        return slot

    async def greet(self, slot: Slot, hello: Hello) -> None:
        """Take the node's Hello."""
        if hello.node == slot.session.node:
            stream = f"{self._replica}/{secrets.token_hex(8)}"
            now = self._clock()
            own = await self._repository.report_spools(slot.node_id, slot.believed(hello.spools), now)
            knows_destinations = DESTINATION_DENIALS in hello.features
            greeting = NodeHello(hello.boot_id, hello.software_version, knows_destinations)
            refused = await self._repository.open_stream(slot.node_id, stream, greeting, now)
            await self._outdo_denials(hello.denials_version, now)
            slot.stream = stream
            slot.session.receive_hello(hello, refused)
            slot.told_to_drain = hello.told_to_drain
            self._hub.drain_node(slot, wanted=self._drains.get(slot, False))
            self._hub.take_spools(slot, hello.spools)
            self._hub.refuse_spools(slot, refused_spools(slot.spools, own))
            await self._give_commands([slot])
        else:
            slot.session.receive_hello(hello, {})
        slot.wake()

    async def heartbeat(
        self, slot: Slot, health: NodeHealth, denials_version: int, spools: tuple[SpoolStatus, ...]
    ) -> None:
        """Take a StatusReport."""
        slot.session.receive_status(health.digest, denials_version)
        slot.wake()
        if slot.stream:
            if anew := slot.session.opened_anew(spools):
                # With the positions that the former incarnations reached.
                await self._give_commands([slot])
                slot.session.repeat_commands(anew)
                slot.wake()
            slot.told_to_drain = health.told_to_drain
            self._hub.drain_node(slot, wanted=self._drains.get(slot, False))
            now = self._clock()
            # The spools first: when it is known that no more mail comes, how much there is must be known, too.
            judgement_count = slot.judgement_count
            own = await self._repository.report_spools(slot.node_id, slot.believed(spools), now)
            await self._repository.report_health(slot.node_id, slot.stream, health, now)
            self._hub.take_spools(slot, spools)
            if slot.judgement_count == judgement_count:
                self._hub.refuse_spools(slot, refused_spools(slot.spools, own))
            else:
                await self._give_commands([slot])

    async def record(self, slot: Slot) -> None:
        """Write down how the node's configuration is, when that changed since the last call."""
        report = slot.session.report()
        if slot.stream and report != self._reported.get(slot):
            await self._repository.report_config(slot.node_id, slot.stream, report, self._clock())
            self._reported[slot] = report

    async def leave(self, slot: Slot) -> None:
        """The stream ended; never raises but UnavailableError, and the slot is gone in any case."""
        self._hub.detach(slot)
        self._reported.pop(slot, None)
        self._drains.pop(slot, None)
        if slot.stream:
            await self._repository.close_stream(slot.node_id, slot.stream, self._clock())

    # --- news -----------------------------------------------------------------------------------------------------

    def look_anew(self) -> None:
        """The database may be another one than before, that has lost what was committed last."""
        self._anew = True

    async def scan(self) -> None:
        """Read what changed and tell those whom it concerns. What must stop comes first."""
        await self._scan_admitted()
        await self._scan_denials()
        await self._scan_config()
        slots = [slot for slot in self._hub.slots if slot.stream]
        if slots:
            await self._scan_nodes(slots)
            await self._give_commands(slots)

    async def _scan_admitted(self) -> None:
        keys, now = list(self._admitted), self._clock()
        if not keys:
            return
        nodes = {node.node_id: node for node in await self._repository.get_nodes([node_id for node_id, _ in keys])}
        for key in keys:
            node = nodes.get(key[0])
            if node is not None and _is_good(node, key[1]):
                self._admitted[key] = (now, node)
            else:
                self._admitted.pop(key, None)

    async def _outdo_denials(self, held: int, now: datetime) -> None:
        """Where a node holds a newer set of denials than is stored, PostgreSQL was restored: make what is stored news.

        Versions follow the clock; what lies far ahead of it no control plane has told.
        """
        if held <= (now.timestamp() + _CLOCKS_DIFFER_S) * 1000 and await self._repository.denials_version() < held:
            await self._repository.move_denials(held)
            await self._scan_denials()

    async def _scan_denials(self) -> None:
        version = await self._repository.denials_version()
        if version < self._denials_version:
            # Lost: nodes take no set for news that has a lower version than theirs.
            await self._repository.move_denials(self._denials_version)
        if version != self._denials_version:
            denials = await self._repository.load_denials(self._clock())
            self._hub.publish_denials(denials)
            self._denials_version = denials.version

    async def _scan_config(self) -> None:
        anew, self._anew = self._anew, False
        try:
            await self._follow_config(anew=anew)
        except BaseException:
            self._anew |= anew
            raise

    async def _follow_config(self, *, anew: bool) -> None:
        listing = await self._repository.bundles_since(0 if anew else self._mark)
        pools = {pool: dict(changes) for pool, changes in listing.pools.items()}
        if anew:
            for pool, missing in self._hub.cache.missing_in(pools).items():
                pools.setdefault(pool, {}).update(missing)
        changed = []
        for pool, changes in pools.items():
            former = self._hub.cache.get(pool)
            config = await self._load(pool, changes)
            if config is not former:
                changed.append(config)
        self._hub.publish_config(changed)
        self._mark = listing.mark

    async def _load(self, pool: str, changes: Mapping[str, BundleVersion | None]) -> PoolConfig:
        names = self._hub.cache.merge(pool, changes)
        if not names and not any(version is None for version in changes.values()):
            return self._hub.cache.get(pool)
        # The keys before the bundles: what is sealed under a new key comes later than the key.
        bundles = await self._repository.load_bundles(pool, names)
        keys = await self._repository.load_pool_keys(pool)
        return self._hub.cache.install(pool, changes, bundles, keys)

    async def _scan_nodes(self, slots: list[Slot]) -> None:
        nodes = {node.node_id: node for node in await self._repository.get_nodes([slot.node_id for slot in slots])}
        for slot in slots:
            node = nodes.get(slot.node_id)
            if node is None or not _is_good(node, slot.certificate_serial):
                close(slot, CloseCode.UNAUTHENTICATED, "the node's certificate is refused")
            elif node.stream != slot.stream:
                close(slot, CloseCode.ABORTED, "a newer stream of this node took over")
            else:
                if node.pool != slot.pool:
                    self._hub.move(slot, node.pool)
                self._drains[slot] = node.drains
                self._hub.drain_node(slot, wanted=node.drains)

    async def _give_commands(self, slots: list[Slot]) -> None:
        # Before whose they are is read: what a node reports from now on may be registered after that.
        reported = {slot: slot.spools for slot in slots}
        judgement_counts = {slot: slot.judgement_count for slot in slots}
        spools = await self._repository.list_spools([slot.node_id for slot in slots])
        commands = await self._repository.open_commands([spool.spool for spool in spools])
        by_spool: dict[str, list[SpoolCommand]] = {}
        for command in commands:
            by_spool.setdefault(command.spool, []).append(command)
        by_node: dict[str, list[SpoolOwner]] = {}
        for spool in spools:
            by_node.setdefault(spool.node_id, []).append(spool)
        overtaken = [slot for slot in slots if slot.judgement_count != judgement_counts[slot]]
        for slot in slots:
            if slot in overtaken:
                continue
            own = by_node.get(slot.node_id, [])
            slot.session.commands_changed([command for one in own for command in by_spool.get(one.spool, [])])
            believed = {status.spool: status for status in slot.believed(reported[slot].values())}
            # What was reported meanwhile was judged then: nothing that is known here speaks for it.
            unseen = slot.refused_spools - believed.keys()
            self._hub.refuse_spools(slot, refused_spools(believed, own) | unseen)
        if overtaken:
            await self._give_commands(overtaken)


def refused_spools(reported: Mapping[str, SpoolStatus], own: Sequence[SpoolOwner]) -> frozenset[str]:
    """Of which of its spools a node must send nothing: what was refused, what it reported and is another's, and what
    waits to be let send and is an old copy, whatever its incarnation says.
    """
    owners = {owner.spool: owner for owner in own}
    refused = {owner.spool for owner in own if not owner.accepted}
    for spool, status in reported.items():
        owner = owners.get(spool)
        if owner is None or (status.refused and _is_old_copy(status, owner)):
            refused.add(spool)
    return frozenset(refused)


def _is_old_copy(status: SpoolStatus, owner: SpoolOwner) -> bool:
    return is_old_copy(owner.opening, owner.cursor, status.openings, status.last_record)


def _is_good(node: NodeRecord, certificate_serial: str) -> bool:
    return node.state is NodeState.ENROLLED and node.certificate_serial == certificate_serial
