"""SuspensionService: which nodes have confirmed what was suspended, resumed or revoked.

Contract. A node has confirmed a denial when every worker of it has in force the version of the denials that first had
it, or a newer one; what was lifted, when it has the newest version. A node whose software does not know how to stop it
is not told, and has confirmed nothing. `wait` looks again until all have, or its time is
over; cancelled, it leaves nothing behind. Nothing here changes anything.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from controlplane.domain import names
from controlplane.domain.access import Caller
from controlplane.domain.errors import invalid
from controlplane.domain.suspensions import Subject, SubjectKind, Suspension
from controlplane.ports import Database, Work, scope_of
from controlplane.services.accounts import DENIAL_ACCOUNT
from controlplane.services.credentials import DENIAL_CREDENTIAL
from controlplane.services.destinations import DENIAL_DESTINATION
from controlplane.services.providers import DENIAL_PROVIDER
from controlplane.services.seats import IN_ALL, Seats

_SUFFIX = "/suspension"
_MAX_WAIT_S = 60.0
_POLL_S = 0.25
_DENIAL_KINDS = {
    SubjectKind.ACCOUNT: DENIAL_ACCOUNT,
    SubjectKind.CREDENTIAL: DENIAL_CREDENTIAL,
    SubjectKind.PROVIDER: DENIAL_PROVIDER,
    SubjectKind.DESTINATION: DENIAL_DESTINATION,
}


def parse_subject(name: str) -> Subject:
    """Return what the suspension of this name is about; InvalidArgumentError for any other name."""
    resource = name.removesuffix(_SUFFIX)
    if resource == name:
        raise invalid("name", "must be the name of what can be suspended, and end with /suspension")
    collection = resource.split("/")[-2:][0]
    if collection == "accounts":
        account = names.parse_name(resource, names.ACCOUNT)[0]
        return Subject(SubjectKind.ACCOUNT, resource, account, account)
    if collection == "smtpCredentials":
        account, credential = names.parse_name(resource, names.SMTP_CREDENTIAL)
        return Subject(SubjectKind.CREDENTIAL, resource, account, credential)
    if collection == "destinations":
        owner, destination = names.parse_owned(resource, names.DESTINATION, names.SHARED_DESTINATION)
        return Subject(SubjectKind.DESTINATION, resource, owner, destination)
    owner, provider = names.parse_owned(resource, names.PROVIDER, names.SHARED_PROVIDER)
    return Subject(SubjectKind.PROVIDER, resource, owner, provider)


class SuspensionsService:
    """See the module."""

    def __init__(
        self, database: Database, *, monotonic: Callable[[], float] = time.monotonic, max_waiters: int = IN_ALL
    ) -> None:
        self._database = database
        self._monotonic = monotonic
        self._waiters = Seats(max_waiters)

    async def get(self, caller: Caller, subject: Subject) -> Suspension:
        """Return the receipt as it is."""
        caller.require_account(subject.account)
        async with self._database.transaction(scope_of(caller)) as work:
            await _check_exists(work, subject)
            version = await work.bundles.denial_version(subject.resource)
            pool = None if subject.account is None else (await work.accounts.get(subject.account)).node_pool
            return Suspension(
                subject.resource + _SUFFIX,
                version is not None,
                await work.bundles.denials_version() if version is None else version,
                tuple(await work.nodes.receipts(pool, _DENIAL_KINDS[subject.kind])),
            )

    async def wait(self, caller: Caller, subject: Subject, timeout_s: float | None) -> Suspension:
        """Return the receipt when all have confirmed it, or as it is when the time is over (at most a minute)."""
        ends = self._monotonic() + min(_MAX_WAIT_S if timeout_s is None else timeout_s, _MAX_WAIT_S)
        caller.require_account(subject.account)
        with self._waiters.seat(subject.account):
            while True:
                found = await self.get(caller, subject)
                left = ends - self._monotonic()
                if found.confirmed or left <= 0:
                    return found
                await asyncio.sleep(min(left, _POLL_S))


async def _check_exists(work: Work, subject: Subject) -> None:
    if subject.kind is SubjectKind.CREDENTIAL and subject.account is not None:
        await work.smtp_credentials.get(subject.account, subject.item)
    elif subject.kind is SubjectKind.PROVIDER:
        await work.providers.get(subject.account, subject.item)
    elif subject.account is not None:
        await work.accounts.get(subject.account)
