"""The first operator's key and the default node pool: what must be there before anybody can call.

Contract. `bootstrap` makes `nodePools/default` when it is missing and the operator's key `apiKeys/bootstrap`, whose
secret it returns, once. AlreadyBootstrappedError when any operator's key exists: keys are then made by operators.
"""

from __future__ import annotations

from controlplane.domain import secrets
from controlplane.domain.access import Scope
from controlplane.domain.errors import NotFoundError
from controlplane.domain.resources import DEFAULT_NODE_POOL, ApiKey, NodePool
from controlplane.ports import Database, Random, operator_scope
from controlplane.services.nodes import NodePoolsService

FIRST_KEY = "bootstrap"


class AlreadyBootstrappedError(Exception):
    """An operator's key exists already."""


async def bootstrap(database: Database, pools: NodePoolsService, random: Random) -> str:
    """Return the secret of the first operator's key."""
    made = secrets.make_api_key(random(secrets.LOOKUP_BYTES), random(secrets.SECRET_BYTES))
    async with database.transaction(operator_scope("bootstrap")) as work:
        await work.api_keys.lock_operator_keys()
        if await work.api_keys.list_page(None, "", 1):
            raise AlreadyBootstrappedError("an operator's key exists already")
        try:
            await work.nodes.get_pool(DEFAULT_NODE_POOL)
        except NotFoundError:
            await pools.make(work, NodePool(DEFAULT_NODE_POOL))
        key = ApiKey(None, FIRST_KEY, "First operator", (Scope.OPERATOR,), made.lookup)
        await work.api_keys.insert(key, made.sha256)
    return made.secret
