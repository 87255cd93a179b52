"""A Postfix of its own in a temporary folder: Debian's as shipped but for limits, ports and the next hop.

Needs root (Postfix's master does) and the Debian package `postfix`. Nothing under /etc or /var/spool/postfix is
touched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.processes import cpu_by_role, memory_by_role
from benchmarks.smtp_tools import ToolError, find_tool, free_port

_MAIN = """\
compatibility_level = 3.6
queue_directory = {root}/queue
data_directory = {root}/data
command_directory = /usr/sbin
daemon_directory = /usr/lib/postfix/sbin
myhostname = postfix.example.org
mydestination =
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
mynetworks = 127.0.0.0/8
relayhost = [127.0.0.1]:{sink_port}
alias_maps =
alias_database =
biff = no
maillog_file = {root}/postfix.log
maillog_file_prefixes = {root}
smtpd_relay_restrictions = permit_mynetworks, reject
smtpd_tls_security_level = none
smtp_tls_security_level = none
default_process_limit = 1100
smtpd_client_connection_count_limit = 0
smtpd_client_connection_rate_limit = 0
smtpd_client_message_rate_limit = 0
qmgr_message_active_limit = 100000
qmgr_message_recipient_limit = 100000
in_flow_delay = 0
"""


class Postfix:
    """One instance; `port` takes mail without TLS or AUTH from loopback and relays all of it to the sink."""

    name = "postfix"
    holders = ("master", "smtpd")

    def __init__(self, sink_port: int) -> None:
        """Write its folder and start it. ToolError when it does not come up."""
        if os.geteuid() != 0:
            msg = "Postfix can only be started by root"
            raise ToolError(msg)
        self.port = free_port()
        self.root = Path(tempfile.mkdtemp(prefix="postfix-bench-"))
        self.root.chmod(0o755)
        self._config = self.root / "etc"
        self._write_config(sink_port)
        self._run("start")
        self.master_pid = self._wait_for_master()

    def _write_config(self, sink_port: int) -> None:
        for folder in (self._config, self.root / "queue", self.root / "data"):
            folder.mkdir()
        shutil.chown(self.root / "data", "postfix")
        (self._config / "main.cf").write_text(_MAIN.format(root=self.root, sink_port=sink_port), encoding="utf-8")
        shipped = Path("/etc/postfix/master.cf").read_text(encoding="utf-8")
        (self._config / "master.cf").write_text(_own_services(shipped, self.port), encoding="utf-8")
        for name in ("dynamicmaps.cf", "postfix-files"):
            shutil.copy(f"/etc/postfix/{name}", self._config / name)

    def _run(self, verb: str) -> None:
        command = [find_tool("postfix"), "-c", str(self._config), verb]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if result.returncode:
            msg = f"postfix {verb}: {result.stderr.strip()} {self._log_tail()}"
            raise ToolError(msg)

    def _log_tail(self) -> str:
        log = self.root / "postfix.log"
        return log.read_text(encoding="utf-8", errors="replace")[-500:] if log.exists() else ""

    def _wait_for_master(self) -> int:
        deadline = time.monotonic() + 20
        pid_file = self.root / "queue" / "pid" / "master.pid"
        while time.monotonic() < deadline:
            if pid_file.exists() and (text := pid_file.read_text(encoding="utf-8").strip()):
                return int(text)
            time.sleep(0.05)
        msg = f"Postfix did not start: {self._log_tail()}"
        raise ToolError(msg)

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far by program; those of processes that ended are master's."""
        return cpu_by_role(self.master_pid, _program)

    def memory(self) -> dict[str, int]:
        """Bytes by program."""
        return memory_by_role(self.master_pid, _program)

    def settle(self, timeout_s: float) -> bool:
        """Return True when nothing is queued any more, False after the time."""
        deadline = time.monotonic() + timeout_s
        while any(self._queued()):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def _queued(self) -> Iterator[Path]:
        for name in ("incoming", "active", "deferred"):
            yield from (path for path in (self.root / "queue" / name).rglob("*") if path.is_file())

    def close(self) -> None:
        """Stop it and delete its folder."""
        self._run("stop")
        shutil.rmtree(self.root, ignore_errors=True)


def _program(command: str) -> str:
    """Return the name of the program of a command line."""
    return Path(command.split(" ", 1)[0]).name or "ended"


def _own_services(master_cf: str, port: int) -> str:
    """Return the shipped master.cf with our port, and without chroot: the instance has no jail prepared."""
    lines = []
    for line in master_cf.splitlines():
        fields = line.split()
        if len(fields) >= 8 and not line.startswith(("#", " ")):
            if fields[:2] == ["smtp", "inet"]:
                fields[0] = str(port)
            fields[4] = "n"
            lines.append(" ".join(fields))
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"
