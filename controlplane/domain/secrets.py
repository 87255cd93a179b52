"""Secrets that we give out, and the hashes that we keep of them.

Contract. Randomness is an argument. A secret is shown once; what is stored cannot be turned back. An API key is
`prk_<8 to look it up by>_<43>`, an SMTP secret `prs_<43>`, an enrolment token `pre_<43>`: 32 random bytes each, so that
one SHA-256 is as good as a slow hash. Comparison takes the same time wherever two values differ.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from typing import NamedTuple

SECRET_BYTES = 32
LOOKUP_BYTES = 6
SALT_BYTES = 16
SCRAM_ITERATIONS = 4_096

_API_KEY = re.compile(r"prk_([A-Za-z0-9_-]{8})_([A-Za-z0-9_-]{43})")


class NewApiKey(NamedTuple):
    """A key to give out, and what is stored of it."""

    secret: str
    lookup: str
    sha256: bytes


class ScramVerifier(NamedTuple):
    """What SCRAM-SHA-256 (RFC 5802, section 3; RFC 7677) needs of a password."""

    salt: bytes
    iterations: int
    stored_key: bytes
    server_key: bytes


def make_api_key(lookup_random: bytes, random: bytes) -> NewApiKey:
    """Make a key of 6 random bytes to look it up by and 32 that are the secret."""
    lookup = _text(lookup_random)
    secret = f"prk_{lookup}_{_text(random)}"
    return NewApiKey(secret, lookup, hash_secret(secret))


def lookup_of(presented: str) -> str | None:
    """Return the readable part of a presented key; None for what cannot be one of ours."""
    match = _API_KEY.fullmatch(presented)
    return match[1] if match else None


def api_key_prefix(lookup: str) -> str:
    """Return the readable beginning of a key."""
    return f"prk_{lookup}"


def make_smtp_secret(random: bytes) -> str:
    """Return an SMTP password made of 32 random bytes."""
    return f"prs_{_text(random)}"


def make_enrollment_token(random: bytes) -> str:
    """Return a node's one-time token made of 32 random bytes."""
    return f"pre_{_text(random)}"


def hash_secret(secret: str) -> bytes:
    """Return the 32 bytes that are stored."""
    return hashlib.sha256(secret.encode()).digest()


def matches(presented: str, stored_sha256: bytes) -> bool:
    """Whether `presented` is the secret, in constant time."""
    return hmac.compare_digest(hash_secret(presented), stored_sha256)


def make_scram_verifier(secret: str, salt: bytes, iterations: int = SCRAM_ITERATIONS) -> ScramVerifier:
    """Return the verifier; our secrets are ASCII, so that SASLprep leaves them as they are."""
    salted = hashlib.pbkdf2_hmac("sha256", secret.encode(), salt, iterations)
    client_key = hmac.digest(salted, b"Client Key", "sha256")
    server_key = hmac.digest(salted, b"Server Key", "sha256")
    return ScramVerifier(salt, iterations, hashlib.sha256(client_key).digest(), server_key)


def _text(random: bytes) -> str:
    return base64.urlsafe_b64encode(random).decode("ascii").rstrip("=")
