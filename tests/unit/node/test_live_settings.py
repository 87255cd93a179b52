"""What changes while a worker runs: which of two settings counts, and that descriptors bound what may be asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dataplane import live_settings
from dataplane.core import replies
from dataplane.core.config import NodeSettings
from dataplane.ingress.admission import Admission
from dataplane.ingress.protocol import Timeouts
from dataplane.live_settings import LiveSettings, wished_bounds
from dataplane.settings import IngressSettings, ListenerSettings, Settings
from support.ingress import Log


class View:
    """A pool's settings."""

    def __init__(self, **values: Any) -> None:
        self.settings = NodeSettings(**values)


class Service:
    """Where the timers are."""

    def __init__(self) -> None:
        self.timeouts = Timeouts()


@pytest.fixture(autouse=True)
def levels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    told: list[str] = []
    monkeypatch.setattr(live_settings, "set_log_level", told.append)
    return told


def own(**ingress: Any) -> Settings:
    return Settings(
        data_dir=Path("/x"),
        hostname="h",
        listeners=(ListenerSettings(port=25, mode="plain"),),
        ingress=IngressSettings(**ingress),
        log_level="warning",
    )


def refused_after(admission: Admission) -> int:
    count = 0
    while admission.admit(f"192.0.2.{count}", counted=True) is None:
        count += 1
    return count


def test_the_pool_wins_where_it_says_something() -> None:
    settings = own(connections=10, connections_per_address=5)
    bounds = wished_bounds(settings, NodeSettings())
    assert (bounds.connections, bounds.connections_per_address, bounds.log_level) == (10, 5, "warning")
    bounds = wished_bounds(settings, NodeSettings(max_connections=20, log_level="debug"))
    assert (bounds.connections, bounds.connections_per_address, bounds.log_level) == (20, 5, "debug")
    assert wished_bounds(settings, NodeSettings(max_connections_per_address=7)).connections_per_address == 7


def test_caps_timers_and_level_follow_both(levels: list[str]) -> None:
    admission, service, view = Admission(1, 1), Service(), View(log_level="debug")
    live = LiveSettings(own(connections=3), view, 1_000, Log())
    live.attach(admission, service)
    assert refused_after(admission) == 3
    live.use(own(connections=5, command_timeout_s=7.0))
    assert refused_after(admission) + 3 == 5
    assert service.timeouts.command_s == 7.0
    view.settings = NodeSettings(max_connections=9)
    live.apply()
    assert refused_after(admission) + 5 == 9
    assert levels[-1] == "warning"


@pytest.mark.parametrize(("former", "later"), [("warning", "info"), ("info", "warning")])
def test_a_change_of_the_level_is_logged_by_the_more_talkative_one(levels: list[str], former: str, later: str) -> None:
    in_force: list[str] = []

    class Noting(Log):
        def info(self, event: str, **fields: object) -> None:
            in_force.append(levels[-1])
            super().info(event, **fields)

    view = View(log_level=former)
    live = LiveSettings(own(), view, 100_000, Noting())
    live.attach(Admission(1, 1), Service())
    view.settings = NodeSettings(log_level=later)
    live.apply()
    assert (in_force[1:], levels[-1]) == (["info"], later)


def test_a_cap_without_descriptors_for_it_is_lowered_and_said_once() -> None:
    admission, log = Admission(1, 1), Log()
    live = LiveSettings(own(connections=100), View(), 4, log)
    live.attach(admission, Service())
    live.apply()
    assert refused_after(admission) == 4
    assert admission.admit("192.0.2.200", counted=True) is replies.TOO_MANY_CONNECTIONS
    assert log.events().count("connections.lowered") == 1
