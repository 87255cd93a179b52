"""What the services of the public API are built on: a database that works in transactions, sealing, encoding, probing.

Contract. `Database.transaction(scope)` gives a `Work`: repositories that see only the rows of the scope, all in one
transaction, committed when the block ends and undone by any exception, cancellation included. Repositories take ids,
return values and raise the errors of `controlplane.domain.errors` (a constraint that a caller can reach is an error of
the domain). While PostgreSQL cannot be asked everything raises UnavailableError. Methods named `list_…` return up to
`limit` rows after `after`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple, Protocol

from controlplane.domain.access import EVERY_ACCOUNT, Caller
from controlplane.domain.books import Book, StoredFinding
from controlplane.domain.drains import Drain
from controlplane.domain.etags import Etag
from controlplane.domain.limits import Limit, Look
from controlplane.domain.messages import Command, CommandOrder, Event, Message, MessageQuery, Position
from controlplane.domain.resources import (
    Account,
    ApiKey,
    Destination,
    Node,
    NodePool,
    Provider,
    RoutingRule,
    SmtpCredential,
)
from controlplane.domain.secrets import ScramVerifier
from controlplane.domain.suspensions import Receipt
from dataplane.core.config import Account as AccountConfig
from dataplane.core.config import NodeSettings, SealedValue, SmtpProvider
from dataplane.core.limits import LimitScope


class Scope(NamedTuple):
    """Whose rows a transaction sees, and who is written into the audit log."""

    account: str
    principal: str
    request_id: str = ""


def scope_of(caller: Caller, request_id: str = "") -> Scope:
    """Return the scope of a caller who was authorised."""
    return Scope(caller.visible_account, caller.principal, request_id)


def operator_scope(principal: str) -> Scope:
    """Return the scope of the control plane's own work."""
    return Scope(EVERY_ACCOUNT, principal)


class Accounts(Protocol):
    """accounts, account_sender_domains, account_networks."""

    async def lock(self, account: str) -> Account:
        """Let nobody else edit the account or what it owns until the transaction ends; NotFoundError."""

    async def get(self, account: str) -> Account:
        """NotFoundError."""

    async def list_page(self, after: str, limit: int) -> list[Account]:
        """In order of id."""

    async def insert(self, account: Account) -> None:
        """AlreadyExistsError; FailedPreconditionError for a domain or network of another account."""

    async def update(self, account: Account, etag: Etag) -> None:
        """Write all that may be set; AbortedError when the etag is stale."""

    async def set_state(self, account: Account) -> None:
        """Write state and reason."""

    async def delete(self, account: str, etag: Etag) -> None:
        """With all that it owns; AbortedError when the etag is stale."""

    async def networks(self, node_pool: str) -> list[tuple[str, str]]:
        """(network, account) of all accounts of a pool, in order of network."""

    async def messages_since(self, account: str) -> datetime | None:
        """Mail accepted earlier belongs to a former account of this id; NotFoundError."""


class AuthenticatedKey(NamedTuple):
    """A key found by its readable part."""

    key: ApiKey
    secret_sha256: bytes


class ApiKeys(Protocol):
    """api_keys."""

    async def mark_use(self, lookup: str, time: datetime) -> None:
        """Remember when the key was last used, unless another replica did within the minute."""

    async def get(self, account: str | None, api_key: str) -> ApiKey:
        """NotFoundError."""

    async def list_page(self, account: str | None, after: str, limit: int) -> list[ApiKey]:
        """In order of id."""

    async def insert(self, key: ApiKey, sha256: bytes) -> None:
        """AlreadyExistsError."""

    async def replace_secret(self, key: ApiKey, lookup: str, sha256: bytes, etag: Etag) -> None:
        """AbortedError when the etag is stale."""

    async def revoke(self, key: ApiKey, etag: Etag) -> None:
        """AbortedError when the etag is stale."""

    async def delete(self, key: ApiKey, etag: Etag) -> None:
        """AbortedError when the etag is stale."""

    async def lock_operator_keys(self) -> int:
        """Let nobody else change operators' keys until the transaction ends; returns how many are good."""


class SmtpCredentials(Protocol):
    """smtp_credentials."""

    async def get(self, account: str, smtp_credential: str) -> SmtpCredential:
        """NotFoundError."""

    async def list_page(self, account: str, after: str, limit: int) -> list[SmtpCredential]:
        """In order of id."""

    async def list_good(self, account: str) -> list[SmtpCredential]:
        """All that were not revoked, in order of id."""

    async def insert(self, credential: SmtpCredential, verifier: ScramVerifier) -> None:
        """AlreadyExistsError."""

    async def replace_secret(self, credential: SmtpCredential, verifier: ScramVerifier, etag: Etag) -> None:
        """AbortedError when the etag is stale."""

    async def revoke(self, credential: SmtpCredential, etag: Etag) -> None:
        """AbortedError when the etag is stale."""

    async def set_suspension(self, credential: SmtpCredential, *, suspended: bool, reason: str) -> None:
        """Suspend it, since when is kept where it was suspended already; or resume it."""

    async def count_suspended(self, account: str) -> int:
        """How many of the account's credentials are suspended."""

    async def delete(self, credential: SmtpCredential, etag: Etag) -> None:
        """AbortedError when the etag is stale."""


