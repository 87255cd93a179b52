"""NodeService: nodes, node pools, enrolment tokens and spools. Operators only.

Contract. A node's certificate and what it reports belong to the fleet's side; here is what operators decide. A pool
is born with a key of its own, under which the secrets of its bundles are sealed, and with its shared bundles. Whose a
spool is changes here alone: nodes speak for their own.
Cancelling any method leaves nothing behind.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

from controlplane.domain import names, secrets
from controlplane.domain.access import Caller
from controlplane.domain.drains import Drain
from controlplane.domain.errors import FailedPreconditionError, NotFoundError, Reason
from controlplane.domain.etags import parse_etag
from controlplane.domain.masks import merge
from controlplane.domain.paging import PageTokens, coerce_page_size
from controlplane.domain.resources import (
    DEFAULT_NODE_POOL,
    NODE_FIELDS,
    NODE_POOL_FIELDS,
    Node,
    NodePool,
    NodeState,
)
from controlplane.ports import Database, Random, Sealer, Work, scope_of
from controlplane.services.compile import POOL_KEY_PLACE, BundleCompiler, Edited, refuse, settings_of
from controlplane.services.mutations import Mutation, Patch, Replay, mutate
from controlplane.services.texts import check_display_name
from dataplane.core.config import validate_settings

TOKEN_LIFE = timedelta(minutes=15)
# After it a node that was not heard of counts as gone; a node reports every 20 s.
SILENCE = timedelta(seconds=90)
_KEY_BYTES = 32


class NodesService:
    """See the module."""

    def __init__(self, database: Database, compiler: BundleCompiler, tokens: PageTokens, random: Random) -> None:
        self._database = database
        self._compiler = compiler
        self._tokens = tokens
        self._random = random

    async def create(self, caller: Caller, mutation: Mutation[Node], node: Node) -> Node | Replay:
        """Create a node; the answer carries its one-time token."""
        caller.require_operator()
        names.check_id(node.node, "node_id")
        check_display_name(node.display_name, "node.display_name")
        wanted = replace(node, node_pool=node.node_pool or DEFAULT_NODE_POOL)

        async def action(work: Work) -> Node:
            await work.nodes.lock_pool(wanted.node_pool)
            await work.nodes.insert(wanted)
            await self._compiler.settings(work, [wanted.node_pool])
            return await self._with_token(work, node.node)

        return await mutate(self._database, caller, mutation, action)

    async def get(self, caller: Caller, node: str) -> Node:
        """Return one node."""
        caller.require_operator()
        async with self._database.transaction(scope_of(caller)) as work:
            return await work.nodes.get(node)

    async def list_page(self, caller: Caller, page_size: int, page_token: str) -> tuple[list[Node], str]:
        """Return a page in order of name, and the token of the next."""
        caller.require_operator()
        size, arguments = coerce_page_size(page_size), ["ListNodes"]
        after = self._tokens.open(page_token, arguments)
        async with self._database.transaction(scope_of(caller)) as work:
            found = await work.nodes.list_page(after[0] if after else "", size + 1)
        more = self._tokens.seal([found[size - 1].node], arguments) if len(found) > size else ""
        return found[:size], more

    async def update(self, caller: Caller, mutation: Mutation[Node], sent: Node, patch: Patch) -> Node | Replay:
        """Change the fields of the mask."""
        caller.require_operator()
        etag = parse_etag(patch.etag, "node.etag")

        async def action(work: Work) -> Node:
            stored = await work.nodes.get(sent.node)
            merged = merge(stored, sent, patch.mask, patch.populated, NODE_FIELDS)
            check_display_name(merged.display_name, "node.display_name")
            wanted = replace(merged, node_pool=merged.node_pool or DEFAULT_NODE_POOL)
            pools = sorted({stored.node_pool, wanted.node_pool})
            for pool in pools:
                await work.nodes.lock_pool(pool)
            await work.nodes.update(wanted, etag)
            await self._compiler.settings(work, pools)
            return await work.nodes.get(sent.node)

        return await mutate(self._database, caller, mutation, action)

    async def delete(
        self, caller: Caller, mutation: Mutation[None], node: str, etag_text: str, *, allow_missing: bool
    ) -> Replay | None:
        """Delete a node that is gone and holds no mail."""
        caller.require_operator()
        etag = parse_etag(etag_text)

        async def action(work: Work) -> None:
            try:
                stored = await work.nodes.get(node)
            except NotFoundError:
                if allow_missing:
                    return
                raise
            reported = any(spool.waiting_count for spool in stored.spools)
            # What it gave up and the ledger has not heard of is in no count of its own.
            if stored.connected or reported or await work.nodes.has_mail(node):
                name = names.format_name(names.NODE, node)
                raise FailedPreconditionError(
                    Reason.NODE_IN_USE, f"{name} is connected or its spools hold mail", subject=name
                )
            await work.nodes.delete(stored, etag)
            await self._compiler.settings(work, [stored.node_pool])

        return await mutate(self._database, caller, mutation, action)

    async def reset_enrollment(self, caller: Caller, mutation: Mutation[Node], node: str) -> Node | Replay:
        """Make a new one-time token; the answer carries it."""
        caller.require_operator()

        async def action(work: Work) -> Node:
            await work.nodes.get(node)
            return await self._with_token(work, node)

        return await mutate(self._database, caller, mutation, action)

    async def revoke(self, caller: Caller, mutation: Mutation[Node], node: str) -> Node | Replay:
        """Refuse the node's certificate from now on."""
        caller.require_operator()

        async def action(work: Work) -> Node:
            stored = await work.nodes.get(node)
            await work.nodes.revoke(node)
            await self._compiler.settings(work, [stored.node_pool])
            return await work.nodes.get(node)

        return await mutate(self._database, caller, mutation, action)

    async def accept_spool(self, caller: Caller, mutation: Mutation[Node], node: str, spool: str) -> Node | Replay:
        """Take records again from a spool that was refused."""
        caller.require_operator()
        names.check_uuid(spool, "spool")

        async def action(work: Work) -> Node:
            await work.nodes.get(node)
            if not await work.nodes.accept_spool(node, spool):
                raise FailedPreconditionError(Reason.SPOOL_NOT_REFUSED, "the spool is not refused", subject=spool)
            return await work.nodes.get(node)

        return await mutate(self._database, caller, mutation, action)

    async def attach_spool(
        self, caller: Caller, mutation: Mutation[Node], node: str, spool: str, *, force: bool
    ) -> Node | Replay:
        """Give a spool to another node; its former one is told to send nothing from it."""
        caller.require_operator()
        names.check_uuid(spool, "spool")

        async def action(work: Work) -> Node:
            taker = await work.nodes.get(node)
            former = await work.nodes.get(await work.nodes.lock_spool(spool))
            _check_move(spool, former, taker, await work.now(), force=force)
            await work.nodes.move_spool(spool, node)
            return await work.nodes.get(node)

        return await mutate(self._database, caller, mutation, action)

    async def give_up_spool(self, caller: Caller, mutation: Mutation[Node], node: str, spool: str) -> Node | Replay:
        """Believe that a spool's disk will not come back; what waited there ends soon after."""
        caller.require_operator()
        names.check_uuid(spool, "spool")

        async def action(work: Work) -> Node:
            await work.nodes.get(node)
            if not await work.nodes.give_up_spool(node, spool, await work.now() - SILENCE):
                owner = names.format_name(names.NODE, node)
                raise FailedPreconditionError(
                    Reason.SPOOL_IN_USE, f"{owner} reported spool {spool} just now", subject=spool
                )
            return await work.nodes.get(node)

        return await mutate(self._database, caller, mutation, action)

    async def drain(self, caller: Caller, mutation: Mutation[Drain], node: str) -> Drain | Replay:
        """Tell a node to take no mail and to hand over what it has; the drain that there is, if there is one."""
        caller.require_operator()

        async def action(work: Work) -> Drain:
            stored = await work.nodes.get(node)
            name = names.format_name(names.NODE, node)
            if stored.state is NodeState.REVOKED:
                raise FailedPreconditionError(Reason.NODE_REVOKED, f"{name} is revoked", subject=name)
            if stored.drain:
                return await work.nodes.get_drain(stored.drain)
            if not await work.nodes.has_taker(stored):
                text = f"no other node of the pool of {name} is connected and takes mail"
                raise FailedPreconditionError(Reason.NODE_ALONE, text, subject=name)
            return await work.nodes.get_drain(await work.nodes.start_drain(node))

        return await mutate(self._database, caller, mutation, action)

    async def undrain(self, caller: Caller, mutation: Mutation[Node], node: str) -> Node | Replay:
        """Let a node take mail again."""
        caller.require_operator()

        async def action(work: Work) -> Node:
            if not (await work.nodes.get(node)).drain:
                name = names.format_name(names.NODE, node)
                raise FailedPreconditionError(Reason.NODE_NOT_DRAINED, f"{name} is not drained", subject=name)
            await work.nodes.end_drain(node)
            return await work.nodes.get(node)

        return await mutate(self._database, caller, mutation, action)

    async def _with_token(self, work: Work, node: str) -> Node:
        token = secrets.make_enrollment_token(self._random(secrets.SECRET_BYTES))
        expire_time = await work.now() + TOKEN_LIFE
        await work.nodes.replace_token(node, secrets.hash_secret(token), expire_time)
        return replace(await work.nodes.get(node), enrollment_token=token)


