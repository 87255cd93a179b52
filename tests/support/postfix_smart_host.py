"""A Postfix of its own in a temporary folder that sends all its mail through a local stack, as a customer's would.

TLS is `secure`: the certificate must hold for the name of the relay. AUTH is by SASL. Header rewriting is off, so that
Postfix adds its Received line and nothing else. Postfix's master needs root; nothing under /etc/postfix or
/var/spool/postfix is written. Its log tells what became of each message.
"""

from __future__ import annotations

import os
import re
import shutil
import smtplib
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest

from support.arrivals import CLIENT_NAME
from support.local_stack import LocalStack
from support.mail_clients import Way
from support.programs import find_program, missing

NAME = "relay.example.com"
"""In the demo account's domains: what Postfix itself writes, bounces for example, is from there."""

_TIMEOUT_S = 50.0
_POLL_S = 0.05

_MAIN = """\
compatibility_level = 3.6
queue_directory = {root}/queue
data_directory = {root}/data
command_directory = {command_directory}
daemon_directory = {daemon_directory}
myhostname = {name}
myorigin = $myhostname
mydestination =
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
mynetworks = 127.0.0.0/8
smtpd_relay_restrictions = permit_mynetworks, reject
smtpd_tls_security_level = none
local_header_rewrite_clients =
message_drop_headers =
alias_maps =
alias_database =
biff = no
maillog_file = {root}/postfix.log
maillog_file_prefixes = {root}
message_size_limit = 30000000
relayhost = [localhost]:{relay_port}
smtp_host_lookup = native
smtp_tls_security_level = secure
smtp_tls_wrappermode = {wrapper_mode}
smtp_tls_CAfile = {root}/etc/ca.pem
smtp_tls_secure_cert_match = nexthop
smtp_tls_loglevel = 1
smtp_sasl_auth_enable = yes
smtp_sasl_password_maps = texthash:{root}/etc/passwords
smtp_sasl_security_options = noanonymous
smtp_sasl_mechanism_filter = {mechanism}
"""

_MASTER = """\
127.0.0.1:{port} inet n - n - - smtpd
pickup unix n - n 1 1 pickup
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
tlsmgr unix - - n 1000? 1 tlsmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
proxymap unix - - n - - proxymap
smtp unix - - n - - smtp
error unix - - n - - error
retry unix - - n - - error
discard unix - - n - - discard
anvil unix - - n - 1 anvil
scache unix - - n - 1 scache
postlog unix-dgram n - n - 1 postlogd
"""


@dataclass(frozen=True, slots=True)
class Delivery:
    """What Postfix logged of one message: its status, and the relay's words."""

    status: str
    reply: str

    def queued_as(self) -> str:
        """The id in the relay's 250."""
        found = re.search(r"250 2\.0\.0 queued as ([0-9a-f-]{36})", self.reply)
        assert self.status == "sent", self
        assert found is not None, self
        return found[1]