class Providers(Protocol):
    """providers."""

    async def get(self, account: str | None, provider: str) -> Provider:
        """NotFoundError."""

    async def list_page(self, account: str | None, after: str, limit: int) -> list[Provider]:
        """In order of id."""

    async def list_all(self, account: str | None) -> list[Provider]:
        """In order of id."""

    async def insert(self, provider: Provider) -> None:
        """With the uid in `meta`; AlreadyExistsError."""

    async def update(self, provider: Provider, etag: Etag) -> None:
        """AbortedError when the etag is stale."""

    async def set_state(self, provider: Provider) -> None:
        """Write state and reason."""

    async def delete(self, provider: Provider, etag: Etag) -> None:
        """AbortedError when the etag is stale; FailedPreconditionError while a rule names it."""


class Destinations(Protocol):
    """suspended_destinations."""

    async def get(self, account: str | None, destination: str) -> Destination:
        """What is kept of it; one that is not suspended, where nothing is."""

    async def list_page(self, account: str | None, after: str, limit: int) -> list[Destination]:
        """Suspended ones, in order of destination."""

    async def count(self, account: str | None) -> int:
        """How many are suspended."""

    async def suspend(self, account: str | None, destination: str, reason: str) -> None:
        """Keep that it is suspended; one that is keeps its time, and gets this reason."""

    async def resume(self, account: str | None, destination: str) -> None:
        """Keep nothing of it."""


class RoutingRules(Protocol):
    """routing_rules, routing_rule_targets."""

    async def get(self, account: str, routing_rule: str) -> RoutingRule:
        """NotFoundError."""

    async def list_page(self, account: str, after: tuple[int, str], limit: int) -> list[RoutingRule]:
        """In order of priority and id."""

    async def list_enabled(self, account: str) -> list[RoutingRule]:
        """In order of priority and id."""

    async def insert(self, rule: RoutingRule) -> None:
        """AlreadyExistsError; FailedPreconditionError for a provider that does not exist."""

    async def update(self, rule: RoutingRule, etag: Etag) -> None:
        """AbortedError when the etag is stale; FailedPreconditionError for a provider that does not exist."""

    async def delete(self, rule: RoutingRule, etag: Etag) -> None:
        """AbortedError when the etag is stale."""


class Limits(Protocol):
    """limit_policies."""

    async def get(self, account: str | None, limit: str) -> Limit:
        """NotFoundError."""

    async def list_page(self, account: str | None, after: str, limit: int) -> list[Limit]:
        """In order of id."""

    async def list_all(self, account: str | None) -> list[Limit]:
        """In order of id."""

    async def list_of(self, accounts: Sequence[str]) -> list[Limit]:
        """All that these accounts own."""

    async def subjects(self, scope: LimitScope, account: str | None, limit: int) -> list[str]:
        """Names of what is counted by itself in this scope, of an account or, with None, of all; by name."""

    async def insert(self, limit: Limit) -> None:
        """AlreadyExistsError; FailedPreconditionError when another one of the owner counts the same."""

    async def update(self, limit: Limit, etag: Etag) -> None:
        """AbortedError when the etag is stale; FailedPreconditionError as for insert."""

    async def delete(self, limit: Limit, etag: Etag) -> None:
        """AbortedError when the etag is stale."""


