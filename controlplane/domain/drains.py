"""Drains of nodes: how far the mail of a node has moved to others. Plain values.

Contract. A drain is done when `end_time` is there: either nothing is left on the node, or somebody let it take mail
again before that (`undrained`). A node stays drained after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple


class DrainTarget(NamedTuple):
    """A node that took mail over, and how much: messages, and the recipients in them that waited."""

    node: str
    message_count: int
    recipient_count: int


@dataclass(frozen=True, slots=True)
class Drain:
    """A drain; `waiting_count` are recipients on the node, `moving_count` messages that it gave up and nobody has."""

    drain: str
    node: str
    create_time: datetime
    end_time: datetime | None
    undrained: bool
    closed: bool
    waiting_count: int
    moving_count: int
    targets: tuple[DrainTarget, ...]

    @property
    def is_done(self) -> bool:
        """Whether it is over."""
        return self.end_time is not None
