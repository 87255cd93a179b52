"""How a node gets its certificate: it makes a key, or takes the one that an earlier try left, and trades a one-time
token for a certificate of it at the control plane's public port.

Blocking. Certificate and CA are written last, each whole and durable, so that a try that failed changes nothing and can
be made again while the token is good. IdentityError tells what to do.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dataplane.agent.identity import FOLDER, Identity, IdentityError, load_identity
from dataplane.files import write_durably
from postroad.node.v1.enrollment_service_pb2 import EnrollRequest, EnrollResponse
from postroad.node.v1.enrollment_service_pb2_grpc import EnrollmentServiceStub

ENROLL_TIMEOUT_S = 30.0


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
