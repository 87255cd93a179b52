"""How the supervisor gives the processes that it starts the settings in force, and what of them may change meanwhile.

The file that people edit is read by the supervisor alone, at the start and at SIGHUP. A process gets the settings in
force by an inherited descriptor of a file that has no name and lies in memory, because secrets stand in it: so a worker
that is started again after somebody broke the file, or changed in it what cannot change, starts as its neighbours did.

    RELOADABLE      taken over while everything runs
    anything else   stays as it was until the node is started again; `take_over` names it
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from dataplane.settings import SECRETS_SHOWN, Settings, SettingsError

RELOADABLE = frozenset(
    {
        "drain_timeout_s",
        "ingress.answer_delay_s",
        "ingress.command_before_auth_timeout_s",
        "ingress.command_timeout_s",
        "ingress.commit_timeout_s",
        "ingress.connections",
        "ingress.connections_per_address",
        "ingress.data_bytes_per_s",
        "ingress.handshake_timeout_s",
        "log_level",
    }
)
_READ_BYTES = 65_536


class TakenOver(NamedTuple):
    """Settings in force from now on, the names of what changed in them, and of what was written and did not."""

    settings: Settings
    changed: list[str]
    kept: list[str]


def take_over(running: Settings, read: Settings) -> TakenOver:
    """Put what may change of the settings that were `read` into those that are `running`."""
    differing = list(_differing(running, read, ""))
    changed = [name for name in differing if name in RELOADABLE]
    return TakenOver(_with(running, read, changed), changed, [name for name in differing if name not in RELOADABLE])


def _differing(one: BaseModel, other: BaseModel, prefix: str) -> Iterator[str]:
    for name in type(one).model_fields:
        mine, theirs = getattr(one, name), getattr(other, name)
        if mine == theirs:
            continue
        if isinstance(mine, BaseModel) and isinstance(theirs, BaseModel):
            yield from _differing(mine, theirs, f"{prefix}{name}.")
        else:
            yield prefix + name


def _with(running: Settings, read: Settings, names: list[str]) -> Settings:
    update: dict[str, Any] = {}
    for name in names:
        section, _, key = name.rpartition(".")
        if section:
            former = update.get(section, getattr(running, section))
            update[section] = former.model_copy(update={key: getattr(getattr(read, section), key)})
        else:
            update[key] = getattr(read, key)
    return running.model_copy(update=update)


class _Handed(Settings):
    """Settings to which the environment has nothing to add: the supervisor has looked there."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What was handed on, and nothing else."""
        del settings_cls, env_settings, dotenv_settings, file_secret_settings
        return (init_settings,)


class HandedSettings:
    """The supervisor's end: `descriptor` is to be inherited."""

    def __init__(self, settings: Settings) -> None:
        self.descriptor = anonymous_file("postroad-settings")
        self.put(settings)

    def put(self, settings: Settings) -> None:
        """Let whoever reads from now on find these; a reader that came in between must be told to read again."""
        text = json.dumps(settings.model_dump(mode="json", context=SECRETS_SHOWN)).encode()
        os.pwrite(self.descriptor, text, 0)
        os.ftruncate(self.descriptor, len(text))


def read_handed(descriptor: int) -> Settings:
    """The settings in force; SettingsError when they are being replaced this moment."""
    parts: list[bytes] = []
    while part := os.pread(descriptor, _READ_BYTES, sum(map(len, parts))):
        parts.append(part)
    try:
        return _Handed(**json.loads(b"".join(parts)))
    except (ValueError, ValidationError) as error:
        # Not the text of the error: it may show a password.
        raise SettingsError(f"the settings handed on cannot be read ({type(error).__name__})") from None


def anonymous_file(name: str) -> int:
    """A descriptor of an empty file without a name, in memory where the system has such; not inherited by itself."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name, os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
