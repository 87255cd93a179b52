"""The command line without a server: words, output and errors."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from google.longrunning.operations_pb2 import Operation
from rich.console import Console

from postroad.cli import problems
from postroad.cli.commands import progress_text
from postroad.cli.connection import SmtpSettings
from postroad.cli.limits import _rate
from postroad.cli.main import hoist, run
from postroad.cli.messages import event_line
from postroad.cli.output import Column, Output, Printer, printable
from postroad.cli.problems import CommandError, report
from postroad.cli.providers import _endpoint
from postroad.cli.send import smtp_settings
from postroad.cli.session import Session
from postroad.cli.submission import canonical, compose
from postroad.control.v1.account_pb2 import Account
from postroad.control.v1.limit_pb2 import Limit
from postroad.control.v1.limit_service_pb2 import GetLimitRequest
from postroad.control.v1.message_pb2 import DELIVERY_EVENT_TYPE_SENT, DeliveryEvent
from postroad.control.v1.message_service_pb2 import (
    CommandMessagesRequest,
    CommandMetadata,
    CommandResult,
    SendMessageRequest,
    SendMessageResponse,
    SpoolProgress,
)
from postroad.control.v1.node_pb2 import Node
from postroad.control.v1.node_service_pb2 import GetNodeRequest, RevokeNodeRequest
from postroad.control.v1.provider_pb2 import Provider
from postroad.control.v1.provider_service_pb2 import GetProviderRequest
from postroad.inbox import Inbox
from postroad.localstack import LocalStackError
from postroad.sdk import (
    DeadlineError,
    ErrorDetails,
    FailedPreconditionError,
    FieldViolation,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    PostroadError,
    UnavailableError,
)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of whoever runs the tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("POSTROAD_SERVER", "POSTROAD_API_KEY", "POSTROAD_CONTEXT", "POSTROAD_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)


def _printer(output: Output = Output.TEXT) -> tuple[Printer, io.StringIO, io.StringIO]:
    out, err = io.StringIO(), io.StringIO()
    return Printer(output, Console(file=out, width=200), Console(file=err, width=200)), out, err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("messages list --output json", "--output=json messages list"),
        ("messages -o json list", "--output=json messages list"),
        ("--server a:1 status --account=x", "--server=a:1 --account=x status"),
        ("send --to a@b -- --output json", "send --to a@b -- --output json"),
        ("status --server", "--server status"),
    ],
)
def test_common_options_may_stand_anywhere(line: str, expected: str) -> None:
    assert hoist(line.split()) == expected.split()


def test_resources_print_as_a_table_for_people_and_as_protobuf_json_for_programs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    accounts = [Account(name="accounts/demo", state=Account.STATE_ACTIVE, sender_domains=["example.com"])]
    columns = [Column("ACCOUNT", lambda one: one.name), Column("DOMAINS", lambda one: ", ".join(one.sender_domains))]
    printer, out, _ = _printer()
    printer.resources("accounts", accounts, columns)
    assert [line.split() for line in out.getvalue().splitlines()] == [
        ["ACCOUNT", "DOMAINS"],
        ["accounts/demo", "example.com"],
    ]
    printer, _, _ = _printer(Output.JSON)
    printer.resources("accounts", accounts, columns)
    assert json.loads(capsys.readouterr().out) == {
        "accounts": [{"name": "accounts/demo", "state": "STATE_ACTIVE", "senderDomains": ["example.com"]}]
    }


def test_an_empty_list_is_an_empty_list_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    printer, _, _ = _printer(Output.JSON)
    printer.resources("messages", [], [])
    assert json.loads(capsys.readouterr().out) == {"messages": []}


def test_one_resource_prints_fields_and_enums_as_people_say_them() -> None:
    printer, out, _ = _printer()
    printer.resource(Account(name="accounts/demo", state=Account.STATE_SUSPENDED, etag="x"), hidden=frozenset({"etag"}))
    assert [line.split() for line in out.getvalue().splitlines()] == [
        ["name", "accounts/demo"],
        ["state", "suspended"],
    ]


def test_text_from_strangers_cannot_steer_a_terminal_or_markup() -> None:
    printer, out, _ = _printer()
    printer.table(["X"], [["\x1b[2J[red]evil[/red]\r\x07"]])
    assert "\x1b" not in out.getvalue()
    assert "[red]evil[/red]" in out.getvalue()
    assert printable("a\x9bb") == "a\N{REPLACEMENT CHARACTER}b"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (CommandError("x"), 1),
        (LocalStackError("x", "y"), 3),
        (UnavailableError("x", ErrorDetails(grpc.StatusCode.UNAVAILABLE)), 4),
        (PermissionDeniedError("x", ErrorDetails(grpc.StatusCode.PERMISSION_DENIED)), 5),
        (NotFoundError("x", ErrorDetails(grpc.StatusCode.NOT_FOUND)), 6),
    ],
)
def test_statuses_are_those_of_the_documentation(error: Exception, status: int) -> None:
    printer, _, _ = _printer()
    assert report(error, printer) == status


def test_an_error_names_fields_reason_and_the_next_step() -> None:
    details = ErrorDetails(
        grpc.StatusCode.INVALID_ARGUMENT,
        reason="RESOURCE_ALREADY_EXISTS",
        violations=(FieldViolation("account.networks[0]", "is not a network"),),
        request_id="r-1",
    )
    printer, _, err = _printer()
    report(InvalidArgumentError("text", details), printer)
    text = err.getvalue()
    assert "account.networks[0]: is not a network" in text
    assert "RESOURCE_ALREADY_EXISTS" in text
    assert "r-1" in text
    assert problems.ADVICE["RESOURCE_ALREADY_EXISTS"] in text


def test_an_error_for_programs_is_one_json_object() -> None:
    details = ErrorDetails(grpc.StatusCode.NOT_FOUND, reason="RESOURCE_NOT_FOUND", metadata={"resource": "x"})
    printer, out, err = _printer(Output.JSON)
    report(NotFoundError("x does not exist", details), printer)
    assert out.getvalue() == ""
    assert json.loads(err.getvalue())["reason"] == "RESOURCE_NOT_FOUND"
    assert json.loads(err.getvalue())["code"] == 5


@pytest.mark.parametrize("line", ["nonsense", "rules create", "messages list --state nonsense"])
def test_a_wrong_line_is_status_2(line: str) -> None:
    assert run(line.split()) == 2


def test_without_a_server_the_error_says_where_one_could_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["accounts", "list"]) == 3
    assert "POSTROAD_SERVER" in capsys.readouterr().err


_SEND = "send --to a@b.example --from c@d.example"
_READING = [
    f"{_SEND} --raw",
    f"{_SEND} --body-file",
    "messages send",
    f"messages {_SEND} --text-file",
    f"messages {_SEND} --html-file",
    f"messages {_SEND} --attach",
    "providers create x --endpoint y --password-file",
    "providers create x --endpoint y --provider-ca-file",
    "providers update x --password-file",
    "contexts set x --api-key-file",
    "accounts list --ca-file",
]


class Providers:
    """The part of a client that shows a provider."""

    def __init__(self) -> None:
        self.providers = self

    def GetProvider(self, request: GetProviderRequest) -> Provider:
        return Provider(name=request.name)


@pytest.mark.parametrize("line", _READING)
def test_a_file_that_is_not_there_is_status_3_and_is_named(
    line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTROAD_SMTP_SERVER", "127.0.0.1:1")
    monkeypatch.setenv("POSTROAD_SERVER", "127.0.0.1:1")
    monkeypatch.setenv("POSTROAD_API_KEY", "prk_none")
    monkeypatch.setenv("POSTROAD_ACCOUNT", "demo")
    if "update" in line:  # which reads the provider first
        monkeypatch.setattr(Session, "client", Providers())
    assert run([*line.split(), "nowhere.eml"]) == problems.NOT_CONFIGURED
    assert "nowhere.eml" in capsys.readouterr().err


@pytest.mark.parametrize("line", [one for one in _READING if "-file" in one and "ca-file" not in one])
def test_a_text_that_is_none_is_status_3_and_is_named(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "latin").write_bytes(b"gr\xfc\xdfe")
    monkeypatch.setenv("POSTROAD_SMTP_SERVER", "127.0.0.1:1")
    monkeypatch.setenv("POSTROAD_ACCOUNT", "demo")
    monkeypatch.setattr(Session, "client", Providers())
    assert run([*line.split(), "latin"]) == problems.NOT_CONFIGURED
    assert "latin: it is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_printed(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    assert "_POSTROAD_COMPLETE" in capsys.readouterr().out


def test_contexts_can_be_made_used_and_forgotten(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "key").write_text("prk_secret\n")
    assert (
        run(["contexts", "set", "prod", "--server", "mail.example:443", "--api-key-file", "key", "--account", "main"])
        == 0
    )
    assert run(["contexts", "set", "other", "--server", "other.example:443"]) == 0
    assert run(["contexts", "use", "other"]) == 0
    capsys.readouterr()
    assert run(["contexts", "list", "--output", "json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["current"] == "other"
    assert [one["name"] for one in listed["contexts"]] == ["other", "prod"]
    assert run(["contexts", "delete", "nothing"]) == 6
    assert run(["contexts", "delete", "other", "--yes"]) == 0


@pytest.mark.parametrize(
    ("words", "answer", "deleted"),
    [([], "n", False), ([], "y", True), ([], "", False), (["--yes"], "", True), (["--output", "json"], "", True)],
)
def test_a_context_is_deleted_when_somebody_says_so(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    answer: str,
    *,
    deleted: bool,
) -> None:
    assert run(["contexts", "set", "prod", "--server", "mail.example:443"]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO(answer and f"{answer}\n"))
    assert (run(["contexts", "delete", "prod", *words]) == 0) is deleted
    assert ("Delete context prod?" in capsys.readouterr().out) is (not words)
    assert run(["contexts", "list", "-o", "json"]) == 0
    assert bool(json.loads(capsys.readouterr().out)["contexts"]) is not deleted


@pytest.mark.parametrize("content", ["", "\n"])
def test_a_context_is_not_kept_without_the_key_that_was_named(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key").write_text(content)
    assert (
        run(["contexts", "set", "prod", "--server", "a.example:1", "--api-key-file", "key"]) == problems.NOT_CONFIGURED
    )
    assert "there is no key in it" in capsys.readouterr().err
    assert run(["contexts", "list", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["contexts"] == []


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("mail.example", "mail.example", 0),
        ("mail.example:25", "mail.example", 25),
        ("192.0.2.1:25", "192.0.2.1", 25),
        ("[2001:db8::1]:25", "2001:db8::1", 25),
        ("[2001:db8::1]", "2001:db8::1", 0),
        ("2001:db8::1", "2001:db8::1", 0),
    ],
)
def test_endpoints_are_read_with_and_without_port(text: str, host: str, port: int) -> None:
    endpoint = _endpoint(text, implicit_tls=False)
    assert (endpoint.host, endpoint.port) == (host, port)


def test_a_composed_message_has_crlf_only_and_leaves_date_to_the_node() -> None:
    content = compose("app@example.com", ["a@example.net", "b@example.net"], "Grüße", "Zeile\nzwei\n")
    assert b"\n" not in content.replace(b"\r\n", b"")
    assert b"To: a@example.net, b@example.net\r\n" in content
    assert b"Date:" not in content
    assert content.isascii()


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"a\nb", b"a\r\nb\r\n"), (b"a\r\n", b"a\r\n"), (b"a\rb\r\n", b"a\r\nb\r\n"), (b"", b"\r\n")],
)
def test_a_file_is_brought_to_crlf(content: bytes, expected: bytes) -> None:
    assert canonical(content) == expected


def test_the_password_of_the_file_goes_to_its_server_only(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SmtpSettings(server="127.0.0.1:2587", username="demo.app", password="prs_file")
    monkeypatch.setenv("POSTROAD_SMTP_SERVER", "evil.example:587")
    assert smtp_settings(found).password == ""
    monkeypatch.setenv("POSTROAD_SMTP_SERVER", "127.0.0.1:2587")
    assert smtp_settings(found).password == "prs_file"


def test_a_timeline_line_says_who_where_and_how_long() -> None:
    event = DeliveryEvent(
        type=DELIVERY_EVENT_TYPE_SENT,
        recipient="a@example.net",
        attempt=1,
        provider="accounts/demo/providers/inbox",
        remote_host="inbox[127.0.0.1]:2526",
        tls="TLSv1.3",
        reply_code=250,
        enhanced_code="2.0.0",
        reply_text="2.0.0 stored as 1",
    )
    line = event_line(event)
    for part in ("sent", "a@example.net", "attempt 1", "via inbox", "inbox[127.0.0.1]:2526, TLSv1.3", "250 2.0.0 st"):
        assert part in line


def test_where_nothing_is_known_the_server_is_named_and_not_the_account(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["messages", "list"]) == problems.NOT_CONFIGURED
    assert "no server is known" in capsys.readouterr().err


def test_mail_of_the_inbox_has_names_for_programs_as_the_api_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = b"Subject: hello\r\n\r\nbody\r\n"
    Inbox(tmp_path).add(content, sender="a@example.com", recipients=["b@example.net"], receive_time="2026-11-20T10:00Z")
    assert run(["inbox", "show", "1", "--dir", str(tmp_path), "--output", "json"]) == 0
    (mail,) = json.loads(capsys.readouterr().out)["mails"]
    assert (mail["receiveTime"], mail["sizeBytes"]) == ("2026-11-20T10:00Z", len(content))
    assert not [name for name in mail if "_" in name]


def test_a_mail_that_is_not_there_is_told_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inbox", "show", "7", "--dir", str(tmp_path)]) == problems.NOT_THERE
    assert "postroad inbox list" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "option"),
    [
        ("--scope address --unit connection --amount 5 --per minute", "--shared"),
        ("--scope destination --unit connection --amount 5", "--shared"),
        ("--scope account --unit message --amount 5", "--per"),
        ("--scope provider --unit message --amount 5", "--per"),
        ("--scope address --unit connection --amount 5 --shared", "--per"),
    ],
)
def test_a_limit_that_lacks_an_option_is_told_which(line: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["limits", "create", "one", *line.split()]) == 2
    assert option in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", ["--scope provider --unit connection", "--scope destination --unit message --shared --per hour"]
)
def test_a_limit_with_all_options_gets_as_far_as_the_server(line: str) -> None:
    assert run(["limits", "create", "one", "--amount", "5", *line.split()]) == problems.NOT_CONFIGURED


class Limits:
    """The part of a client that is asked for one limit."""

    def __init__(self, *limits: Limit) -> None:
        self.limits = self
        self._by_name = {limit.name: limit for limit in limits}

    def GetLimit(self, request: GetLimitRequest) -> Limit:
        if request.name not in self._by_name:
            raise NotFoundError("none", ErrorDetails(grpc.StatusCode.NOT_FOUND, "RESOURCE_NOT_FOUND"))
        return self._by_name[request.name]


@pytest.fixture
def slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose only limit is a shared one of connections at once."""
    client = Limits(Limit(name="limits/slots", unit=Limit.UNIT_CONNECTION, amount=5))
    monkeypatch.setattr(Session, "client", client)
    monkeypatch.setenv("POSTROAD_ACCOUNT", "demo")


