"""What a message's limits cost: `python -m benchmarks.limiter [--seconds 2] [--accounts 50]`.

Each line is one kind of limiter and number of askers at once, each of which asks for what a message usually draws from
(account and credential) and waits for the answer. Figures are CPU, user and system, for each message: of this process,
and of the server beside it. `nobody` grants at once and shows what asking itself costs here; `local` is the share that
decides while the server is away.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import redis
import uvloop

from dataplane.adapters.limiter_local import LocalLimiter
from dataplane.adapters.limiter_redis import RedisLimiter
from dataplane.core.config import Account, NodeSettings
from dataplane.core.policy import compile_account
from dataplane.ingress.buckets import IngressLimits
from dataplane.ports import Grant, Take
from postroad.localstack import ValkeyServer

AT_ONCE = (1, 64, 1_000)
_GENEROUS = 4_000_000_000

Ask = Callable[[Sequence[Take]], asyncio.Future[Grant]]


def _messages(account_count: int) -> list[tuple[Take, ...]]:
    """What messages of so many accounts draw from."""
    settings = NodeSettings(account_messages_per_hour=_GENEROUS, credential_messages_per_hour=_GENEROUS)
    limits = IngressLimits()
    found = []
    for number in range(account_count):
        name = f"accounts/account-{number}"
        compiled = compile_account(Account(name, "uid", 1))
        credential = f"{name}/smtpCredentials/app"
        found.append(limits.of_message(settings, compiled, credential, "192.0.2.1", listed=False).takes(1, 0))
    return found


def _ask_nobody(takes: Sequence[Take]) -> asyncio.Future[Grant]:
    del takes
    answer: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
    answer.set_result(Grant(allowed=True, wait_s=0.0, refused_key="", local=False))
    return answer


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _server_cpu_s(url: str) -> float:
    with redis.Redis.from_url(url) as client:
        used = client.info("cpu")
    return float(used["used_cpu_user"]) + float(used["used_cpu_sys"])


async def _measure(
    name: str, ask: Ask, at_once: int, messages: list[tuple[Take, ...]], seconds: float, url: str
) -> None:
    wishes = itertools.cycle(messages)
    done = refused = 0

    async def one() -> None:
        nonlocal done, refused
        while time.monotonic() < end_s:
            grant = await ask(next(wishes))
            done += 1
            refused += not grant.allowed

    cpu_s, server_s, started_s = _cpu_s(), _server_cpu_s(url), time.monotonic()
    end_s = started_s + seconds
    await asyncio.gather(*(one() for _ in range(at_once)))
    elapsed_s = time.monotonic() - started_s
    cpu_us = (_cpu_s() - cpu_s) / done * 1e6
    server_us = (_server_cpu_s(url) - server_s) / done * 1e6
    print(
        f"{name:8} {at_once:5} at once: {cpu_us:6.2f} us here, {server_us:6.2f} us server, "
        f"{done / elapsed_s:9.0f}/s, {refused} refused"
    )


async def _run(url: str, seconds: float, account_count: int) -> None:
    messages = _messages(account_count)
    shared = RedisLimiter(url, LocalLimiter(time.monotonic))
    await shared.start()
    local = LocalLimiter(time.monotonic)
    for name, ask in (("nobody", _ask_nobody), ("local", local.ask), ("shared", shared.ask)):
        for at_once in AT_ONCE:
            await _measure(name, ask, at_once, messages, seconds, url)
    print(f"decided locally: {shared.counters.local}, connections given up: {shared.counters.trips}")
    await shared.close()


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description="cost of limits")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--accounts", type=int, default=50)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = ValkeyServer(Path(folder) / "valkey").start()
        try:
            uvloop.run(_run(server.url(), arguments.seconds, arguments.accounts))
        finally:
            server.destroy()


if __name__ == "__main__":
    main()
