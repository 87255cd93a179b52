"""What delivery counts, as plain integers that the agent collects when metrics are scraped. Never reset."""

from __future__ import annotations

from dataclasses import dataclass


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
    settle_failures: int = 0  # settlements that the spool refused and that are tried again
    quarantined: int = 0  # messages that could not be read back
    records_alone: int = 0  # acceptances that were not settled in time to share a record
    window_bytes: int = 0  # content in memory now
