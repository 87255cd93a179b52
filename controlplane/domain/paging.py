"""Page tokens: where the next page begins, bound to the arguments of the list, authenticated and opaque.

Contract. `PageTokens(key).seal(position, arguments)` gives a token; `open` gives the position back, or raises
InvalidArgumentError (PAGE_TOKEN_INVALID) for a token that was changed, made with another key, or used with other
arguments. Positions are keyset positions, never offsets, so that rows that come and go neither repeat nor hide others.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Sequence

from controlplane.domain.errors import InvalidArgumentError, Reason, invalid

DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1_000
_TAG_BYTES = 16


def coerce_page_size(size: int) -> int:
    """Return how many rows a page has: 50 for 0, at most 1,000; InvalidArgumentError for a negative size."""
    if size < 0:
        raise invalid("page_size", "must not be negative")
    return min(size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)


class PageTokens:
    """Seals and opens tokens with a secret that every replica has."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def seal(self, position: Sequence[str], arguments: Sequence[str]) -> str:
        """Return the token for the page that begins after `position`."""
        body = json.dumps(list(position), separators=(",", ":")).encode()
        return base64.urlsafe_b64encode(self._tag(body, arguments) + body).decode("ascii").rstrip("=")

    def open(self, token: str, arguments: Sequence[str]) -> tuple[str, ...] | None:
        """Return the position in `token`; None for the empty token of a first page."""
        if not token:
            return None
        try:
            raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            raise _refused() from None
        tag, body = raw[:_TAG_BYTES], raw[_TAG_BYTES:]
        if not hmac.compare_digest(tag, self._tag(body, arguments)):
            raise _refused()
        return tuple(json.loads(body))

    def _tag(self, body: bytes, arguments: Sequence[str]) -> bytes:
        said = json.dumps(list(arguments), separators=(",", ":")).encode()
        return hmac.digest(self._key, hashlib.sha256(said).digest() + body, "sha256")[:_TAG_BYTES]


def _refused() -> InvalidArgumentError:
    return invalid("page_token", "is none of ours, or belongs to other arguments", Reason.PAGE_TOKEN_INVALID)
