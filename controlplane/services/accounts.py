"""AccountService: accounts, and stopping them.

Contract. Every edit holds the account's lock, is compiled into its bundle and committed with its audit row. An
account's own keys may change what only concerns itself; the rest is the operators'. Suspending is a denial: nodes
enforce it whatever bundles they have. Cancelling any method leaves nothing behind.
"""

from __future__ import annotations

from dataclasses import replace

from controlplane.domain import names
from controlplane.domain.access import OPERATOR_FIELDS, Caller
from controlplane.domain.errors import (
    NotFoundError,
    PermissionDeniedError,
    Reason,
)
from controlplane.domain.etags import parse_etag
from controlplane.domain.masks import changed_paths, merge
from controlplane.domain.paging import PageTokens, coerce_page_size
from controlplane.domain.resources import (
    ACCOUNT_FIELDS,
    DEFAULT_NODE_POOL,
    Account,
    AccountState,
    Durability,
    UncertainPolicy,
)
from controlplane.ports import Database, Work, scope_of
from controlplane.services.compile import BundleCompiler, Edited, refuse
from controlplane.services.mutations import Mutation, Patch, Replay, mutate
from controlplane.services.texts import check_display_name, check_reason
from dataplane.core.config import validate_account_networks, validate_sender_domains

DENIAL_ACCOUNT = 1
_EDITED = Edited("", "account")


class AccountsService:
    """See the module."""

    def __init__(self, database: Database, compiler: BundleCompiler, tokens: PageTokens) -> None:
        self._database = database
        self._compiler = compiler
        self._tokens = tokens

    async def create(self, caller: Caller, mutation: Mutation[Account], account: Account) -> Account | Replay:
        """Create an account."""
        caller.require_operator()
        names.check_id(account.account, "account_id")
        account = _checked(account)

        async def action(work: Work) -> Account:
            await work.accounts.insert(account)
            stored = await work.accounts.get(account.account)
            await self._compiler.account(work, stored, _EDITED)
            if stored.networks:
                await self._compiler.networks(work, [stored.node_pool])
            return stored

        return await mutate(self._database, caller, mutation, action)

    async def get(self, caller: Caller, account: str) -> Account:
        """Return one account."""
        caller.require_account(account)
        async with self._database.transaction(scope_of(caller)) as work:
            return await work.accounts.get(account)

    async def list_page(self, caller: Caller, page_size: int, page_token: str) -> tuple[list[Account], str]:
        """Return a page in order of name, and the token of the next."""
        caller.require_operator()
        size, arguments = coerce_page_size(page_size), ["ListAccounts"]
        after = self._tokens.open(page_token, arguments)
        async with self._database.transaction(scope_of(caller)) as work:
            found = await work.accounts.list_page(after[0] if after else "", size + 1)
        more = self._tokens.seal([found[size - 1].account], arguments) if len(found) > size else ""
        return found[:size], more

    async def update(
        self, caller: Caller, mutation: Mutation[Account], sent: Account, patch: Patch
    ) -> Account | Replay:
        """Change the fields of the mask."""
        caller.require_account(sent.account)
        touched = changed_paths(patch.mask, patch.populated, ACCOUNT_FIELDS)
        if not caller.is_operator and "*" not in patch.mask and touched & OPERATOR_FIELDS:
            raise _operators_only(touched & OPERATOR_FIELDS)
        etag = parse_etag(patch.etag, "account.etag")

        async def action(work: Work) -> Account:
            stored = await work.accounts.lock(sent.account)
            wanted = _checked(merge(stored, sent, patch.mask, patch.populated, ACCOUNT_FIELDS))
            if not caller.is_operator:
                _refuse_operator_fields(stored, wanted)
            await work.accounts.update(wanted, etag)
            changed = await work.accounts.get(sent.account)
            await self._compiler.account(work, changed, _EDITED)
            if (stored.networks, stored.node_pool) != (changed.networks, changed.node_pool):
                await self._compiler.networks(work, [stored.node_pool, changed.node_pool])
            return changed

        return await mutate(self._database, caller, mutation, action)

    async def delete(
        self, caller: Caller, mutation: Mutation[None], account: str, etag_text: str, *, allow_missing: bool
    ) -> Replay | None:
        """Delete an account with all that it owns; its messages stay until retention."""
        caller.require_operator()
        etag = parse_etag(etag_text)

        async def action(work: Work) -> None:
            try:
                stored = await work.accounts.lock(account)
            except NotFoundError:
                if allow_missing:
                    return
                raise
            await work.accounts.delete(account, etag)
            await work.bundles.remove(names.format_name(names.ACCOUNT, account))
            await work.bundles.lift_account(account)
            if stored.networks:
                await self._compiler.networks(work, [stored.node_pool])

        return await mutate(self._database, caller, mutation, action)

    async def suspend(self, caller: Caller, mutation: Mutation[Account], account: str, reason: str) -> Account | Replay:
        """Stop submission and delivery; again changes the reason only."""
        caller.require_operator()
        check_reason(reason)

        async def action(work: Work) -> Account:
            stored = await work.accounts.lock(account)
            await work.accounts.set_state(replace(stored, state=AccountState.SUSPENDED, suspend_reason=reason))
            if stored.state is not AccountState.SUSPENDED:
                name = names.format_name(names.ACCOUNT, account)
                await work.bundles.deny(name, DENIAL_ACCOUNT, account, None)
            return await work.accounts.get(account)

        return await mutate(self._database, caller, mutation, action)

    async def resume(self, caller: Caller, mutation: Mutation[Account], account: str) -> Account | Replay:
        """Lift a suspension; an active account is left alone."""
        caller.require_operator()

        async def action(work: Work) -> Account:
            stored = await work.accounts.lock(account)
            if stored.state is AccountState.ACTIVE:
                return stored
            await work.accounts.set_state(replace(stored, state=AccountState.ACTIVE, suspend_reason=""))
            await work.bundles.lift(names.format_name(names.ACCOUNT, account))
            return await work.accounts.get(account)

        return await mutate(self._database, caller, mutation, action)


def _checked(account: Account) -> Account:
    """Fill in defaults and refuse what no account may have; the rest is for the compiler."""
    check_display_name(account.display_name, "account.display_name")
    domains = tuple(domain.lower() for domain in account.sender_domains)
    # Before the database sees them: it would refuse what it cannot hold in words of its own.
    refuse([*validate_sender_domains(domains), *validate_account_networks(account.networks)], _EDITED)
    return replace(
        account,
        durability=account.durability or Durability.LOCAL,
        uncertain_policy=account.uncertain_policy or UncertainPolicy.RETRY,
        node_pool=account.node_pool or DEFAULT_NODE_POOL,
        sender_domains=domains,
    )


def _refuse_operator_fields(stored: Account, wanted: Account) -> None:
    changed = {name for name in OPERATOR_FIELDS if getattr(stored, name) != getattr(wanted, name)}
    if changed:
        raise _operators_only(changed)


def _operators_only(fields: set[str]) -> PermissionDeniedError:
    listed = ", ".join(sorted(fields))
    return PermissionDeniedError(
        Reason.FIELD_OPERATOR_ONLY, f"only operators may change {listed}", metadata={"fields": listed}
    )
