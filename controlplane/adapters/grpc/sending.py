"""MessageService.SendMessage and BatchSendMessages over gRPC: requests to values, results to messages."""

from __future__ import annotations

import hashlib
from typing import Any

from google.protobuf.message import Message

from controlplane.adapters.grpc import convert
from controlplane.adapters.grpc.context import caller, origin
from controlplane.adapters.grpc.errors import to_status
from controlplane.domain import names
from controlplane.domain.errors import ControlPlaneError, InvalidArgumentError, Reason, invalid
from controlplane.domain.outgoing import MAX_BATCH, Attachment, Content, Outgoing, ShownAddress
from controlplane.services.sending import SendingService, Sent
from postroad.control.v1 import message_service_pb2 as service_pb
from postroad.control.v1 import outgoing_message_pb2 as pb


class SendingHandlers:
    """See the module; a part of MessageHandlers."""

    def __init__(self, sending: SendingService) -> None:
        self._sending = sending

    async def send(self, request: service_pb.SendMessageRequest) -> service_pb.SendMessageResponse:
        """As the proto says of SendMessage."""
        account = names.parse_name(request.parent, names.ACCOUNT, "parent")[0]
        # Who may not is not told what is wrong.
        caller().require_account(account)
        outgoing = _read(request, "message", request.validate_only)
        (result,) = await self._sending.send(caller(), account, [outgoing], origin())
        if isinstance(result, ControlPlaneError):
            raise result
        return _sent(account, result)

    async def send_batch(self, request: service_pb.BatchSendMessagesRequest) -> service_pb.BatchSendMessagesResponse:
        """As the proto says of BatchSendMessages."""
        account = names.parse_name(request.parent, names.ACCOUNT, "parent")[0]
        caller().require_account(account)
        if not 1 <= len(request.requests) <= MAX_BATCH:
            raise invalid("requests", f"must be 1 to {MAX_BATCH}")
        outgoings: list[Outgoing | InvalidArgumentError] = []
        for number, one in enumerate(request.requests):
            try:
                outgoings.append(_read_of_batch(request, one, number))
            except InvalidArgumentError as error:
                outgoings.append(error)
        results = await self._sending.send(caller(), account, outgoings, origin())
        return service_pb.BatchSendMessagesResponse(results=[_result(account, result) for result in results])


def _read_of_batch(
    batch: service_pb.BatchSendMessagesRequest, request: service_pb.SendMessageRequest, number: int
) -> Outgoing:
    if request.parent not in ("", batch.parent):
        raise invalid(f"requests[{number}].parent", "must be the batch's, or empty")
    return _read(request, f"requests[{number}].message", batch.validate_only or request.validate_only)


def _read(request: service_pb.SendMessageRequest, field: str, is_rehearsal: bool) -> Outgoing:  # noqa: FBT001 - a field
    message = request.message
    body = message.WhichOneof("body")
    return Outgoing(
        where=field,
        sender=message.sender,
        recipients=tuple(message.recipients),
        raw=message.raw if body == "raw" else None,
        content=_content(message.content) if body == "content" else None,
        tags=tuple(message.tags),
        metadata=dict(message.metadata),
        priority=message.priority,
        send_time=convert.from_timestamp(message, "send_time", f"{field}.send_time"),
        request_id=_request_id(request.request_id, field),
        fingerprint=_fingerprint(message) if request.request_id else b"",
        is_rehearsal=is_rehearsal,
    )


def _request_id(request_id: str, field: str) -> str:
    if not request_id:
        return ""
    try:
        return names.check_uuid(request_id.lower(), "request_id")
    except InvalidArgumentError:
        path = f"{field.rpartition('message')[0]}request_id"
        raise invalid(path, "must be a UUID", Reason.REQUEST_ID_INVALID) from None


def _fingerprint(message: Message) -> bytes:
    return hashlib.sha256(message.SerializeToString(deterministic=True)).digest()


def _content(content: pb.MessageContent) -> Content:
    return Content(
        author=_address(content.author),
        to=tuple(map(_address, content.to)),
        cc=tuple(map(_address, content.cc)),
        bcc=tuple(map(_address, content.bcc)),
        reply_to=tuple(map(_address, content.reply_to)),
        subject=content.subject,
        headers=tuple((one.name, one.value) for one in content.headers),
        text=content.text,
        html=content.html,
        attachments=tuple(
            Attachment(one.file_name, one.content_type, one.data, one.content_id) for one in content.attachments
        ),
    )


def _address(address: pb.EmailAddress) -> ShownAddress:
    return ShownAddress(address.address, address.display_name)


def _sent(account: str, sent: Sent) -> service_pb.SendMessageResponse:
    return service_pb.SendMessageResponse(
        message=names.format_name(names.MESSAGE, account, sent.message_id) if sent.message_id else "",
        repeated_request=sent.is_repeated,
        recipient_count=sent.recipient_count,
    )


def _result(account: str, result: Any) -> service_pb.BatchSendMessagesResponse.Result:
    if isinstance(result, ControlPlaneError):
        return service_pb.BatchSendMessagesResponse.Result(error=to_status(result, ""))
    return service_pb.BatchSendMessagesResponse.Result(sent=_sent(account, result))