class Nodes(Protocol):
    """nodes, node_pools and what hangs on them."""

    async def get(self, node: str) -> Node:
        """NotFoundError."""

    async def list_page(self, after: str, limit: int) -> list[Node]:
        """In order of id."""

    async def insert(self, node: Node) -> None:
        """AlreadyExistsError; FailedPreconditionError for a pool that does not exist."""

    async def update(self, node: Node, etag: Etag) -> None:
        """AbortedError when the etag is stale."""

    async def revoke(self, node: str) -> None:
        """Refuse its certificate and void its tokens."""

    async def delete(self, node: Node, etag: Etag) -> None:
        """AbortedError when the etag is stale."""

    async def replace_token(self, node: str, sha256: bytes, expire_time: datetime) -> None:
        """Void every older token of the node."""

    async def accept_spool(self, node: str, spool: str) -> bool:
        """Take what the spool reported for true; False when it was not refused. NotFoundError."""

    async def give_up_spool(self, node: str, spool: str, silent_since: datetime) -> bool:
        """Make it nobody's for ever; False where a node that is not revoked reported it since then. NotFoundError."""

    async def lock_spool(self, spool: str) -> str:
        """Whose the spool is, which stays so until the transaction ends. NotFoundError."""

    async def move_spool(self, spool: str, node: str) -> None:
        """Make it the node's; nodes hear of it."""

    async def has_taker(self, node: Node) -> bool:
        """Whether another node of the pool is connected that takes mail."""

    async def has_mail(self, node: str) -> bool:
        """Whether mail waits in the node's spools, as far as the ledger knows."""

    async def start_drain(self, node: str) -> str:
        """Tell it to drain; returns the id of the drain."""

    async def end_drain(self, node: str) -> None:
        """Let it take mail again; a drain that was not over has ended with that."""

    async def get_drain(self, drain: str) -> Drain:
        """With what has become of it. NotFoundError."""

    async def get_pool(self, node_pool: str) -> NodePool:
        """NotFoundError."""

    async def list_pools(self, after: str, limit: int) -> list[NodePool]:
        """In order of id."""

    async def lock_pool(self, node_pool: str) -> NodePool:
        """Let nobody else edit the pool's shared bundles until the transaction ends; FailedPreconditionError."""

    async def lock_pools(self) -> list[NodePool]:
        """The same for all pools, in order of id."""

    async def insert_pool(self, pool: NodePool) -> None:
        """AlreadyExistsError."""

    async def update_pool(self, pool: NodePool, etag: Etag) -> None:
        """AbortedError when the etag is stale."""

    async def delete_pool(self, pool: NodePool, etag: Etag) -> None:
        """AbortedError when the etag is stale; FailedPreconditionError while nodes or accounts belong to it."""

    async def count_nodes(self, node_pool: str) -> int:
        """Nodes of the pool that were not revoked."""

    async def receipts(self, node_pool: str | None, kind: int) -> list[Receipt]:
        """What the nodes of a pool, or all, have confirmed of denials of a kind; enrolled ones, by name."""

    async def add_pool_key(self, node_pool: str, key_id: str, key_sealed: bytes) -> None:
        """Bundles made from now on use it."""

    async def newest_pool_key(self, node_pool: str) -> tuple[str, bytes]:
        """(key id, sealed key)."""


class Bundles(Protocol):
    """config_bundles, config_revisions, denials."""

    async def put(self, node_pool: str, bundle: str, kind: int, account: str | None, content: bytes) -> int | None:
        """Store a new revision and tell the replicas; None when the content is what is stored already."""

    async def remove(self, bundle: str, *, except_pool: str = "") -> None:
        """Delete it from every pool but one, and tell the replicas."""

    async def remove_pool(self, node_pool: str) -> None:
        """Delete all bundles of a pool, and tell the replicas."""

    async def deny(
        self,
        denial: str,
        kind: int,
        account: str | None,
        expire_time: datetime | None,
        since_time: datetime | None = None,
    ) -> None:
        """Add or renew a denial, move the version, and tell the replicas; `since_time` is now unless given.

        One that is there keeps the time since when it is.
        """

    async def denial_version(self, denial: str) -> int | None:
        """The version that has had the denial since it was last renewed; None when there is none in force."""

    async def denials_version(self) -> int:
        """The newest version."""

    async def lift(self, denial: str) -> None:
        """Take a denial away; moves the version only if there was one."""

    async def lift_account(self, account: str) -> None:
        """Take away all denials of an account."""

    async def denials_full_until(self, account: str, kind: int, limit: int) -> datetime | None:
        """When fewer than `limit` of the account's denials of a kind will be left; None when they are fewer now."""


class Idempotency(Protocol):
    """idempotency."""

    async def begin(self, request_id: str, method: str, payload_sha256: bytes) -> bytes | None:
        """Claim a request id: None when it is new, else the first answer. InvalidArgumentError for another payload."""

    async def finish(self, request_id: str, response: bytes) -> None:
        """Store the answer of a request id that was claimed in this transaction."""


class Messages(Protocol):
    """messages, recipients, delivery_events, commands."""

    async def get(self, account: str, message_id: str, since_id: str) -> Message:
        """With recipients and timeline; NotFoundError, also for ids below `since_id`."""

    async def list_page(self, query: MessageQuery) -> tuple[list[Message], bool]:
        """Newest first, with recipients, and whether there are more; fewer than asked for when they have very many."""

    async def newest_position(self, account: str) -> Position:
        """The position of the last event that `events` would give, (0, 0) where there is none."""

    async def has_reached(self, position: Position) -> bool:
        """Whether `events` may ever have given it: not, when PostgreSQL was restored from an older state."""

    async def events(self, account: str, after: Position, limit: int, message_id: str | None) -> list[Event]:
        """What the ledger learnt after a position, in its order; only what no open transaction can precede."""

    async def add_command(self, order: CommandOrder, message: Message) -> Command:
        """Store a command for the spool of the message, and tell the replicas."""

    async def count_filter_commands(self, account: str) -> int:
        """How many commands with a filter are not done yet."""

    async def add_filter_command(self, order: CommandOrder, since_id: str) -> Command:
        """Store a command for every spool, on messages with ids from `since_id`, and tell the replicas.

        FailedPreconditionError while there is no spool.
        """

    async def get_command(self, account: str, command: str) -> Command:
        """NotFoundError."""

    async def list_commands(self, account: str, after: str, limit: int) -> list[Command]:
        """In order of id."""