@pytest.mark.usefixtures("slots")
def test_a_limit_that_the_account_has_not_may_be_a_shared_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["limits", "get", "slots"]) == problems.NOT_THERE
    assert "limits/slots" in capsys.readouterr().err
    assert run(["limits", "get", "limits/slots"]) == 0


@pytest.mark.usefixtures("slots")
def test_connections_at_once_are_not_turned_into_a_rate_by_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["limits", "update", "limits/slots", "--per", "hour"]) == 2
    assert "--per" in capsys.readouterr().err


class Nodes:
    """The part of a client that revokes a node."""

    def __init__(self) -> None:
        self.nodes = self
        self.revoked: list[str] = []

    def GetNode(self, request: GetNodeRequest) -> Node:
        return Node(name=request.name)

    def RevokeNode(self, request: RevokeNodeRequest) -> Node:
        self.revoked.append(request.name)
        return Node(name=request.name, state=Node.STATE_REVOKED)


@pytest.mark.parametrize(
    ("words", "answer", "revoked"),
    [([], "n", False), ([], "y", True), ([], "", False), (["--yes"], "", True), (["--output", "json"], "", True)],
)
def test_a_node_is_revoked_when_somebody_says_so(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    answer: str,
    *,
    revoked: bool,
) -> None:
    client = Nodes()
    monkeypatch.setattr(Session, "client", client)
    monkeypatch.setattr("sys.stdin", io.StringIO(answer and f"{answer}\n"))
    assert (run(["nodes", "revoke", "mx1", *words]) == 0) is revoked
    assert client.revoked == (["nodes/mx1"] if revoked else [])
    assert ("Revoke nodes/mx1?" in capsys.readouterr().out) is (not words)


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        ("LIMIT_SUBJECT_MISSING", problems.NOT_THERE),
        ("PROVIDER_MISSING", problems.NOT_THERE),
        ("NODE_POOL_MISSING", problems.NOT_THERE),
        # Not a thing that was named.
        ("SPOOL_MISSING", problems.FAILED),
        ("PROVIDER_IN_USE", problems.FAILED),
    ],
)
def test_what_is_named_and_missing_ends_like_what_is_asked_for_and_missing(reason: str, status: int) -> None:
    error = FailedPreconditionError("none", ErrorDetails(grpc.StatusCode.FAILED_PRECONDITION, reason))
    assert problems.status_of(error) == status


