"""How the SDK connects: TLS always, the API key as bearer token, deadlines, and retries where they are safe.

A call is retried on UNAVAILABLE (up to 4 attempts, back-off 0.2 to 3 s with jitter, done by gRPC) when repeating it
cannot do harm: reads, and changes that carry a `request_id`, which the server answers once and remembers. The SDK fills
in a `request_id` where the caller left it empty, in a batch for each of its requests. Not retried are calls whose
answer holds a secret: the server shows one only once, so that a repeated call would come back without it.

A unary call that was refused because the key made too many requests, which is before anything was done, is repeated
after the time that the server says, whatever it does: up to `MAX_WAITS` times, and never beyond its own timeout. So is
one of the above that is refused for another quota with a time to wait.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
from google.longrunning import operations_pb2
from google.protobuf.descriptor import Descriptor, FileDescriptor, MethodDescriptor

from postroad.control.v1 import (
    account_service_pb2,
    book_service_pb2,
    credential_service_pb2,
    destination_service_pb2,
    limit_service_pb2,
    message_service_pb2,
    node_service_pb2,
    provider_service_pb2,
    routing_rule_service_pb2,
    suspension_service_pb2,
)
from postroad.sdk.errors import PostroadError, ResourceExhaustedError

DEFAULT_TIMEOUT_S = 30.0
MAX_WAITS = 5
REQUESTS_EXHAUSTED = "REQUESTS_EXHAUSTED"
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
_SECRET_FIELDS = frozenset({"secret", "enrollment_token"})
_READS = ("Get", "List", "Wait")
_FILES: tuple[FileDescriptor, ...] = (
    account_service_pb2.DESCRIPTOR,
    credential_service_pb2.DESCRIPTOR,
    book_service_pb2.DESCRIPTOR,
    destination_service_pb2.DESCRIPTOR,
    limit_service_pb2.DESCRIPTOR,
    message_service_pb2.DESCRIPTOR,
    node_service_pb2.DESCRIPTOR,
    provider_service_pb2.DESCRIPTOR,
    routing_rule_service_pb2.DESCRIPTOR,
    suspension_service_pb2.DESCRIPTOR,
    operations_pb2.DESCRIPTOR,
)
_RETRY_POLICY = {
    "maxAttempts": 4,
    "initialBackoff": "0.2s",
    "maxBackoff": "3s",
    "backoffMultiplier": 2.5,
    "retryableStatusCodes": ["UNAVAILABLE"],
}


def credentials(api_key: str, ca_file: str | Path | None) -> grpc.ChannelCredentials:
    """TLS by the CA in `ca_file`, or the system's, and the key on every call. OSError when the file cannot be read."""
    roots = Path(ca_file).read_bytes() if ca_file is not None else None
    return grpc.composite_channel_credentials(
        grpc.ssl_channel_credentials(roots), grpc.access_token_call_credentials(api_key)
    )


def options() -> list[tuple[str, Any]]:
    """Channel options for sync and async channels alike."""
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.enable_retries", 1),
        ("grpc.service_config", _service_config()),
    ]


def is_repeatable(method: MethodDescriptor) -> bool:
    """Whether the same call may be sent twice without harm. See the module."""
    if method.server_streaming:
        return False
    if method.name.startswith(_READS):
        return True
    shows_secret = any(field.name in _SECRET_FIELDS for field in method.output_type.fields)
    return _has_request_id(method.input_type) and not shows_secret


def wait_before_repeating_s(method: str, error: PostroadError, waits: int, remaining_s: float) -> float | None:
    """Return how long to wait before `/package.Service/Method` is called again; None when it is not to be.

    `waits` is how often this call waited already, `remaining_s` what is left of its timeout.
    """
    wait_s = error.details.retry_after_s
    if not isinstance(error, ResourceExhaustedError) or wait_s is None or waits >= MAX_WAITS or wait_s >= remaining_s:
        return None
    return wait_s if error.reason == REQUESTS_EXHAUSTED or method in _REPEATABLE else None


def fill_request_id(request: Any) -> None:
    """Give the request, or each of a batch, an id where it has the field and the caller did not."""
    if "request_id" in request.DESCRIPTOR.fields_by_name:
        request.request_id = request.request_id or str(uuid.uuid4())
    elif _has_request_id(request.DESCRIPTOR):
        for one in request.requests:
            fill_request_id(one)


def _has_request_id(message: Descriptor) -> bool:
    if "request_id" in message.fields_by_name:
        return True
    batch = message.fields_by_name.get("requests")
    return batch is not None and batch.message_type is not None and _has_request_id(batch.message_type)


def methods() -> Iterator[MethodDescriptor]:
    """Every method of the public API."""
    for file in _FILES:
        for service in file.services_by_name.values():
            yield from service.methods


_REPEATABLE = frozenset(
    f"/{method.containing_service.full_name}/{method.name}" for method in methods() if is_repeatable(method)
)


def _service_config() -> str:
    repeatable = [
        {"service": method.containing_service.full_name, "method": method.name}
        for method in methods()
        if is_repeatable(method)
    ]
    return json.dumps({"methodConfig": [{"name": repeatable, "retryPolicy": _RETRY_POLICY}]})
