"""What the leader does to the database: partitions made ahead, old rows dropped.

Contract. `housekeeping_jobs` returns the jobs; each is a transaction or a few, may run twice, and may be
cut off anywhere.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from functools import partial

from controlplane.jobs.leader import Job
from controlplane.ports_fleet import WAITING_DAYS, JobStore

# One day back: a node's clock, or its report, may lag behind midnight.
_DAYS_BACK, _DAYS_AHEAD = 1, 3
_IDEMPOTENCY = timedelta(hours=24)
# A node may have been cut off for days when it tells of its messages.
_SUBMISSION_KEYS = timedelta(days=7)
_KEYS_A_BATCH = 10_000
_EXPIRED_TOKENS = timedelta(days=1)
_LATE_CONTENTS = timedelta(days=1)
_WAITING = timedelta(days=WAITING_DAYS)
_OLD_REVISIONS = timedelta(days=30)
# A revision may be megabytes: few in a transaction.
_REVISIONS_A_BATCH, _BATCHES_A_RUN = 200, 100
_LEFT_BEHIND_A_BATCH = 5_000
_HELD_A_BATCH = 5_000
_COMMANDS_A_BATCH = 10
_GIVEN_UP_A_BATCH = 2_000
# One transaction, so that the nodes are sent the denials once a run at most.
_DENIALS_A_RUN = 10_000


def housekeeping_jobs(store: JobStore, *, retention: timedelta) -> list[Job]:
    """The jobs on `store`; the record of mail is kept for `retention`."""

    async def make_partitions(now: datetime) -> None:
        first = now.date() - timedelta(days=_DAYS_BACK)
        await store.ensure_partitions(first, _DAYS_BACK + 1 + _DAYS_AHEAD)

    async def drop_partitions(now: datetime) -> None:
        await store.drop_partitions((now - retention).date())

    async def forget_requests(now: datetime) -> None:
        await store.delete_idempotency_keys(now - _IDEMPOTENCY)

    async def forget_submission_keys(now: datetime) -> None:
        await _in_batches(partial(store.delete_submission_keys, now - _SUBMISSION_KEYS), _KEYS_A_BATCH)

    async def forget_tokens(now: datetime) -> None:
        await store.delete_enrollment_tokens(now - _EXPIRED_TOKENS)

    async def forget_revisions(now: datetime) -> None:
        await _in_batches(partial(store.delete_config_revisions, now - _OLD_REVISIONS), _REVISIONS_A_BATCH)

    async def forget_denials(now: datetime) -> None:
        await store.delete_denials(now, _DENIALS_A_RUN)

    async def sweep_queue(now: datetime) -> None:
        await store.sweep_queue(now - _LATE_CONTENTS)

    return [
        Job("make_partitions", timedelta(hours=1), make_partitions),
        Job("drop_partitions", timedelta(hours=1), drop_partitions),
        Job("forget_requests", timedelta(minutes=10), forget_requests),
        Job("forget_submission_keys", timedelta(minutes=10), forget_submission_keys),
        Job("forget_tokens", timedelta(hours=1), forget_tokens),
        Job("forget_revisions", timedelta(hours=6), forget_revisions),
        Job("sweep_queue", timedelta(hours=1), sweep_queue),
        Job("expire_held", timedelta(hours=1), lambda _: _in_batches(store.expire_held, _HELD_A_BATCH)),
        Job(
            "end_left_behind", timedelta(minutes=1), lambda _: _in_batches(store.end_left_behind, _LEFT_BEHIND_A_BATCH)
        ),
        # At every turn of the leader: commands wait for it.
        Job("end_given_up", timedelta(0), lambda _: _in_batches(store.end_given_up, _GIVEN_UP_A_BATCH)),
        # As often: where no node asks for mail nobody else does it.
        Job("run_queue_commands", timedelta(0), lambda _: _in_batches(store.run_queue_commands, _COMMANDS_A_BATCH)),
        Job("forget_denials", timedelta(hours=1), forget_denials),
        # As long as records of mail that was held under them can be stored.
        Job("forget_leases", timedelta(hours=6), lambda now: store.delete_leases(now - retention - _WAITING)),
    ]


async def _in_batches(step: Callable[[int], Awaitable[int]], count: int) -> None:
    """Do `count` at a time; what is left over after so many batches waits for the next run."""
    for _ in range(_BATCHES_A_RUN):
        if await step(count) < count:
            return
