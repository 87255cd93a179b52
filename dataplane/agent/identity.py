"""Who this node is: its key, made here and never sent, and the certificate that the control plane gave for it.

    identity/key.pem           ECDSA P-256, 0600
    identity/certificate.pem   from enrolment
    identity/ca.pem            the CA that signed it and the node port's certificate

Enrolment makes the key (or takes the one that an earlier try left), sends a CSR with a one-time token to the public
port and writes certificate and CA last, each whole and durable. IdentityError tells what to do.
"""

from __future__ import annotations

import contextlib
import datetime as dt
from dataclasses import dataclass
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dataplane.files import write_durably
from postroad.node.v1.enrollment_service_pb2 import EnrollRequest, EnrollResponse
from postroad.node.v1.enrollment_service_pb2_grpc import EnrollmentServiceStub

FOLDER = "identity"
URI_PREFIX = "spiffe://postroad/node/"
ENROLL_TIMEOUT_S = 30.0


class IdentityError(Exception):
    """There is no usable identity, or none could be had; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What the node shows the control plane; `node` is `nodes/{node}`."""

    node: str
    key_pem: bytes
    certificate_pem: bytes
    ca_pem: bytes
    not_after: dt.datetime


def is_enrolled(data_dir: Path) -> bool:
    """Whether the files of an identity are there."""
    folder = data_dir / FOLDER
    return all((folder / name).is_file() for name in ("key.pem", "certificate.pem", "ca.pem"))


def load_identity(data_dir: Path) -> Identity:
    """Read the identity; IdentityError when the node is not enrolled or the files are damaged."""
    if not is_enrolled(data_dir):
        raise IdentityError("this node is not enrolled: run `postroad-node enroll --token …`")
    folder = data_dir / FOLDER
    certificate_pem = (folder / "certificate.pem").read_bytes()
    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (ValueError, x509.ExtensionNotFound) as error:
        raise IdentityError(f"{folder / 'certificate.pem'} is no node certificate: enrol again") from error
    if not uri.startswith(URI_PREFIX):
        raise IdentityError(f"{folder / 'certificate.pem'} is no node certificate: enrol again")
    return Identity(
        node=f"nodes/{uri.removeprefix(URI_PREFIX)}",
        key_pem=(folder / "key.pem").read_bytes(),
        certificate_pem=certificate_pem,
        ca_pem=(folder / "ca.pem").read_bytes(),
        not_after=certificate.not_valid_after_utc,
    )


def enroll(data_dir: Path, server: str, ca_file: Path | None, token: str, software_version: str) -> Identity:
    """Trade the token for a certificate and keep both; IdentityError when the control plane will not or is away.

    Blocking. `server` is host:port of the public port, whose certificate must verify against `ca_file`, or against the
    system's authorities without one.
    """
    folder = data_dir / FOLDER
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = _load_or_make_key(folder / "key.pem")
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    request = EnrollRequest(
        token=token,
        csr_pem=csr.public_bytes(serialization.Encoding.PEM),
        software_version=software_version,
    )
    response = _ask(server, ca_file, request)
    certificate = x509.load_pem_x509_certificate(response.certificate_pem)
    if certificate.public_key() != key.public_key():
        raise IdentityError(f"{server} answered with a certificate for another key")
    write_durably(folder / "ca.pem", [response.ca_pem])
    write_durably(folder / "certificate.pem", [response.certificate_pem])
    return load_identity(data_dir)


def _ask(server: str, ca_file: Path | None, request: EnrollRequest) -> EnrollResponse:
    try:
        roots = None if ca_file is None else ca_file.read_bytes()
    except OSError as error:
        raise IdentityError(f"the CA file cannot be read: {error}") from error
    with grpc.secure_channel(server, grpc.ssl_channel_credentials(root_certificates=roots)) as channel:
        try:
            return EnrollmentServiceStub(channel).Enroll(request, timeout=ENROLL_TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise IdentityError(
                    "the token is unknown, used or older than 15 minutes: get a new one with "
                    "`postroad nodes create` or `postroad nodes reset-enrollment`"
                ) from error
            raise IdentityError(f"{server}: {error.code().name}: {error.details()}") from error


def _load_or_make_key(path: Path) -> ec.EllipticCurvePrivateKey:
    with contextlib.suppress(FileNotFoundError):
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise IdentityError(f"{path} is no P-256 key: move it away and enrol again")
        return key
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_durably(path, [pem])
    return key
