"""A worker that hammers one limit until it is told to stop: `limiter_child.py URL WORKERS CAPACITY RATE`.

It says on standard output what happens, one line a time: `shared`, `local`, `asked` every so often, `exhausted` once it
has been refused by the server and remembers so. A line on standard input ends it; the last line is its counts as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

from dataplane.adapters.limiter_local import LocalLimiter
from dataplane.adapters.limiter_redis import RedisLimiter
from dataplane.ports import Take

AT_ONCE = 16
SAY_EVERY = 20
LOOK_S = 0.05
PAUSE_S = 0.002


def say(word: str) -> None:
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


def remembers_little(limiter: RedisLimiter) -> bool:
    """Whether the limiter has seen the bucket with less than a tenth in it."""
    seen = [level for lot in limiter._first.levels.remembered.values() for level in lot.values()]
    return any(level.level * 10 < level.known.capacity for level in seen)


async def hammer(limiter: RedisLimiter, take: Take, stopped: asyncio.Event) -> dict[str, int]:
    counts = {"asked": 0, "granted": 0, "granted_locally": 0}
    exhausted = False
    rounds = 0
    while not stopped.is_set():
        grants = await asyncio.gather(*(limiter.take([take]) for _ in range(AT_ONCE)))
        counts["asked"] += len(grants)
        counts["granted"] += sum(grant.allowed for grant in grants)
        counts["granted_locally"] += sum(grant.allowed and grant.local for grant in grants)
        rounds += 1
        if rounds % SAY_EVERY == 0:
            say("asked")
        is_long = take.capacity > 300 * take.rate_per_s
        refused = not any(grant.allowed or grant.local for grant in grants)
        if refused and not exhausted and (remembers_little(limiter) or not is_long):
            exhausted = True
            say("exhausted")
        # Decided locally nothing waits, and the loop must read answers all the same.
        await asyncio.sleep(PAUSE_S)
    return counts


async def main(url: str, workers: int, take: Take) -> None:
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), stopped.set)
    limiter = RedisLimiter(
        url,
        LocalLimiter(time.monotonic, lambda: workers),
        look_s=LOOK_S,
        on_change=lambda shared, _: say("shared" if shared else "local"),
    )
    await limiter.start()
    counts = await hammer(limiter, take, stopped)
    counts["trips"] = limiter.counters.trips
    counts["lost"] = limiter.counters.lost
    await limiter.close()
    say(json.dumps(counts))


if __name__ == "__main__":
    _, server_url, worker_count, capacity, rate = sys.argv
    asyncio.run(main(server_url, int(worker_count), Take("messages", "a:demo", int(capacity), float(rate), 1)))
