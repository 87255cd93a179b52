"""The built-in CA: certificates for nodes and for Postroad's own ports, all ECDSA P-256.

Contract. The CA lies in a folder as `ca.pem` and `ca.key` (0600); `create_authority` makes it once,
`load_authority` reads it. Of a node's CSR only the public key counts: subject and extensions are ignored,
and its identity is the one URI SAN `spiffe://postroad/node/<id>` that the CA writes. `read_identity` is the
way back and the only source of a node's identity. Every failure is a `PkiError` that says what is wrong,
with no key material in it. Files are written whole or not at all.
"""

from __future__ import annotations

import os
import re
import secrets
from datetime import datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

NODE_URI_PREFIX = "spiffe://postroad/node/"
NODE_LIFETIME = timedelta(days=30)
SERVER_LIFETIME = timedelta(days=397)
CA_LIFETIME = timedelta(days=3_650)

# Clocks of machines differ: a certificate made now must be good there, too.
_BACKDATE = timedelta(minutes=5)
_MAX_CSR_BYTES = 8_192
_NODE_ID = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")


class PkiError(Exception):
    """A certificate, key or request cannot be used; the text is fit for operators."""


class NodeIdentity(NamedTuple):
    """Who a client certificate says the node is. `serial` is hexadecimal; `not_after` is aware, in UTC."""

    node_id: str
    serial: str
    not_after: datetime


class IssuedCertificate(NamedTuple):
    """A new node certificate: its chain in PEM, without the CA, and what is recorded of it."""

    certificate_pem: bytes
    serial: str
    fingerprint: bytes
    not_before: datetime
    not_after: datetime


class CertificateAuthority:
    """The CA, in memory."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate = certificate
        self._key = key

    @property
    def certificate_pem(self) -> bytes:
        """The CA's own certificate."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def not_after(self) -> datetime:
        """When the CA ends."""
        return self._certificate.not_valid_after_utc

    def sign_node(self, csr_pem: bytes, node_id: str, now: datetime) -> IssuedCertificate:
        """A certificate for the key in `csr_pem`, good for 30 days from `now`; PkiError for a bad request."""
        if _NODE_ID.fullmatch(node_id) is None:
            raise PkiError("not a node id")
        public_key = _key_of_request(csr_pem)
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(NODE_URI_PREFIX + node_id)])
        certificate = self._issue(public_key, node_id, names, ExtendedKeyUsageOID.CLIENT_AUTH, now, NODE_LIFETIME)
        return IssuedCertificate(
            certificate.public_bytes(serialization.Encoding.PEM),
            _serial_text(certificate),
            certificate.fingerprint(hashes.SHA256()),
            certificate.not_valid_before_utc,
            certificate.not_valid_after_utc,
        )

    def issue_server(self, names: list[str], now: datetime) -> tuple[bytes, bytes]:
        """A new key and its certificate for a server known by `names` (hosts or addresses): chain, key, PEM."""
        if not names:
            raise PkiError("a server certificate needs at least one name")
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._issue(
            key.public_key(),
            names[0],
            x509.SubjectAlternativeName([_general_name(name) for name in names]),
            ExtendedKeyUsageOID.SERVER_AUTH,
            now,
            SERVER_LIFETIME,
        )
        return certificate.public_bytes(serialization.Encoding.PEM) + self.certificate_pem, _key_pem(key)

    def _issue(
        self,
        public_key: ec.EllipticCurvePublicKey,
        common_name: str,
        names: x509.SubjectAlternativeName,
        usage: x509.ObjectIdentifier,
        now: datetime,
        lifetime: timedelta,
    ) -> x509.Certificate:
        authority_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return (
            x509.CertificateBuilder()
            .subject_name(_name(common_name[:64]))
            .issuer_name(self._certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BACKDATE)
            # A certificate that outlives its CA would fail without a warning.
            .not_valid_after(min(now + lifetime, self.not_after))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(names, critical=False)
            .add_extension(authority_key, critical=False)
            .sign(self._key, hashes.SHA256())
        )


def create_authority(folder: Path, now: datetime) -> CertificateAuthority:
    """Make the CA in `folder`; PkiError when there is one already, which is never overwritten."""
    if (folder / "ca.pem").exists() or (folder / "ca.key").exists():
        raise PkiError(f"{folder} holds a CA already")
    key = ec.generate_private_key(ec.SECP256R1())
    public_key = key.public_key()
    name = _name("Postroad CA " + secrets.token_hex(4))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + CA_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .sign(key, hashes.SHA256())
    )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # The key first: a certificate without its key would look like a whole CA.
    write_private(folder / "ca.key", _key_pem(key))
    write_private(folder / "ca.pem", certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)
    return CertificateAuthority(certificate, key)


def load_authority(folder: Path) -> CertificateAuthority:
    """The CA in `folder`; PkiError when it is missing, torn, or its key is readable by others."""
    certificate = read_certificate(folder / "ca.pem")
    file = folder / "ca.key"
    try:
        if file.stat().st_mode & 0o077:
            raise PkiError(f"{file} can be read by others: chmod 600 it")
        key = serialization.load_pem_private_key(file.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise PkiError(f"{file} cannot be read ({type(error).__name__}): is this the folder of `pki init`?") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise PkiError(f"{file} is not the key of {folder / 'ca.pem'}")
    return CertificateAuthority(certificate, key)


def read_certificate(file: Path) -> x509.Certificate:
    """The first certificate in a PEM file; PkiError when there is none."""
    try:
        return x509.load_pem_x509_certificate(file.read_bytes())
    except (OSError, ValueError) as error:
        raise PkiError(f"{file} cannot be read ({type(error).__name__}): run `pki init` first?") from None


def read_identity(certificate_pem: bytes) -> NodeIdentity:
    """Who the node is, from the one URI SAN of its verified certificate; PkiError for every other certificate."""
    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound) as error:
        raise PkiError("the certificate names no node") from error
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1 or len(names) != 1 or not uris[0].startswith(NODE_URI_PREFIX):
        raise PkiError("the certificate names no node")
    node_id = uris[0].removeprefix(NODE_URI_PREFIX)
    if _NODE_ID.fullmatch(node_id) is None:
        raise PkiError("the certificate names no node")
    return NodeIdentity(node_id, _serial_text(certificate), certificate.not_valid_after_utc)


def write_private(file: Path, content: bytes, mode: int = 0o600) -> None:
    """Write `file` whole, durable, with `mode` from its first moment."""
    making = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    descriptor = os.open(making, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        making.replace(file)
        _sync_folder(file.parent)
    except BaseException:
        making.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _key_of_request(csr_pem: bytes) -> ec.EllipticCurvePublicKey:
    if len(csr_pem) > _MAX_CSR_BYTES:
        raise PkiError("the request is too large")
    try:
        request = x509.load_pem_x509_csr(csr_pem)
        signed = request.is_signature_valid
        public_key = request.public_key()
    except (ValueError, InvalidSignature, UnsupportedAlgorithm, TypeError) as error:
        raise PkiError("the request is no PKCS#10 in PEM") from error
    if not isinstance(public_key, ec.EllipticCurvePublicKey) or public_key.curve.name != "secp256r1":
        raise PkiError("the request's key is not ECDSA P-256")
    if not signed:
        raise PkiError("the request's signature is wrong")
    return public_key


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _serial_text(certificate: x509.Certificate) -> str:
    return f"{certificate.serial_number:x}"


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
