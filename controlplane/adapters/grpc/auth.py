"""Lets a call in, or not: the key in its metadata, and the scope that its method needs.

Contract. `Guard.enter(method, metadata)` begins a call: it returns the Caller, or None for the methods that need no key
(`PUBLIC_METHODS`, which identify their callers themselves). It raises UnauthenticatedError without a good key,
ResourceExhaustedError when the key made too many requests and PermissionDeniedError without the scope, before anything
of the request is looked at. A method that no table names is UnimplementedError: deny by default. `admit` looks again at
a call that was begun, which is no request of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from controlplane.domain.access import METHOD_SCOPES, Caller, Scope
from controlplane.domain.errors import Reason, UnauthenticatedError, UnimplementedError
from controlplane.services.authentication import Authenticator
from controlplane.services.throttle import Throttle

Metadata: TypeAlias = Iterable[tuple[str, str | bytes]]

_HEALTH = "/grpc.health.v1.Health/"
_REFLECTION = "/grpc.reflection."
_SCHEME = "bearer "

PUBLIC_METHODS = frozenset(
    {
        f"{_HEALTH}Check",
        f"{_HEALTH}Watch",
        f"{_HEALTH}List",
        # The one-time token in the request is the credential.
        "/postroad.node.v1.EnrollmentService/Enroll",
    }
)


class Guard:
    """See the module."""

    def __init__(self, authenticator: Authenticator, throttle: Throttle) -> None:
        self._authenticator = authenticator
        self._throttle = throttle

    async def enter(self, method: str, metadata: Metadata) -> Caller | None:
        """Return who calls `method` (`/package.Service/Method`)."""
        if method in PUBLIC_METHODS:
            return None
        presented = _presented(metadata)
        self._throttle.refuse_spent(presented)
        caller = await self._authenticator.authenticate(presented)
        await self._throttle.spend(presented, caller.principal)
        return _allowed(method, caller)

    async def admit(self, method: str, metadata: Metadata) -> Caller | None:
        """Return who called `method`, if it may still."""
        if method in PUBLIC_METHODS:
            return None
        return _allowed(method, await self._authenticator.authenticate(_presented(metadata)))


def _allowed(method: str, caller: Caller) -> Caller:
    needed = Scope.OPERATOR if method.startswith(_REFLECTION) else METHOD_SCOPES.get(method)
    if needed is None:
        raise UnimplementedError(Reason.METHOD_UNKNOWN, metadata={"method": method})
    caller.require(needed)
    return caller


def _presented(metadata: Metadata) -> str:
    found = [value for name, value in metadata if name.lower() == "authorization"]
    # Two keys in one call would let a proxy and us disagree about who calls.
    if len(found) != 1 or not isinstance(found[0], str) or not found[0].lower().startswith(_SCHEME):
        raise UnauthenticatedError(Reason.API_KEY_MISSING, "send one API key as `authorization: Bearer prk_…`")
    return found[0][len(_SCHEME) :].strip()
