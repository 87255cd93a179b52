"""How the agent reaches the control plane: one place for what the transport must be told.

A ping every minute also while nothing is said, so that a half-open connection is noticed (the server tolerates one
every 30 s); messages up to 16 MiB; the channel's own reconnecting is as patient as ours. `why_ended` tells failures of
a stream, which are the weather, from our own bugs, which end the process.
"""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio

from dataplane.agent.identity import Identity

MAX_MESSAGE_BYTES = 16 * 1024 * 1024

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 60_000),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)


def eager_options() -> tuple[tuple[str, int], ...]:
    """Options for who has a lease to renew, and cannot be patient."""
    eager = {"grpc.initial_reconnect_backoff_ms": 500, "grpc.max_reconnect_backoff_ms": 2_000}
    return tuple({**dict(OPTIONS), **eager}.items())


def open_channel(address: str, identity: Identity, options: tuple[tuple[str, int], ...] = OPTIONS) -> grpc.aio.Channel:
    """A channel with mutual TLS; connects with its first call."""
    credentials = grpc.ssl_channel_credentials(
        root_certificates=identity.ca_pem,
        private_key=identity.key_pem,
        certificate_chain=identity.certificate_pem,
    )
    return grpc.aio.secure_channel(address, credentials, options=options)


def why_ended(failure: Exception) -> str:
    """What ended a stream, for the log; raises `failure` again when it is nothing that a stream may die of."""
    error: BaseException = failure
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    if isinstance(error, OSError | grpc.aio.UsageError | asyncio.InvalidStateError):
        return str(error) or type(error).__name__
    raise failure
