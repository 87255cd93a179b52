"""What delivery counts, as plain integers that the agent collects when metrics are scraped. Never reset."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from dataplane.histogram import LATENCY_BOUNDS_S, LIFETIME_BOUNDS_S, Histogram


def _latency() -> Histogram:
    return Histogram(LATENCY_BOUNDS_S)


@dataclass(slots=True)
class DeliveryCounters:
    """Totals since the start, by recipient where nothing else is said; `waiting`, `window_bytes` and so on are now."""

    sent: int = 0
    deferred: int = 0
    bounced: int = 0
    failed: int = 0
    expired: int = 0
    uncertain: int = 0
    interrupted: int = 0
    attempts: int = 0  # transactions begun
    recovered: int = 0  # recipients found `sending` at the start
    put_back: int = 0  # recipients returned to the queue without an attempt
    connections_opened: int = 0
    connections_failed: int = 0
    connections_now: int = 0
    throttled: int = 0  # times a destination was found dead
    limited: int = 0  # times a limit let a message or a connection wait
    settle_failures: int = 0  # settlements that the spool refused and that are tried again
    quarantined: int = 0  # messages that could not be read back
    records_alone: int = 0  # acceptances that were not settled in time to share a record
    window_bytes: int = 0  # messages in memory now: content, envelope, recipients
    window_messages: int = 0  # messages whose content that is
    lifetime_seconds: Histogram = field(default_factory=lambda: Histogram(LIFETIME_BOUNDS_S))  # due to ended
    waiting_seconds: Histogram = field(default_factory=_latency)  # of an attempt: for a connection
    connecting_seconds: Histogram = field(default_factory=_latency)  # of an attempt that had one opened
    transferring_seconds: Histogram = field(default_factory=_latency)  # of an attempt: the transaction

    def samples(self) -> Iterator[tuple[str, tuple[str, ...], float | tuple[float, ...]]]:
        """Rows for the metrics of the node."""
        for result in ("sent", "deferred", "bounced", "failed", "expired", "uncertain", "interrupted"):
            yield "delivery_attempts_total", (result,), getattr(self, result)
        yield "delivery_connections", (), self.connections_now
        yield "delivery_connections_total", ("opened",), self.connections_opened
        yield "delivery_connections_total", ("failed",), self.connections_failed
        yield "delivery_throttled_total", (), self.throttled
        yield "delivery_limited_total", (), self.limited
        yield "delivery_window_bytes", (), self.window_bytes
        yield "delivery_window_messages", (), self.window_messages
        yield "delivery_transactions_total", (), self.attempts
        yield "delivery_put_back_total", (), self.put_back
        yield "delivery_stage_duration_seconds", ("waiting",), self.waiting_seconds.row
        yield "delivery_stage_duration_seconds", ("connecting",), self.connecting_seconds.row
        yield "delivery_stage_duration_seconds", ("transferring",), self.transferring_seconds.row
        yield "queue_processing_duration_seconds", (), self.lifetime_seconds.row
        yield "spool_write_failures_total", (), self.settle_failures
        yield "queue_recovered_total", (), self.recovered
        yield "queue_quarantined_total", (), self.quarantined
        yield "ledger_records_alone_total", (), self.records_alone
        # What is found in mid-attempt at a start is uncertain, too, and counted there.
        yield "duplicate_windows_total", ("W2",), self.uncertain
