"""Hatchling build hook: ships the SQL migrations inside the wheel as `controlplane/_migrations`.

Input: hatchling's build data. Output: one more forced inclusion in it, for built wheels only. Does nothing
for an editable install, where `controlplane` reads `/migrations` at the repository's root.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class MigrationsHook(BuildHookInterface):  # type: ignore[type-arg]  # generic over a config we do not have
    """Adds `migrations/` to a standard wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Force-include the folder; `version` is `standard` or `editable`."""
        migrations = Path(self.root) / "migrations"
        if version == "standard" and migrations.is_dir():
            build_data["force_include"][str(migrations)] = "controlplane/_migrations"
