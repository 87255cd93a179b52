"""Lets a call in, or not: the key in its metadata, and the scope that its method needs.

Contract. `Guard.admit(method, metadata)` returns the Caller, or None for the methods that need no key
(`PUBLIC_METHODS`, which identify their callers themselves). It raises UnauthenticatedError without a good key and
PermissionDeniedError without the scope, before anything of the request is looked at. A method that no table names is
UnimplementedError: deny by default.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from controlplane.domain.access import METHOD_SCOPES, Caller, Scope
from controlplane.domain.errors import Reason, UnauthenticatedError, UnimplementedError
from controlplane.services.authentication import Authenticator

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

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    async def admit(self, method: str, metadata: Metadata) -> Caller | None:
        """Return who calls `method` (`/package.Service/Method`)."""
        if method in PUBLIC_METHODS:
            return None
        needed = Scope.OPERATOR if method.startswith(_REFLECTION) else METHOD_SCOPES.get(method)
        caller = await self._authenticator.authenticate(_presented(metadata))
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
