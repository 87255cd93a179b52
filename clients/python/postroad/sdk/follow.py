"""Following a message from its acceptance to its end.

Contract. `follow` yields each event of the message once, in the order in which the ledger learnt them, and ends when
every recipient is in a terminal state; its return value (`yield from`) is the message then. It survives a server that
goes away and comes back, resuming where it was. `DeadlineError` when `timeout_s` is over first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator

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
from postroad.control.v1.message_service_pb2 import GetMessageRequest, WatchEventsRequest
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


def _message_if_known(client: Client, name: str) -> Message | None:
    try:
        return client.messages.GetMessage(GetMessageRequest(name=name))
    except NotFoundError:
        return None