@pytest.mark.parametrize(
    ("seconds", "text"), [(1, "a second"), (3_600, "an hour"), (86_400, "a day"), (7_200, "in 2h")]
)
def test_a_rate_reads_as_people_say_it(seconds: int, text: str) -> None:
    limit = Limit(unit=Limit.UNIT_MESSAGE, amount=5)
    limit.period.seconds = seconds
    assert _rate(limit) == f"5 messages {text}"


def test_a_command_says_whom_it_waits_for() -> None:
    pending = [
        SpoolProgress(spool="00000000-0000-0000-0000-000000000001"),
        SpoolProgress(spool="01900000-0000-7000-8000-000000000000", node="nodes/mx2"),
        SpoolProgress(spool="01900000-0000-7000-8000-000000000002"),
    ]
    metadata = CommandMetadata(changed_count=4, too_late_count=1, spool_count=5, done_spool_count=2)
    metadata.pending_spools.extend(pending)
    operation = Operation()
    operation.metadata.Pack(metadata)
    assert progress_text(operation) == (
        "2 of 5 spools done, 4 changed, 1 too late; waiting for 01900000-0000-7000-8000-000000000002, mx2, "
        "the replicated queue"
    )


class Commands:
    """The part of a client that takes commands and messages; what it answers is given."""

    def __init__(self, operation: Operation, error: PostroadError | None = None) -> None:
        self.messages = self.operations = self.providers = self
        self.operation = operation
        self.error = error
        self.sent: list[SendMessageRequest] = []

    def CommandMessages(self, request: CommandMessagesRequest) -> Operation:
        return self.operation

    def GetProvider(self, request: GetProviderRequest) -> Provider:
        if request.name.endswith("/nope"):
            raise NotFoundError("none", ErrorDetails(grpc.StatusCode.NOT_FOUND, "RESOURCE_NOT_FOUND"))
        return Provider(name=request.name)

    def SendMessage(self, request: SendMessageRequest) -> SendMessageResponse:
        self.sent.append(request)
        if self.error is not None:
            raise self.error
        return SendMessageResponse(message="accounts/demo/messages/m1", recipient_count=len(request.message.content.to))


