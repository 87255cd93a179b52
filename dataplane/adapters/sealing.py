r"""Secrets under keys: values of bundles under pool keys, files of the node under its seal key. AES-256-GCM.

Contract. `KeyRing` opens the sealed values of bundles; the additional data (`dataplane.core.config.seal_context`)
binds each to its place. `SealKey` seals whole files; `purpose` binds a file to what it is, so that one file of the
node cannot be put in another's place. What does not open raises SealError, an unknown pool key KeyError; neither
ever says anything of key or content. Nonces are 12 random bytes: good for 2^32 seals under one key (SP 800-38D).

    a sealed file    `PRSEAL1\\n`, 8 bytes that tell the key, 12 bytes of nonce, ciphertext and tag
    a key file       base64 of 32 bytes and a line end, mode 0600, made once when it is missing
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from dataplane.core.config import SealedValue

KEY_BYTES = 32
NONCE_BYTES = 12
_TAG_BYTES = 16
_MAGIC = b"PRSEAL1\n"
_KEY_MARK_BYTES = 8
_PURPOSE_PREFIX = b"postroad/file/v1\0"


class SealError(ValueError):
    """It does not open: another key, another place, or changed bytes. Or a key that cannot be used."""


class KeyRing:
    """Pool keys by id; immutable."""

    __slots__ = ("_ciphers",)

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        """SealError for a key that has not 32 bytes."""
        self._ciphers = {key_id: _cipher(key) for key_id, key in keys.items()}

    def seal(self, key_id: str, plaintext: bytes, context: bytes) -> SealedValue:
        """Seal under the key `key_id`. KeyError for an unknown one."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        return SealedValue(key_id, nonce + self._ciphers[key_id].encrypt(nonce, plaintext, context))

    def unseal(self, value: SealedValue, context: bytes) -> bytes:
        """Open a value. KeyError for an unknown key, SealError when it does not belong there."""
        return _open(self._ciphers[value.key_id], value.ciphertext, context)


class SealKey:
    """The node's key for its own files."""

    __slots__ = ("_cipher", "_mark")

    def __init__(self, key: bytes) -> None:
        """SealError for a key that has not 32 bytes."""
        self._cipher = _cipher(key)
        self._mark = hashlib.sha256(b"postroad/key-mark\0" + key).digest()[:_KEY_MARK_BYTES]

    @classmethod
    def from_text(cls, text: str) -> SealKey:
        """Return the key that an environment variable or a key file holds in base64. SealError."""
        try:
            key = base64.b64decode(text.strip(), validate=True)
        except (binascii.Error, ValueError) as error:
            raise SealError("the seal key is not base64") from error
        return cls(key)

    @classmethod
    def from_file(cls, path: Path) -> SealKey:
        """Return the key in the file, made (0600, durable) when there is none. SealError, OSError.

        A file that others than its owner may read is refused. Two processes that begin together get one key.
        """
        try:
            text = _read_private(path)
        except FileNotFoundError:
            _write_new_key(path)
            text = _read_private(path)
        return cls.from_text(text)

    def seal(self, content: bytes, purpose: str) -> bytes:
        """Return the sealed file."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        return _MAGIC + self._mark + nonce + self._cipher.encrypt(nonce, content, _PURPOSE_PREFIX + purpose.encode())

    def unseal(self, sealed: bytes, purpose: str) -> bytes:
        """Return the content. SealError says whether the key or the file is the wrong one."""
        head_bytes = len(_MAGIC) + _KEY_MARK_BYTES
        if not sealed.startswith(_MAGIC) or len(sealed) < head_bytes + NONCE_BYTES + _TAG_BYTES:
            raise SealError("the file is not sealed, or not whole")
        if sealed[len(_MAGIC) : head_bytes] != self._mark:
            raise SealError("the file was sealed under another seal key")
        return _open(self._cipher, sealed[head_bytes:], _PURPOSE_PREFIX + purpose.encode())


def _cipher(key: bytes) -> AESGCM:
    if len(key) != KEY_BYTES:
        raise SealError("a key must have 32 bytes")
    return AESGCM(key)


def _open(cipher: AESGCM, sealed: bytes, context: bytes) -> bytes:
    try:
        return cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], context)
    except (InvalidTag, ValueError) as error:
        raise SealError("it was sealed for another place, or changed") from error


def _read_private(path: Path) -> str:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_mode & 0o077:
            raise SealError(f"{path} may be read by others than its owner: chmod 600")
        return file.read(1_024).decode("ascii", "replace")


def _write_new_key(path: Path) -> None:
    """Write a key beside the file and link it into place, so that a file with half a key never has its name."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(base64.b64encode(secrets.token_bytes(KEY_BYTES)) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            path.hardlink_to(temporary)
        except FileExistsError:
            # Another process was quicker; its key counts.
            return
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink()
