"""SuspensionService over gRPC: messages to values and back; see the proto for what each method promises."""

from __future__ import annotations

from typing import Any

from controlplane.adapters.grpc import convert
from controlplane.adapters.grpc.context import caller
from controlplane.domain import names
from controlplane.domain.suspensions import Suspension
from controlplane.services.suspensions import SuspensionsService, parse_subject
from postroad.control.v1 import suspension_pb2 as pb
from postroad.control.v1 import suspension_service_pb2 as service_pb
from postroad.control.v1 import suspension_service_pb2_grpc as service_grpc


class SuspensionHandlers(service_grpc.SuspensionServiceServicer):
    """See the module."""

    def __init__(self, suspensions: SuspensionsService) -> None:
        self._suspensions = suspensions

    async def GetSuspension(self, request: service_pb.GetSuspensionRequest, context: Any) -> pb.Suspension:
        """As the proto says."""
        return _write(await self._suspensions.get(caller(), parse_subject(request.name)))

    async def WaitSuspension(self, request: service_pb.WaitSuspensionRequest, context: Any) -> pb.Suspension:
        """As the proto says."""
        timeout_s = convert.from_duration(request, "timeout")
        return _write(await self._suspensions.wait(caller(), parse_subject(request.name), timeout_s))


def _write(suspension: Suspension) -> pb.Suspension:
    return pb.Suspension(
        name=suspension.name,
        state=pb.Suspension.STATE_IN_FORCE if suspension.in_force else pb.Suspension.STATE_LIFTED,
        denials_version=suspension.denials_version,
        receipts=[
            pb.Suspension.Receipt(
                node=names.format_name(names.NODE, receipt.node),
                node_pool=names.format_name(names.NODE_POOL, receipt.node_pool),
                connected=receipt.connected,
                denials_version=receipt.denials_version,
                acknowledge_time=convert.to_timestamp(receipt.acknowledge_time),
                confirmed=suspension.confirmed_by(receipt),
                unsupported=receipt.told_since is None,
            )
            for receipt in suspension.receipts
        ],
        confirmed=suspension.confirmed,
    )
