"""The SDK: Postroad's API for Python programs, sync (`connect`) and async (`connect_async`).

Requests and resources are the generated messages of `postroad.control.v1`; see client.py for the clients, errors.py
for what they raise and follow.py for following messages.
"""

from __future__ import annotations

from postroad.sdk.client import AsyncClient, Client, connect, connect_async
from postroad.sdk.errors import (
    AbortedError,
    AlreadyExistsError,
    CancelledError,
    DeadlineError,
    ErrorDetails,
    EtagMismatchError,
    EtagRequiredError,
    FailedPreconditionError,
    FieldViolation,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    OutOfRangeError,
    PermissionDeniedError,
    PostroadError,
    RequestIdReusedError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
)
from postroad.sdk.follow import follow, follow_all, is_over, watch_events

__all__ = [
    "AbortedError",
    "AlreadyExistsError",
    "AsyncClient",
    "CancelledError",
    "Client",
    "DeadlineError",
    "ErrorDetails",
    "EtagMismatchError",
    "EtagRequiredError",
    "FailedPreconditionError",
    "FieldViolation",
    "InternalError",
    "InvalidArgumentError",
    "NotFoundError",
    "OutOfRangeError",
    "PermissionDeniedError",
    "PostroadError",
    "RequestIdReusedError",
    "ResourceExhaustedError",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "connect",
    "connect_async",
    "follow",
    "follow_all",
    "is_over",
    "watch_events",
]
