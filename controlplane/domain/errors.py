"""Everything that the control plane says no with: who is to blame, and whether trying again helps.

Contract. Services raise these and nothing else on purpose; an adapter maps each class to a status in one table. The
docstring of a class is its default text, fit to be shown to the caller; nothing secret goes into texts or metadata.
`Reason` names each cause once, for programs.

    class                     the caller should
    UnauthenticatedError      present a good key
    PermissionDeniedError     ask somebody who may
    InvalidArgumentError      mend the request
    NotFoundError             look elsewhere
    AlreadyExistsError        choose another id
    FailedPreconditionError   change the state of the system first
    AbortedError              read again and repeat the whole edit
    ResourceExhaustedError    come back later, with less
    UnavailableError          try again after `retry_after_s`
    UnimplementedError        not call this server's method
    DeadlineError             ask what became of it, with more time
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple


class Reason(StrEnum):
    """ErrorInfo.reason of every error of the API."""

    API_KEY_MISSING = "API_KEY_MISSING"
    API_KEY_INVALID = "API_KEY_INVALID"
    ENROLLMENT_TOKEN_INVALID = "ENROLLMENT_TOKEN_INVALID"  # noqa: S105 - the name of an error
    SCOPE_MISSING = "SCOPE_MISSING"
    OTHER_ACCOUNT = "OTHER_ACCOUNT"
    OPERATOR_ONLY = "OPERATOR_ONLY"
    FIELD_INVALID = "FIELD_INVALID"
    FIELD_OPERATOR_ONLY = "FIELD_OPERATOR_ONLY"
    ETAG_REQUIRED = "ETAG_REQUIRED"
    ETAG_INVALID = "ETAG_INVALID"
    ETAG_MISMATCH = "ETAG_MISMATCH"
    PAGE_TOKEN_INVALID = "PAGE_TOKEN_INVALID"  # noqa: S105 - the name of an error
    REQUEST_ID_INVALID = "REQUEST_ID_INVALID"
    REQUEST_ID_REUSED = "REQUEST_ID_REUSED"
    CONFIGURATION_INVALID = "CONFIGURATION_INVALID"
    RESOURCE_NOT_FOUND = "RESOURCE_NOT_FOUND"
    RESOURCE_ALREADY_EXISTS = "RESOURCE_ALREADY_EXISTS"
    SENDER_DOMAIN_TAKEN = "SENDER_DOMAIN_TAKEN"
    NETWORK_TAKEN = "NETWORK_TAKEN"
    NODE_POOL_MISSING = "NODE_POOL_MISSING"
    NODE_POOL_IN_USE = "NODE_POOL_IN_USE"
    NODE_POOL_DEFAULT = "NODE_POOL_DEFAULT"
    NODE_IN_USE = "NODE_IN_USE"
    NODE_REVOKED = "NODE_REVOKED"
    NODE_ALONE = "NODE_ALONE"
    NODE_NOT_DRAINED = "NODE_NOT_DRAINED"
    SPOOL_NOT_REFUSED = "SPOOL_NOT_REFUSED"
    SPOOL_MISSING = "SPOOL_MISSING"
    SPOOL_ATTACHED = "SPOOL_ATTACHED"
    SPOOL_IN_USE = "SPOOL_IN_USE"
    SPOOL_POOL_DIFFERS = "SPOOL_POOL_DIFFERS"
    ACCOUNT_SUSPENDED = "ACCOUNT_SUSPENDED"
    SENDER_NOT_OWNED = "SENDER_NOT_OWNED"
    NO_ROUTE = "NO_ROUTE"
    LIMIT_EXHAUSTED = "LIMIT_EXHAUSTED"
    PROVIDER_MISSING = "PROVIDER_MISSING"
    PROVIDER_IN_USE = "PROVIDER_IN_USE"
    PROVIDER_SUSPENDED = "PROVIDER_SUSPENDED"
    LIMIT_TAKEN = "LIMIT_TAKEN"
    LIMIT_SUBJECT_MISSING = "LIMIT_SUBJECT_MISSING"
    LAST_OPERATOR_KEY = "LAST_OPERATOR_KEY"
    KEY_REVOKED = "KEY_REVOKED"
    CONCURRENT_EDIT = "CONCURRENT_EDIT"
    REQUESTS_EXHAUSTED = "REQUESTS_EXHAUSTED"
    READER_TOO_SLOW = "READER_TOO_SLOW"
    TOO_MANY_WATCHERS = "TOO_MANY_WATCHERS"
    TOO_MANY_COMMANDS = "TOO_MANY_COMMANDS"
    POSITION_AHEAD = "POSITION_AHEAD"
    TOO_MANY_DENIED_CREDENTIALS = "TOO_MANY_DENIED_CREDENTIALS"
    TOO_MANY_SUSPENDED_CREDENTIALS = "TOO_MANY_SUSPENDED_CREDENTIALS"
    TOO_MANY_SUSPENDED_DESTINATIONS = "TOO_MANY_SUSPENDED_DESTINATIONS"
    DATABASE_UNAVAILABLE = "DATABASE_UNAVAILABLE"
    DRAINING = "DRAINING"
    DEADLINE_TOO_SHORT = "DEADLINE_TOO_SHORT"
    METHOD_UNKNOWN = "METHOD_UNKNOWN"
    INTERNAL = "INTERNAL"


class Violation(NamedTuple):
    """A field of the request by its path, and what is wrong with it."""

    field: str
    description: str


class ControlPlaneError(Exception):
    """Something went wrong."""

    def __init__(self, reason: Reason, text: str = "", *, metadata: Mapping[str, str] | None = None) -> None:
        self.reason = reason
        self.text = text or (self.__doc__ or "").strip()
        self.metadata = dict(metadata or {})
        super().__init__(f"{reason}: {self.text}")


class UnauthenticatedError(ControlPlaneError):
    """The API key is missing, unknown, expired or revoked."""


class PermissionDeniedError(ControlPlaneError):
    """The API key does not allow this."""


class InvalidArgumentError(ControlPlaneError):
    """The request is malformed."""

    def __init__(self, violations: Sequence[Violation], reason: Reason = Reason.FIELD_INVALID) -> None:
        self.violations = tuple(violations)
        super().__init__(reason, "; ".join(f"{one.field}: {one.description}" for one in self.violations))


class NotFoundError(ControlPlaneError):
    """There is no such resource."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(Reason.RESOURCE_NOT_FOUND, f"{name} does not exist", metadata={"resource": name})


