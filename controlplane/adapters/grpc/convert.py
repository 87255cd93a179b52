"""What every handler needs between messages and values: times, masks, names, and the record of a mutation.

Contract. Absent timestamps and durations are None. A time that cannot be one is InvalidArgumentError for its field.
`mutation` describes a call for `services.mutations`: the hash covers the request without its request id; `encode`
writes the answer without secrets. `answer` gives back the first answer of a repeated request, or writes a new one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from controlplane.domain.errors import invalid
from controlplane.domain.etags import format_etag
from controlplane.domain.masks import Field, Fields
from controlplane.domain.resources import Meta
from controlplane.services.mutations import Mutation, Patch, Replay

Value = TypeVar("Value")
Proto = TypeVar("Proto", bound=Message)

_LAST_SECOND = 253_402_300_799  # 9999-12-31T23:59:59Z


def to_timestamp(time: datetime | None) -> Timestamp | None:
    """Return the message for a time."""
    if time is None:
        return None
    value = Timestamp()
    value.FromDatetime(time)
    return value


def from_timestamp(message: Message, name: str, field: str) -> datetime | None:
    """Return the time in a field of a message, or None."""
    if not message.HasField(name):
        return None
    value: Timestamp = getattr(message, name)
    if not (0 <= value.seconds <= _LAST_SECOND and 0 <= value.nanos < 1_000_000_000):
        raise invalid(field, "must be a time from 1970 to 9999")
    return value.ToDatetime(tzinfo=UTC)


def to_duration(seconds: float | None) -> Duration | None:
    """Return the message for a duration."""
    if seconds is None:
        return None
    value = Duration()
    value.FromMicroseconds(round(seconds * 1_000_000))
    return value


def from_duration(message: Message, name: str) -> float | None:
    """Return the seconds in a field of a message, or None."""
    if not message.HasField(name):
        return None
    value: Duration = getattr(message, name)
    return value.seconds + value.nanos / 1_000_000_000


def write_meta(message: Any, meta: Meta) -> None:
    """Fill in what the server keeps of every resource."""
    message.uid = meta.uid
    message.etag = format_etag(meta.uid, meta.version)
    if meta.create_time is not None:
        message.create_time.FromDatetime(meta.create_time)
    if meta.update_time is not None:
        message.update_time.FromDatetime(meta.update_time)


def patch_of(resource: Any, request: Any, fields: Fields) -> Patch:
    """Return what an Update sends beside the resource."""
    return Patch(tuple(request.update_mask.paths), populated_paths(resource, fields), resource.etag)


def populated_paths(message: Message, fields: Fields) -> tuple[str, ...]:
    """Return the paths of settable fields that carry something."""
    return tuple(_populated(message, fields.settable, ""))


def _populated(message: Message, settable: Mapping[str, Field], prefix: str) -> list[str]:
    paths: list[str] = []
    for name, field in settable.items():
        if field.children:
            if message.HasField(name):
                paths += _populated(getattr(message, name), field.children, f"{prefix}{name}.")
        elif _carries(message, name):
            paths.append(prefix + name)
    return paths


def _carries(message: Message, name: str) -> bool:
    # Lists what is set: present messages and optional fields, other fields that are not at their default.
    return any(descriptor.name == name for descriptor, _ in message.ListFields())


def mutation(
    method: str, request: Any, write: Callable[[Value], Message], *, validate_only: bool = False
) -> Mutation[Value]:
    """Return the record of a call; `write` must leave secrets out."""
    payload = type(request)()
    payload.CopyFrom(request)
    payload.request_id = ""
    return Mutation(
        method=method,
        encode=lambda value: write(value).SerializeToString(),
        payload_sha256=hashlib.sha256(payload.SerializeToString(deterministic=True)).digest(),
        request_id=request.request_id,
        validate_only=validate_only,
    )


def answer(result: Value | Replay, kind: type[Proto], write: Callable[[Value], Proto]) -> Proto:
    """Return the answer to a call."""
    if isinstance(result, Replay):
        return kind.FromString(result.response)
    return write(result)


def write_empty(_nothing: None) -> Empty:
    """Return the answer of a Delete."""
    return Empty()