class SmartHostClient:
    """One instance; once started, `port` takes mail from loopback until `close`."""

    def __init__(self, root: Path, stack: LocalStack, way: Way) -> None:
        """Write its folder; skips the test where Postfix cannot be had."""
        self._postfix = find_program("postfix")
        self._sendmail = find_program("sendmail", "postfix")
        if os.geteuid() != 0:
            pytest.skip("Postfix can only be started by root")
        _require_sasl_mechanisms()
        self.root = root
        self.port = _free_port()
        self._config = root / "etc"
        self._write_config(stack, way)

    # --- mail ------------------------------------------------------------------------------------

    def inject(self, content: bytes, recipients: Sequence[str], *, sender: str = "app@example.com") -> Delivery:
        """Hand it a message by SMTP without TLS, and wait for what became of it."""
        with smtplib.SMTP("127.0.0.1", self.port, local_hostname=CLIENT_NAME, timeout=_TIMEOUT_S) as client:
            client.ehlo()
            utf8 = [] if all(map(str.isascii, recipients)) else ["SMTPUTF8"]
            assert client.mail(sender, ["BODY=8BITMIME", *utf8])[0] == 250
            for recipient in recipients:
                assert client.rcpt(recipient)[0] == 250
            code, text = client.data(content)
        found = re.fullmatch(rb"2\.0\.0 Ok: queued as (\S+)", text)
        assert found is not None, (code, text)
        return self.wait_for_end(found[1].decode())

    def inject_by_sendmail(self, content: bytes, recipient: str, *, sender: str = "app@example.com") -> Delivery:
        """Hand it a message with LF line ends by the `sendmail` command; its Message-ID must be new.

        Postfix adds a Date to what local programs send without one.
        """
        message_id = re.search(rb"(?im)^message-id: (.+)$", content)
        assert message_id is not None
        words = [self._sendmail, "-C", str(self._config), "-i", "-f", sender, recipient]
        subprocess.run(words, input=content, capture_output=True, timeout=_TIMEOUT_S, check=True)
        pattern = rf": (\S+): message-id={re.escape(message_id[1].decode())}$"
        return self.wait_for_end(self._wait_for_line(pattern)[1])

    def wait_for_end(self, queue_id: str) -> Delivery:
        """What became of the message with this queue id at its first attempt."""
        found = self._wait_for_line(rf": {queue_id}: to=.* status=(\w+) \((.*)\)$")
        return Delivery(found[1], found[2])

    def log(self) -> str:
        """All that it logged."""
        path = self.root / "postfix.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    # --- life ------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Start it, and wait until it listens."""
        self._run("start")
        self._wait_for(lambda: _listens(self.port), "listening")
        return self

    def close(self) -> None:
        """Stop it, whatever came of the start; its processes have ended."""
        if (self.root / "queue" / "pid" / "master.pid").exists():
            self._run("stop")

    def _write_config(self, stack: LocalStack, way: Way) -> None:
        for folder in (self._config, self.root / "queue", self.root / "data"):
            folder.mkdir()
        shutil.chown(self.root / "data", "postfix")
        shutil.copy(stack.ready["ca_file"], self._config / "ca.pem")
        for name in ("postfix-files", "dynamicmaps.cf"):
            if (shipped := Path(_compiled_in("meta_directory")) / name).exists():
                shutil.copy(shipped, self._config / name)
        relay_port = way.port(stack)
        main = _MAIN.format(
            root=self.root,
            command_directory=_compiled_in("command_directory"),
            daemon_directory=_compiled_in("daemon_directory"),
            name=NAME,
            relay_port=relay_port,
            wrapper_mode="yes" if way.implicit_tls else "no",
            mechanism=way.mechanism,
        )
        passwords = self._config / "passwords"
        passwords.touch(mode=0o600)
        passwords.write_text(
            f"[localhost]:{relay_port} {stack.ready['smtp_username']}:{way.secret(stack)}\n", encoding="ascii"
        )
        (self._config / "main.cf").write_text(main, encoding="ascii")
        (self._config / "master.cf").write_text(_MASTER.format(port=self.port), encoding="ascii")

    def _run(self, verb: str) -> None:
        words = [self._postfix, "-c", str(self._config), verb]
        result = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        assert result.returncode == 0, f"postfix {verb}: {result.stderr} {self.log()[-1000:]}"

    def _wait_for_line(self, pattern: str) -> re.Match[str]:
        found: list[re.Match[str]] = []

        def look() -> bool:
            found.extend(re.finditer(pattern, self.log(), re.MULTILINE))
            return bool(found)

        self._wait_for(look, pattern)
        return found[0]

    def _wait_for(self, has_come: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _TIMEOUT_S
        while not has_come():
            assert time.monotonic() < deadline, f"not seen: {what}\n{self.log()[-2000:]}"
            time.sleep(_POLL_S)


def _require_sasl_mechanisms() -> None:
    """Cyrus SASL loads PLAIN and LOGIN from plugins; without them Postfix finds no mechanism."""
    patterns = ("lib/*/sasl2/libplain.so*", "lib/sasl2/libplain.so*", "lib64/sasl2/libplain.so*")
    if not any(any(Path("/usr").glob(pattern)) for pattern in patterns):
        missing("SASL mechanisms are not installed (Debian package libsasl2-modules)")


def _compiled_in(name: str) -> str:
    words = [find_program("postconf", "postfix"), "-dh", name]
    return subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True).stdout.strip()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
