"""From errors of the domain to what goes over the wire: one table, for every entrance.

Contract. `to_status(error, request)` returns a google.rpc.Status with the code of the error's class, exactly one
ErrorInfo (domain `postroad`) and the details that its kind has. An exception that is none of the domain's is a defect
of ours: INTERNAL, with the id of the request and nothing of the exception. `ApiStatusError` carries a status to
callers in this process.
"""

from __future__ import annotations

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details
from google.rpc.status_pb2 import Status

from controlplane.domain import errors
from controlplane.domain.errors import ControlPlaneError, Reason

ERROR_DOMAIN = "postroad"

STATUS_CODES: dict[type[ControlPlaneError], grpc.StatusCode] = {
    errors.UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    errors.InvalidArgumentError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExistsError: grpc.StatusCode.ALREADY_EXISTS,
    errors.FailedPreconditionError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.AbortedError: grpc.StatusCode.ABORTED,
    errors.ResourceExhaustedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.UnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.UnimplementedError: grpc.StatusCode.UNIMPLEMENTED,
    errors.DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
}


class ApiStatusError(Exception):
    """A call in this process ended with a status that is not OK."""

    def __init__(self, status: Status) -> None:
        self.status = status
        super().__init__(f"{code_of(status).name}: {status.message}")


def code_of(status: Status) -> grpc.StatusCode:
    """Return the code of a status as gRPC's enum."""
    return _CODES[status.code]


def to_status(error: Exception, request: str) -> Status:
    """Return the status for `error`; `request` names the call in our log."""
    if not isinstance(error, ControlPlaneError) or type(error) not in STATUS_CODES:
        info = details.ErrorInfo(reason=Reason.INTERNAL, domain=ERROR_DOMAIN)
        return _status(
            grpc.StatusCode.INTERNAL,
            "an error of ours; quote the request id to your operator",
            [info, details.RequestInfo(request_id=request)],
        )
    info = details.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=error.metadata)
    return _status(STATUS_CODES[type(error)], error.text, [info, *_more(error)])


def _more(error: ControlPlaneError) -> list[Message]:
    match error:
        case errors.InvalidArgumentError():
            violation = details.BadRequest.FieldViolation
            found = [violation(field=one.field, description=one.description) for one in error.violations]
            return [details.BadRequest(field_violations=found)]
        case errors.NotFoundError() | errors.AlreadyExistsError():
            return [details.ResourceInfo(resource_name=error.name, description=error.text)]
        case errors.FailedPreconditionError():
            failure = details.PreconditionFailure.Violation(
                type=error.reason, subject=error.subject, description=error.text
            )
            return [details.PreconditionFailure(violations=[failure])]
        case errors.ResourceExhaustedError():
            quota = details.QuotaFailure.Violation(subject=error.subject, description=error.text)
            return [details.QuotaFailure(violations=[quota]), _retry(error.retry_after_s)]
        case errors.UnavailableError():
            return [_retry(error.retry_after_s)]
        case _:
            return []


def _retry(after_s: float) -> details.RetryInfo:
    delay = Duration()
    delay.FromMilliseconds(round(after_s * 1000))
    return details.RetryInfo(retry_delay=delay)


def _status(code: grpc.StatusCode, text: str, messages: list[Message]) -> Status:
    packed = []
    for message in messages:
        one = AnyMessage()
        one.Pack(message)
        packed.append(one)
    return Status(code=code.value[0], message=text, details=packed)


_CODES = {code.value[0]: code for code in grpc.StatusCode}
