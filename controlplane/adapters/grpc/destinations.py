"""DestinationService over gRPC: messages to values and back; see the proto for what each method promises."""

from __future__ import annotations

from typing import Any

from controlplane.adapters.grpc import convert
from controlplane.adapters.grpc.context import caller
from controlplane.domain import names
from controlplane.domain.resources import Destination
from controlplane.services.destinations import DestinationsService
from postroad.control.v1 import destination_pb2 as pb
from postroad.control.v1 import destination_service_pb2 as service_pb
from postroad.control.v1 import destination_service_pb2_grpc as service_grpc


class DestinationHandlers(service_grpc.DestinationServiceServicer):
    """See the module."""

    def __init__(self, destinations: DestinationsService) -> None:
        self._destinations = destinations

    async def GetDestination(self, request: service_pb.GetDestinationRequest, context: Any) -> pb.Destination:
        """As the proto says."""
        return _write(await self._destinations.get(caller(), *_ids(request.name)))

    async def ListDestinations(
        self, request: service_pb.ListDestinationsRequest, context: Any
    ) -> service_pb.ListDestinationsResponse:
        """As the proto says."""
        account = names.parse_parent(request.parent)
        found, more = await self._destinations.list_page(caller(), account, request.page_size, request.page_token)
        return service_pb.ListDestinationsResponse(destinations=map(_write, found), next_page_token=more)

    async def SuspendDestination(self, request: service_pb.SuspendDestinationRequest, context: Any) -> pb.Destination:
        """As the proto says."""
        mutation = convert.mutation("SuspendDestination", request, _write)
        result = await self._destinations.suspend(caller(), mutation, *_ids(request.name), request.reason)
        return convert.answer(result, pb.Destination, _write)

    async def ResumeDestination(self, request: service_pb.ResumeDestinationRequest, context: Any) -> pb.Destination:
        """As the proto says."""
        mutation = convert.mutation("ResumeDestination", request, _write)
        result = await self._destinations.resume(caller(), mutation, *_ids(request.name))
        return convert.answer(result, pb.Destination, _write)


def _ids(name: str) -> tuple[str | None, str]:
    return names.parse_owned(name, names.DESTINATION, names.SHARED_DESTINATION)


def _write(destination: Destination) -> pb.Destination:
    suspended = destination.suspend_time is not None
    return pb.Destination(
        name=names.destination_name(destination.account, destination.destination),
        state=pb.Destination.STATE_SUSPENDED if suspended else pb.Destination.STATE_ACTIVE,
        suspend_time=convert.to_timestamp(destination.suspend_time),
        suspend_reason=destination.suspend_reason,
    )
