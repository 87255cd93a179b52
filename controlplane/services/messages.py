"""MessageService and Operations: the record of mail, and commands on what still waits.

Contract. Reading shows what nodes reported; a message that was accepted a moment ago may be unknown. A watch reads the
ledger forward from a position, woken by hints and by a poll, and holds one page at a time; who carries the pages ends a
reader that does not take them. Watches are bounded in number, also for each account, and in length; a reader resumes
from its last position. So are calls that wait for an operation, and the commands with a filter that an account has
under way.
A command is stored, for each spool that it goes to, and brought there by the fleet's side; its Operation is done when
every result is in. One with a filter for every account is operators' alone. What waits in the replicated queue is
changed by the control plane, when a node asks for mail or at the leader's next turn: the queue counts as one spool more
where there is any. Among the operations of every account are the drains of nodes; they are not listed: the node names
its own.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import timedelta

from controlplane.domain import names
from controlplane.domain.access import Caller
from controlplane.domain.drains import Drain
from controlplane.domain.errors import (
    FailedPreconditionError,
    NotFoundError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
    invalid,
)
from controlplane.domain.messages import (
    EVERY_ACCOUNT,
    LEAST_ID,
    Command,
    CommandOrder,
    EventPage,
    Message,
    MessageFilter,
    MessageQuery,
    Position,
    first_id_at,
    parse_position,
)
from controlplane.domain.paging import PageTokens, coerce_page_size
from controlplane.ports import Database, LedgerSignal, Work, scope_of
from controlplane.services.mutations import Mutation, Replay, mutate
from controlplane.services.seats import IN_ALL, Seats
from controlplane.services.texts import check_domain_text
from dataplane.core.queue import WAITING, Verb

MAX_FILTER_COMMANDS = 100
_COMMANDS_RETRY_S = 10
_PAGE_EVENTS = 200
_POLL_S = 2.0
_WATCH_S = 1_800.0
_MAX_WAIT_S = 60.0
_OPERATION_POLL_S = 0.5
# Longer than mail may wait.
_MAX_AGE = timedelta(days=400)


class MessagesService:
    """See the module."""

    def __init__(
        self,
        database: Database,
        tokens: PageTokens,
        signal: LedgerSignal,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        max_watchers: int = IN_ALL,
    ) -> None:
        self._database = database
        self._tokens = tokens
        self._signal = signal
        self._monotonic = monotonic
        self._watchers = Seats(max_watchers)
        self._draining = False

    def drain(self) -> None:
        """End every watch at its next turn, and refuse new ones."""
        self._draining = True

    async def get(self, caller: Caller, account: str, message_id: str) -> Message:
        """Return a message with recipients and timeline."""
        caller.require_account(account)
        async with self._database.transaction(scope_of(caller)) as work:
            return await work.messages.get(account, message_id, await _since(work, account))

    async def list_page(self, caller: Caller, query: MessageQuery, page_token: str) -> tuple[list[Message], str]:
        """Return a page, newest first, and the token of the next; `query.limit` is the page size asked for."""
        caller.require_account(query.account)
        size = coerce_page_size(query.limit)
        arguments = _arguments(query)
        position = self._tokens.open(page_token, arguments)
        async with self._database.transaction(scope_of(caller)) as work:
            since = max(await _since(work, query.account), query.from_id or "")
            wanted = MessageQuery(
                account=query.account,
                limit=size,
                before_id=position[0] if position else None,
                state=query.state,
                recipient=query.recipient,
                from_id=since,
                to_id=query.to_id,
                tag=query.tag,
            )
            found, more = await work.messages.list_page(wanted)
        return found, self._tokens.seal([found[-1].message_id], arguments) if more else ""

    async def watch(
        self, caller: Caller, account: str, message_id: str | None, position_text: str
    ) -> AsyncIterator[EventPage]:
        """Yield pages of events as the ledger learns them, the first at once; closing the iterator ends the watch."""
        caller.require_account(account)
        after = parse_position(position_text) if position_text else None
        with self._watchers.seat(account):
            async for page in self._watch(caller, account, message_id, after):
                yield page

    async def _watch(
        self, caller: Caller, account: str, message_id: str | None, after: Position | None
    ) -> AsyncIterator[EventPage]:
        ends = self._monotonic() + _WATCH_S
        async with self._database.transaction(scope_of(caller)) as work:
            if after is None:
                after = await work.messages.newest_position(account) if message_id is None else Position(0, 0)
            elif not await work.messages.has_reached(after):
                text = "the ledger has not been at this position: it was restored from an older state"
                raise FailedPreconditionError(Reason.POSITION_AHEAD, text)
        is_first = True
        while True:
            async with self._database.transaction(scope_of(caller)) as work:
                since = await _since(work, account)
                page = await work.messages.events(account, after, _PAGE_EVENTS, message_id)
            after = page[-1].position if page else after
            shown = [event for event in page if event.message_id >= since]
            # Who is cut off before anything happened has a position to resume from all the same.
            if shown or is_first:
                yield EventPage(shown, after)
                is_first = False
            if self._draining or self._monotonic() > ends:
                raise UnavailableError(Reason.DRAINING, "resume from the last position", retry_after_s=1)
            if len(page) < _PAGE_EVENTS:
                await self._signal.wait(_POLL_S)

    async def command(self, caller: Caller, mutation: Mutation[Command], order: CommandOrder) -> Command | Replay:
        """Ask the owning spool, or with a filter every spool, to change recipients that still wait."""
        caller.require_account(order.account)
        order = _checked(order)

        async def action(work: Work) -> Command:
            since = LEAST_ID if order.account == EVERY_ACCOUNT else await _since(work, order.account)
            if order.provider:
                await work.providers.get(*_provider_of(order.provider, order.account, "provider"))
            if order.filter is None:
                message = await work.messages.get(order.account, order.message_id, since)
                return await work.messages.add_command(order, message)
            # Each walks all that waits, in turn: without a bound one account's would keep those of others waiting.
            if await work.messages.count_filter_commands(order.account) >= MAX_FILTER_COMMANDS:
                text = f"{MAX_FILTER_COMMANDS} commands with a filter are not done yet"
                raise ResourceExhaustedError(Reason.TOO_MANY_COMMANDS, text, retry_after_s=_COMMANDS_RETRY_S)
            return await work.messages.add_filter_command(order, since)

        return await mutate(self._database, caller, mutation, action)


class OperationsService:
    """See the module."""

    def __init__(
        self,
        database: Database,
        tokens: PageTokens,
        signal: LedgerSignal,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        max_waiters: int = IN_ALL,
    ) -> None:
        self._database = database
        self._tokens = tokens
        self._signal = signal
        self._monotonic = monotonic
        self._waiters = Seats(max_waiters)

    async def get(self, caller: Caller, account: str, command: str) -> Command | Drain:
        """Return one operation."""
        caller.require_account(account)
        async with self._database.transaction(scope_of(caller)) as work:
            try:
                return await work.messages.get_command(account, command)
            except NotFoundError:
                if account != EVERY_ACCOUNT:
                    raise
                return await work.nodes.get_drain(command)

    async def wait(self, caller: Caller, account: str, command: str, timeout_s: float | None) -> Command | Drain:
        """Return the operation when it is done, or as it is when the time is over (at most a minute)."""
        ends = self._monotonic() + min(_MAX_WAIT_S if timeout_s is None else timeout_s, _MAX_WAIT_S)
        caller.require_account(account)
        with self._waiters.seat(account):
            while True:
                found = await self.get(caller, account, command)
                left = ends - self._monotonic()
                if found.is_done or left <= 0:
                    return found
                await self._signal.wait(min(left, _OPERATION_POLL_S))

    async def list_page(
        self, caller: Caller, account: str, page_size: int, page_token: str
    ) -> tuple[list[Command], str]:
        """Return a page in order of id, and the token of the next."""
        caller.require_account(account)
        size, arguments = coerce_page_size(page_size), ["ListOperations", account]
        after = self._tokens.open(page_token, arguments)
        async with self._database.transaction(scope_of(caller)) as work:
            found = await work.messages.list_commands(account, after[0] if after else "", size + 1)
        more = self._tokens.seal([found[size - 1].command], arguments) if len(found) > size else ""
        return found[:size], more


def _checked(order: CommandOrder) -> CommandOrder:
    """The order as it is stored. InvalidArgumentError for what cannot be meant."""
    if order.verb is Verb.REROUTE:
        _provider_of(order.provider, order.account, "provider")
    elif order.provider:
        raise invalid("provider", "is for a reroute only")
    return order if order.filter is None else replace(order, filter=_checked_filter(order.filter, order.account))


def _checked_filter(wanted: MessageFilter, account: str) -> MessageFilter:
    if wanted.provider:
        _provider_of(wanted.provider, account, "filter.provider")
    domain = wanted.recipient_domain.lower()
    check_domain_text(domain, "filter.recipient_domain")
    if not timedelta() <= wanted.min_age <= _MAX_AGE:
        raise invalid("filter.min_age", f"must be 0 to {_MAX_AGE.days} days")
    if not WAITING.issuperset(wanted.states):
        raise invalid("filter.states", "must be of scheduled, queued, deferred and held")
    return replace(wanted, recipient_domain=domain, states=tuple(sorted(set(wanted.states))))


def _provider_of(name: str, account: str, field: str) -> tuple[str | None, str]:
    """Return owner and id of a provider that an account's mail may go by; every account's by shared ones only."""
    owner, provider = names.parse_owned(name, names.PROVIDER, names.SHARED_PROVIDER, field)
    if owner not in (None, account) and not (account == EVERY_ACCOUNT and field != "provider"):
        raise invalid(field, "must be shared or of the parent's account")
    return owner, provider


async def _since(work: Work, account: str) -> str:
    """Return the least id that is shown: what came before was a former account's."""
    since = await work.accounts.messages_since(account)
    return LEAST_ID if since is None else first_id_at(since)


def _arguments(query: MessageQuery) -> list[str]:
    if query.from_id and query.to_id and query.from_id > query.to_id:
        raise invalid("end_time", "must not lie before start_time")
    state = "" if query.state is None else query.state.name
    return ["ListMessages", query.account, state, query.recipient, query.from_id or "", query.to_id or "", query.tag]
