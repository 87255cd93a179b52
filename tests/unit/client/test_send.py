"""`postroad send` against a server that refuses: what is said, and what is known of the copies before."""

from __future__ import annotations

import contextlib
import json
import socket
import socketserver
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from postroad.cli import problems
from postroad.cli.main import run
from support.certificates import write_certificate

IDS = [f"0192f0c1-2d3e-7000-8000-{number:012d}" for number in range(2)]
LINE = ["send", "--to", "a@b.example", "--from", "c@d.example"]


class Server(socketserver.ThreadingTCPServer):
    """Says the greeting and accepts the messages that there are ids for, over TLS unless the greeting refuses."""

    daemon_threads = True

    def __init__(self, greeting: bytes, context: ssl.SSLContext | None) -> None:
        self.greeting = greeting
        self.extensions = b"250 AUTH PLAIN\r\n"
        self.mails: list[bytes] = []
        self.context = context
        self.starts_plain = False
        self.ids = iter(IDS)
        super().__init__(("127.0.0.1", 0), Conversation)

    def reply(self, line: bytes) -> bytes:
        match line[:4].upper():
            case b"EHLO":
                return b"250-server\r\n" + self.extensions
            case b"MAIL":
                self.mails.append(line)
            case b"STAR":
                return b"220 2.0.0 go on\r\n"
            case b"AUTH":
                return b"235 2.7.0 welcome\r\n"
            case b"DATA":
                return b"354 go on\r\n"
            case b".\r\n":
                found = next(self.ids, None)
                return f"250 2.0.0 queued as {found}\r\n".encode() if found else b"452 4.3.1 no room\r\n"
            case b"QUIT":
                return b"221 2.0.0 bye\r\n"
        return b"250 2.0.0 fine\r\n"


