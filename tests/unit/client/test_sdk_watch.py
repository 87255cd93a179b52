"""Watching the events of an account: a stream that breaks is taken up where it was, and a last look is not left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import grpc
import pytest

from postroad.control.v1.message_pb2 import RECIPIENT_STATE_SENT, DeliveryEvent, Message
from postroad.control.v1.message_service_pb2 import GetMessageRequest, WatchEventsRequest, WatchEventsResponse
from postroad.sdk import Client, DeadlineError, follow, watch_events
from postroad.sdk.errors import (
    ErrorDetails,
    FailedPreconditionError,
    PostroadError,
    ResourceExhaustedError,
    UnavailableError,
)

PARENT = "accounts/demo"
NAME = f"{PARENT}/messages/01a1f8b6-c723-742f-bae0-6864fc456caf"
AWAY = UnavailableError("away", ErrorDetails(grpc.StatusCode.UNAVAILABLE))
USED_UP = ResourceExhaustedError(
    "used up", ErrorDetails(grpc.StatusCode.RESOURCE_EXHAUSTED, reason="REQUESTS_EXHAUSTED")
)
TOO_LARGE = ResourceExhaustedError("larger than max", ErrorDetails(grpc.StatusCode.RESOURCE_EXHAUSTED))
OVER = DeadlineError("over", ErrorDetails(grpc.StatusCode.DEADLINE_EXCEEDED))
AHEAD = FailedPreconditionError("ahead", ErrorDetails(grpc.StatusCode.FAILED_PRECONDITION))
Parts = list[WatchEventsResponse | PostroadError]


class Stream:
    """A stream that says what it was given, and then ends or breaks."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.is_cancelled = False

    def __iter__(self) -> Iterator[WatchEventsResponse]:
        for part in self._parts:
            if isinstance(part, PostroadError):
                raise part
            yield part

    def cancel(self) -> None:
        self.is_cancelled = True


class Server:
    """A server with a script of streams, and of errors before it shows its message."""

    def __init__(self, *streams: Parts) -> None:
        self.messages = self
        self.streams = [Stream(parts) for parts in streams]
        self.positions: list[str] = []
        self.errors: list[PostroadError] = []

    def WatchEvents(self, request: WatchEventsRequest, timeout: float | None) -> Stream:
        assert request.parent == PARENT
        self.positions.append(request.position)
        return self.streams[len(self.positions) - 1]

    def GetMessage(self, request: GetMessageRequest) -> Message:
        if self.errors:
            raise self.errors.pop(0)
        message = Message(name=request.name)
        message.recipients.add(state=RECIPIENT_STATE_SENT)
        message.events.add(position="8-1")
        return message


def client_of(server: Server) -> Client:
    return cast("Client", server)


def answer(position: str, *events: str) -> WatchEventsResponse:
    return WatchEventsResponse(position=position, events=[DeliveryEvent(position=one) for one in events])


def test_a_stream_that_breaks_goes_on_after_the_last_answer_even_when_that_had_no_events() -> None:
    server = Server([answer("7-1"), AWAY], [answer("7-1"), answer("9-2", "8-1", "9-2"), USED_UP], [OVER])
    pauses: list[float] = []

    seen = list(watch_events(client_of(server), PARENT, timeout_s=60.0, pause=pauses.append))

    assert [event.position for one in seen for event in one.events] == ["8-1", "9-2"]
    assert server.positions == ["", "7-1", "9-2"]
    assert len(pauses) == 2
    assert all(stream.is_cancelled for stream in server.streams)


@pytest.mark.parametrize("error", [AHEAD, TOO_LARGE], ids=["position ahead", "answer too large"])
def test_what_does_not_pass_with_time_is_an_error(error: PostroadError) -> None:
    server = Server([error])
    with pytest.raises(type(error)):
        next(watch_events(client_of(server), PARENT, position="9-9"))
    assert server.positions == ["9-9"]


def test_a_watch_that_is_closed_ends_its_stream() -> None:
    server = Server([answer("7-1"), answer("8-1", "8-1")])
    answers = watch_events(client_of(server), PARENT)
    next(answers)
    answers.close()
    assert server.streams[0].is_cancelled


def test_a_record_that_is_ahead_of_the_stream_leaves_out_no_event() -> None:
    server = Server([answer("7-1"), answer("8-1", "8-1"), OVER])
    events = follow(client_of(server), NAME, 60.0)
    assert next(events).position == "8-1"
    with pytest.raises(StopIteration) as end:
        next(events)
    assert end.value.value.name == NAME


@pytest.mark.parametrize("error", [AWAY, USED_UP], ids=["away", "used up"])
def test_a_look_that_fails_after_the_last_event_is_made_again(error: PostroadError) -> None:
    server = Server([answer("8-1", "8-1"), OVER])
    server.errors = [error, error]
    pauses: list[float] = []

    events = follow(client_of(server), NAME, 60.0, pause=pauses.append)
    assert next(events).position == "8-1"
    with pytest.raises(StopIteration) as end:
        next(events)

    assert end.value.value.name == NAME
    assert len(pauses) == 2
    assert server.streams[0].is_cancelled
