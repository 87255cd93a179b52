"""Following a message from its acceptance to its end.

Contract. `follow` yields each event of the message once, in the order in which the ledger learnt them, and ends when
every recipient is in a terminal state; its return value (`yield from`) is the message then. It survives a server that
goes away and comes back, resuming where it was. `DeadlineError` when `timeout_s` is over first.

`follow_all` yields each of many messages as it ends, without events, at the price of a few requests for all of them
together: a watch and a look for each would use up a key's requests. `DeadlineError` when none ended for `timeout_s`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator

import grpc

from postroad.control.v1.message_pb2 import (
    RECIPIENT_STATE_BOUNCED,
    RECIPIENT_STATE_CANCELLED,
    RECIPIENT_STATE_EXPIRED,
    RECIPIENT_STATE_FAILED,
    RECIPIENT_STATE_SENT,
    DeliveryEvent,
    Message,
)
from postroad.control.v1.message_service_pb2 import GetMessageRequest, ListMessagesRequest, WatchEventsRequest
from postroad.sdk.client import Client
from postroad.sdk.errors import DeadlineError, ErrorDetails, NotFoundError, ResourceExhaustedError, UnavailableError

TERMINAL_STATES = frozenset(
    {
        RECIPIENT_STATE_SENT,
        RECIPIENT_STATE_BOUNCED,
        RECIPIENT_STATE_FAILED,
        RECIPIENT_STATE_EXPIRED,
        RECIPIENT_STATE_CANCELLED,
    }
)
_PAGE_SIZE = 1_000
_PAUSES_S = (0.2, 0.5, 1.0, 2.0, 4.0)


def is_over(message: Message) -> bool:
    """Whether every recipient is in a terminal state."""
    return bool(message.recipients) and all(one.state in TERMINAL_STATES for one in message.recipients)


def follow(
    client: Client, name: str, timeout_s: float, *, pause: Callable[[float], None] = time.sleep
) -> Generator[DeliveryEvent, None, Message]:
    """The events of `accounts/{account}/messages/{message}`, which the ledger need not know yet. See the module."""
    deadline = time.monotonic() + timeout_s
    position = ""
    failures = 0
    while (left_s := deadline - time.monotonic()) > 0:
        request = WatchEventsRequest(parent=name.rpartition("/messages/")[0], message=name, position=position)
        stream = client.messages.WatchEvents(request, timeout=left_s)
        try:
            for answer in stream:
                failures = 0
                for event in answer.events:
                    position = event.position
                    yield event
                message = _message_if_known(client, name)
                if message is not None and is_over(message):
                    return message
        except (UnavailableError, ResourceExhaustedError):
            pass
        except DeadlineError:
            break
        finally:
            stream.cancel()
        pause(min(_PAUSES_S[min(failures, len(_PAUSES_S) - 1)], max(0.0, deadline - time.monotonic())))
        failures += 1
    raise DeadlineError(f"{name} did not end within {timeout_s:.0f} s", ErrorDetails(grpc.StatusCode.DEADLINE_EXCEEDED))


def follow_all(
    client: Client,
    names: Iterable[str],
    timeout_s: float,
    *,
    pause: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Message]:
    """Each of these messages of one account when it has ended, in no order. DeadlineError. See the module."""
    waiting = set(names)
    quiet, quiet_since = 0, clock()
    while waiting:
        ended: list[Message] = []
        with contextlib.suppress(UnavailableError, ResourceExhaustedError):
            newest = _newest(client, min(waiting))
            ended = [message for message in newest if message.name in waiting and is_over(message)]
        for message in ended:
            waiting.discard(message.name)
            yield message
        if ended:
            quiet, quiet_since = 0, clock()
        left_s = quiet_since + timeout_s - clock()
        if waiting and left_s <= 0:
            text = f"{len(waiting)} messages have not ended, and none did for {timeout_s:.0f} s"
            raise DeadlineError(text, ErrorDetails(grpc.StatusCode.DEADLINE_EXCEEDED))
        if waiting:
            pause(min(_PAUSES_S[min(quiet, len(_PAUSES_S) - 1)], left_s))
            quiet += 1


def _newest(client: Client, oldest: str) -> Iterator[Message]:
    """The messages of an account from the newest down to `oldest`: ids grow with time."""
    token = ""
    while True:
        request = ListMessagesRequest(parent=oldest.rpartition("/messages/")[0], page_size=_PAGE_SIZE, page_token=token)
        answer = client.messages.ListMessages(request)
        for message in answer.messages:
            if message.name < oldest:
                return
            yield message
        token = answer.next_page_token
        if not token:
            return


def _message_if_known(client: Client, name: str) -> Message | None:
    try:
        return client.messages.GetMessage(GetMessageRequest(name=name))
    except NotFoundError:
        return None