def _operation(counts: CommandMetadata | CommandResult) -> Operation:
    done = isinstance(counts, CommandResult)
    operation = Operation(name="accounts/demo/operations/1", done=done)
    (operation.response if done else operation.metadata).Pack(counts)
    return operation


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Commands]:
    """Make a server that answers so."""

    def make(counts: CommandMetadata | CommandResult, error: PostroadError | None = None) -> Commands:
        client = Commands(_operation(counts), error)
        monkeypatch.setattr(Session, "client", client)
        return client

    monkeypatch.setenv("POSTROAD_ACCOUNT", "demo")
    return make


def test_programs_are_told_what_was_changed_also_when_the_wait_is_over(
    answering: Callable[..., Commands], capsys: pytest.CaptureFixture[str]
) -> None:
    pending = [SpoolProgress(spool="01900000-0000-7000-8000-000000000000", node="nodes/mx2")]
    answering(CommandMetadata(changed_count=3, too_late_count=1, spool_count=2, pending_spools=pending))
    line = ["messages", "hold", "--account-wide", "--wait", "0", "-o", "json"]
    assert run(line) == problems.UNREACHABLE
    said = capsys.readouterr()
    assert json.loads(said.out) == {
        "changedCount": 3,
        "tooLateCount": 1,
        "operations": ["accounts/demo/operations/1"],
    }
    assert "mx2" in json.loads(said.err)["message"]


