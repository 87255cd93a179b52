"""Who this node is: its key, made here and never sent, and the certificate that the control plane gave for it.

    identity/key.pem           ECDSA P-256, 0600
    identity/certificate.pem   from enrolment
    identity/ca.pem            the CA that signed it and the node port's certificate

`load_identity` reads the three; IdentityError tells what to do when it cannot.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

FOLDER = "identity"
URI_PREFIX = "spiffe://postroad/node/"


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
