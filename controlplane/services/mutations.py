"""How every edit runs: one transaction, with its request id (AIP-155) and its rehearsal (AIP-163).

Contract. `mutate(database, caller, mutation, action)` runs `action` in a transaction of the caller's scope. With a
request id, the first answer is stored in that transaction and given again, as bytes in a `Replay`, for 24 h; the
bytes come from `mutation.encode`, which leaves secrets out. `validate_only` does everything and then undoes it,
wake-ups of the nodes included. Whatever raises, and cancellation, leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from controlplane.domain.access import Caller
from controlplane.domain.errors import InvalidArgumentError, Reason, invalid
from controlplane.domain.names import check_uuid
from controlplane.ports import Database, Work, scope_of

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Mutation(Generic[Result]):
    """One call that changes something: who it is by full method name, and how its answer is kept."""

    method: str
    encode: Callable[[Result], bytes]
    payload_sha256: bytes = b""
    request_id: str = ""
    validate_only: bool = False


@dataclass(frozen=True, slots=True)
class Patch:
    """What an Update sends beside the resource: its mask, the paths that were populated, and the etag."""

    mask: Sequence[str]
    populated: Sequence[str]
    etag: str


@dataclass(frozen=True, slots=True)
class Replay:
    """The answer that an earlier call with the same request id was given."""

    response: bytes


class _UndoneError(Exception):
    """Ends a transaction that was a rehearsal."""


async def mutate(
    database: Database, caller: Caller, mutation: Mutation[Result], action: Callable[[Work], Awaitable[Result]]
) -> Result | Replay:
    """Run one edit; see the module."""
    request_id = "" if mutation.validate_only else _checked(mutation.request_id)
    rehearsed: list[Result] = []
    try:
        async with database.transaction(scope_of(caller, request_id)) as work:
            if request_id:
                first = await work.idempotency.begin(request_id, mutation.method, mutation.payload_sha256)
                if first is not None:
                    return Replay(first)
            result = await action(work)
            if mutation.validate_only:
                rehearsed.append(result)
                raise _UndoneError  # noqa: TRY301 - leaving the transaction by an exception is what undoes it
            if request_id:
                await work.idempotency.finish(request_id, mutation.encode(result))
    except _UndoneError:
        return rehearsed[0]
    return result


def _checked(request_id: str) -> str:
    if not request_id:
        return ""
    try:
        return check_uuid(request_id.lower(), "request_id")
    except InvalidArgumentError:
        raise invalid("request_id", "must be a UUID", Reason.REQUEST_ID_INVALID) from None
