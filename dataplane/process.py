"""What a process of the node knows of the supervisor that started it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass

from dataplane.lifecycle import die_with_parent, watch_lifeline


@dataclass(frozen=True, slots=True)
class Child:
    """A started process: the pipe that ends with the supervisor, and the one to say "ready" on; -1 for none."""

    lifeline_fd: int
    ready_fd: int
    parent_pid: int

    def tie(self) -> None:
        """From now on end with the supervisor; on the running loop."""
        if self.parent_pid > 0:
            die_with_parent(self.parent_pid)
        if self.lifeline_fd >= 0:
            watch_lifeline(self.lifeline_fd)

    def report_ready(self, facts: Mapping[str, object]) -> None:
        """Tell the supervisor that this process serves; once."""
        if self.ready_fd >= 0:
            os.write(self.ready_fd, json.dumps(dict(facts)).encode() + b"\n")
            os.close(self.ready_fd)
