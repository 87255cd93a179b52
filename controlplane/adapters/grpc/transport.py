"""How the two gRPC ports are set up: keepalive, sizes, TLS, and who a node's certificate says it is.

Contract. The servers tolerate a ping every 30 s and ping silent clients themselves, so that a half-open connection is
noticed within two minutes. TLS files are read again when they change, without a restart; files that cannot be used
leave the former ones in force and are reported. `identity_of` takes a node's identity from its verified certificate
alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import grpc
import grpc.aio

from controlplane.adapters.grpc.calls import MAX_LARGE_BYTES
from controlplane.adapters.pki import NodeIdentity, PkiError, read_identity

# Of methods that send mail; `calls` says what others take.
MAX_API_MESSAGE_BYTES = MAX_LARGE_BYTES + 64 * 1024
MAX_NODE_MESSAGE_BYTES = 16 * 1024 * 1024

_SHARED_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
    ("grpc.http2.max_ping_strikes", 2),
    ("grpc.max_connection_age_ms", 3_600_000),
    ("grpc.max_connection_age_grace_ms", 60_000),
    ("grpc.max_concurrent_streams", 200),
    ("grpc.max_metadata_size", 16_384),
    # Two processes on one port would each get a part of the calls: a port that is taken must be an error.
    ("grpc.so_reuseport", 0),
)

API_OPTIONS: tuple[tuple[str, int], ...] = (
    *_SHARED_OPTIONS,
    ("grpc.max_receive_message_length", MAX_API_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_NODE_MESSAGE_BYTES),
)
NODE_OPTIONS: tuple[tuple[str, int], ...] = (
    *_SHARED_OPTIONS,
    ("grpc.max_receive_message_length", MAX_NODE_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_NODE_MESSAGE_BYTES),
)


class TlsFiles(NamedTuple):
    """Certificate chain and key in PEM; `client_ca` makes client certificates obligatory."""

    certificate: Path
    key: Path
    client_ca: Path | None = None


def server_credentials(files: TlsFiles, report: Callable[[str], None]) -> grpc.ServerCredentials:
    """Credentials that follow the files; OSError when they cannot be read now."""
    stamp = _stamp(files)
    first = _configuration(files)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal stamp
        try:
            present = _stamp(files)
            if present == stamp:
                return None
            configuration = _configuration(files)
        except OSError as error:
            report(f"{error.filename}: {error.strerror}")
            return None
        stamp = present
        return configuration

    # The stub does not know that None means "as before".
    fetcher = cast("Callable[[], grpc.ServerCertificateConfiguration]", fetch)
    return grpc.dynamic_ssl_server_credentials(
        first, fetcher, require_client_authentication=files.client_ca is not None
    )


def identity_of(context: grpc.aio.ServicerContext[Any, Any]) -> NodeIdentity:
    """Who calls on the nodes' port; PkiError for a certificate that is no node's."""
    certificates = list(context.auth_context().get("x509_pem_cert", ()))
    if len(certificates) != 1:
        raise PkiError("there is no client certificate")
    return read_identity(certificates[0])


def _stamp(files: TlsFiles) -> list[tuple[int, int]]:
    stats = [file.stat() for file in files if file is not None]
    return [(stat.st_mtime_ns, stat.st_ino) for stat in stats]


def _configuration(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    client_ca = None if files.client_ca is None else files.client_ca.read_bytes()
    return grpc.ssl_server_certificate_configuration(
        [(files.key.read_bytes(), files.certificate.read_bytes())], root_certificates=client_ca
    )
