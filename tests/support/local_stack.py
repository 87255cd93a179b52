"""A local stack for end-to-end tests: `postroad up` as a process of its own, on free ports, in a folder of its own.

The stack is what users start, driven as they drive it: started by the command, stopped by Ctrl-C (SIGINT), asked by
`postroad … --output json`. Nothing here reaches into it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from postroad.inbox import Inbox, ReceivedMail
from postroad.localstack import PostgresServer, ValkeyServer
from postroad.localstack.ports import DEFAULT_PORTS
from postroad.sdk import Client, connect
from support import folders
from support.ports import own_ports

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 90.0
_COMMAND_TIMEOUT_S = 60.0


@contextlib.contextmanager
def stack_folder() -> Iterator[Path]:
    """A folder for a stack, which the database's user can pass through; what a failed test left running is ended."""
    with folders.passable_folder() as folder:
        try:
            yield folder
        finally:
            PostgresServer(folder / ".postroad" / "postgres").destroy()
            ValkeyServer(folder / ".postroad" / "valkey").destroy()


# Tests ask more than people do.
_UNCOUNTED = {"POSTROAD_CONTROLPLANE_API__REQUESTS_PER_MINUTE": "0"}


def environment(home: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """An environment in which no settings of whoever runs the tests count."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("POSTROAD_")}
    folders = {"HOME": str(home), "XDG_CONFIG_HOME": str(home / ".config")}
    return {**ours, **folders, **_UNCOUNTED, **(extra or {})}


class LocalStack:
    """`postroad up` in `folder`/.postroad, with ports of its own; `ready` holds what it said when it was up."""

    def __init__(self, folder: Path, options: Sequence[str] = (), ports: Mapping[str, int] | None = None) -> None:
        self.folder = folder
        given = own_ports(DEFAULT_PORTS) if ports is None else ports
        self._options = [*options, *(word for name, port in given.items() for word in ("--port", f"{name}={port}"))]
        self.extra_environment: dict[str, str] = {}
        self.events: list[dict[str, Any]] = []
        self.ready: dict[str, Any] = {}
        self._process: subprocess.Popen[str] | None = None
        self._is_ready = threading.Event()
        self._reader: threading.Thread | None = None

    # --- its life --------------------------------------------------------------------------------

    def launch(self) -> Self:
        """Start the process, without waiting for anything."""
        self._is_ready.clear()
        with (self.folder / "up.err").open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "postroad.cli", "up", "--output", "json", *self._options],
                cwd=self.folder,
                env=environment(self.folder, self.extra_environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()
        return self

    def start(self) -> Self:
        """Start, and wait until it is up."""
        self.launch()
        if not self._is_ready.wait(START_TIMEOUT_S) or not self.ready:
            self.kill()
            raise AssertionError(f"the stack did not come up: {self.errors()} {self.logs()}")
        return self

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """End it as Ctrl-C does; its exit status."""
        assert self._process is not None
        self._process.send_signal(number)
        return self._wait()

    def kill(self) -> None:
        """SIGKILL, as a crash of the machine's owner; children are left to themselves."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
        if self._process is not None:
            self._wait()

    @property
    def is_running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    def wait(self) -> int:
        """Wait until it ends by itself; its exit status."""
        return self._wait()

    def errors(self) -> str:
        """What it said on standard error."""
        return (self.folder / "up.err").read_text(encoding="utf-8")

    def logs(self) -> str:
        """The ends of all logs, for the message of a failed test."""
        logs = sorted((self.folder / ".postroad" / "logs").glob("*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-2_000:]}" for log in logs)

    def _wait(self) -> int:
        assert self._process is not None
        assert self._reader is not None
        status = self._process.wait(STOP_TIMEOUT_S)
        self._reader.join(STOP_TIMEOUT_S)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return status

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.ready = {}
        for line in process.stdout:
            event = json.loads(line)
            self.events.append(event)
            if event["event"] == "up.ready":
                self.ready = event
                self._is_ready.set()
        self._is_ready.set()

    # --- using it --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def running_cli(self, *words: str) -> Iterator[subprocess.Popen[str]]:
        """`postroad …` in the stack's folder while the block lasts, with what it prints as a pipe."""
        # A shell starts what runs in its background without SIGINT, which goes on to children: not here.
        inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            started = subprocess.Popen(
                [sys.executable, "-m", "postroad.cli", *words],
                cwd=self.folder,
                env=environment(self.folder),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        finally:
            signal.signal(signal.SIGINT, inherited)
        with started as process:
            try:
                yield process
            finally:
                process.kill()

    def cli(self, *words: str, extra: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run `postroad …` in the stack's folder."""
        return subprocess.run(
            [sys.executable, "-m", "postroad.cli", *words],
            cwd=self.folder,
            env=environment(self.folder, extra),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT_S,
            check=False,
        )

    def json(self, *words: str) -> Any:
        """What `postroad … --output json` says; fails the test when the command fails."""
        result = self.cli(*words, "--output", "json")
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    def client(self) -> Client:
        """The SDK with the operator's key; a context manager."""
        root = self.folder / ".postroad"
        key = (root / "keys" / "operator.key").read_text(encoding="ascii").strip()
        return connect(f"127.0.0.1:{self.ready['ports']['grpc']}", key, root / "pki" / "ca.pem")

    @property
    def inbox(self) -> Inbox:
        """The inbox's folder."""
        return Inbox(self.folder / ".postroad" / "inbox")

    def delivered(self, message: str) -> tuple[ReceivedMail, bytes]:
        """The one mail in the inbox that carries this id, and its content."""
        (mail,) = self.inbox.find(message)
        return mail, self.inbox.content(mail)

    def tls_context(self) -> ssl.SSLContext:
        """What a client needs to trust the node."""
        return ssl.create_default_context(cafile=self.ready["ca_file"])