class NodePoolsService:
    """See the module."""

    def __init__(
        self, database: Database, compiler: BundleCompiler, tokens: PageTokens, *, sealer: Sealer, random: Random
    ) -> None:
        self._database = database
        self._compiler = compiler
        self._tokens = tokens
        self._sealer = sealer
        self._random = random

    async def create(self, caller: Caller, mutation: Mutation[NodePool], pool: NodePool) -> NodePool | Replay:
        """Create a pool with its key and bundles."""
        caller.require_operator()
        names.check_id(pool.node_pool, "node_pool_id")
        _check(pool)

        async def action(work: Work) -> NodePool:
            return await self.make(work, pool)

        return await mutate(self._database, caller, mutation, action)

    async def make(self, work: Work, pool: NodePool) -> NodePool:
        """Create a pool inside a transaction of an operator's scope."""
        await work.nodes.insert_pool(pool)
        key_id = f"{pool.node_pool}-{self._random(4).hex()}"
        table, column = POOL_KEY_PLACE
        sealed = self._sealer.seal(self._random(_KEY_BYTES), "", table, f"{pool.node_pool}/{key_id}", column)
        await work.nodes.add_pool_key(pool.node_pool, key_id, sealed)
        await self._compiler.new_pool(work, pool)
        return await work.nodes.get_pool(pool.node_pool)

    async def get(self, caller: Caller, node_pool: str) -> NodePool:
        """Return one pool."""
        caller.require_operator()
        async with self._database.transaction(scope_of(caller)) as work:
            return await work.nodes.get_pool(node_pool)

    async def list_page(self, caller: Caller, page_size: int, page_token: str) -> tuple[list[NodePool], str]:
        """Return a page in order of name, and the token of the next."""
        caller.require_operator()
        size, arguments = coerce_page_size(page_size), ["ListNodePools"]
        after = self._tokens.open(page_token, arguments)
        async with self._database.transaction(scope_of(caller)) as work:
            found = await work.nodes.list_pools(after[0] if after else "", size + 1)
        more = self._tokens.seal([found[size - 1].node_pool], arguments) if len(found) > size else ""
        return found[:size], more

    async def update(
        self, caller: Caller, mutation: Mutation[NodePool], sent: NodePool, patch: Patch
    ) -> NodePool | Replay:
        """Change the fields of the mask."""
        caller.require_operator()
        etag = parse_etag(patch.etag, "node_pool.etag")

        async def action(work: Work) -> NodePool:
            stored = await work.nodes.get_pool(sent.node_pool)
            wanted = merge(stored, sent, patch.mask, patch.populated, NODE_POOL_FIELDS)
            _check(wanted)
            await work.nodes.update_pool(wanted, etag)
            await self._compiler.settings(work, [sent.node_pool])
            return await work.nodes.get_pool(sent.node_pool)

        return await mutate(self._database, caller, mutation, action)

    async def delete(
        self, caller: Caller, mutation: Mutation[None], node_pool: str, etag_text: str, *, allow_missing: bool
    ) -> Replay | None:
        """Delete a pool that nothing belongs to; the default one stays."""
        caller.require_operator()
        etag = parse_etag(etag_text)
        if node_pool == DEFAULT_NODE_POOL:
            name = names.format_name(names.NODE_POOL, node_pool)
            raise FailedPreconditionError(Reason.NODE_POOL_DEFAULT, f"{name} always exists", subject=name)

        async def action(work: Work) -> None:
            try:
                stored = await work.nodes.get_pool(node_pool)
            except NotFoundError:
                if allow_missing:
                    return
                raise
            await work.nodes.delete_pool(stored, etag)
            await work.bundles.remove_pool(node_pool)

        return await mutate(self._database, caller, mutation, action)


