"""Puts the public API together: services on a database, their handlers, and the registry that serves them.

Contract. `build_api(parts)` opens nothing and starts nothing; what it returns is stopped by forgetting it, after
`drain()` has let the watches end. Only composition roots and tests call it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from google.longrunning import operations_pb2, operations_pb2_grpc

from controlplane.adapters.bundles import ProtobufBundleEncoder
from controlplane.adapters.grpc.accounts import AccountHandlers
from controlplane.adapters.grpc.auth import Guard
from controlplane.adapters.grpc.books import BookHandlers
from controlplane.adapters.grpc.calls import CallObserver, Calls
from controlplane.adapters.grpc.credentials import CredentialHandlers
from controlplane.adapters.grpc.destinations import DestinationHandlers
from controlplane.adapters.grpc.interceptor import ApiInterceptor
from controlplane.adapters.grpc.limits import LimitHandlers
from controlplane.adapters.grpc.messages import MessageHandlers
from controlplane.adapters.grpc.nodes import NodeHandlers
from controlplane.adapters.grpc.operations import OperationHandlers
from controlplane.adapters.grpc.providers import ProviderHandlers
from controlplane.adapters.grpc.registry import ApiRegistry, ApiService
from controlplane.adapters.grpc.routing_rules import RoutingRuleHandlers
from controlplane.adapters.grpc.sending import SendingHandlers
from controlplane.adapters.grpc.suspensions import SuspensionHandlers
from controlplane.adapters.sealing import Keyring, KeyringSealer
from controlplane.adapters.smtp_probe import SmtpProbe
from controlplane.domain.hosts import HostPolicy
from controlplane.domain.messages import milliseconds_at
from controlplane.domain.paging import PageTokens
from controlplane.ports import Database, LedgerSignal, LiveLimits, ProviderProbe, Random, RequestBudget
from controlplane.ports_sending import MessageBudget, Outbox, SendingObserver
from controlplane.services.accounts import AccountsService
from controlplane.services.authentication import Authenticator
from controlplane.services.books import BooksService
from controlplane.services.compile import BundleCompiler
from controlplane.services.credentials import ApiKeysService, SmtpCredentialsService
from controlplane.services.destinations import DestinationsService
from controlplane.services.limit_states import LimitStates, NoLiveLimits
from controlplane.services.limits import LimitsService
from controlplane.services.messages import MessagesService, OperationsService
from controlplane.services.nodes import NodePoolsService, NodesService
from controlplane.services.providers import ProvidersService
from controlplane.services.routing_rules import RoutingRulesService
from controlplane.services.seats import IN_ALL
from controlplane.services.sending import NoOutbox, SendingService, Unobserved
from controlplane.services.sending_budget import LocalMessageBudget
from controlplane.services.suspensions import SuspensionsService
from controlplane.services.throttle import Throttle
from postroad.control.v1 import (
    account_service_pb2,
    account_service_pb2_grpc,
    book_service_pb2,
    book_service_pb2_grpc,
    credential_service_pb2,
    credential_service_pb2_grpc,
    destination_service_pb2,
    destination_service_pb2_grpc,
    limit_service_pb2,
    limit_service_pb2_grpc,
    message_service_pb2,
    message_service_pb2_grpc,
    node_service_pb2,
    node_service_pb2_grpc,
    provider_service_pb2,
    provider_service_pb2_grpc,
    routing_rule_service_pb2,
    routing_rule_service_pb2_grpc,
    suspension_service_pb2,
    suspension_service_pb2_grpc,
)


def _utc_now() -> datetime:
    return datetime.now(UTC)


def _ignore(_method: str, _status: str, _seconds: float | None) -> None:
    """For those who do not measure."""


@dataclass(frozen=True, slots=True)
class ApiParts:
    """What the API stands on; the last ones have what production uses as defaults."""

    database: Database
    keyring: Keyring
    signal: LedgerSignal
    hosts: HostPolicy
    observe: CallObserver = _ignore
    probe: ProviderProbe | None = None
    random: Random = os.urandom
    now: Callable[[], datetime] = _utc_now
    max_watchers: int = IN_ALL
    live: LiveLimits = field(default_factory=NoLiveLimits)
    requests: RequestBudget | None = None
    monotonic: Callable[[], float] = time.monotonic
    outbox: Outbox = field(default_factory=NoOutbox)
    # A bucket for each control plane, where there is no Redis.
    messages: MessageBudget = field(default_factory=lambda: LocalMessageBudget(time.monotonic))
    sending: SendingObserver = field(default_factory=Unobserved)
    hostname: str = "localhost"


@dataclass(frozen=True, slots=True)
class Api:
    """The public API: `interceptor` for a grpc.aio server, `registry` for its services and calls in this process."""

    registry: ApiRegistry
    interceptor: ApiInterceptor
    authenticator: Authenticator
    pools: NodePoolsService
    messages: MessagesService

    def drain(self) -> None:
        """Let every watch end with UNAVAILABLE at its next turn."""
        self.messages.drain()


def build_api(parts: ApiParts) -> Api:
    """Put the API together."""
    database, random = parts.database, parts.random
    sealer = KeyringSealer(parts.keyring, random)
    compiler = BundleCompiler(sealer, ProtobufBundleEncoder())
    tokens = PageTokens(parts.keyring.page_token_key())
    pools = NodePoolsService(database, compiler, tokens, sealer=sealer, random=random)
    messages = MessagesService(database, tokens, parts.signal, max_watchers=parts.max_watchers)
    sending = SendingService(
        parts.outbox,
        parts.messages,
        parts.sending,
        now_ms=lambda: milliseconds_at(parts.now()),
        random=random,
        hostname=parts.hostname,
    )
    providers = ProvidersService(
        database,
        compiler,
        tokens,
        sealer=sealer,
        probe=parts.probe or SmtpProbe(parts.hosts),
        hosts=parts.hosts,
        random=random,
    )
    credentials = CredentialHandlers(
        ApiKeysService(database, tokens, random), SmtpCredentialsService(database, compiler, tokens, random)
    )
    services = _services(
        AccountHandlers(AccountsService(database, compiler, tokens)),
        credentials,
        ProviderHandlers(providers),
        RoutingRuleHandlers(RoutingRulesService(database, compiler, tokens)),
        LimitHandlers(LimitsService(database, compiler, tokens, LimitStates(parts.live))),
        MessageHandlers(messages, SendingHandlers(sending)),
        NodeHandlers(NodesService(database, compiler, tokens, random), pools),
        OperationHandlers(OperationsService(database, tokens, parts.signal, max_waiters=parts.max_watchers)),
    )
    books = ApiService(
        book_service_pb2.DESCRIPTOR.services_by_name["BookService"],
        BookHandlers(BooksService(database, tokens)),
        book_service_pb2_grpc.add_BookServiceServicer_to_server,
    )
    destinations = ApiService(
        destination_service_pb2.DESCRIPTOR.services_by_name["DestinationService"],
        DestinationHandlers(DestinationsService(database, tokens)),
        destination_service_pb2_grpc.add_DestinationServiceServicer_to_server,
    )
    suspensions = ApiService(
        suspension_service_pb2.DESCRIPTOR.services_by_name["SuspensionService"],
        SuspensionHandlers(SuspensionsService(database, max_waiters=parts.max_watchers)),
        suspension_service_pb2_grpc.add_SuspensionServiceServicer_to_server,
    )
    authenticator = Authenticator(database, parts.now)
    guard = Guard(authenticator, Throttle(parts.requests, parts.monotonic))
    # What comes by the registry is measured by who carries it.
    registry = ApiRegistry(Calls(guard), (*services, books, destinations, suspensions))
    return Api(registry, ApiInterceptor(Calls(guard, parts.observe)), authenticator, pools, messages)


def _services(
    accounts: AccountHandlers,
    credentials: CredentialHandlers,
    providers: ProviderHandlers,
    rules: RoutingRuleHandlers,
    limits: LimitHandlers,
    messages: MessageHandlers,
    nodes: NodeHandlers,
    operations: OperationHandlers,
) -> Sequence[ApiService]:
    return (
        ApiService(
            account_service_pb2.DESCRIPTOR.services_by_name["AccountService"],
            accounts,
            account_service_pb2_grpc.add_AccountServiceServicer_to_server,
        ),
        ApiService(
            credential_service_pb2.DESCRIPTOR.services_by_name["CredentialService"],
            credentials,
            credential_service_pb2_grpc.add_CredentialServiceServicer_to_server,
        ),
        ApiService(
            provider_service_pb2.DESCRIPTOR.services_by_name["ProviderService"],
            providers,
            provider_service_pb2_grpc.add_ProviderServiceServicer_to_server,
        ),
        ApiService(
            routing_rule_service_pb2.DESCRIPTOR.services_by_name["RoutingRuleService"],
            rules,
            routing_rule_service_pb2_grpc.add_RoutingRuleServiceServicer_to_server,
        ),
        ApiService(
            limit_service_pb2.DESCRIPTOR.services_by_name["LimitService"],
            limits,
            limit_service_pb2_grpc.add_LimitServiceServicer_to_server,
        ),
        ApiService(
            message_service_pb2.DESCRIPTOR.services_by_name["MessageService"],
            messages,
            message_service_pb2_grpc.add_MessageServiceServicer_to_server,
        ),
        ApiService(
            node_service_pb2.DESCRIPTOR.services_by_name["NodeService"],
            nodes,
            node_service_pb2_grpc.add_NodeServiceServicer_to_server,
        ),
        ApiService(
            operations_pb2.DESCRIPTOR.services_by_name["Operations"],
            operations,
            operations_pb2_grpc.add_OperationsServicer_to_server,
        ),
    )
