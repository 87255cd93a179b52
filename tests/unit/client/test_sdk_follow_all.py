"""Many messages followed together: few requests, no message lost, no waiting for what does not come."""

from __future__ import annotations

from typing import Any, cast

import grpc
import pytest

from postroad.control.v1.message_pb2 import RECIPIENT_STATE_DEFERRED, RECIPIENT_STATE_SENT, Message
from postroad.control.v1.message_service_pb2 import ListMessagesRequest, ListMessagesResponse
from postroad.sdk import Client, DeadlineError, follow_all
from postroad.sdk.errors import ErrorDetails, UnavailableError

PARENT = "accounts/demo"


def name_of(number: int) -> str:
    return f"{PARENT}/messages/{number:04}"


class Server:
    """A server with messages by number, newest last, that answers in pages of two."""

    def __init__(self, count: int) -> None:
        self.states = dict.fromkeys(range(count), RECIPIENT_STATE_DEFERRED)
        self.requests: list[ListMessagesRequest] = []
        self.errors: list[Exception] = []

    @property
    def messages(self) -> Server:
        return self

    def ListMessages(self, request: ListMessagesRequest) -> ListMessagesResponse:
        self.requests.append(request)
        if self.errors:
            raise self.errors.pop(0)
        last = int(request.page_token or len(self.states))
        numbers = list(range(last - 1, max(-1, last - 3), -1))
        answer = ListMessagesResponse(next_page_token=str(numbers[-1]) if numbers and numbers[-1] else "")
        for number in numbers:
            message = Message(name=name_of(number))
            message.recipients.add(state=self.states[number])
            answer.messages.append(message)
        return answer

    def send(self, *numbers: int) -> None:
        self.states |= dict.fromkeys(numbers, RECIPIENT_STATE_SENT)


def client_of(server: Server) -> Client:
    return cast("Client", server)


def test_each_message_comes_once_when_it_has_ended() -> None:
    server = Server(9)
    server.send(4, 6)
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            server.send(5)

    found = [one.name for one in follow_all(client_of(server), map(name_of, (4, 5, 6)), 60, pause=pause)]
    assert found == [name_of(6), name_of(4), name_of(5)]
    # Nothing new: less and less often.
    assert pauses == [0.2, 0.5, 1.0]


def test_pages_are_read_down_to_the_oldest_that_is_waited_for_and_no_further() -> None:
    server = Server(9)
    server.send(*range(9))
    assert len(list(follow_all(client_of(server), [name_of(6)], 60, pause=_never))) == 1
    # 8 7, 6 5: not the two pages below.
    assert len(server.requests) == 2


def test_a_server_that_is_away_is_asked_again() -> None:
    server = Server(1)
    server.send(0)
    server.errors = [UnavailableError("away", ErrorDetails(grpc.StatusCode.UNAVAILABLE))]
    pauses: list[float] = []
    assert len(list(follow_all(client_of(server), [name_of(0)], 60, pause=pauses.append))) == 1
    assert len(pauses) == 1


def test_messages_that_do_not_end_are_given_up() -> None:
    server = Server(3)
    server.send(2)
    now_s = [0.0]

    def pause(seconds: float) -> None:
        now_s[0] += seconds

    found = follow_all(client_of(server), map(name_of, (0, 1, 2)), 10, pause=pause, clock=lambda: now_s[0])
    assert next(found).name == name_of(2)
    with pytest.raises(DeadlineError, match="2 messages have not ended"):
        next(found)
    assert now_s[0] == pytest.approx(10)


def _never(_seconds: Any) -> None:
    raise AssertionError("there is nothing to wait for")
