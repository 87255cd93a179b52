"""Carries QueueService: messages to values and back, and the errors of the queue as statuses.

Contract. The node is the certificate's; one that was revoked is refused as soon as the change feed has heard of it.
UNAUTHENTICATED for a node that is not admitted, PERMISSION_DENIED for another node's spool, ABORTED for a lease that
has ended, INVALID_ARGUMENT for what can never be done, UNAVAILABLE while PostgreSQL is away.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import grpc
import grpc.aio

from controlplane.adapters.grpc.stream_codec import BadMessageError, uuid_text
from controlplane.adapters.grpc.transport import identity_of
from controlplane.adapters.pki import PkiError
from controlplane.domain.errors import UnavailableError
from controlplane.ports_fleet import NodeRecord
from controlplane.ports_queue import (
    BadQueueRequestError,
    Claimed,
    ClaimWish,
    LeaseLostError,
    QueuedMessage,
    Repeated,
    SpoolOwnershipError,
)
from controlplane.services.queue import QueueService
from controlplane.stream.fleet import FleetService, NotAdmittedError
from postroad.node.v1 import queue_service_pb2 as pb
from postroad.node.v1.queue_service_pb2_grpc import QueueServiceServicer

_ACCOUNT_PREFIX = "accounts/"


class NodeQueueServicer(QueueServiceServicer):
    """QueueService; see the module."""

    def __init__(self, queue: QueueService, fleet: FleetService) -> None:
        self._queue = queue
        self._fleet = fleet

    async def RenewLease(self, request: pb.RenewLeaseRequest, context: Any) -> pb.RenewLeaseResponse:
        """As the proto says."""
        async with self._node(context) as node:
            lease = await self._queue.renew(node.node_id, uuid_text(request.spool), request.epoch)
        response = pb.RenewLeaseResponse(epoch=lease.epoch)
        response.duration.FromTimedelta(timedelta(seconds=lease.duration_s))
        return response

    async def StoreContent(self, request: pb.StoreContentRequest, context: Any) -> pb.StoreContentResponse:
        """As the proto says."""
        async with self._node(context):
            await self._queue.store_content(request.message_id, request.chunk, request.data)
        return pb.StoreContentResponse()

    async def StoreMessages(self, request: pb.StoreMessagesRequest, context: Any) -> pb.StoreMessagesResponse:
        """As the proto says."""
        messages = [
            QueuedMessage(
                *(one.record, one.envelope, None if one.chunks else one.content, one.chunks, one.sending),
                *(tuple(one.next_hops), one.account_uid),
            )
            for one in request.messages
        ]
        async with self._node(context) as node:
            found = await self._queue.store(node.node_id, node.pool, uuid_text(request.spool), request.epoch, messages)
        return pb.StoreMessagesResponse(repeated_messages=[_repeated(one) for one in found])

    async def ClaimMessages(self, request: pb.ClaimMessagesRequest, context: Any) -> pb.ClaimMessagesResponse:
        """As the proto says."""
        async with self._node(context) as node:
            wish = ClaimWish(
                uuid_text(request.spool),
                request.epoch,
                uuid_text(request.claim_id),
                request.max_messages,
                request.max_bytes,
                tuple([name.removeprefix(_ACCOUNT_PREFIX) for name in request.left_out_accounts]),
            )
            claimed = await self._queue.claim(node.node_id, node.pool, wish)
        return pb.ClaimMessagesResponse(messages=[_claimed(one) for one in claimed])

    async def FetchContent(self, request: pb.FetchContentRequest, context: Any) -> pb.FetchContentResponse:
        """As the proto says."""
        async with self._node(context) as node:
            part = await self._queue.fetch_content(
                node.node_id, uuid_text(request.spool), request.epoch, request.message_id, request.chunk
            )
        return pb.FetchContentResponse(data=part.data, next_chunk=part.next_chunk)

    async def ConfirmClaim(self, request: pb.ConfirmClaimRequest, context: Any) -> pb.ConfirmClaimResponse:
        """As the proto says."""
        async with self._node(context) as node:
            confirmed = await self._queue.confirm(
                *(node.node_id, uuid_text(request.spool), request.epoch),
                *(uuid_text(request.claim_id), request.message_ids),
            )
        return pb.ConfirmClaimResponse(message_ids=confirmed)

    @asynccontextmanager
    async def _node(self, context: Any) -> AsyncIterator[NodeRecord]:
        """The calling node; what goes wrong inside ends the call."""
        try:
            identity = identity_of(context)
            yield await self._fleet.admitted(identity.node_id, identity.serial)
        except PkiError as error:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        except NotAdmittedError:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the node's certificate is refused")
        except SpoolOwnershipError:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "the spool is another node's")
        except LeaseLostError as error:
            await context.abort(grpc.StatusCode.ABORTED, str(error))
        except (BadMessageError, BadQueueRequestError) as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except UnavailableError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, error.text)


def _repeated(one: Repeated) -> pb.RepeatedMessage:
    return pb.RepeatedMessage(message_id=one.message_id, first_message_id=one.first_id, same_content=one.is_same)


def _claimed(one: Claimed) -> pb.ClaimedMessage:
    return pb.ClaimedMessage(
        message_id=one.message_id,
        envelope=one.envelope,
        recipients=[
            pb.ClaimedRecipient(index=each.index, attempt=each.attempt, due_ms=each.due_ms, provider=each.provider)
            for each in one.recipients
        ],
        has_content=one.content is not None,
        content=one.content or b"",
    )
