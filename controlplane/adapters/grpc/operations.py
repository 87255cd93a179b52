"""google.longrunning.Operations for `accounts/*/operations/*`: commands to spools, as long-running operations.

GetOperation, WaitOperation and ListOperations are offered; an operation can be neither deleted nor cancelled
(UNIMPLEMENTED): what a command did, it did.
"""

from __future__ import annotations

from typing import Any

from google.longrunning import operations_pb2, operations_pb2_grpc
from google.rpc.code_pb2 import FAILED_PRECONDITION
from google.rpc.status_pb2 import Status

from controlplane.adapters.grpc import convert
from controlplane.adapters.grpc.context import caller
from controlplane.domain import names
from controlplane.domain.errors import invalid
from controlplane.domain.messages import Command
from controlplane.services.messages import OperationsService
from postroad.control.v1 import message_service_pb2 as service_pb

_VERBS = {1: "cancel"}


class OperationHandlers(operations_pb2_grpc.OperationsServicer):
    """See the module."""

    def __init__(self, operations: OperationsService) -> None:
        self._operations = operations

    async def GetOperation(self, request: operations_pb2.GetOperationRequest, context: Any) -> operations_pb2.Operation:
        """Return an operation as it is. NOT_FOUND."""
        return write_operation(await self._operations.get(caller(), *_ids(request.name)))

    async def WaitOperation(
        self, request: operations_pb2.WaitOperationRequest, context: Any
    ) -> operations_pb2.Operation:
        """Return an operation when it is done, or as it is after `timeout`, a minute at most. NOT_FOUND."""
        timeout_s = convert.from_duration(request, "timeout")
        return write_operation(await self._operations.wait(caller(), *_ids(request.name), timeout_s))

    async def ListOperations(
        self, request: operations_pb2.ListOperationsRequest, context: Any
    ) -> operations_pb2.ListOperationsResponse:
        """List the operations of `accounts/{account}` (or of its `operations`) by id; filters are refused."""
        if request.filter:
            raise invalid("filter", "is not supported")
        account = names.parse_name(request.name.removesuffix("/operations"), names.ACCOUNT)[0]
        found, more = await self._operations.list_page(caller(), account, request.page_size, request.page_token)
        return operations_pb2.ListOperationsResponse(
            operations=[write_operation(command) for command in found], next_page_token=more
        )


def _ids(name: str) -> tuple[str, str]:
    account, operation = names.parse_name(name, names.OPERATION)
    return account, operation


def write_operation(command: Command) -> operations_pb2.Operation:
    """Return the operation of a command."""
    operation = operations_pb2.Operation(
        name=names.format_name(names.OPERATION, command.account, command.command),
        done=command.done_time is not None,
    )
    operation.metadata.Pack(
        service_pb.CommandMetadata(
            verb=_VERBS[command.verb],
            message=names.format_name(names.MESSAGE, command.account, command.message_id),
            create_time=convert.to_timestamp(command.create_time),
        )
    )
    if command.done_time is None:
        return operation
    if command.error:
        operation.error.CopyFrom(Status(code=FAILED_PRECONDITION, message=command.error))
    else:
        operation.response.Pack(
            service_pb.CancelMessageResult(cancelled_count=command.changed_count, too_late_count=command.too_late_count)
        )
    return operation
