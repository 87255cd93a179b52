"""A Haraka of its own in a temporary folder: relays everything from loopback to the sink by its outbound queue.

Needs node 20 or newer and npm; Haraka is installed once into `.build/haraka`, by npm from the registry that npm is set
up for. It is as it comes but for ports, the next hop, log level, and limits. ToolError says what is missing.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.processes import cpu_by_role, memory_by_role
from benchmarks.smtp_tools import ToolError, find_tool, free_port, is_listening

_VERSION = "3.1.1"
# Dependencies as they were then, so that a run can be repeated.
_BEFORE = "2026-06-01"
_INSTALLED = Path(__file__).parents[1] / ".build" / "haraka"
_INSTALL_S = 300.0
_START_S = 30.0
_STOP_S = 10.0
_POLL_S = 0.05
_PLUGIN = """\
exports.register = function () {
    this.register_hook('connect', 'relay');
    this.register_hook('rcpt', 'accept');
    this.register_hook('get_mx', 'to_sink');
}
exports.relay = function (next, connection) { connection.relaying = true; next(); }
exports.accept = function (next) { next(OK); }
exports.to_sink = function (next) { next(OK, {priority: 0, exchange: '127.0.0.1', port: SINK_PORT}); }
"""


class Haraka:
    """One instance; `port` takes mail without TLS or AUTH from loopback and relays all of it to the sink."""

    name = "haraka"
    holders = ("haraka",)

    def __init__(self, sink_port: int, workers: int) -> None:
        """Install it where it is not yet, write its folder and start it, with a process for each worker."""
        program = _install()
        self.port = free_port()
        self.root = Path(tempfile.mkdtemp(prefix="haraka-bench-"))
        self._write_config(sink_port, workers)
        self._log = (self.root / "haraka.log").open("wb")
        command = [find_tool("node"), str(program), "-c", str(self.root)]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT, cwd=self.root)
        self.master_pid = self._process.pid
        try:
            self._wait_ready()
        except ToolError:
            self.close()
            raise

    def _write_config(self, sink_port: int, workers: int) -> None:
        for folder in ("plugins", "queue"):
            (self.root / folder).mkdir()
        config = self.root / "config"
        shutil.copytree(_INSTALLED / "node_modules" / "Haraka" / "config", config)
        nodes = workers if workers > 1 else 0
        (config / "smtp.ini").write_text(f"listen=127.0.0.1:{self.port}\nnodes={nodes}\n", encoding="ascii")
        (config / "outbound.ini").write_text("concurrency_max=200\nlocal_mx_ok=true\n", encoding="ascii")
        (config / "log.ini").write_text("[main]\nlevel=error\n", encoding="ascii")
        (config / "me").write_text("haraka.example.org\n", encoding="ascii")
        (config / "plugins").write_text("bench\n", encoding="ascii")
        plugin = _PLUGIN.replace("SINK_PORT", str(sink_port))
        (self.root / "plugins" / "bench.js").write_text(plugin, encoding="ascii")

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + _START_S
        while not is_listening(self.port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                log = (self.root / "haraka.log").read_text(encoding="utf-8", errors="replace")
                msg = f"Haraka does not come up: {log[-1_000:]}"
                raise ToolError(msg)
            time.sleep(_POLL_S)

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far."""
        return cpu_by_role(self.master_pid, lambda _: "haraka")

    def memory(self) -> dict[str, int]:
        """Bytes."""
        return memory_by_role(self.master_pid, lambda _: "haraka")

    def settle(self, timeout_s: float) -> bool:
        """Return True when nothing is queued any more, False after the time."""
        deadline = time.monotonic() + timeout_s
        while any(path.is_file() for path in (self.root / "queue").rglob("*")):
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def close(self) -> None:
        """Stop it and delete its folder."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
        shutil.rmtree(self.root, ignore_errors=True)


def _install() -> Path:
    """Return the program, installed now if it was not; nothing half-installed is left."""
    program = _INSTALLED / "node_modules" / "Haraka" / "bin" / "haraka"
    if program.exists():
        return program
    npm = find_tool("npm")
    _INSTALLED.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_INSTALLED.parent) as folder:
        command = [npm, "install", f"Haraka@{_VERSION}", f"--before={_BEFORE}", "--omit=dev", "--omit=optional"]
        command += ["--no-audit", "--no-fund", "--no-package-lock", "--prefix", folder]
        result = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_S, check=False)
        if result.returncode:
            msg = f"Haraka could not be installed: {result.stderr.strip()[-500:]}"
            raise ToolError(msg)
        shutil.rmtree(_INSTALLED, ignore_errors=True)
        Path(folder).rename(_INSTALLED)
        Path(folder).mkdir()
    return program