class AlreadyExistsError(ControlPlaneError):
    """The resource exists already."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(Reason.RESOURCE_ALREADY_EXISTS, f"{name} exists already", metadata={"resource": name})


class FailedPreconditionError(ControlPlaneError):
    """The system is not in a state that allows this."""

    def __init__(self, reason: Reason, text: str, *, subject: str = "") -> None:
        self.subject = subject
        super().__init__(reason, text, metadata={"subject": subject} if subject else None)


class AbortedError(ControlPlaneError):
    """Somebody else changed it meanwhile: read again and repeat."""


class ResourceExhaustedError(ControlPlaneError):
    """There is more than can be served."""

    def __init__(self, reason: Reason, text: str = "", *, retry_after_s: float, subject: str = "") -> None:
        self.retry_after_s = retry_after_s
        self.subject = subject or reason
        super().__init__(reason, text)


class UnavailableError(ControlPlaneError):
    """The service cannot answer now."""

    def __init__(self, reason: Reason, text: str = "", *, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(reason, text)


class UnimplementedError(ControlPlaneError):
    """This server does not offer the method."""


class DeadlineError(ControlPlaneError):
    """The deadline was over before the answer was there; what was asked may have happened."""


def invalid(field: str, description: str, reason: Reason = Reason.FIELD_INVALID) -> InvalidArgumentError:
    """Return the error for one bad field."""
    return InvalidArgumentError([Violation(field, description)], reason)
