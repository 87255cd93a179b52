"""The settings of a worker that change while it runs: caps of connections, timers of sessions, the log's level.

Contract. `use` takes the node's own settings anew, `apply` also what the control plane says of the pool, which wins
where it says something. Nobody who is connected is sent away. A cap that the descriptors have no room for is lowered,
with a warning, so that the worker refuses connections (421) before the system refuses descriptors.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from dataplane.core.config import NodeSettings
from dataplane.event_log import LEVELS
from dataplane.ingress.admission import Admission
from dataplane.ingress.protocol import Timeouts
from dataplane.ports import EventLog
from dataplane.settings import IngressSettings, Settings
from dataplane.telemetry import set_log_level


class NodeSettingsHolder(Protocol):
    """Who knows what the control plane says; a ConfigView."""

    @property
    def settings(self) -> NodeSettings:
        """Settings of the node's pool."""
        ...


class TimeoutsHolder(Protocol):
    """Who measures by the timers; the ingress's Service."""

    timeouts: Timeouts


class Bounds(NamedTuple):
    """What is in force."""

    connections: int
    connections_per_address: int
    log_level: str
    timeouts: Timeouts


class LiveSettings:
    """See the module. `room` is how many connections the descriptors suffice for."""

    def __init__(self, settings: Settings, view: NodeSettingsHolder, room: int, log: EventLog) -> None:
        self._settings = settings
        self._view = view
        self._room = room
        self._log = log
        self._in_force: Bounds | None = None
        self._targets: tuple[Admission, TimeoutsHolder] | None = None

    @property
    def settings(self) -> Settings:
        """The node's own, as last taken."""
        return self._settings

    def attach(self, admission: Admission, service: TimeoutsHolder) -> None:
        """Say who is to be told; tells them at once."""
        self._targets = admission, service
        self.apply()

    def use(self, settings: Settings) -> None:
        """Take the node's own settings."""
        self._settings = settings
        self.apply()

    def apply(self) -> None:
        """Put in force what now counts; the settings of the pool may have changed."""
        wished = wished_bounds(self._settings, self._view.settings)
        bounds = wished._replace(connections=min(wished.connections, self._room))
        if self._targets is None or bounds == self._in_force:
            return
        former = bounds if self._in_force is None else self._in_force
        self._in_force = bounds
        # At the more talkative of both levels, so that a change of the level does not hide that it was made.
        set_log_level(min(former.log_level, bounds.log_level, key=LEVELS.__getitem__))
        admission, service = self._targets
        admission.bound(bounds.connections, bounds.connections_per_address)
        service.timeouts = bounds.timeouts
        self._log.info(
            "bounds.in_force",
            connections=bounds.connections,
            connections_per_address=bounds.connections_per_address,
            log_level=bounds.log_level,
        )
        set_log_level(bounds.log_level)
        if bounds.connections < wished.connections:
            self._log.warning(
                "connections.lowered",
                connections=bounds.connections,
                wished=wished.connections,
                reason="more would need more descriptors than the system allows this process",
            )


def wished_bounds(settings: Settings, node: NodeSettings) -> Bounds:
    """Return what the settings of node and pool ask for together."""
    own = settings.ingress
    return Bounds(
        node.max_connections or own.connections,
        node.max_connections_per_address or own.connections_per_address,
        wished_log_level(settings, node),
        timeouts_of(own),
    )


def wished_log_level(settings: Settings, node: NodeSettings) -> str:
    """Return what to log from."""
    return node.log_level or settings.log_level


def timeouts_of(bounds: IngressSettings) -> Timeouts:
    """Return the timers of sessions."""
    return Timeouts(
        command_s=bounds.command_timeout_s,
        command_before_auth_s=bounds.command_before_auth_timeout_s,
        handshake_s=bounds.handshake_timeout_s,
        commit_s=bounds.commit_timeout_s,
        answer_delay_s=bounds.answer_delay_s,
        data_bytes_per_s=bounds.data_bytes_per_s,
    )