class Conversation(socketserver.BaseRequestHandler):
    """One connection."""

    def handle(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        context = None if server.starts_plain else server.context
        with contextlib.suppress(ssl.SSLError):  # a client that does not trust us
            self.converse(server, context.wrap_socket(self.request, server_side=True) if context else self.request)

    def converse(self, server: Server, peer: socket.socket) -> None:
        with peer, peer.makefile("rb") as lines:
            peer.sendall(server.greeting)
            in_content = False
            for line in lines:
                if in_content and line != b".\r\n":
                    continue
                in_content = line[:4].upper() == b"DATA"
                peer.sendall(server.reply(line))
                if line[:4].upper() == b"STAR":
                    assert server.context is not None
                    server.context.wrap_socket(peer, server_side=True)


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, greeting: bytes, tls: Path | None = None) -> Iterator[Server]:
    context = None
    if tls is not None:
        certificate, key = write_certificate(tls, "localhost")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        monkeypatch.setenv("POSTROAD_SMTP_CA_FILE", str(certificate))
    with Server(greeting, context) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("POSTROAD_SMTP_SERVER", f"localhost:{server.server_address[1]}")
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of whoever runs the tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("POSTROAD_SERVER", "POSTROAD_API_KEY", "POSTROAD_CONTEXT", "POSTROAD_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("POSTROAD_SMTP_SERVER", "127.0.0.1:1")
    monkeypatch.setenv("POSTROAD_SMTP_USERNAME", "demo.app")
    monkeypatch.setenv("POSTROAD_SMTP_PASSWORD", "prs_secret")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(
            ("--to", address)
            for address in ("nobody@", "nobody", "@b.example", "", "a@b.example, c@d.example", "a\n@b")
        ),
        ("--from", "nobody@"),
        ("--subject", "two\nlines"),
    ],
)
def test_what_cannot_be_written_into_a_header_is_a_wrong_line(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["send", "--to", "a@b.example"] if option != "--to" else ["send"]
    words += ["--from", "c@d.example"] if option != "--from" else []
    assert run([*words, f"{option}={value}"]) == 2
    assert option in capsys.readouterr().err


def test_copies_that_were_accepted_before_a_refusal_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(monkeypatch, b"220 ready\r\n", tmp_path):
        assert run([*LINE, "--implicit-tls", "--count", "5"]) == problems.FAILED
    said = capsys.readouterr()
    assert said.out.splitlines() == [f"Accepted {one}" for one in IDS]
    assert "452 4.3.1 no room" in said.err


def test_copies_that_were_accepted_before_a_refusal_are_named_to_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(monkeypatch, b"220 ready\r\n", tmp_path):
        assert run([*LINE, "--implicit-tls", "--count", "5", "--output", "json"]) == problems.FAILED
    said = capsys.readouterr()
    assert json.loads(said.out) == {"messages": [{"id": one} for one in IDS]}
    assert "452 4.3.1 no room" in json.loads(said.err)["message"]


def test_a_server_that_takes_no_connection_is_quoted_and_not_called_down(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(monkeypatch, b"421 4.7.0 too many connections\r\n"):
        assert run(LINE) == problems.UNREACHABLE
    said = capsys.readouterr().err
    assert "421 4.7.0 too many connections" in said
    assert "Is it running" not in said


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        (["--hold-for", "60"], b" HOLDFOR=60"),
        (["--hold-for", "1m"], b" HOLDFOR=60"),
        (["--at", "2026-12-01T08:30:00Z", "--priority", "-4"], b" HOLDUNTIL=2026-12-01T08:30:00Z MT-PRIORITY=-4"),
        (["--at", "2026-12-01"], b" HOLDUNTIL=2026-12-01T00:00:00Z"),
        (["--priority", "9", "--no-follow"], b" MT-PRIORITY=9"),
        (["--no-follow"], b""),
    ],
)
def test_time_and_priority_are_asked_for_with_mail_and_what_is_held_is_not_followed(
    options: list[str],
    parameters: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with serving(monkeypatch, b"220 ready\r\n", tmp_path) as server:
        server.extensions = b"250-AUTH PLAIN\r\n250-FUTURERELEASE 60 2026-12-01T00:00:00Z\r\n250 MT-PRIORITY\r\n"
        assert run([*LINE, "--implicit-tls", *options]) == 0
    assert [line.strip().removeprefix(b"MAIL FROM:<c@d.example>") for line in server.mails] == [parameters]
    assert capsys.readouterr().out.splitlines() == [f"Accepted {IDS[0]}"]


@pytest.mark.parametrize("option", ["--hold-for=90", "--at=2026-12-01", "--priority=1"])
def test_nothing_is_submitted_where_the_server_does_not_know_what_is_asked(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(monkeypatch, b"220 ready\r\n", tmp_path) as server:
        assert run([*LINE, "--implicit-tls", option]) == problems.FAILED
    assert server.mails == []
    assert "does not offer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("offered", "most"), [(b"2592000", "30 days"), (b"86400", "1 day"), (b"90000", "90000 s"), (b"60", "60 s")]
)
def test_nothing_is_submitted_that_is_to_wait_longer_than_the_server_offers(
    offered: bytes, most: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(monkeypatch, b"220 ready\r\n", tmp_path) as server:
        server.extensions = b"250-AUTH PLAIN\r\n250 FUTURERELEASE %b 2026-12-31T00:00:00Z\r\n" % offered
        assert run([*LINE, "--implicit-tls", f"--hold-for={int(offered) + 1}"]) == problems.FAILED
        assert server.mails == []
        assert run([*LINE, "--implicit-tls", f"--hold-for={int(offered)}"]) == 0
    assert f"the server holds mail for {most} at most" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--implicit-tls"], []])
def test_a_certificate_that_is_not_trusted_is_told_with_what_names_its_ca(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(monkeypatch, b"220 ready\r\n", tmp_path) as server:
        server.starts_plain = not words
        server.extensions = b"250-AUTH PLAIN\r\n250 STARTTLS\r\n"
        monkeypatch.delenv("POSTROAD_SMTP_CA_FILE")
        assert run([*LINE, *words]) == problems.UNREACHABLE
    said = capsys.readouterr().err
    assert "certificate is not trusted" in said
    assert "POSTROAD_SMTP_CA_FILE" in said
    assert "Is it running" not in said


def test_what_was_accepted_is_told_to_programs_also_when_nobody_can_watch_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(monkeypatch, b"220 ready\r\n", tmp_path):
        monkeypatch.setenv("POSTROAD_ACCOUNT", "demo")
        monkeypatch.setenv("POSTROAD_SERVER", "127.0.0.1:1")
        monkeypatch.setenv("POSTROAD_API_KEY", "prk_none")
        assert run([*LINE, "--implicit-tls", "--timeout", "1", "-o", "json"]) == problems.UNREACHABLE
    assert json.loads(capsys.readouterr().out) == {"messages": [{"id": IDS[0]}]}


def test_one_time_is_enough(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*LINE, "--hold-for", "5", "--at", "2026-12-01"]) == 2
    assert "--hold-for or --at, not both" in capsys.readouterr().err
