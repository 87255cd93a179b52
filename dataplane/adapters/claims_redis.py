"""Submission keys in Redis or Valkey: `ports.Claims` by the functions and the connections of the limiter.

Contract. One round trip for a claim, which leaves with what limits ask in the same turn of the loop; what follows is
told and not waited for. When no server answers in the limiter's time, or it refuses, the claim is UNKNOWN: it may have
been noted all the same, and ends by itself. A key lies in Redis under its hash, and in a cluster anywhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from dataplane.adapters.limiter_redis import RedisLimiter
from dataplane.adapters.limiter_wire import pack_call
from dataplane.core.idempotency import KEY_WINDOW_MS, PENDING_MS
from dataplane.core.ids import MessageId
from dataplane.core.limits import server_key
from dataplane.ports import Claim, Claimed

_STATES = (Claimed.YES, Claimed.PENDING, Claimed.STORED, Claimed.OTHER)


class RedisClaims:
    """See the module. `pending_ms` is how long a claim holds that nobody ended."""

    def __init__(self, limiter: RedisLimiter, *, pending_ms: int = PENDING_MS) -> None:
        self._limiter = limiter
        self._pending_ms = pending_ms

    def claim(self, key_hash: bytes, content_hash: bytes, message_id: MessageId) -> asyncio.Future[Claim]:
        """Take the key for a message that is about to be stored."""
        claim: asyncio.Future[Claim] = asyncio.get_running_loop().create_future()
        answer = self._call("postroad_claim_1", key_hash, message_id.hex(), content_hash.hex(), self._pending_ms)
        answer.add_done_callback(partial(_settle, claim.set_result))
        return claim

    def stored(self, key_hash: bytes, content_hash: bytes, message_id: MessageId) -> None:
        """The message answers for its key from now on."""
        self._call("postroad_stored_1", key_hash, message_id.hex(), content_hash.hex(), KEY_WINDOW_MS)

    def withdraw(self, key_hash: bytes, message_id: MessageId) -> None:
        """Give the key free if this message has it."""
        self._call("postroad_withdraw_1", key_hash, message_id.hex())

    def _call(self, function: str, key_hash: bytes, *arguments: str | int) -> asyncio.Future[Any]:
        tag = f"i:{key_hash.hex()}"
        return self._limiter.call(tag, pack_call(function, server_key(tag, ""), *arguments))


def _settle(tell: Callable[[Claim], None], answer: asyncio.Future[Any]) -> None:
    tell(_claim_of(answer.result()))


def _claim_of(answer: Any) -> Claim:
    """Read an answer; one that is none of ours says nothing."""
    try:
        state, message = answer
        found = _STATES[state]
        return Claim(found, bytes.fromhex(message.decode()) if found is Claimed.STORED else b"")
    except (TypeError, ValueError, LookupError, AttributeError):
        return Claim(Claimed.UNKNOWN)
