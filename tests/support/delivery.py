"""A delivery engine with a spool; clock, random numbers and configuration are in the test's hands."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from dataplane.adapters.resolver import CheckingResolver
from dataplane.adapters.spool_ram import RamSpool
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
from dataplane.core.envelope import Envelope, RecipientRow, make_queue_key, message_bytes
from dataplane.core.ledger import AttemptEvent, LedgerRecord, RecipientUpdate
from dataplane.core.policy import CompiledAccount, compile_account
from dataplane.core.queue import EventType, State
from dataplane.delivery.engine import DeliveryEngine, Surroundings
from dataplane.ports import Spool
from support.ingress import Log
from support.spools import ManualClock, make_envelope

ACCOUNT = "accounts/demo"
ACCOUNT_UID = make_envelope().account_uid
CONTENT = b"Subject: hello\r\n\r\n.leading dot\r\nbody\r\n"
A, B = "providers/a", "providers/b"
KEY_A = make_queue_key(ACCOUNT, A)
HELD_BYTES = message_bytes(len(CONTENT), ("b@example.net",))
"""What a message of `Bench.submit` takes of the window."""


@dataclass
class Config:
    """A `ConfigView` of plain attributes."""

    settings: NodeSettings = field(default_factory=NodeSettings)
    denials: Denials = field(default_factory=Denials)
    loaded: bool = True
    stale: bool = False
    accounts: dict[str, CompiledAccount] = field(default_factory=dict)
    providers: dict[str, SmtpProvider] = field(default_factory=dict)

    def account(self, name: str) -> CompiledAccount | None:
        return self.accounts.get(name)

    def account_of_network(self, address: str) -> str | None:
        return None

    def provider(self, name: str) -> SmtpProvider | None:
        return self.providers.get(name)

    def unseal(self, value: SealedValue, account: str, resource: str, field: str) -> bytes:
        if value.key_id != "test":
            raise KeyError(value.key_id)
        return value.ciphertext

    def route_to(self, *targets: str, recipients: tuple[str, ...] = ()) -> None:
        """One rule for the account."""
        rule = Rule(
            f"{ACCOUNT}/routingRules/r", 1, tuple(Target(name) for name in targets), recipient_patterns=recipients
        )
        self.accounts[ACCOUNT] = compile_account(Account(ACCOUNT, ACCOUNT_UID, revision=7, rules=(rule,)))

    def add_provider(self, name: str, *ports: int, host: str = "127.0.0.1", **options: Any) -> SmtpProvider:
        options.setdefault("tls_policy", TlsPolicy.NONE)
        implicit = options.pop("implicit_tls", False)
        endpoints = tuple(Endpoint(host, port, implicit) for port in ports)
        provider = SmtpProvider(name, "", endpoints, **options)
        self.providers[name] = provider
        return provider


@dataclass
class Bench:
    """What a test works with. `records` are all ledger records in order."""

    engine: DeliveryEngine
    spool: Spool
    config: Config
    clock: ManualClock
    log: Log
    records: list[LedgerRecord]
    surroundings: Surroundings

    @property
    def events(self) -> list[AttemptEvent]:
        return [event for record in self.records for event in record.events]

    @property
    def updates(self) -> list[RecipientUpdate]:
        return [update for record in self.records for update in record.updates]

    def types(self) -> list[str]:
        return [EventType(event.type).name for event in self.events]

    def states(self) -> list[str]:
        return [State(update.state).name for update in self.updates]

    async def submit(
        self, *recipients: str, content: bytes = CONTENT, envelope: Envelope | None = None, key: str = KEY_A
    ) -> Envelope:
        """Accept a message as ingress does: handed over where the engine admits it, else queued."""
        envelope = envelope or self.envelope(content)
        recipients = recipients or ("b@example.net",)
        admitted = self.engine.admit(message_bytes(len(content), recipients), key)
        state, attempt = (State.SENDING, 1) if admitted else (State.QUEUED, 0)
        rows = [
            RecipientRow(index, address, state, attempt, self.clock.wall_ms(), envelope.priority, key)
            for index, address in enumerate(recipients)
        ]
        await self.spool.accept(envelope, content, rows)
        if admitted:
            self.engine.deliver(envelope, content, rows)
        else:
            self.engine.queued(envelope, rows)
        return envelope

    def envelope(self, content: bytes = CONTENT, **changes: Any) -> Envelope:
        made = make_envelope(accepted_ms=self.clock.wall_ms())
        return replace(made, size_bytes=len(content), **changes)

    async def until(self, condition: Callable[[], bool], what: str = "") -> None:
        """Let the loop run until `condition` holds, for ten seconds at most."""
        end_s = asyncio.get_running_loop().time() + 10
        while not condition():
            assert asyncio.get_running_loop().time() < end_s, f"never: {what or condition}"
            await asyncio.sleep(0.001)

    async def events_come(self, count: int) -> list[AttemptEvent]:
        await self.until(lambda: len(self.events) >= count, f"{count} events, only {self.types()}")
        return self.events

    async def retry(self, seconds: float = 3_600.0, key: str = KEY_A) -> None:
        """Make due what is deferred."""
        self.clock.advance(seconds)
        self.engine.wake(key)


@asynccontextmanager
async def delivery_bench(
    spool: Spool | None = None,
    *,
    clock: ManualClock | None = None,
    config: Config | None = None,
    allowed: Sequence[str] = ("127.0.0.0/8",),
    start: bool = True,
    **options: Any,
) -> AsyncIterator[Bench]:
    clock = clock or ManualClock()
    config = config or Config()
    spool = spool or RamSpool(clock)
    records: list[LedgerRecord] = []
    log = Log()

    def encode(record: LedgerRecord) -> bytes:
        records.append(record)
        return b"record"

    surroundings = Surroundings(
        spool=spool,
        config=config,
        resolver=CheckingResolver(clock, allowed),
        encode=encode,
        clock=clock,
        random=lambda: 0.5,
        log=log,
        hostname="relay.test",
    )
    engine = DeliveryEngine(surroundings, **options)
    bench = Bench(engine, spool, config, clock, log, records, surroundings)
    if start:
        await engine.start()
    try:
        yield bench
    finally:
        await engine.stop(0.0)
