"""A worker's limiter in Redis: one that cannot be made stops no mail."""

from __future__ import annotations

import pytest

from dataplane.adapters.limiter_local import LocalLimiter
from dataplane.worker import shared_limiter


@pytest.fixture
def local() -> LocalLimiter:
    return LocalLimiter(lambda: 0.0, lambda: 1)


@pytest.mark.parametrize(
    "url",
    [
        "http://canary",
        "redis://canary:port",
        "redis://h?canary=1",
        "redis://h?ssl_ca_certs=canary",
        "rediss://h?ssl_cert_reqs=canary",
    ],
)
async def test_a_limiter_that_cannot_be_made_leaves_the_local_share_and_says_so(local: LocalLimiter, url: str) -> None:
    heard: list[tuple[bool, str]] = []
    assert shared_limiter(url, local, lambda shared, reason: heard.append((shared, reason))) is None
    ((shared, reason),) = heard
    assert not shared
    assert reason.startswith("redis.url cannot be used")
    assert "canary" not in reason


async def test_a_server_that_is_away_is_no_reason_against_the_limiter(local: LocalLimiter) -> None:
    limiter = shared_limiter("redis://:secret@127.0.0.1:1/0", local, lambda *_: None)
    assert limiter is not None
    assert not limiter.shared
    await limiter.close()
