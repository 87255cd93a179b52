"""What a process of the node knows of the supervisor that started it, and what both share."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass

from dataplane.lifecycle import die_with_parent, watch_lifeline
from dataplane.settings import Settings
from dataplane.settings_handover import read_handed

EXIT_UNAVAILABLE = 69
# A spool's disk is full: nothing is wrong with the worker, and space may come back at any moment.
EXIT_NO_SPACE = 75


@dataclass(frozen=True, slots=True)
class Child:
    """A started process: the pipe that ends with the supervisor, the one to say "ready" on, the settings in force and
    the counts of connections by address; -1 for none.
    """

    lifeline_fd: int
    ready_fd: int
    parent_pid: int
    settings_fd: int = -1
    counts_fd: int = -1

    def tie(self) -> None:
        """From now on end with the supervisor; on the running loop."""
        if self.parent_pid > 0:
            die_with_parent(self.parent_pid)
        if self.lifeline_fd >= 0:
            watch_lifeline(self.lifeline_fd)

    def settings(self) -> Settings | None:
        """The settings as the supervisor has them in force now; None without one. SettingsError while they change."""
        return read_handed(self.settings_fd) if self.settings_fd >= 0 else None

    def report_ready(self, facts: Mapping[str, object]) -> None:
        """Tell the supervisor that this process serves; once."""
        if self.ready_fd >= 0:
            os.write(self.ready_fd, json.dumps(dict(facts)).encode() + b"\n")
            os.close(self.ready_fd)
