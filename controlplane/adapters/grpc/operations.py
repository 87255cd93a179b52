"""google.longrunning.Operations for `accounts/*/operations/*`: commands to spools, as long-running operations. Those on
the mail of every account lie under `accounts/-`, and so do the drains of nodes.

GetOperation, WaitOperation and ListOperations are offered; an operation can be neither deleted nor cancelled
(UNIMPLEMENTED): what a command did, it did.
"""

from __future__ import annotations

from typing import Any

from google.longrunning import operations_pb2, operations_pb2_grpc
from google.rpc.code_pb2 import CANCELLED, FAILED_PRECONDITION
from google.rpc.status_pb2 import Status

from controlplane.adapters.grpc import convert
from controlplane.adapters.grpc.context import caller
from controlplane.domain import names
from controlplane.domain.drains import Drain, DrainTarget
from controlplane.domain.errors import invalid
from controlplane.domain.messages import EVERY_ACCOUNT, Command, MessageFilter, SpoolProgress
from controlplane.services.messages import OperationsService
from postroad.control.v1 import message_pb2 as message_pb
from postroad.control.v1 import message_service_pb2 as service_pb
from postroad.control.v1 import node_service_pb2 as node_service_pb

_PENDING_LIMIT = 100
_RESULT_LIMIT = 1_000


class OperationHandlers(operations_pb2_grpc.OperationsServicer):
    """See the module."""

    def __init__(self, operations: OperationsService) -> None:
        self._operations = operations

    async def GetOperation(self, request: operations_pb2.GetOperationRequest, context: Any) -> operations_pb2.Operation:
        """Return an operation as it is. NOT_FOUND."""
        return _write(await self._operations.get(caller(), *names.parse_operation(request.name)))

    async def WaitOperation(
        self, request: operations_pb2.WaitOperationRequest, context: Any
    ) -> operations_pb2.Operation:
        """Return an operation when it is done, or as it is after `timeout`, a minute at most. NOT_FOUND."""
        timeout_s = convert.from_duration(request, "timeout")
        return _write(await self._operations.wait(caller(), *names.parse_operation(request.name), timeout_s))

    async def ListOperations(
        self, request: operations_pb2.ListOperationsRequest, context: Any
    ) -> operations_pb2.ListOperationsResponse:
        """List the operations of `accounts/{account}` (or of its `operations`) by id; filters are refused."""
        if request.filter:
            raise invalid("filter", "is not supported")
        account = names.parse_account_or_every(request.name.removesuffix("/operations"))
        found, more = await self._operations.list_page(caller(), account, request.page_size, request.page_token)
        return operations_pb2.ListOperationsResponse(
            operations=[write_operation(command) for command in found], next_page_token=more
        )


def _write(found: Command | Drain) -> operations_pb2.Operation:
    return write_drain(found) if isinstance(found, Drain) else write_operation(found)


def drain_name(drain: str) -> str:
    """Return the name of a drain's operation."""
    return names.format_name(names.OPERATION, EVERY_ACCOUNT, drain)


def write_drain(drain: Drain) -> operations_pb2.Operation:
    """Return the operation of a drain."""
    targets = [_write_target(target) for target in drain.targets]
    metadata = node_service_pb.DrainNodeMetadata(
        node=names.format_name(names.NODE, drain.node),
        create_time=convert.to_timestamp(drain.create_time),
        closed=drain.closed,
        waiting_count=drain.waiting_count,
        moving_count=drain.moving_count,
        targets=targets,
    )
    operation = operations_pb2.Operation(name=drain_name(drain.drain), done=drain.is_done)
    operation.metadata.Pack(metadata)
    if drain.undrained:
        operation.error.CopyFrom(Status(code=CANCELLED, message="the node takes mail again"))
    elif drain.is_done:
        operation.response.Pack(node_service_pb.DrainNodeResult(targets=targets))
    return operation


def _write_target(target: DrainTarget) -> node_service_pb.DrainTarget:
    return node_service_pb.DrainTarget(
        node=names.format_name(names.NODE, target.node),
        message_count=target.message_count,
        recipient_count=target.recipient_count,
    )


def write_operation(command: Command) -> operations_pb2.Operation:
    """Return the operation of a command."""
    order = command.order
    pending = [spool for spool in command.spools if not spool.is_done]
    metadata = service_pb.CommandMetadata(
        verb=service_pb.CommandVerb.ValueType(order.verb),
        message=names.format_name(names.MESSAGE, order.account, order.message_id) if order.message_id else "",
        create_time=convert.to_timestamp(command.create_time),
        filter=_write_filter(order.filter),
        provider=order.provider,
        changed_count=command.changed_count,
        too_late_count=command.too_late_count,
        spool_count=len(command.spools),
        done_spool_count=len(command.spools) - len(pending),
        pending_spools=[_write_spool(spool) for spool in pending[:_PENDING_LIMIT]],
    )
    operation = operations_pb2.Operation(
        name=names.format_name(names.OPERATION, order.account, command.command), done=command.is_done
    )
    operation.metadata.Pack(metadata)
    if not command.is_done:
        return operation
    if command.error:
        operation.error.CopyFrom(Status(code=FAILED_PRECONDITION, message=command.error))
        return operation
    busy = [spool for spool in command.spools if spool.changed_count or spool.too_late_count or spool.error]
    operation.response.Pack(
        service_pb.CommandResult(
            changed_count=command.changed_count,
            too_late_count=command.too_late_count,
            spools=[_write_spool(spool) for spool in busy[:_RESULT_LIMIT]],
        )
    )
    return operation


def _write_filter(wanted: MessageFilter | None) -> service_pb.MessageFilter | None:
    if wanted is None:
        return None
    return service_pb.MessageFilter(
        provider=wanted.provider,
        recipient_domain=wanted.recipient_domain,
        min_age=convert.to_duration(wanted.min_age.total_seconds()) if wanted.min_age else None,
        states=[message_pb.RecipientState.ValueType(state) for state in wanted.states],
    )


def _write_spool(spool: SpoolProgress) -> service_pb.SpoolProgress:
    return service_pb.SpoolProgress(
        spool=spool.spool,
        node=names.format_name(names.NODE, spool.node) if spool.node else "",
        changed_count=spool.changed_count,
        too_late_count=spool.too_late_count,
        update_time=convert.to_timestamp(spool.update_time),
        error=spool.error,
    )
