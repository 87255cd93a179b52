"""Watching what happens to an account's mail, and following messages from their acceptance to their end.

Contract. `watch_events` yields the answers of `WatchEvents` as they come, the first at once and maybe without events.
It survives a server that goes away and comes back, and a stream that the server ends after a while, resuming after the
last answer: no event is missed, none comes twice, as long as PostgreSQL has not lost commits. It ends without an error
when `timeout_s` is over, without one never. FailedPreconditionError when the ledger has not been at the position:
PostgreSQL was restored. ResourceExhaustedError only for what does not pass with time.

`follow` yields each event of the message once, in the order in which the ledger learnt them, and ends when every
recipient is in a terminal state; its return value (`yield from`) is the message then. `DeadlineError` when `timeout_s`
is over first.

`follow_all` yields each of many messages as it ends, without events, at the price of a few requests for all of them
together: a watch and a look for each would use up a key's requests. `DeadlineError` when none ended for `timeout_s`.
"""

from __future__ import annotations

import contextlib
import math
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
from postroad.control.v1.message_service_pb2 import (
    GetMessageRequest,
    ListMessagesRequest,
    WatchEventsRequest,
    WatchEventsResponse,
)
from postroad.sdk.client import Client
from postroad.sdk.errors import (
    DeadlineError,
    ErrorDetails,
    NotFoundError,
    PostroadError,
    ResourceExhaustedError,
    UnavailableError,
)

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
_PASSING = frozenset({"REQUESTS_EXHAUSTED", "READER_TOO_SLOW", "TOO_MANY_WATCHERS"})
_PAUSES_S = (0.2, 0.5, 1.0, 2.0, 4.0)


def is_over(message: Message) -> bool:
    """Whether every recipient is in a terminal state."""
    return bool(message.recipients) and all(one.state in TERMINAL_STATES for one in message.recipients)


def watch_events(
    client: Client,
    parent: str,
    *,
    message: str = "",
    position: str = "",
    timeout_s: float | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> Generator[WatchEventsResponse]:
    """What happens to the mail of `accounts/{account}`, or to one message, after a position. See the module.

    Without a position it begins now, or at the message's first event. Closing the generator ends the stream.
    """
    deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
    failures = 0
    while (left_s := deadline - time.monotonic()) > 0:
        request = WatchEventsRequest(parent=parent, message=message, position=position)
        stream = client.messages.WatchEvents(request, timeout=None if timeout_s is None else left_s)
        try:
            for answer in stream:
                failures = 0
                position = answer.position
                yield answer
        except (UnavailableError, ResourceExhaustedError) as error:
            _check_passes(error)
        except DeadlineError:
            return
        finally:
            stream.cancel()
        _pause(pause, failures, deadline)
        failures += 1


def follow(
    client: Client, name: str, timeout_s: float, *, pause: Callable[[float], None] = time.sleep
) -> Generator[DeliveryEvent, None, Message]:
    """The events of `accounts/{account}/messages/{message}`, which the ledger need not know yet. See the module."""
    deadline = time.monotonic() + timeout_s
    parent = name.rpartition("/messages/")[0]
    seen: set[str] = set()
    with contextlib.closing(watch_events(client, parent, message=name, timeout_s=timeout_s, pause=pause)) as answers:
        for answer in answers:
            for event in answer.events:
                seen.add(event.position)
                yield event
            message = _message_if_known(client, name, deadline, pause)
            # The record may be ahead of the stream, which waits for transactions that are still open.
            if message is not None and is_over(message) and seen.issuperset(one.position for one in message.events):
                return message
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
        try:
            newest = _newest(client, min(waiting))
            ended = [message for message in newest if message.name in waiting and is_over(message)]
        except (UnavailableError, ResourceExhaustedError) as error:
            _check_passes(error)
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


def _message_if_known(client: Client, name: str, deadline: float, pause: Callable[[float], None]) -> Message | None:
    failures = 0
    while time.monotonic() < deadline:
        try:
            return client.messages.GetMessage(GetMessageRequest(name=name))
        except NotFoundError:
            return None
        except (UnavailableError, ResourceExhaustedError) as error:
            _check_passes(error)
            # The stream may have no more to say: the look is made again, not left to its next answer.
            _pause(pause, failures, deadline)
            failures += 1
    return None


def _check_passes(error: PostroadError) -> None:
    """Raise what does not pass with time: an answer that is too large stays so."""
    if isinstance(error, ResourceExhaustedError) and error.reason not in _PASSING:
        raise error


def _pause(pause: Callable[[float], None], failures: int, deadline: float) -> None:
    pause(min(_PAUSES_S[min(failures, len(_PAUSES_S) - 1)], max(0.0, deadline - time.monotonic())))
