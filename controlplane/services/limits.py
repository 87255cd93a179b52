"""LimitService: how much may pass, and what is left of it.

Contract. Operators write limits, accounts read their own. An account's limits are compiled into its bundle, shared ones
into the settings of every pool. What nodes would refuse is InvalidArgumentError on the limit that was edited; a subject
that does not exist, and a second limit of one owner that counts the same, are FailedPreconditionError. Reads tell the
live state, or that it is not known: counters that do not answer never fail a call. Cancelling leaves nothing behind.
"""

from __future__ import annotations

from typing import NamedTuple

from controlplane.domain import names
from controlplane.domain.access import Caller
from controlplane.domain.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError, Reason, Violation
from controlplane.domain.etags import parse_etag
from controlplane.domain.limits import (
    LIMIT_FIELDS,
    Limit,
    LimitState,
    effective,
    is_about,
    name_of,
    own_problems,
)
from controlplane.domain.masks import merge
from controlplane.domain.paging import PageTokens, coerce_page_size
from controlplane.ports import Database, Work, scope_of
from controlplane.services.compile import BundleCompiler, Edited, settings_of
from controlplane.services.limit_states import LimitPlan, LimitStates
from controlplane.services.mutations import Mutation, Patch, Replay, mutate
from controlplane.services.texts import check_display_name
from dataplane.core.limits import LimitScope


class LimitView(NamedTuple):
    """A limit and what is left of it."""

    limit: Limit
    state: LimitState


class LimitsService:
    """See the module."""

    def __init__(self, database: Database, compiler: BundleCompiler, tokens: PageTokens, states: LimitStates) -> None:
        self._database = database
        self._compiler = compiler
        self._tokens = tokens
        self._states = states

    async def create(self, caller: Caller, mutation: Mutation[Limit], limit: Limit) -> Limit | Replay:
        """Create a limit."""
        caller.require_operator()
        names.check_id(limit.limit, "limit_id")
        _check(limit)

        async def action(work: Work) -> Limit:
            await _lock(work, limit.account)
            await _check_subject(work, limit)
            await work.limits.insert(limit)
            return await self._changed(work, limit)

        return await mutate(self._database, caller, mutation, action)

    async def get(self, caller: Caller, account: str | None, limit: str) -> LimitView:
        """Return one limit with its live state."""
        caller.require_account(account)
        async with self._database.transaction(scope_of(caller)) as work:
            found = await work.limits.get(account, limit)
            plans = await self._states.plan(work, caller, [found], account)
        (view,) = await self._views(plans)
        return view

    async def list_page(
        self, caller: Caller, account: str | None, page_size: int, page_token: str
    ) -> tuple[list[LimitView], str]:
        """Return a page in order of name with live states, and the token of the next."""
        caller.require_account(account)
        size, arguments = coerce_page_size(page_size), ["ListLimits", account or ""]
        after = self._tokens.open(page_token, arguments)
        async with self._database.transaction(scope_of(caller)) as work:
            found = await work.limits.list_page(account, after[0] if after else "", size + 1)
            plans = await self._states.plan(work, caller, found[:size], account)
        more = self._tokens.seal([found[size - 1].limit], arguments) if len(found) > size else ""
        return await self._views(plans), more

    async def list_effective(self, caller: Caller, account: str) -> list[LimitView]:
        """Return what holds for an account, by scope, unit and subject."""
        caller.require_account(account)
        async with self._database.transaction(scope_of(caller)) as work:
            pool = await work.nodes.get_pool((await work.accounts.get(account)).node_pool)
            shared = [one for one in await work.limits.list_all(None) if is_about(one, account)]
            found = effective(await work.limits.list_all(account), shared, settings_of(pool, 1))
            plans = await self._states.plan(work, caller, found, account)
        return await self._views(plans)

    async def update(self, caller: Caller, mutation: Mutation[Limit], sent: Limit, patch: Patch) -> Limit | Replay:
        """Change the fields of the mask."""
        caller.require_operator()
        etag = parse_etag(patch.etag, "limit.etag")

        async def action(work: Work) -> Limit:
            await _lock(work, sent.account)
            stored = await work.limits.get(sent.account, sent.limit)
            wanted = merge(stored, sent, patch.mask, patch.populated, LIMIT_FIELDS)
            _check(wanted)
            if (wanted.scope, wanted.subject) != (stored.scope, stored.subject):
                await _check_subject(work, wanted)
            await work.limits.update(wanted, etag)
            return await self._changed(work, wanted)

        return await mutate(self._database, caller, mutation, action)

    async def delete(
        self,
        caller: Caller,
        mutation: Mutation[None],
        account: str | None,
        limit: str,
        etag_text: str,
        *,
        allow_missing: bool,
    ) -> Replay | None:
        """Delete a limit."""
        caller.require_operator()
        etag = parse_etag(etag_text)

        async def action(work: Work) -> None:
            try:
                await _lock(work, account)
                stored = await work.limits.get(account, limit)
            except NotFoundError:
                if allow_missing:
                    return
                raise
            await work.limits.delete(stored, etag)
            await self._compile(work, stored)

        return await mutate(self._database, caller, mutation, action)

    async def _views(self, plans: list[LimitPlan]) -> list[LimitView]:
        states = await self._states.states(plans)
        return [LimitView(plan.limit, state) for plan, state in zip(plans, states, strict=True)]

    async def _changed(self, work: Work, limit: Limit) -> Limit:
        await self._compile(work, limit)
        return await work.limits.get(limit.account, limit.limit)

    async def _compile(self, work: Work, limit: Limit) -> None:
        edited = Edited(f'limits["{name_of(limit)}"]', "limit")
        if limit.account is None:
            await self._compiler.shared_limits(work, edited)
        else:
            await self._compiler.account(work, await work.accounts.get(limit.account), edited)


async def _lock(work: Work, account: str | None) -> None:
    if account is None:
        await work.nodes.lock_pools()
    else:
        await work.accounts.lock(account)


def _check(limit: Limit) -> None:
    check_display_name(limit.display_name, "limit.display_name")
    problems = list(own_problems(limit))
    if problems:
        raise InvalidArgumentError([Violation(f"limit.{field}", text) for field, text in problems])


async def _check_subject(work: Work, limit: Limit) -> None:
    """A subject that a typing error made up would never be counted, and nobody would notice."""
    subject = limit.subject
    if not subject:
        return
    try:
        if limit.scope is LimitScope.ACCOUNT:
            await work.accounts.get(*names.parse_name(subject, names.ACCOUNT))
        elif limit.scope is LimitScope.CREDENTIAL:
            account, credential = names.parse_name(subject, names.SMTP_CREDENTIAL)
            await work.smtp_credentials.get(account, credential)
        elif limit.scope is LimitScope.PROVIDER:
            await work.providers.get(*names.parse_owned(subject, names.PROVIDER, names.SHARED_PROVIDER))
    except NotFoundError as error:
        raise FailedPreconditionError(
            Reason.LIMIT_SUBJECT_MISSING, f"{subject} does not exist", subject=subject
        ) from error
