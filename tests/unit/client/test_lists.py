"""How much of a list is shown: all to programs, a part to people, who are told that there is more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from postroad.cli.main import run
from postroad.cli.session import Session
from postroad.control.v1.message_pb2 import RECIPIENT_STATE_QUEUED, Message
from postroad.control.v1.message_service_pb2 import ListMessagesRequest, ListMessagesResponse
from postroad.inbox import Inbox

COUNT = 1_234
# The server gives no more at once, whatever is asked for.
PAGE = 500


class Messages:
    """The part of a client that lists messages."""

    def __init__(self, count: int) -> None:
        self.messages = self
        self.requests: list[ListMessagesRequest] = []
        self._names = [f"accounts/demo/messages/{number}" for number in range(count)]

    def ListMessages(self, request: ListMessagesRequest) -> ListMessagesResponse:
        self.requests.append(request)
        first = int(request.page_token or 0)
        last = first + min(request.page_size, PAGE)
        token = str(last) if last < len(self._names) else ""
        found = [Message(name=name) for name in self._names[first:last]]
        return ListMessagesResponse(messages=found, next_page_token=token)


@pytest.fixture(autouse=True)
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Messages:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("POSTROAD_ACCOUNT", "demo")
    for name in ("POSTROAD_CONTEXT", "POSTROAD_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    client = Messages(COUNT)
    monkeypatch.setattr(Session, "client", client)
    return client


@pytest.mark.parametrize(
    ("words", "count"),
    [([], COUNT), (["--limit", "0"], COUNT), (["--limit", "700"], 700), (["--limit", "9999"], COUNT)],
)
def test_programs_get_all_unless_they_say_otherwise(
    words: list[str], count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["messages", "list", "--output", "json", *words]) == 0
    said = capsys.readouterr()
    assert [one["name"] for one in json.loads(said.out)["messages"]] == [
        f"accounts/demo/messages/{number}" for number in range(count)
    ]
    assert said.err == ""


@pytest.mark.parametrize(("words", "count"), [([], 50), (["--limit", "700"], 700)])
def test_people_are_told_that_there_is_more(words: list[str], count: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["messages", "list", *words]) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == count + 1
    assert f"{count} shown, more exist: --limit NUMBER" in said.err


@pytest.mark.parametrize("words", [["--limit", "0"], ["--limit", str(COUNT)]])
def test_people_are_not_told_of_more_where_there_is_none(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["messages", "list", *words]) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == COUNT + 1
    assert said.err == ""


def test_what_is_asked_for_holds_on_every_page(client: Messages, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["messages", "list", "--state", "queued", "--since", "2026-11-28T02:12:00Z", "-o", "json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["messages"]) == COUNT
    assert len(client.requests) == 3
    assert {(one.state, one.start_time.ToJsonString()) for one in client.requests} == {
        (RECIPIENT_STATE_QUEUED, "2026-11-28T02:12:00Z")
    }


def test_the_inbox_ends_like_the_other_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inbox = Inbox(tmp_path)
    for _ in range(51):
        inbox.add(b"\r\nbody\r\n", sender="a@b.example", recipients=["c@d.example"], receive_time="2026-11-20T10:00Z")
    line = ["inbox", "list", "--dir", str(tmp_path)]
    assert run(line) == 0
    said = capsys.readouterr()
    assert [row.split()[0] for row in said.out.splitlines()[1:]] == [str(number) for number in range(2, 52)]
    assert "50 shown, more exist: --last NUMBER" in said.err
    assert run([*line, "--last", "0"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 52
    assert run([*line, "--output", "json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["mails"]) == 51
