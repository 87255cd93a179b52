"""A CA and server certificates, good and bad, for tests of TLS towards next hops."""

from __future__ import annotations

import datetime as dt
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_HOUR = dt.timedelta(hours=1)


class RelayPki:
    """`ca_pem` is what a provider trusts; `server` makes the context of a next hop."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "relay test CA")])
        self._count = 0
        now = dt.datetime.now(dt.UTC)
        certificate = self._builder(self._name, self._key, now - _HOUR, now + _HOUR, is_ca=True)
        self.ca_pem = certificate.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()

    def _builder(
        self, name: x509.Name, key: ec.EllipticCurvePrivateKey, begin: dt.datetime, end: dt.datetime, *, is_ca: bool
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        )

    def server(self, hostname: str = "localhost", *, expired: bool = False) -> ssl.SSLContext:
        """A server's context with a certificate for `hostname`."""
        self._count += 1
        key = ec.generate_private_key(ec.SECP256R1())
        now = dt.datetime.now(dt.UTC)
        begin, end = (now - 2 * _HOUR, now - _HOUR) if expired else (now - _HOUR, now + _HOUR)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hostname)])
        certificate = (
            self._builder(name, key, begin, end, is_ca=False)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(hostname)]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        path = self._folder / f"server-{self._count}.pem"
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return context
