r"""Secrets at rest and in bundles: AES-256-GCM under a data key per value, the data key wrapped by a keyring key.

Contract. `Keyring` holds keys by id, from a folder with one file a key: `<key id>.key`, base64 of 32 bytes, mode 0600;
the greatest id seals, every key opens, so that keys rotate by adding one. `KeyringSealer` implements
`controlplane.ports.Sealer`: the additional data binds account, table, row and column, so that bytes that were moved do
not open. UnsealError says nothing of key or content. A KeyringError is a keyring that cannot be used.

    sealed bytes     1, length of the key id, key id, 60 bytes of wrapped key, 12 bytes of nonce, ciphertext and tag
    wrapped data key 12 bytes of nonce, 32 of key, 16 of tag

Nonces at rest are random. Those of bundles are made from the plaintext and its context by HMAC under a key derived from
the pool key: the same secret in the same place seals to the same bytes, so that a bundle changes only when its content
does, and two different secrets never share a nonce but by a collision of 96 bits.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from controlplane.ports import Random, UnsealError
from dataplane.core.config import SealedValue

_KEY_BYTES = 32
_NONCE_BYTES = 12
_WRAPPED_BYTES = _NONCE_BYTES + _KEY_BYTES + 16
_FORMAT = 1
_PAGE_TOKEN_LABEL = b"postroad/page-tokens/v1"
_NONCE_LABEL = b"postroad/bundle-nonce/v1"


class KeyringError(Exception):
    """The keyring cannot be used; the text says what to mend, and no key."""


class Keyring:
    """Keys that wrap data keys, by id; the greatest id is the one that seals."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        if not keys:
            raise KeyringError("the keyring is empty: run `bootstrap`, or put a key there")
        if any(len(key) != _KEY_BYTES for key in keys.values()):
            raise KeyringError("a key of the keyring has not 32 bytes")
        self._keys = dict(keys)
        self.active = max(keys)

    @classmethod
    def load(cls, folder: Path) -> Keyring:
        """Read every key in `folder`; KeyringError when there is none or one cannot be read."""
        keys = {}
        for file in sorted(folder.glob("*.key")):
            if file.stat().st_mode & 0o077:
                raise KeyringError(f"{file} is readable to others: chmod 600 it")
            try:
                keys[file.stem] = base64.b64decode(file.read_text("ascii").strip(), validate=True)
            except (OSError, UnicodeDecodeError, binascii.Error) as error:
                raise KeyringError(f"{file} cannot be read as a key") from error
        return cls(keys)

    @classmethod
    def load_or_create(cls, folder: Path, random: Random = os.urandom) -> Keyring:
        """As `load`; makes the first key where there is none."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not any(folder.glob("*.key")):
            cls.add_key(folder, random)
        return cls.load(folder)

    @staticmethod
    def add_key(folder: Path, random: Random = os.urandom) -> str:
        """Add a key that seals from the next start on; returns its id."""
        key_id = datetime.now(UTC).strftime("k%Y%m%dt%H%M%S%f")
        descriptor = os.open(folder / f"{key_id}.key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(base64.b64encode(random(_KEY_BYTES)) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        return key_id

    def cipher(self, key_id: str) -> AESGCM:
        """Return the cipher of a key; UnsealError when the key is gone."""
        if key_id not in self._keys:
            raise UnsealError(f"the keyring has no key {key_id}")
        return AESGCM(self._keys[key_id])

    def page_token_key(self) -> bytes:
        """Return a key for page tokens, the same on every replica with this keyring."""
        return hmac.digest(self._keys[self.active], _PAGE_TOKEN_LABEL, "sha256")


class KeyringSealer:
    """`controlplane.ports.Sealer`; see the module."""

    def __init__(self, keyring: Keyring, random: Random = os.urandom) -> None:
        self._keyring = keyring
        self._random = random

    def seal(self, secret: bytes, account: str, table: str, row: str, column: str) -> bytes:
        """As the port says."""
        context = _context(account, table, row, column)
        key_id = self._keyring.active.encode("ascii")
        data_key, wrap_nonce, nonce = self._random(_KEY_BYTES), self._random(_NONCE_BYTES), self._random(_NONCE_BYTES)
        wrapped = wrap_nonce + self._keyring.cipher(self._keyring.active).encrypt(wrap_nonce, data_key, context)
        header = bytes([_FORMAT, len(key_id)]) + key_id
        return header + wrapped + nonce + AESGCM(data_key).encrypt(nonce, secret, context)

    def unseal(self, sealed: bytes, account: str, table: str, row: str, column: str) -> bytes:
        """As the port says."""
        context = _context(account, table, row, column)
        if len(sealed) < 2 or sealed[0] != _FORMAT or len(sealed) < 2 + sealed[1] + _WRAPPED_BYTES + _NONCE_BYTES:
            raise UnsealError("these are no sealed bytes")
        begin = 2 + sealed[1]
        wrapped, rest = sealed[begin : begin + _WRAPPED_BYTES], sealed[begin + _WRAPPED_BYTES :]
        try:
            cipher = self._keyring.cipher(sealed[2:begin].decode("ascii", "replace"))
            data_key = cipher.decrypt(wrapped[:_NONCE_BYTES], wrapped[_NONCE_BYTES:], context)
            return AESGCM(data_key).decrypt(rest[:_NONCE_BYTES], rest[_NONCE_BYTES:], context)
        except InvalidTag:
            raise UnsealError("the sealed bytes do not belong there") from None

    def unseal_pool_key(self, node_pool: str, key_id: str, sealed: bytes) -> bytes:
        """Open a row of pool_keys; UnsealError as `unseal`."""
        return self.unseal(sealed, "", "pool_keys", f"{node_pool}/{key_id}", "key_sealed")

    def seal_for_pool(self, secret: bytes, key_id: str, key: bytes, context: bytes) -> SealedValue:
        """As the port says."""
        nonce_key = hmac.digest(key, _NONCE_LABEL, "sha256")
        message = len(context).to_bytes(4, "big") + context + secret
        nonce = hmac.digest(nonce_key, message, "sha256")[:_NONCE_BYTES]
        return SealedValue(key_id, nonce + AESGCM(key).encrypt(nonce, secret, context))


def _context(account: str, table: str, row: str, column: str) -> bytes:
    return f"postroad/rest/v1\0{account}\0{table}\0{row}\0{column}".encode()