def test_what_the_replicated_queue_says_is_not_said_by_a_number(
    answering: Callable[..., Commands], capsys: pytest.CaptureFixture[str]
) -> None:
    queue = SpoolProgress(spool="00000000-0000-0000-0000-000000000001", error="no room")
    answering(CommandResult(changed_count=1, spools=[queue]))
    assert run(["messages", "hold", "--account-wide", "--yes"]) == 0
    assert capsys.readouterr().out.splitlines() == ["the replicated queue: no room", "Held 1, too late for 0"]


@pytest.mark.parametrize(("provider", "status"), [("nope", problems.NOT_THERE), ("relay", problems.FAILED)])
def test_a_filter_that_met_nothing_says_so_when_there_is_no_such_provider(
    provider: str, status: int, answering: Callable[..., Commands]
) -> None:
    answering(CommandResult())
    assert run(["messages", "hold", "--provider", provider, "--yes"]) == status
    # Mail may wait for one that was deleted.
    answering(CommandResult(changed_count=1))
    assert run(["messages", "hold", "--provider", provider, "--yes"]) == 0


_MAIL = ["messages", "send", "--from", "a@b.example", "--to", "c@d.example", "--text", "x"]


@pytest.mark.parametrize(
    ("kind", "details"),
    [
        (UnavailableError, ErrorDetails(grpc.StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")),
        (UnavailableError, ErrorDetails(grpc.StatusCode.UNAVAILABLE)),
        (DeadlineError, ErrorDetails(grpc.StatusCode.DEADLINE_EXCEEDED)),
    ],
)
@pytest.mark.parametrize("words", [[], ["-o", "json"]])
def test_a_message_of_which_nobody_knows_is_told_with_how_to_send_it_once(
    kind: type[PostroadError],
    details: ErrorDetails,
    words: list[str],
    answering: Callable[..., Commands],
    capsys: pytest.CaptureFixture[str],
) -> None:
    client = answering(CommandResult(), kind("x", details))
    assert run([*_MAIL, "--in", "1h", *words]) == problems.UNREACHABLE
    err = capsys.readouterr().err
    found = re.search(r"--request-id (\S+) --at (\S+)", json.loads(err)["advice"] if words else err)
    assert found is not None
    client.error = None
    assert run([*_MAIL, "--request-id", found[1], "--at", found[2]]) == 0
    first, again = client.sent
    assert first == again


def test_a_message_that_was_refused_is_not_said_to_be_stored(
    answering: Callable[..., Commands], capsys: pytest.CaptureFixture[str]
) -> None:
    answering(CommandResult(), NotFoundError("x", ErrorDetails(grpc.StatusCode.NOT_FOUND)))
    assert run(_MAIL) == problems.NOT_THERE
    assert "--request-id" not in capsys.readouterr().err


@pytest.mark.parametrize(("more", "text"), [([], "1 recipient"), (["--to", "e@f.example"], "2 recipients")])
def test_a_message_would_go_to_so_many(
    more: list[str], text: str, answering: Callable[..., Commands], capsys: pytest.CaptureFixture[str]
) -> None:
    answering(CommandResult())
    assert run([*_MAIL, *more, "--validate-only"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"It would go to {text}"]


def test_one_time_is_enough(answering: Callable[..., Commands], capsys: pytest.CaptureFixture[str]) -> None:
    answering(CommandResult())
    assert run([*_MAIL, "--at", "2026-12-01", "--in", "1h"]) == 2
    assert "give --at or --in, not both" in capsys.readouterr().err
