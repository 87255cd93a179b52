"""LimitService over gRPC: messages to values and back; see the proto for what each method promises."""

from __future__ import annotations

from typing import Any

from google.protobuf.empty_pb2 import Empty

from controlplane.adapters.grpc import convert
from controlplane.adapters.grpc.context import caller
from controlplane.domain import names
from controlplane.domain.limits import LIMIT_FIELDS, Limit, LimitState, name_of, origin_of
from controlplane.services.limits import LimitsService, LimitView
from dataplane.core.limits import LimitScope, LimitUnit
from postroad.control.v1 import limit_pb2 as pb
from postroad.control.v1 import limit_service_pb2 as service_pb
from postroad.control.v1 import limit_service_pb2_grpc as service_grpc

_SCOPES = {scope.value: scope for scope in LimitScope}
_UNITS = {unit.value: unit for unit in LimitUnit}


class LimitHandlers(service_grpc.LimitServiceServicer):
    """See the module."""

    def __init__(self, limits: LimitsService) -> None:
        self._limits = limits

    async def CreateLimit(self, request: service_pb.CreateLimitRequest, context: Any) -> pb.Limit:
        """As the proto says."""
        mutation = convert.mutation("CreateLimit", request, write_limit, validate_only=request.validate_only)
        value = _read(request.limit, names.parse_parent(request.parent), request.limit_id)
        return convert.answer(await self._limits.create(caller(), mutation, value), pb.Limit, write_limit)

    async def GetLimit(self, request: service_pb.GetLimitRequest, context: Any) -> pb.Limit:
        """As the proto says."""
        return _write_view(await self._limits.get(caller(), *_ids(request.name)))

    async def ListLimits(self, request: service_pb.ListLimitsRequest, context: Any) -> service_pb.ListLimitsResponse:
        """As the proto says."""
        account = names.parse_parent(request.parent)
        found, more = await self._limits.list_page(caller(), account, request.page_size, request.page_token)
        return service_pb.ListLimitsResponse(limits=map(_write_view, found), next_page_token=more)

    async def ListEffectiveLimits(
        self, request: service_pb.ListEffectiveLimitsRequest, context: Any
    ) -> service_pb.ListEffectiveLimitsResponse:
        """As the proto says."""
        account = names.parse_name(request.parent, names.ACCOUNT, "parent")[0]
        found = await self._limits.list_effective(caller(), account)
        return service_pb.ListEffectiveLimitsResponse(limits=map(_write_view, found))

    async def UpdateLimit(self, request: service_pb.UpdateLimitRequest, context: Any) -> pb.Limit:
        """As the proto says."""
        mutation = convert.mutation("UpdateLimit", request, write_limit, validate_only=request.validate_only)
        sent = _read(request.limit, *_ids(request.limit.name, "limit.name"))
        patch = convert.patch_of(request.limit, request, LIMIT_FIELDS)
        return convert.answer(await self._limits.update(caller(), mutation, sent, patch), pb.Limit, write_limit)

    async def DeleteLimit(self, request: service_pb.DeleteLimitRequest, context: Any) -> Empty:
        """As the proto says."""
        mutation = convert.mutation("DeleteLimit", request, convert.write_empty)
        await self._limits.delete(
            caller(), mutation, *_ids(request.name), request.etag, allow_missing=request.allow_missing
        )
        return Empty()


def _ids(name: str, field: str = "name") -> tuple[str | None, str]:
    return names.parse_owned(name, names.LIMIT, names.SHARED_LIMIT, field)


def _read(message: pb.Limit, account: str | None, limit: str) -> Limit:
    return Limit(
        account=account,
        limit=limit,
        display_name=message.display_name,
        scope=_SCOPES.get(message.scope),
        subject=message.subject,
        unit=_UNITS.get(message.unit),
        amount=message.amount,
        period_s=convert.from_duration(message, "period") or 0.0,
        burst=message.burst,
    )


def write_limit(limit: Limit) -> pb.Limit:
    """Return the message of a limit, without its live state."""
    message = pb.Limit(
        name=name_of(limit),
        display_name=limit.display_name,
        scope=pb.Limit.Scope.ValueType(limit.scope or 0),
        subject=limit.subject,
        unit=pb.Limit.Unit.ValueType(limit.unit or 0),
        amount=limit.amount,
        period=convert.to_duration(limit.period_s or None),
        burst=limit.burst,
        origin=pb.Limit.Origin.ValueType(origin_of(limit)),
    )
    if limit.limit:
        convert.write_meta(message, limit.meta)
    return message


def _write_view(view: LimitView) -> pb.Limit:
    message = write_limit(view.limit)
    message.state.CopyFrom(_write_state(view.state))
    return message


def _write_state(state: LimitState) -> pb.LimitState:
    return pb.LimitState(
        known=state.known,
        reason=state.reason,
        subjects=[
            pb.LimitState.Subject(
                subject=one.subject,
                available=one.available,
                used=one.used,
                capacity=one.capacity,
                next_delay=convert.to_duration(one.next_s),
                full_delay=convert.to_duration(one.full_s),
            )
            for one in state.subjects
        ],
        more=state.more,
    )
