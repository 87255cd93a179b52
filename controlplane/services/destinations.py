"""DestinationService: domains of recipients, which can be suspended.

Contract. Suspending is a denial, of mail of an account or, with None for it, of every account; it says nothing of what
may be submitted. Nothing is kept of a destination that is not suspended. Cancelling leaves nothing behind.
"""

from __future__ import annotations

from controlplane.domain import names
from controlplane.domain.access import Caller
from controlplane.domain.errors import FailedPreconditionError, Reason
from controlplane.domain.paging import PageTokens, coerce_page_size
from controlplane.domain.resources import Destination
from controlplane.ports import Database, Work, scope_of
from controlplane.services.mutations import Mutation, Replay, mutate
from controlplane.services.texts import check_reason

DENIAL_DESTINATION = 4
# All denials of the fleet travel to every node in one message.
_SUSPENDED_LIMIT = 1_000


class DestinationsService:
    """See the module."""

    def __init__(self, database: Database, tokens: PageTokens) -> None:
        self._database = database
        self._tokens = tokens

    async def get(self, caller: Caller, account: str | None, destination: str) -> Destination:
        """Return one destination."""
        caller.require_account(account)
        async with self._database.transaction(scope_of(caller)) as work:
            if account is not None:
                await work.accounts.get(account)
            return await work.destinations.get(account, destination)

    async def list_page(
        self, caller: Caller, account: str | None, page_size: int, page_token: str
    ) -> tuple[list[Destination], str]:
        """Return a page of suspended ones in order of name, and the token of the next."""
        caller.require_account(account)
        size, arguments = coerce_page_size(page_size), ["ListDestinations", account or ""]
        after = self._tokens.open(page_token, arguments)
        async with self._database.transaction(scope_of(caller)) as work:
            found = await work.destinations.list_page(account, after[0] if after else "", size + 1)
        more = self._tokens.seal([found[size - 1].destination], arguments) if len(found) > size else ""
        return found[:size], more

    async def suspend(
        self, caller: Caller, mutation: Mutation[Destination], account: str | None, destination: str, reason: str
    ) -> Destination | Replay:
        """Stop deliveries to a destination; again changes the reason only."""
        caller.require_account(account)
        check_reason(reason)

        async def action(work: Work) -> Destination:
            stored = await _lock(work, account, destination)
            if stored.suspend_time is None:
                name = names.destination_name(account, destination)
                if await work.destinations.count(account) >= _SUSPENDED_LIMIT:
                    raise FailedPreconditionError(
                        Reason.TOO_MANY_SUSPENDED_DESTINATIONS,
                        f"{_SUSPENDED_LIMIT:,} destinations are suspended",
                        subject=name,
                    )
                await work.bundles.deny(name, DENIAL_DESTINATION, account, None)
            await work.destinations.suspend(account, destination, reason)
            return await work.destinations.get(account, destination)

        return await mutate(self._database, caller, mutation, action)

    async def resume(
        self, caller: Caller, mutation: Mutation[Destination], account: str | None, destination: str
    ) -> Destination | Replay:
        """Lift a suspension; an active destination is left alone."""
        caller.require_account(account)

        async def action(work: Work) -> Destination:
            stored = await _lock(work, account, destination)
            if stored.suspend_time is None:
                return stored
            await work.destinations.resume(account, destination)
            await work.bundles.lift(names.destination_name(account, destination))
            return await work.destinations.get(account, destination)

        return await mutate(self._database, caller, mutation, action)


async def _lock(work: Work, account: str | None, destination: str) -> Destination:
    if account is None:
        await work.nodes.lock_pools()
    else:
        await work.accounts.lock(account)
    return await work.destinations.get(account, destination)
