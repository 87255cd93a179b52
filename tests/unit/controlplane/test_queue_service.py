"""When mail of ended leases is given away: not before everybody who lives had time to report."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Any

import pytest

from controlplane.domain.errors import Reason, UnavailableError
from controlplane.ports_queue import BadQueueRequestError, ClaimWish, Lease
from controlplane.services.queue import ADOPT_AFTER_S, MAX_BYTES, MAX_MESSAGES, SILENT_S, QueueService

NOW = datetime(2026, 1, 1, tzinfo=UTC)


class Store:
    def __init__(self) -> None:
        self.away = False
        self.adopted: list[bool] = []

    async def renew(self, *_: Any) -> Lease:
        if self.away:
            raise UnavailableError(Reason.DATABASE_UNAVAILABLE, "away", retry_after_s=1)
        return Lease(1, 15)

    async def claim(self, *_: Any, adopt: bool) -> list[Any]:
        self.adopted.append(adopt)
        return []


def wish(messages: int = 1, size_bytes: int = 0) -> ClaimWish:
    return ClaimWish(str(uuid.uuid4()), 1, str(uuid.uuid4()), messages, size_bytes)


class Bench:
    def __init__(self) -> None:
        self.store, self.now_s = Store(), 100.0
        self.service = QueueService(self.store, lambda: NOW, lambda: self.now_s)  # type: ignore[arg-type]

    async def claim_after(self, *waits_s: float) -> list[bool]:
        """Claim after each of these times; whether mail of ended leases was given away."""
        self.store.adopted.clear()
        for wait_s in waits_s:
            self.now_s += wait_s
            await self.service.claim("edge-1", "default", wish())
        return self.store.adopted


async def test_nothing_is_given_away_until_postgresql_has_answered_for_a_while() -> None:
    bench = Bench()
    half_s = ADOPT_AFTER_S / 2
    assert await bench.claim_after(0, half_s, half_s - 0.1, 0.2) == [False, False, False, True]
    bench.store.away = True
    with pytest.raises(UnavailableError):
        await bench.service.renew("edge-1", "spool", 1)
    assert await bench.claim_after(0, half_s, half_s + 0.1) == [False, False, True]


async def test_a_process_that_stood_still_gives_nodes_time_to_report_first() -> None:
    bench = Bench()
    half_s = ADOPT_AFTER_S / 2
    assert await bench.claim_after(0, half_s, half_s + 0.1) == [False, False, True]
    assert await bench.claim_after(SILENT_S + 0.1, half_s, half_s + 0.1) == [False, False, True]


@pytest.mark.parametrize("asked", [wish(0), wish(MAX_MESSAGES + 1), wish(1, MAX_BYTES + 1)])
async def test_a_claim_is_bounded(asked: ClaimWish) -> None:
    service = QueueService(Store(), lambda: NOW, lambda: 0.0)  # type: ignore[arg-type]
    with pytest.raises(BadQueueRequestError):
        await service.claim("edge-1", "default", asked)
