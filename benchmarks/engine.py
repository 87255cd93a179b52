"""What the delivery engine costs for a message handed on in memory: planning, waiting line, client, settlement.

Run by `python -m benchmarks.engine [--messages 20000] [--accounts 1]`. 4 KiB, one recipient, 20 kept connections to a
peer in another process that only answers, a spool that keeps nothing, no log. `window` messages are under way at a
time, so that the line to the provider is as long as under load. Processor time of this process for each message, the
least of five rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import uvloop

from benchmarks.client import serve_peer
from benchmarks.spool import CONTENT, make_message
from dataplane.adapters.resolver import CheckingResolver
from dataplane.adapters.spool_null import NullSpool
from dataplane.clock import SystemClock
from dataplane.core.config import (
    Account,
    Denials,
    Endpoint,
    NodeSettings,
    Rule,
    SealedValue,
    SmtpProvider,
    Target,
    TlsPolicy,
)
from dataplane.core.envelope import make_queue_key, message_bytes
from dataplane.core.ids import new_message_id
from dataplane.core.ledger import LedgerRecord
from dataplane.core.policy import CompiledAccount, compile_account
from dataplane.delivery.engine import DeliveryEngine, Surroundings

PROVIDER = "providers/inbox"
_ROUNDS = 5


def account_names(count: int) -> list[str]:
    """Names of so many accounts."""
    return [f"accounts/a{number}" for number in range(count)]


class PlainConfig:
    """`ports.ConfigView` of one provider that all of some accounts' mail goes to."""

    settings = NodeSettings()
    denials = Denials()
    loaded = True
    stale = False

    def __init__(self, port: int, accounts: int, uid: str) -> None:
        self._provider = SmtpProvider(PROVIDER, "", (Endpoint("127.0.0.1", port),), TlsPolicy.NONE)
        self.names = account_names(accounts)
        self._accounts = {name: _compiled(name, uid) for name in self.names}

    def account(self, name: str) -> CompiledAccount | None:
        """See the port."""
        return self._accounts.get(name)

    def account_of_network(self, address: str) -> str | None:
        """See the port; nobody submits here."""
        del address
        return None

    def provider(self, name: str) -> SmtpProvider | None:
        """See the port."""
        return self._provider if name == PROVIDER else None

    def unseal(self, value: SealedValue, account: str, resource: str, field: str) -> bytes:
        """Raise KeyError: nothing is sealed here."""
        raise KeyError(value, account, resource, field)


class SentLog:
    """`ports.EventLog` that writes nothing and calls `on_sent` for each message sent."""

    on_sent: Callable[[], None]

    def info(self, event: str, **fields: object) -> None:
        """Tell of what was sent."""
        del fields
        if event == "delivery.sent":
            self.on_sent()

    def warning(self, event: str, **fields: object) -> None:
        """Fail: nothing is refused here."""
        raise RuntimeError(event, fields)


def _compiled(name: str, uid: str) -> CompiledAccount:
    rule = Rule(f"{name}/routingRules/r", 1, (Target(PROVIDER),))
    return compile_account(Account(name, uid, revision=1, rules=(rule,)))


def _encode(record: LedgerRecord) -> bytes:
    del record
    return b"record"


async def _deliver(port: int, messages: int, accounts: int, window: int) -> float:
    envelope, row = make_message()
    clock = SystemClock()
    config = PlainConfig(port, accounts, envelope.account_uid)
    resolver = CheckingResolver(clock, ["127.0.0.0/8"])
    log = SentLog()
    engine = DeliveryEngine(
        Surroundings(NullSpool(), config, resolver, _encode, clock, lambda: 0.5, log, "bench.example")
    )
    await engine.start()
    made = [
        (
            replace(
                envelope,
                account=name,
                credential=f"{name}/smtpCredentials/app",
                message_id=new_message_id(clock.wall_ms(), os.urandom(10)),
            ),
            [row._replace(queue_key=make_queue_key(name, PROVIDER))],
        )
        for number in range(messages)
        for name in (config.names[number % accounts],)
    ]
    loop = asyncio.get_running_loop()
    finished = loop.create_future()
    coming = iter(made)
    left = messages

    def deliver() -> None:
        for one, rows in islice(coming, 1):
            if not engine.admit(message_bytes(len(CONTENT), [rows[0].address]), rows[0].queue_key):
                raise RuntimeError("the engine did not admit a message")
            engine.deliver(one, CONTENT, rows)

    def sent() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            finished.set_result(None)
        else:
            loop.call_soon(deliver)

    log.on_sent = sent
    begin = time.process_time()
    for _ in range(window):
        deliver()
    await finished
    cost = (time.process_time() - begin) / messages * 1e6
    await engine.stop(1.0)
    return cost


def main() -> None:
    """Print the figure."""
    parser = argparse.ArgumentParser(description="cost of the delivery engine for a message")
    parser.add_argument("--messages", type=int, default=20_000, help="messages of a round")
    parser.add_argument("--accounts", type=int, default=1, help="accounts that take turns")
    parser.add_argument("--window", type=int, default=200, help="messages under way at a time")
    arguments = parser.parse_args()
    with serve_peer() as port, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        cost = min(
            runner.run(_deliver(port, arguments.messages, arguments.accounts, arguments.window)) for _ in range(_ROUNDS)
        )
    print(f"engine  {cost:6.1f} us a message, {arguments.accounts} accounts")


if __name__ == "__main__":
    main()