class Books(Protocol):
    """What comparisons of the ledger with spools showed; the account None stands for all that the scope shows."""

    async def list_page(self, account: str | None, after: tuple[str, str] | None, limit: int) -> list[Book]:
        """Books after this account and spool, in that order."""

    async def list_findings(
        self, account: str | None, since_id: str, before: int | None, limit: int, *, resolved: bool
    ) -> list[StoredFinding]:
        """Findings before this number, newest first; those that are over where `resolved`.

        Those that name a message below `since_id` are left out.
        """


class Work(Protocol):
    """One transaction."""

    accounts: Accounts
    api_keys: ApiKeys
    smtp_credentials: SmtpCredentials
    providers: Providers
    destinations: Destinations
    routing_rules: RoutingRules
    limits: Limits
    nodes: Nodes
    bundles: Bundles
    idempotency: Idempotency
    messages: Messages
    books: Books

    async def now(self) -> datetime:
        """The transaction's time, by the database's clock."""


class Database(Protocol):
    """Where all of it is kept."""

    def transaction(self, scope: Scope) -> AbstractAsyncContextManager[Work]:
        """Begin a transaction that may write."""

    async def find_api_key(self, lookup: str) -> AuthenticatedKey | None:
        """Find the key with this readable part, whosever it is."""

    def authentication(self, lookup: str) -> AbstractAsyncContextManager[Work]:
        """Begin a transaction that sees nothing but the API key with this readable part."""


class UnsealError(Exception):
    """Sealed bytes belong to another place, or the key that sealed them is gone."""


class Sealer(Protocol):
    """Seals what must not be readable in the database or in a bundle."""

    def seal(self, secret: bytes, account: str, table: str, row: str, column: str) -> bytes:
        """For one column of one row, under the keyring."""

    def unseal(self, sealed: bytes, account: str, table: str, row: str, column: str) -> bytes:
        """UnsealError when it was made for another place, or its key is gone."""

    def seal_for_pool(self, secret: bytes, key_id: str, key: bytes, context: bytes) -> SealedValue:
        """For a bundle; the same arguments give the same bytes, so that an unchanged bundle stays unchanged."""


class BundleEncoder(Protocol):
    """Writes the content of bundles; the same values give the same bytes."""

    def account(self, account: AccountConfig) -> bytes:
        """An AccountBundle."""

    def shared_providers(self, providers: Sequence[SmtpProvider]) -> bytes:
        """A SharedProvidersBundle."""

    def networks(self, bindings: Sequence[tuple[str, str]]) -> bytes:
        """A NetworksBundle of (network, account name)."""

    def settings(self, settings: NodeSettings) -> bytes:
        """A NodeSettingsBundle."""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What a look at a provider showed; `detail` is for people."""

    ok: bool
    detail: str
    tls_version: str


class ProviderProbe(Protocol):
    """Connects to a provider as the control plane."""

    async def probe(self, provider: Provider, password: str) -> ProbeResult:
        """Connect, TLS by policy, AUTH, QUIT; never raises for what the remote does. Cancelling closes."""


class LiveStateUnknownError(Exception):
    """The shared counters cannot be asked; the text says why, for people."""


class LiveLimits(Protocol):
    """The counters that nodes share, to look at."""

    async def look(self, looks: Sequence[Look]) -> list[float]:
        """Return the level of each bucket in tokens, or how many of its slots are held.

        LiveStateUnknownError, at the latest after a moment that a caller can spare. Cancelling leaves nothing behind.
        """


class RequestBudget(Protocol):
    """How many requests an API key may still make."""

    async def spend(self, key: str) -> float:
        """Take one request from the bucket of a key: 0.0, or the seconds until there is one. Never raises."""


class LedgerSignal(Protocol):
    """Says that the ledger may have grown: a hint, so whoever waits looks again now and then anyway."""

    async def wait(self, timeout_s: float) -> None:
        """Return at the next hint, or when the time is over; cancelling leaves nothing behind."""


class Random(Protocol):
    """A source of secrets."""

    def __call__(self, size: int, /) -> bytes:
        """Return `size` random bytes."""
