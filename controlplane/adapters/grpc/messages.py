"""MessageService over gRPC: messages to values and back; see the proto for what each method promises."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any

from google.longrunning import operations_pb2

from controlplane.adapters.grpc import convert
from controlplane.adapters.grpc.context import caller
from controlplane.adapters.grpc.operations import write_operation
from controlplane.adapters.grpc.sending import SendingHandlers
from controlplane.domain import names
from controlplane.domain.errors import invalid
from controlplane.domain.messages import (
    CommandOrder,
    Event,
    EventPage,
    Message,
    MessageFilter,
    MessageQuery,
    Recipient,
    first_id_at,
)
from controlplane.services.messages import MessagesService
from dataplane.core.queue import State, Verb
from postroad.control.v1 import message_pb2 as pb
from postroad.control.v1 import message_service_pb2 as service_pb
from postroad.control.v1 import message_service_pb2_grpc as service_grpc

_STATES = frozenset(state.value for state in State)
_VERBS = frozenset(verb.value for verb in Verb)


class MessageHandlers(service_grpc.MessageServiceServicer):
    """See the module."""

    def __init__(self, messages: MessagesService, sending: SendingHandlers) -> None:
        self._messages = messages
        self._sending = sending

    async def SendMessage(self, request: service_pb.SendMessageRequest, context: Any) -> service_pb.SendMessageResponse:
        """As the proto says."""
        return await self._sending.send(request)

    async def BatchSendMessages(
        self, request: service_pb.BatchSendMessagesRequest, context: Any
    ) -> service_pb.BatchSendMessagesResponse:
        """As the proto says."""
        return await self._sending.send_batch(request)

    async def GetMessage(self, request: service_pb.GetMessageRequest, context: Any) -> pb.Message:
        """As the proto says."""
        return write_message(await self._messages.get(caller(), *_ids(request.name)))

    async def ListMessages(
        self, request: service_pb.ListMessagesRequest, context: Any
    ) -> service_pb.ListMessagesResponse:
        """As the proto says."""
        if request.state and int(request.state) not in _STATES:
            raise invalid("state", "is not known")
        query = MessageQuery(
            account=names.parse_name(request.parent, names.ACCOUNT, "parent")[0],
            limit=request.page_size,
            state=State(request.state) if request.state else None,
            recipient=_with_lower_domain(request.recipient),
            tag=request.tag,
            from_id=_first_id(convert.from_timestamp(request, "start_time", "start_time")),
            to_id=_first_id(convert.from_timestamp(request, "end_time", "end_time")),
        )
        found, more = await self._messages.list_page(caller(), query, request.page_token)
        return service_pb.ListMessagesResponse(
            messages=[write_message(message) for message in found], next_page_token=more
        )

    def WatchEvents(
        self, request: service_pb.WatchEventsRequest, context: Any
    ) -> AsyncIterator[service_pb.WatchEventsResponse]:
        """As the proto says."""
        account = names.parse_name(request.parent, names.ACCOUNT, "parent")[0]
        message_id = None
        if request.message:
            owner, message_id = _ids(request.message, "message")
            if owner != account:
                raise invalid("message", "must belong to the parent")
        return _written(self._messages.watch(caller(), account, message_id, request.position))

    async def CancelMessage(self, request: service_pb.CancelMessageRequest, context: Any) -> operations_pb2.Operation:
        """As the proto says."""
        return await self._command_message("CancelMessage", request, Verb.CANCEL)

    async def HoldMessage(self, request: service_pb.HoldMessageRequest, context: Any) -> operations_pb2.Operation:
        """As the proto says."""
        return await self._command_message("HoldMessage", request, Verb.HOLD)

    async def ReleaseMessage(self, request: service_pb.ReleaseMessageRequest, context: Any) -> operations_pb2.Operation:
        """As the proto says."""
        return await self._command_message("ReleaseMessage", request, Verb.RELEASE)

    async def RetryMessage(self, request: service_pb.RetryMessageRequest, context: Any) -> operations_pb2.Operation:
        """As the proto says."""
        return await self._command_message("RetryMessage", request, Verb.RETRY)

    async def BounceMessage(self, request: service_pb.BounceMessageRequest, context: Any) -> operations_pb2.Operation:
        """As the proto says."""
        return await self._command_message("BounceMessage", request, Verb.BOUNCE)

    async def RerouteMessage(self, request: service_pb.RerouteMessageRequest, context: Any) -> operations_pb2.Operation:
        """As the proto says."""
        return await self._command_message("RerouteMessage", request, Verb.REROUTE, request.provider)

    async def CommandMessages(
        self, request: service_pb.CommandMessagesRequest, context: Any
    ) -> operations_pb2.Operation:
        """As the proto says."""
        account = names.parse_account_or_every(request.parent, "parent")
        # Who may not is not told what is wrong.
        caller().require_account(account)
        if request.verb not in _VERBS:
            raise invalid("verb", "is not known" if request.verb else "is required")
        if not _STATES.issuperset(request.filter.states):
            raise invalid("filter.states", "must be of scheduled, queued, deferred and held")
        wanted = MessageFilter(
            request.filter.provider,
            request.filter.recipient_domain,
            _age(request.filter),
            tuple(State(number) for number in request.filter.states),
        )
        order = CommandOrder(account, Verb(request.verb), filter=wanted, provider=request.provider)
        return await self._command("CommandMessages", request, order)

    async def _command_message(
        self, method: str, request: Any, verb: Verb, provider: str = ""
    ) -> operations_pb2.Operation:
        account, message_id = _ids(request.name)
        return await self._command(method, request, CommandOrder(account, verb, message_id, provider=provider))

    async def _command(self, method: str, request: Any, order: CommandOrder) -> operations_pb2.Operation:
        mutation = convert.mutation(method, request, write_operation, validate_only=request.validate_only)
        result = await self._messages.command(caller(), mutation, order)
        return convert.answer(result, operations_pb2.Operation, write_operation)


async def _written(pages: AsyncIterator[EventPage]) -> AsyncIterator[service_pb.WatchEventsResponse]:
    async for page in pages:
        events = [write_event(event) for event in page.events]
        yield service_pb.WatchEventsResponse(events=events, position=str(page.position))


def _ids(name: str, field: str = "name") -> tuple[str, str]:
    account, message = names.parse_name(name, names.MESSAGE, field)
    return account, message


def _age(wanted: service_pb.MessageFilter) -> timedelta:
    seconds = convert.from_duration(wanted, "min_age") or 0.0
    try:
        return timedelta(seconds=seconds)
    except OverflowError:
        raise invalid("filter.min_age", "is too long") from None


def _with_lower_domain(address: str) -> str:
    local, at, domain = address.rpartition("@")
    return local + at + domain.lower()


def _first_id(time: datetime | None) -> str | None:
    return None if time is None else first_id_at(time)


def write_message(message: Message) -> pb.Message:
    """Return the message of a mail message."""
    return pb.Message(
        name=names.format_name(names.MESSAGE, message.account, message.message_id),
        accept_time=convert.to_timestamp(message.accept_time),
        sender=message.sender,
        header_message_id=message.header_message_id,
        subject=message.subject,
        size_bytes=message.size_bytes,
        state=pb.RecipientState.ValueType(message.state),
        credential=message.credential,
        client_address=message.client_address,
        client_helo=message.client_helo,
        client_tls=message.client_tls,
        session=message.session,
        node=_node(message.node),
        spool=message.spool,
        send_time=convert.to_timestamp(message.send_time),
        priority=message.priority,
        recipients=[_write_recipient(recipient) for recipient in message.recipients],
        events=[write_event(event) for event in message.events],
        duplicate_of=_duplicate_of(message),
        tags=message.tags,
        metadata=message.metadata,
    )


def _node(node: str) -> str:
    return names.format_name(names.NODE, node) if node else ""


def _duplicate_of(message: Message) -> str:
    if not message.duplicate_of:
        return ""
    return names.format_name(names.MESSAGE, message.account, message.duplicate_of)


def _write_recipient(recipient: Recipient) -> pb.Recipient:
    return pb.Recipient(
        index=recipient.index,
        address=recipient.address,
        state=pb.RecipientState.ValueType(recipient.state),
        attempts=recipient.attempts,
        next_attempt_time=convert.to_timestamp(recipient.next_attempt_time),
        update_time=convert.to_timestamp(recipient.update_time),
        reply_code=recipient.reply_code,
        enhanced_code=recipient.enhanced_code,
        reply_text=recipient.reply_text,
        provider=recipient.provider,
    )


def write_event(event: Event) -> pb.DeliveryEvent:
    """Return the message of an event."""
    message = pb.DeliveryEvent(
        message=names.format_name(names.MESSAGE, event.account, event.message_id),
        recipient=event.recipient,
        type=pb.DeliveryEventType.ValueType(event.type),
        event_time=convert.to_timestamp(event.event_time),
        node=_node(event.node),
        spool=event.spool,
        attempt=event.attempt,
        bundle_revision=event.bundle_revision,
        rule=event.rule,
        provider=event.provider,
        remote_host=event.remote_host,
        tls=event.tls,
        reply_code=event.reply_code,
        enhanced_code=event.enhanced_code,
        reply_text=event.reply_text,
        stage_times=pb.DeliveryEvent.StageTimes(
            queued_ms=event.queued_ms,
            waiting_ms=event.waiting_ms,
            connecting_ms=event.connecting_ms,
            transferring_ms=event.transferring_ms,
        ),
        position=str(event.position),
        tags=event.tags,
        metadata=event.metadata,
    )
    if event.recipient_index is not None:
        message.recipient_index = event.recipient_index
    return message