def _check_move(spool: str, former: Node, taker: Node, now: datetime, *, force: bool) -> None:
    """Whether the spool may go from one node to the other."""
    owner, wanted = (names.format_name(names.NODE, one.node) for one in (former, taker))
    if former.node == taker.node:
        raise FailedPreconditionError(Reason.SPOOL_ATTACHED, f"spool {spool} is {owner}'s already", subject=spool)
    if taker.state is NodeState.REVOKED:
        raise FailedPreconditionError(Reason.NODE_REVOKED, f"{wanted} is revoked", subject=wanted)
    if former.node_pool != taker.node_pool:
        # It has no other pool's accounts, and could route none of the mail.
        raise FailedPreconditionError(
            Reason.SPOOL_POOL_DIFFERS, f"{owner} and {wanted} belong to different pools", subject=spool
        )
    heard_of = former.last_seen_time is not None and now - former.last_seen_time < SILENCE
    if heard_of and former.state is not NodeState.REVOKED and not force:
        raise FailedPreconditionError(
            Reason.SPOOL_IN_USE, f"{owner} has spool {spool} and was heard of just now", subject=spool
        )


def _check(pool: NodePool) -> None:
    check_display_name(pool.display_name, "node_pool.display_name")
    refuse(validate_settings(settings_of(pool, 1)), Edited("", "node_pool"))
