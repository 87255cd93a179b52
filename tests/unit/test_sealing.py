"""Secrets open with their key, in their place, unchanged; nowhere else."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from dataplane.adapters.sealing import KeyRing, SealError, SealKey
from dataplane.core.config import SealedValue, seal_context

RING = KeyRing({"k1": bytes(32), "k2": b"\1" * 32})
CONTEXT = seal_context("accounts/demo", "accounts/demo/providers/relay", "password")
SECRET = b"canary-secret"


def test_a_value_opens_in_its_place() -> None:
    sealed = RING.seal("k1", SECRET, CONTEXT)
    assert RING.unseal(sealed, CONTEXT) == SECRET
    assert SECRET not in sealed.ciphertext
    assert RING.seal("k1", SECRET, CONTEXT).ciphertext != sealed.ciphertext


@pytest.mark.parametrize(
    "context",
    [
        seal_context("accounts/other", "accounts/demo/providers/relay", "password"),
        seal_context("accounts/demo", "accounts/demo/providers/other", "password"),
        seal_context("accounts/demo", "accounts/demo/providers/relay", "ca_pem"),
        seal_context("", "accounts/demo/providers/relay", "password"),
        b"",
    ],
)
def test_a_value_opens_in_no_other_account_resource_or_field(context: bytes) -> None:
    with pytest.raises(SealError):
        RING.unseal(RING.seal("k1", SECRET, CONTEXT), context)


def test_a_value_opens_with_no_other_key() -> None:
    sealed = RING.seal("k1", SECRET, CONTEXT)
    with pytest.raises(SealError):
        RING.unseal(SealedValue("k2", sealed.ciphertext), CONTEXT)
    with pytest.raises(KeyError):
        RING.unseal(SealedValue("k3", sealed.ciphertext), CONTEXT)


def test_a_changed_or_cut_value_does_not_open() -> None:
    sealed = RING.seal("k1", SECRET, CONTEXT).ciphertext
    for position in range(len(sealed)):
        changed = sealed[:position] + bytes([sealed[position] ^ 1]) + sealed[position + 1 :]
        for data in (changed, sealed[:position]):
            with pytest.raises(SealError) as caught:
                RING.unseal(SealedValue("k1", data), CONTEXT)
            assert "canary" not in str(caught.value)


@pytest.mark.parametrize("key", [b"", bytes(16), bytes(31), bytes(33)])
def test_a_key_has_32_bytes(key: bytes) -> None:
    with pytest.raises(SealError):
        KeyRing({"k": key})
    with pytest.raises(SealError):
        SealKey(key)


def test_a_file_opens_for_its_purpose_with_its_key() -> None:
    key = SealKey(bytes(32))
    sealed = key.seal(SECRET, "last-known-good")
    assert SECRET not in sealed
    assert SealKey(bytes(32)).unseal(sealed, "last-known-good") == SECRET
    with pytest.raises(SealError, match="another place, or changed"):
        key.unseal(sealed, "denials")
    with pytest.raises(SealError, match="another seal key"):
        SealKey(b"\1" * 32).unseal(sealed, "last-known-good")


def test_a_torn_or_tampered_file_does_not_open() -> None:
    key = SealKey(bytes(32))
    sealed = key.seal(SECRET, "p")
    for position in range(len(sealed)):
        changed = sealed[:position] + bytes([sealed[position] ^ 1]) + sealed[position + 1 :]
        for data in (changed, sealed[:position]):
            with pytest.raises(SealError):
                key.unseal(data, "p")


def test_a_missing_key_file_is_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "seal.key"
    sealed = SealKey.from_file(path).seal(SECRET, "p")
    assert path.stat().st_mode & 0o777 == 0o600
    assert SealKey.from_file(path).unseal(sealed, "p") == SECRET
    assert [path.name for path in tmp_path.iterdir()] == ["seal.key"]


def test_a_key_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "seal.key"
    SealKey.from_file(path)
    path.chmod(0o640)
    with pytest.raises(SealError, match="chmod 600"):
        SealKey.from_file(path)


@pytest.mark.parametrize("text", ["", "!", "AAAA", "A" * 44])
def test_a_key_that_is_no_base64_of_32_bytes_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(SealError):
        SealKey.from_text(text)
    path = tmp_path / "seal.key"
    path.touch(0o600)
    path.write_text(text)
    with pytest.raises(SealError):
        SealKey.from_file(path)


def test_processes_that_begin_together_get_one_key(tmp_path: Path) -> None:
    keys: list[SealKey] = []
    together = threading.Barrier(4)

    def begin() -> None:
        together.wait(10)
        keys.append(SealKey.from_file(tmp_path / "seal.key"))

    threads = [threading.Thread(target=begin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(keys) == 4
    sealed = keys[0].seal(SECRET, "p")
    assert [key.unseal(sealed, "p") for key in keys] == [SECRET] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["seal.key"]
