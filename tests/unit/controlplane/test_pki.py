"""The built-in CA: whom it signs for, what it writes into certificates, what it reads back."""

from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from controlplane.adapters.pki import (
    CertificateAuthority,
    PkiError,
    create_authority,
    load_authority,
    read_identity,
)

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


@pytest.fixture
def authority(tmp_path: Path) -> CertificateAuthority:
    return create_authority(tmp_path / "pki", NOW)


def _csr(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, name: str = "x") -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier("spiffe://postroad/node/other")])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).add_extension(names, critical=False)
    return request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def test_a_node_certificate_says_what_the_ca_says_and_nothing_of_the_request(
    authority: CertificateAuthority,
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())

    issued = authority.sign_node(_csr(key, "nodes/other"), "edge-1", NOW)

    certificate = x509.load_pem_x509_certificate(issued.certificate_pem)
    assert read_identity(issued.certificate_pem) == ("edge-1", issued.serial, NOW + timedelta(days=30))
    assert certificate.public_key() == key.public_key()
    assert "other" not in certificate.subject.rfc4514_string()
    assert b"other" not in certificate.public_bytes(serialization.Encoding.DER)
    assert certificate.fingerprint(hashes.SHA256()) == issued.fingerprint


@pytest.mark.parametrize("curve", [ec.SECP384R1(), None])
def test_only_p256_keys_are_signed(authority: CertificateAuthority, curve: ec.EllipticCurve | None) -> None:
    key = rsa.generate_private_key(65_537, 2_048) if curve is None else ec.generate_private_key(curve)

    with pytest.raises(PkiError, match="P-256"):
        authority.sign_node(_csr(key), "edge-1", NOW)


def test_a_request_with_a_wrong_signature_is_refused(authority: CertificateAuthority) -> None:
    request = x509.load_pem_x509_csr(_csr(ec.generate_private_key(ec.SECP256R1())))
    other = x509.load_pem_x509_csr(_csr(ec.generate_private_key(ec.SECP256R1())))
    forged = request.public_bytes(serialization.Encoding.DER).replace(
        request.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint),
        other.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint),
    )
    pem = x509.load_der_x509_csr(forged).public_bytes(serialization.Encoding.PEM)

    with pytest.raises(PkiError, match="signature"):
        authority.sign_node(pem, "edge-1", NOW)


@pytest.mark.parametrize("request_pem", [b"", b"garbage", b"x" * 100_000])
def test_what_is_no_request_is_refused(authority: CertificateAuthority, request_pem: bytes) -> None:
    with pytest.raises(PkiError):
        authority.sign_node(request_pem, "edge-1", NOW)


@pytest.mark.parametrize("node_id", ["", "a/b", "A", "-a", "a-", "a" * 64])
def test_a_node_id_that_could_mean_something_else_is_never_signed(
    authority: CertificateAuthority, node_id: str
) -> None:
    with pytest.raises(PkiError):
        authority.sign_node(_csr(ec.generate_private_key(ec.SECP256R1())), node_id, NOW)


def test_a_server_certificate_is_no_identity(authority: CertificateAuthority) -> None:
    chain, key = authority.issue_server(["localhost", "127.0.0.1"], NOW)

    names = x509.load_pem_x509_certificate(chain).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.value.get_values_for_type(x509.DNSName) == ["localhost"]
    assert [str(a) for a in names.value.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    assert b"PRIVATE KEY" in key
    with pytest.raises(PkiError):
        read_identity(chain)


def test_the_ca_is_made_once_and_its_key_is_private(tmp_path: Path, authority: CertificateAuthority) -> None:
    folder = tmp_path / "pki"

    with pytest.raises(PkiError, match="already"):
        create_authority(folder, NOW)

    assert stat.S_IMODE((folder / "ca.key").stat().st_mode) == 0o600
    assert load_authority(folder).certificate_pem == authority.certificate_pem
    assert sorted(file.name for file in folder.iterdir()) == ["ca.key", "ca.pem"]


def test_a_ca_key_that_others_can_read_is_refused(tmp_path: Path, authority: CertificateAuthority) -> None:
    (tmp_path / "pki" / "ca.key").chmod(0o640)

    with pytest.raises(PkiError, match="chmod 600"):
        load_authority(tmp_path / "pki")


def test_a_key_of_another_ca_is_refused(tmp_path: Path, authority: CertificateAuthority) -> None:
    create_authority(tmp_path / "other", NOW)
    (tmp_path / "other" / "ca.key").replace(tmp_path / "pki" / "ca.key")

    with pytest.raises(PkiError, match="not the key"):
        load_authority(tmp_path / "pki")


def test_no_certificate_outlives_the_ca(authority: CertificateAuthority) -> None:
    late = authority.not_after - timedelta(days=3)

    issued = authority.sign_node(_csr(ec.generate_private_key(ec.SECP256R1())), "edge-1", late)

    assert issued.not_after == authority.not_after
