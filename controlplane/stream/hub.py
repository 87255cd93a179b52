"""Who is connected to this process, and the way news reaches them: one latest-wins slot per node, no queue.

Contract. `publish_*` puts the newest state into every session that it concerns and wakes its driver;
nothing waits and nothing is sent here. A newer stream of a node closes the older one. What was published
last is remembered and handed to streams that open later.

    attach → slot is the node's; an older slot gets Close      detach → gone, unless a newer one took its place
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from controlplane.ports_fleet import DenialSet, PoolConfig, SpoolCommand, SpoolStatus
from controlplane.stream.cache import ConfigCache
from controlplane.stream.session import Action, CloseCode, Directive, Session


@dataclass(slots=True, eq=False)
class Slot:
    """A node's open stream. `wake` tells the driver to pull the session's outputs; `stream` is empty before Hello.

    `spools` is what is believed of them, `refused_spools` those of which the node knows that it must not send, and
    `let_send` those that it was let send from on this stream: what it says of holding them back is older than that.
    `judgement_count` tells who reads whose spools these are that somebody else has judged them meanwhile.
    `told_to_drain`: what it knows of that.
    """

    node_id: str
    pool: str
    certificate_serial: str
    session: Session
    wake: Callable[[], None]
    stream: str = ""
    spools: Mapping[str, SpoolStatus] = field(default_factory=dict)
    refused_spools: frozenset[str] = frozenset()
    let_send: frozenset[str] = frozenset()
    judgement_count: int = 0
    told_to_drain: bool = False

    def believed(self, spools: Iterable[SpoolStatus]) -> list[SpoolStatus]:
        """The node's words, but for those that were overtaken by ours."""
        return [status._replace(refused=status.refused and status.spool not in self.let_send) for status in spools]


class TooManyStreamsError(Exception):
    """This process holds as many streams as it may."""


class Hub:
    """All open streams of this process."""

    def __init__(self, max_streams: int) -> None:
        self.cache = ConfigCache()
        self._max_streams = max_streams
        self._slots: dict[str, Slot] = {}
        self._denials: DenialSet | None = None
        self._draining = False
        self._loaded = False

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def slots(self) -> list[Slot]:
        """The streams that are open now."""
        return list(self._slots.values())

    def attach(self, slot: Slot) -> None:
        """A node's stream opens; TooManyStreamsError at the limit."""
        older = self._slots.get(slot.node_id)
        if older is None and len(self._slots) >= self._max_streams:
            raise TooManyStreamsError
        if older is not None:
            close(older, CloseCode.ABORTED, "a newer stream of this node took over")
        self._slots[slot.node_id] = slot
        if self._loaded:
            slot.session.config_changed(self.cache.get(slot.pool))
        if self._denials is not None:
            slot.session.denials_changed(self._denials)
        if self._draining:
            self._ask_to_reconnect(slot)

    def detach(self, slot: Slot) -> None:
        """A stream ended."""
        if self._slots.get(slot.node_id) is slot:
            del self._slots[slot.node_id]

    def publish_config(self, configs: Iterable[PoolConfig]) -> None:
        """Pools have a new configuration. Before the first call nobody is told anything: we know nothing yet."""
        changed = {config.pool for config in configs}
        for slot in self.slots:
            if slot.pool in changed or not self._loaded:
                slot.session.config_changed(self.cache.get(slot.pool))
                slot.wake()
        self._loaded = True

    def move(self, slot: Slot, pool: str) -> None:
        """The node belongs to another pool now."""
        slot.pool = pool
        slot.session.config_changed(self.cache.get(pool))
        slot.wake()

    def take_spools(self, slot: Slot, spools: Iterable[SpoolStatus]) -> None:
        """The node said this of its spools: what it does is what it knows, whatever it was told."""
        said = list(spools)
        slot.spools = {status.spool: status for status in slot.believed(said)}
        slot.refused_spools = frozenset(status.spool for status in said if status.refused)

    def refuse_spools(self, slot: Slot, spools: frozenset[str]) -> None:
        """From exactly these spools of the node nothing may be sent."""
        slot.judgement_count += 1
        for spool in spools - slot.refused_spools:
            slot.session.direct(Directive(Action.REFUSE_SPOOL, spool))
        for spool in slot.refused_spools - spools:
            slot.session.direct(Directive(Action.ACCEPT_SPOOL, spool))
        accepted = slot.refused_spools - spools
        slot.let_send = (slot.let_send | accepted) - spools
        slot.refused_spools = spools
        slot.spools = {status.spool: status for status in slot.believed(slot.spools.values())}
        slot.wake()

    def drain_node(self, slot: Slot, *, wanted: bool) -> None:
        """Whether the node shall drain; said when that is not what it knows."""
        if slot.told_to_drain != wanted:
            slot.session.direct(Directive(Action.DRAIN if wanted else Action.RESUME))
            slot.told_to_drain = wanted
            slot.wake()

    def publish_denials(self, denials: DenialSet) -> None:
        """The denials are these now."""
        self._denials = denials
        for slot in self.slots:
            slot.session.denials_changed(denials)
            slot.wake()

    def publish_commands(self, by_node: Mapping[str, Sequence[SpoolCommand]]) -> None:
        """For each connected node every command without result; a node that is missing has none."""
        for slot in self.slots:
            slot.session.commands_changed(by_node.get(slot.node_id, ()))
            slot.wake()

    def tick(self, slot: Slot) -> None:
        """A stream's minute is over."""
        slot.session.tick()
        slot.wake()

    def drain(self) -> None:
        """Ask every node, and those that still come, to connect elsewhere; their streams end."""
        self._draining = True
        for slot in self.slots:
            self._ask_to_reconnect(slot)

    def _ask_to_reconnect(self, slot: Slot) -> None:
        slot.session.direct(Directive(Action.RECONNECT))
        close(slot, CloseCode.OK, "draining")


def close(slot: Slot, code: CloseCode, text: str) -> None:
    """End one stream."""
    slot.session.close(code, text)
    slot.wake()
