"""Who presents an API key: the first thing that happens to every call.

Contract. `authenticate(presented)` returns the Caller or raises UnauthenticatedError, with one and the same text
whether the key is unknown, wrong, expired or revoked. It asks the database at every call, so that a revoked key is
refused at once. The last use is written at most once a minute and its failure never fails a call.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from controlplane.domain import names, secrets
from controlplane.domain.access import Caller, Scope
from controlplane.domain.errors import AbortedError, Reason, UnauthenticatedError, UnavailableError
from controlplane.ports import Database

_USE_STEP = timedelta(minutes=1)
# Compared when no key has that readable part, so that a wrong one takes the same way as a wrong secret.
_NO_SECRET = bytes(32)


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Authenticator:
    """See the module."""

    def __init__(self, database: Database, now: Callable[[], datetime] = _utc_now) -> None:
        self._database = database
        self._now = now

    async def authenticate(self, presented: str) -> Caller:
        """Return whose key it is."""
        lookup = secrets.lookup_of(presented)
        if lookup is None:
            raise _refused()
        now = self._now()
        found = await self._database.find_api_key(lookup)
        good = secrets.matches(presented, _NO_SECRET if found is None else found.secret_sha256)
        if found is None or not good:
            raise _refused()
        key = found.key
        if key.revoke_time is not None or (key.expire_time is not None and key.expire_time <= now):
            raise _refused()
        if key.last_use_time is None or now - key.last_use_time >= _USE_STEP:
            # What could not be noted is noted at the next call.
            with suppress(UnavailableError, AbortedError):
                async with self._database.authentication(lookup) as work:
                    await work.api_keys.mark_use(lookup, now)
        scopes = frozenset(Scope(scope) for scope in key.scopes)
        return Caller(names.api_key_name(key.account, key.api_key), key.account, scopes)


def _refused() -> UnauthenticatedError:
    return UnauthenticatedError(Reason.API_KEY_INVALID, "the API key is not valid")
