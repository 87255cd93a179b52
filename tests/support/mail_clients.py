"""Foreign SMTP clients that submit to a local stack as their users run them: swaks, curl and Python's smtplib.

Each `submit_by_…` sends one message over verified TLS after AUTH and returns the id from the 250 to the final dot. The
content is what goes over the wire, before dot-stuffing; what a client would do to it by itself is switched off where
it can be. A refusal is a `RefusedError` with what the client said.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import smtplib
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from support.arrivals import CLIENT_NAME
from support.local_stack import LocalStack
from support.programs import find_program, missing

_HOST = "127.0.0.1"
_QUEUED = re.compile(rb"250 2\.0\.0 queued as ([0-9a-f-]{36})")
_TIMEOUT_S = 50.0


class RefusedError(Exception):
    """The client did not get its message accepted; the text is what it printed or raised."""


@dataclass(frozen=True, slots=True)
class Way:
    """How to reach the stack: STARTTLS or TLS from the first octet, and which mechanism of AUTH."""

    implicit_tls: bool = False
    mechanism: str = "PLAIN"
    password: str = ""  # empty: the right one
    ca_file: str = ""  # empty: the right one

    def port(self, stack: LocalStack) -> int:
        """The port that serves it."""
        port: int = stack.ready["ports"]["smtps" if self.implicit_tls else "smtp"]
        return port

    def secret(self, stack: LocalStack) -> str:
        """The password to show."""
        return self.password or stack.ready["smtp_password"]

    def trust(self, stack: LocalStack) -> str:
        """The file with the CA that is trusted."""
        return self.ca_file or stack.ready["ca_file"]

    def __str__(self) -> str:
        return f"{'smtps' if self.implicit_tls else 'starttls'}-{self.mechanism.lower()}"


WAYS = tuple(Way(implicit, mechanism) for implicit in (False, True) for mechanism in ("PLAIN", "LOGIN"))
_STARTTLS = Way()


def submit_by_swaks(
    stack: LocalStack,
    content: bytes,
    recipients: Sequence[str],
    *,
    way: Way = _STARTTLS,
    sender: str = "app@example.com",
) -> str:
    """Submit by swaks, which is given the octets between 354 and the reply to the dot."""
    stuffed = re.sub(rb"(?m)^\.", b"..", content) + b".\r\n"
    with _file(stuffed) as path:
        words = ["--data", f"@{path}", "--no-data-fixup", "--suppress-data"]
        return _queued_as(run_swaks(stack, sender, recipients, words, way=way))


def run_swaks(
    stack: LocalStack, sender: str, recipients: Sequence[str], words: Sequence[str], *, way: Way = _STARTTLS
) -> bytes:
    """Run swaks with more words; its transcript."""
    return _run(
        [
            *(_swaks(), "--server", _HOST, "--port", str(way.port(stack)), "--helo", CLIENT_NAME),
            "--tls-on-connect" if way.implicit_tls else "--tls",
            *("--tls-verify", "--tls-ca-path", way.trust(stack)),
            *("--auth", way.mechanism, "--auth-user", stack.ready["smtp_username"]),
            *("--from", sender, "--to", ",".join(recipients), *words),
        ],
        {"SWAKS_OPT_auth_password": way.secret(stack)},
    )


def submit_by_curl(
    stack: LocalStack,
    content: bytes,
    recipients: Sequence[str],
    *,
    way: Way = _STARTTLS,
    sender: str = "app@example.com",
) -> str:
    """Submit by curl, which reads the password from standard input as a setting."""
    scheme = "smtps" if way.implicit_tls else "smtp"
    with _file(content) as path:
        words = [
            *(find_program("curl"), "--disable", "--silent", "--show-error", "--verbose", "--config", "-"),
            *("--url", f"{scheme}://{_HOST}:{way.port(stack)}/{CLIENT_NAME}", "--ssl-reqd"),
            *("--cacert", way.trust(stack), "--login-options", f"AUTH={way.mechanism}"),
            *("--mail-from", sender, *(word for one in recipients for word in ("--mail-rcpt", one))),
            *("--upload-file", str(path)),
        ]
        settings = f'user = "{stack.ready["smtp_username"]}:{way.secret(stack)}"\n'
        return _queued_as(_run(words, {}, settings.encode()))


def submit_by_smtplib(
    stack: LocalStack,
    content: bytes,
    recipients: Sequence[str],
    *,
    way: Way = _STARTTLS,
    sender: str = "app@example.com",
) -> str:
    """Submit by smtplib, by the steps of its `sendmail`, which keeps the last reply to itself."""
    with smtplib_session(stack, way) as client:
        return send_by_session(client, content, recipients, sender=sender)


@contextlib.contextmanager
def smtplib_session(stack: LocalStack, way: Way = _STARTTLS) -> Iterator[smtplib.SMTP]:
    """A session after TLS and AUTH; QUIT at the end."""
    port = way.port(stack)
    if way.implicit_tls:
        client: smtplib.SMTP = smtplib.SMTP_SSL(
            _HOST, port, local_hostname=CLIENT_NAME, context=stack.tls_context(), timeout=_TIMEOUT_S
        )
    else:
        client = smtplib.SMTP(_HOST, port, local_hostname=CLIENT_NAME, timeout=_TIMEOUT_S)
    with client:
        if not way.implicit_tls:
            client.starttls(context=stack.tls_context())
        client.ehlo()
        client.user, client.password = stack.ready["smtp_username"], way.secret(stack)
        client.auth(way.mechanism, client.auth_login if way.mechanism == "LOGIN" else client.auth_plain)
        yield client


def send_by_session(
    client: smtplib.SMTP, content: bytes, recipients: Sequence[str], *, sender: str = "app@example.com"
) -> str:
    """One transaction, pipelining nothing; the id from the 250."""
    for code, text in (client.mail(sender, [f"SIZE={len(content)}"]), *map(client.rcpt, recipients)):
        if code != 250:
            raise RefusedError(f"{code} {text.decode()}")
    code, text = client.data(content)
    return _queued_as(b"%d %s" % (code, text))


@functools.cache
def _swaks() -> str:
    """Swaks, if it can speak TLS, for which it needs another package."""
    program = find_program("swaks")
    support = subprocess.run([program, "--support"], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    if "TLS supported" not in support.stdout:
        missing("swaks cannot speak TLS (Debian package libnet-ssleay-perl)")
    return program


def _run(words: Sequence[str], settings: dict[str, str], stdin: bytes = b"") -> bytes:
    result = subprocess.run(
        words,
        env={**os.environ, **settings},
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=_TIMEOUT_S,
        check=False,
    )
    if result.returncode:
        raise RefusedError(result.stdout.decode(errors="replace"))
    return result.stdout


def _queued_as(transcript: bytes) -> str:
    ids: list[bytes] = _QUEUED.findall(transcript)
    if len(ids) != 1:
        raise RefusedError(transcript.decode(errors="replace"))
    return ids[0].decode()


@contextlib.contextmanager
def _file(content: bytes) -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "message"
        path.write_bytes(content)
        yield path
