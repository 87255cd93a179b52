"""Errors of the API as exceptions: the way back from gRPC status, ErrorInfo and the details beside it.

Contract. Every failed call of the SDK raises a `PostroadError`. Its class follows from the ErrorInfo's reason where
that has a class of its own (`BY_REASON`), else from the status code (`BY_CODE`); a reason this version has not heard
of is therefore still caught by the class of its code. The attributes carry the details; the text is the server's.

    class of the code     who is to blame, and what helps
    InvalidArgumentError  the request: `violations` names the fields
    AbortedError          somebody else was quicker: read again, then retry
    UnavailableError      nobody for good: retry after `retry_after_s`
    InternalError         the server: quote `request_id` to its operator
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

ERROR_DOMAIN = "postroad"
_DETAILS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field that is wrong, by its path, and why."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class ErrorDetails:
    """What came beside the text. Empty values stand for what the server did not say; times in seconds."""

    code: grpc.StatusCode
    reason: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    violations: tuple[FieldViolation, ...] = ()
    resource: str = ""
    request_id: str = ""
    retry_after_s: float | None = None


class PostroadError(Exception):
    """A call failed. `details` says how; `str()` is the server's text."""

    def __init__(self, message: str, details: ErrorDetails) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    @property
    def code(self) -> grpc.StatusCode:
        """The gRPC status."""
        return self.details.code

    @property
    def reason(self) -> str:
        """The ErrorInfo's reason, for programs; empty when the error came from elsewhere than Postroad."""
        return self.details.reason


class InvalidArgumentError(PostroadError):
    """The request is malformed; `details.violations` names the fields."""


class NotFoundError(PostroadError):
    """There is no such resource."""


class AlreadyExistsError(PostroadError):
    """The name is taken."""


class PermissionDeniedError(PostroadError):
    """The key may not do this."""


class UnauthenticatedError(PostroadError):
    """The key is missing, wrong, expired or revoked."""


class FailedPreconditionError(PostroadError):
    """The resource is in a state that does not allow this."""


class AbortedError(PostroadError):
    """Somebody changed the resource meanwhile; read it again and retry."""


class ResourceExhaustedError(PostroadError):
    """A limit was reached."""


class OutOfRangeError(PostroadError):
    """The request reaches past what there is."""


class UnimplementedError(PostroadError):
    """The server does not know this call; it may be older than this client."""


class UnavailableError(PostroadError):
    """The server cannot be reached or cannot serve now."""


class DeadlineError(PostroadError):
    """No answer in time; the call may have been carried out."""


class CancelledError(PostroadError):
    """The call was cancelled."""


class InternalError(PostroadError):
    """The server failed; `details.request_id` finds it in the log."""


class EtagMismatchError(AbortedError):
    """The resource was changed since it was read."""


class EtagRequiredError(InvalidArgumentError):
    """The call wants the etag of the resource as it was read."""


class RequestIdReusedError(InvalidArgumentError):
    """The request id was used before, with another request."""


