"""RoutingRuleService: which providers an account's mail goes through.

Contract. Every edit is compiled, with all other rules of the account, by the nodes' own code; what does not compile is
InvalidArgumentError on the rule that was edited and changes nothing. Cancelling any method leaves nothing behind.
"""

from __future__ import annotations

from controlplane.domain import names
from controlplane.domain.access import Caller
from controlplane.domain.errors import NotFoundError
from controlplane.domain.etags import parse_etag
from controlplane.domain.masks import merge
from controlplane.domain.paging import PageTokens, coerce_page_size
from controlplane.domain.resources import ROUTING_RULE_FIELDS, RoutingRule
from controlplane.ports import Database, Work, scope_of
from controlplane.services.compile import BundleCompiler, Edited, refuse, rule_config
from controlplane.services.mutations import Mutation, Patch, Replay, mutate
from controlplane.services.texts import check_display_name
from dataplane.core.config import validate_rule

_EDITED = Edited("", "routing_rule")


class RoutingRulesService:
    """See the module."""

    def __init__(self, database: Database, compiler: BundleCompiler, tokens: PageTokens) -> None:
        self._database = database
        self._compiler = compiler
        self._tokens = tokens

    async def create(self, caller: Caller, mutation: Mutation[RoutingRule], rule: RoutingRule) -> RoutingRule | Replay:
        """Create a rule."""
        caller.require_account(rule.account)
        names.check_id(rule.routing_rule, "routing_rule_id")
        _check(rule)

        async def action(work: Work) -> RoutingRule:
            await work.accounts.lock(rule.account)
            await work.routing_rules.insert(rule)
            return await self._changed(work, rule)

        return await mutate(self._database, caller, mutation, action)

    async def get(self, caller: Caller, account: str, routing_rule: str) -> RoutingRule:
        """Return one rule."""
        caller.require_account(account)
        async with self._database.transaction(scope_of(caller)) as work:
            return await work.routing_rules.get(account, routing_rule)

    async def list_page(
        self, caller: Caller, account: str, page_size: int, page_token: str
    ) -> tuple[list[RoutingRule], str]:
        """Return a page in order of priority and name, and the token of the next."""
        caller.require_account(account)
        size, arguments = coerce_page_size(page_size), ["ListRoutingRules", account]
        position = self._tokens.open(page_token, arguments)
        after = (int(position[0]), position[1]) if position else (-1, "")
        async with self._database.transaction(scope_of(caller)) as work:
            found = await work.routing_rules.list_page(account, after, size + 1)
        if len(found) <= size:
            return found, ""
        last = found[size - 1]
        return found[:size], self._tokens.seal([str(last.priority), last.routing_rule], arguments)

    async def update(
        self, caller: Caller, mutation: Mutation[RoutingRule], sent: RoutingRule, patch: Patch
    ) -> RoutingRule | Replay:
        """Change the fields of the mask."""
        caller.require_account(sent.account)
        etag = parse_etag(patch.etag, "routing_rule.etag")

        async def action(work: Work) -> RoutingRule:
            await work.accounts.lock(sent.account)
            stored = await work.routing_rules.get(sent.account, sent.routing_rule)
            wanted = merge(stored, sent, patch.mask, patch.populated, ROUTING_RULE_FIELDS)
            _check(wanted)
            await work.routing_rules.update(wanted, etag)
            return await self._changed(work, wanted)

        return await mutate(self._database, caller, mutation, action)

    async def delete(
        self,
        caller: Caller,
        mutation: Mutation[None],
        account: str,
        routing_rule: str,
        etag_text: str,
        *,
        allow_missing: bool,
    ) -> Replay | None:
        """Delete a rule."""
        caller.require_account(account)
        etag = parse_etag(etag_text)

        async def action(work: Work) -> None:
            try:
                await work.accounts.lock(account)
                stored = await work.routing_rules.get(account, routing_rule)
            except NotFoundError:
                if allow_missing:
                    return
                raise
            await work.routing_rules.delete(stored, etag)
            await self._compile(work, stored)

        return await mutate(self._database, caller, mutation, action)

    async def _changed(self, work: Work, rule: RoutingRule) -> RoutingRule:
        await self._compile(work, rule)
        return await work.routing_rules.get(rule.account, rule.routing_rule)

    async def _compile(self, work: Work, rule: RoutingRule) -> None:
        name = names.format_name(names.ROUTING_RULE, rule.account, rule.routing_rule)
        account = await work.accounts.get(rule.account)
        await self._compiler.account(work, account, Edited(f'rules["{name}"]', "routing_rule"))


def _check(rule: RoutingRule) -> None:
    """What can be said of the rule alone; also of a disabled one, which no bundle holds."""
    check_display_name(rule.display_name, "routing_rule.display_name")
    account = names.format_name(names.ACCOUNT, rule.account)
    refuse(validate_rule(rule_config(rule), account), _EDITED)
