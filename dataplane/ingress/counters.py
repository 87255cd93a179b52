"""What ingress counts: plain integers of one worker, collected by the agent at scrape.

Contract. Only ingress adds to them; `samples` gives rows of metric name, label values and value, by the names of
`dataplane.metric_table`. Counting never fails and never allocates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from dataplane.histogram import LATENCY_BOUNDS_S, Histogram


@dataclass(slots=True)
class IngressCounters:
    """All since start, but `sessions_active` and `content_bytes`, which are now.

    `enqueue_seconds` goes from the dot to the 250; `answers_lost` counts messages stored whose 250 nobody could be
    given: who sent them may send them again (window W1). `submissions_…` are messages with an Idempotency-Key.
    """

    sessions_active: int = 0
    connections_accepted: int = 0
    connections_over_cap: int = 0
    connections_over_rate: int = 0
    connections_early_talker: int = 0
    connections_tls_failed: int = 0
    connections_timed_out: int = 0
    connections_failed: int = 0
    auth_succeeded: int = 0
    auth_failed: int = 0
    auth_throttled: int = 0
    messages_enqueued: int = 0
    messages_refused: int = 0
    commits_late: int = 0
    content_bytes: int = 0
    answers_lost: int = 0
    answers_delayed: int = 0
    submissions_stored: int = 0
    submissions_unchecked: int = 0
    submissions_repeated: int = 0
    submissions_pending: int = 0
    submissions_conflicting: int = 0
    enqueue_seconds: Histogram = field(default_factory=lambda: Histogram(LATENCY_BOUNDS_S))

    def samples(self) -> Iterator[tuple[str, tuple[str, ...], float | tuple[float, ...]]]:
        """Rows for the metrics of the node."""
        yield "smtp_active_sessions", (), self.sessions_active
        for status, count in (
            ("accepted", self.connections_accepted),
            ("over_cap", self.connections_over_cap),
            ("over_rate", self.connections_over_rate),
            ("early_talker", self.connections_early_talker),
            ("tls_failed", self.connections_tls_failed),
            ("timed_out", self.connections_timed_out),
            ("failed", self.connections_failed),
        ):
            yield "smtp_connections_total", (status,), count
        for result, count in (
            ("succeeded", self.auth_succeeded),
            ("failed", self.auth_failed),
            ("throttled", self.auth_throttled),
        ):
            yield "smtp_auth_attempts_total", (result,), count
        for result, count in (
            ("stored", self.submissions_stored),
            ("unchecked", self.submissions_unchecked),
            ("repeated", self.submissions_repeated),
            ("pending", self.submissions_pending),
            ("conflicting", self.submissions_conflicting),
        ):
            yield "smtp_submission_keys_total", (result,), count
        yield "smtp_message_enqueued_total", (), self.messages_enqueued
        yield "smtp_messages_refused_total", (), self.messages_refused
        yield "smtp_commits_late_total", (), self.commits_late
        yield "smtp_answers_delayed_total", (), self.answers_delayed
        yield "smtp_content_bytes", (), self.content_bytes
        yield "smtp_enqueue_duration_seconds", (), self.enqueue_seconds.row
        yield "duplicate_windows_total", ("W1",), self.answers_lost