BY_CODE: Mapping[grpc.StatusCode, type[PostroadError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    grpc.StatusCode.ABORTED: AbortedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.OUT_OF_RANGE: OutOfRangeError,
    grpc.StatusCode.UNIMPLEMENTED: UnimplementedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.CANCELLED: CancelledError,
    grpc.StatusCode.INTERNAL: InternalError,
    grpc.StatusCode.UNKNOWN: InternalError,
    grpc.StatusCode.DATA_LOSS: InternalError,
}

# The reasons of the server, each with the class of the status it comes with, or a finer one.
BY_REASON: Mapping[str, type[PostroadError]] = {
    "API_KEY_MISSING": UnauthenticatedError,
    "API_KEY_INVALID": UnauthenticatedError,
    "ENROLLMENT_TOKEN_INVALID": UnauthenticatedError,
    "SCOPE_MISSING": PermissionDeniedError,
    "OTHER_ACCOUNT": PermissionDeniedError,
    "OPERATOR_ONLY": PermissionDeniedError,
    "FIELD_INVALID": InvalidArgumentError,
    "FIELD_OPERATOR_ONLY": PermissionDeniedError,
    "ETAG_REQUIRED": EtagRequiredError,
    "ETAG_INVALID": InvalidArgumentError,
    "ETAG_MISMATCH": EtagMismatchError,
    "PAGE_TOKEN_INVALID": InvalidArgumentError,
    "REQUEST_ID_INVALID": InvalidArgumentError,
    "REQUEST_ID_REUSED": RequestIdReusedError,
    "CONFIGURATION_INVALID": InvalidArgumentError,
    "RESOURCE_NOT_FOUND": NotFoundError,
    "RESOURCE_ALREADY_EXISTS": AlreadyExistsError,
    "SENDER_DOMAIN_TAKEN": FailedPreconditionError,
    "NETWORK_TAKEN": FailedPreconditionError,
    "NODE_POOL_MISSING": FailedPreconditionError,
    "NODE_POOL_IN_USE": FailedPreconditionError,
    "NODE_POOL_DEFAULT": FailedPreconditionError,
    "NODE_IN_USE": FailedPreconditionError,
    "SPOOL_NOT_REFUSED": FailedPreconditionError,
    "SPOOL_MISSING": FailedPreconditionError,
    "NODE_REVOKED": FailedPreconditionError,
    "SPOOL_ATTACHED": FailedPreconditionError,
    "SPOOL_IN_USE": FailedPreconditionError,
    "SPOOL_POOL_DIFFERS": FailedPreconditionError,
    "NODE_ALONE": FailedPreconditionError,
    "NODE_NOT_DRAINED": FailedPreconditionError,
    "ACCOUNT_SUSPENDED": FailedPreconditionError,
    "SENDER_NOT_OWNED": FailedPreconditionError,
    "NO_ROUTE": FailedPreconditionError,
    "LIMIT_EXHAUSTED": ResourceExhaustedError,
    "PROVIDER_MISSING": FailedPreconditionError,
    "PROVIDER_IN_USE": FailedPreconditionError,
    "PROVIDER_SUSPENDED": FailedPreconditionError,
    "LIMIT_TAKEN": FailedPreconditionError,
    "LIMIT_SUBJECT_MISSING": FailedPreconditionError,
    "LAST_OPERATOR_KEY": FailedPreconditionError,
    "KEY_REVOKED": FailedPreconditionError,
    "CONCURRENT_EDIT": AbortedError,
    "REQUESTS_EXHAUSTED": ResourceExhaustedError,
    "READER_TOO_SLOW": ResourceExhaustedError,
    "TOO_MANY_WATCHERS": ResourceExhaustedError,
    "TOO_MANY_COMMANDS": ResourceExhaustedError,
    "POSITION_AHEAD": FailedPreconditionError,
    "TOO_MANY_DENIED_CREDENTIALS": ResourceExhaustedError,
    "TOO_MANY_SUSPENDED_CREDENTIALS": FailedPreconditionError,
    "TOO_MANY_SUSPENDED_DESTINATIONS": FailedPreconditionError,
    "DATABASE_UNAVAILABLE": UnavailableError,
    "DRAINING": UnavailableError,
    "DEADLINE_TOO_SHORT": DeadlineError,
    "METHOD_UNKNOWN": UnimplementedError,
    "INTERNAL": InternalError,
}


def error_class(code: grpc.StatusCode, reason: str) -> type[PostroadError]:
    """The class for a status and a reason; a reason that comes with another status than its class's is not trusted."""
    by_code = BY_CODE.get(code, InternalError)
    by_reason = BY_REASON.get(reason, by_code)
    return by_reason if issubclass(by_reason, by_code) else by_code


def to_error(
    code: grpc.StatusCode, message: str | None, trailing_metadata: Iterable[tuple[str, str | bytes]] | None
) -> PostroadError:
    """The exception for a call that ended with `code`; details that cannot be decoded are left out."""
    details = ErrorDetails(code)
    for key, value in trailing_metadata or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                details = _decode(code, status_pb2.Status.FromString(value))
            except DecodeError:
                break
    return error_class(code, details.reason)(message or code.name, details)


def _decode(code: grpc.StatusCode, status: status_pb2.Status) -> ErrorDetails:
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    resource = error_details_pb2.ResourceInfo()
    request = error_details_pb2.RequestInfo()
    retry = error_details_pb2.RetryInfo()
    retry_after_s = None
    for detail in status.details:
        # Unpack does nothing and says False where the type is another.
        for kind in (info, bad_request, resource, request):
            detail.Unpack(kind)
        if detail.Unpack(retry):
            retry_after_s = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    return ErrorDetails(
        code=code,
        reason=info.reason if info.domain == ERROR_DOMAIN else "",
        metadata=dict(info.metadata),
        violations=tuple(FieldViolation(one.field, one.description) for one in bad_request.field_violations),
        resource=resource.resource_name,
        request_id=request.request_id,
        retry_after_s=retry_after_s,
    )
