"""What a run of the harness was asked for; every scenario has defaults of its own for what was not said."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Counts are of one round; sizes in bytes, rates in messages a second, times in seconds."""

    scenario: str
    sessions: int
    messages: int
    # Messages of peers other than Postroad, which take longer for each.
    other_messages: int
    seconds: float
    rate: float
    size_bytes: int
    deadline_s: float
    # How long nothing may arrive before what is missing counts as lost.
    patience_s: float
    rounds: int = 1
    workers: int = 0
    processes: int = 2
    peers: tuple[str, ...] = ("postroad",)
    pipelining: bool = False
    reconnect: bool = False
    # Of the account that floods; rate 0 is a closed loop.
    flood_sessions: int = 50
    flood_rate: float = 0.0
    # Of an account that sends in a closed loop before and beside the flood; 0: there is none.
    background_sessions: int = 0
    api_rate: float = 100.0
    sink_options: tuple[str, ...] = ()
    json_file: Path | None = None
    plot_file: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """Of a scenario; 0 means that this bound does not count."""

    sessions: int = 1_000
    messages: int = 20_000
    seconds: float = 0.0
    rate: float = 0.0
    size_bytes: int = 4_096
