"""Sending by API on a test's database: the API with everything that it needs for that."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from controlplane.adapters.postgres.fleet_database import FleetDatabase
from controlplane.adapters.postgres.ledger import PostgresLedger
from controlplane.adapters.postgres.outbox import PostgresOutbox
from controlplane.domain.acceptance import Accepted
from controlplane.domain.sending_limits import Take
from controlplane.ports_sending import Denied
from controlplane.services.sending_budget import LocalMessageBudget
from postroad.control.v1 import message_service_pb2 as service
from postroad.control.v1 import outgoing_message_pb2 as outgoing
from postroad.control.v1 import provider_service_pb2, routing_rule_service_pb2
from postroad.control.v1.provider_pb2 import Provider, SmtpProvider
from postroad.control.v1.routing_rule_pb2 import RoutingRule
from support.api import ApiStack, Client, running_api
from support.databases import Database
from support.fleet import fleet_pool

RAW = b"From: app@acme.example\r\nSubject: raw\r\n\r\nHello.\r\n"
PARENT = "accounts/acme"


@dataclass
class Heard:
    """Observes; see `ports_sending.SendingObserver`."""

    messages: list[Accepted] = field(default_factory=list)
    results: list[str] = field(default_factory=list)

    def accepted(self, message: Accepted) -> None:
        self.messages.append(message)

    def ended(self, result: str) -> None:
        self.results.append(result)


class Budget(LocalMessageBudget):
    """A budget that remembers what it was asked for, and in how many calls."""

    def __init__(self) -> None:
        super().__init__(time.monotonic)
        self.asked: list[Sequence[Sequence[Take]]] = []
        self.given_back: list[Take] = []

    async def take(self, groups: Sequence[Sequence[Take]], parts: int) -> list[Denied | None]:
        self.asked.append(groups)
        return await super().take(groups, 1)

    async def give_back(self, takes: Sequence[Take]) -> None:
        self.given_back += takes
        await super().give_back(takes)


@dataclass
class Sending:
    """The API, a client of account `acme` that may send, and what was heard and counted."""

    stack: ApiStack
    client: Client
    heard: Heard
    budget: Budget

    async def send(self, message: outgoing.OutgoingMessage, **more: Any) -> service.SendMessageResponse:
        """Send as `acme`."""
        request = service.SendMessageRequest(parent=PARENT, message=message, **more)
        answer: service.SendMessageResponse = await self.client.message("SendMessage", request)
        return answer

    async def batch(
        self, *requests: service.SendMessageRequest, **more: Any
    ) -> Sequence[service.BatchSendMessagesResponse.Result]:
        """Send a batch as `acme`."""
        request = service.BatchSendMessagesRequest(parent=PARENT, requests=requests, **more)
        answer: service.BatchSendMessagesResponse = await self.client.message("BatchSendMessages", request)
        return answer.results

    async def count(self, table: str) -> int:
        rows = await self.stack.as_superuser(f"TABLE postroad.{table}")
        return len(rows)


def raw(*recipients: str, content: bytes = RAW, sender: str = "app@acme.example", **more: Any) -> Any:
    """A whole message to these."""
    to = recipients or ("someone@example.net",)
    return outgoing.OutgoingMessage(sender=sender, recipients=to, raw=content, **more)


def composed(**more: Any) -> Any:
    """A message of parts."""
    content = outgoing.MessageContent(
        author=outgoing.EmailAddress(address="app@acme.example", display_name="App"),
        to=[outgoing.EmailAddress(address="someone@example.net")],
        subject="Hello",
        text="Hi.\n",
    )
    content.MergeFrom(outgoing.MessageContent(**more))
    return outgoing.OutgoingMessage(content=content)


@asynccontextmanager
async def running_sending(database: Database, **parts: Any) -> AsyncIterator[Sending]:
    """The API with account `acme`, a rule for everything, and partitions for today."""
    heard, budget = Heard(), Budget()
    async with fleet_pool(database) as pool:
        fleet = FleetDatabase(pool)
        ledger = PostgresLedger(fleet, retention=timedelta(days=30))
        more = {"outbox": PostgresOutbox(fleet, ledger), "messages": budget, "sending": heard, "hostname": "cp.example"}
        async with running_api(database, **(more | parts)) as stack:
            client = await stack.make_account("acme")
            await add_rule(stack, "acme")
            yield Sending(stack, client, heard, budget)


async def add_rule(stack: ApiStack, account: str, **conditions: Any) -> None:
    """A provider, and a rule that leads to it."""
    parent = f"accounts/{account}"
    smtp = SmtpProvider(endpoints=[SmtpProvider.Endpoint(host="127.0.0.1", port=9)])
    await stack.operator.provider(
        "CreateProvider",
        provider_service_pb2.CreateProviderRequest(parent=parent, provider_id="hop", provider=Provider(smtp=smtp)),
    )
    rule = RoutingRule(targets=[RoutingRule.Target(provider=f"{parent}/providers/hop")], **conditions)
    await stack.operator.rule(
        "CreateRoutingRule",
        routing_rule_service_pb2.CreateRoutingRuleRequest(parent=parent, routing_rule_id="all", routing_rule=rule),
    )
