"""CredentialService: API keys and SMTP credentials.

Contract. A secret is made here, returned once and stored as hashes. Who makes or rotates a key learns its secret, so
a key never gets more than its maker has. A credential that is revoked or deleted is denied to every node as well,
until no mail that it submitted can be waiting any more; one that is suspended until it is resumed. Cancelling any
method leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from controlplane.domain import names, secrets
from controlplane.domain.access import ACCOUNT_SCOPES, Caller, Scope
from controlplane.domain.errors import FailedPreconditionError, NotFoundError, Reason, ResourceExhaustedError, invalid
from controlplane.domain.etags import parse_etag
from controlplane.domain.paging import PageTokens, coerce_page_size
from controlplane.domain.resources import ApiKey, SmtpCredential
from controlplane.ports import Database, Random, Work, scope_of
from controlplane.services.compile import BundleCompiler, Edited
from controlplane.services.mutations import Mutation, Replay, mutate
from controlplane.services.texts import check_display_name, check_expiry, check_reason

DENIAL_CREDENTIAL = 2
# Longer than any message waits (30 days), and than any node serves without the control plane (7 days).
_DENIAL_LIFE = timedelta(days=31)
_EVER = datetime(1970, 1, 1, tzinfo=UTC)
# All denials of the fleet travel to every node in one message.
_DENIED_LIMIT = 1_000


class ApiKeysService:
    """See the module."""

    def __init__(self, database: Database, tokens: PageTokens, random: Random) -> None:
        self._database = database
        self._tokens = tokens
        self._random = random

    async def create(self, caller: Caller, mutation: Mutation[ApiKey], key: ApiKey) -> ApiKey | Replay:
        """Create a key; the answer carries its secret."""
        caller.require_account(key.account)
        names.check_id(key.api_key, "api_key_id")
        check_display_name(key.display_name, "api_key.display_name")
        scopes = _checked_scopes(key)
        for scope in scopes:
            caller.require(scope)
        made = self._make()
        key = replace(key, scopes=tuple(sorted(scopes)), lookup=made.lookup)

        async def action(work: Work) -> ApiKey:
            check_expiry(key.expire_time, await work.now(), "api_key.expire_time")
            if key.account is not None:
                await work.accounts.lock(key.account)
            await work.api_keys.insert(key, made.sha256)
            return replace(await work.api_keys.get(key.account, key.api_key), secret=made.secret)

        return await mutate(self._database, caller, mutation, action)

    async def get(self, caller: Caller, account: str | None, api_key: str) -> ApiKey:
        """Return one key, without its secret."""
        caller.require_account(account)
        async with self._database.transaction(scope_of(caller)) as work:
            return await work.api_keys.get(account, api_key)

    async def list_page(
        self, caller: Caller, account: str | None, page_size: int, page_token: str
    ) -> tuple[list[ApiKey], str]:
        """Return a page in order of name, and the token of the next."""
        caller.require_account(account)
        size, arguments = coerce_page_size(page_size), ["ListApiKeys", account or ""]
        after = self._tokens.open(page_token, arguments)
        async with self._database.transaction(scope_of(caller)) as work:
            found = await work.api_keys.list_page(account, after[0] if after else "", size + 1)
        more = self._tokens.seal([found[size - 1].api_key], arguments) if len(found) > size else ""
        return found[:size], more

    async def rotate(
        self, caller: Caller, mutation: Mutation[ApiKey], account: str | None, api_key: str, etag_text: str
    ) -> ApiKey | Replay:
        """Replace the secret; the answer carries the new one."""
        caller.require_account(account)
        etag = parse_etag(etag_text)
        made = self._make()

        async def action(work: Work) -> ApiKey:
            stored = await work.api_keys.get(account, api_key)
            for scope in stored.scopes:
                caller.require(Scope(scope))
            if stored.revoke_time is not None:
                name = names.api_key_name(account, api_key)
                raise FailedPreconditionError(Reason.KEY_REVOKED, f"{name} was revoked", subject=name)
            await work.api_keys.replace_secret(stored, made.lookup, made.sha256, etag)
            return replace(await work.api_keys.get(account, api_key), secret=made.secret)

        return await mutate(self._database, caller, mutation, action)

    async def revoke(
        self, caller: Caller, mutation: Mutation[ApiKey], account: str | None, api_key: str, etag_text: str
    ) -> ApiKey | Replay:
        """Make a key useless for ever; one that is, stays as it is."""
        caller.require_account(account)
        etag = parse_etag(etag_text)

        async def action(work: Work) -> ApiKey:
            stored = await work.api_keys.get(account, api_key)
            if stored.revoke_time is not None:
                return stored
            await _keep_one_operator_key(work, stored)
            await work.api_keys.revoke(stored, etag)
            return await work.api_keys.get(account, api_key)

        return await mutate(self._database, caller, mutation, action)

    async def delete(
        self,
        caller: Caller,
        mutation: Mutation[None],
        account: str | None,
        api_key: str,
        etag_text: str,
        *,
        allow_missing: bool,
    ) -> Replay | None:
        """Delete a key."""
        caller.require_account(account)
        etag = parse_etag(etag_text)

        async def action(work: Work) -> None:
            try:
                stored = await work.api_keys.get(account, api_key)
            except NotFoundError:
                if allow_missing:
                    return
                raise
            if stored.revoke_time is None:
                await _keep_one_operator_key(work, stored)
            await work.api_keys.delete(stored, etag)

        return await mutate(self._database, caller, mutation, action)

    def _make(self) -> secrets.NewApiKey:
        return secrets.make_api_key(self._random(secrets.LOOKUP_BYTES), self._random(secrets.SECRET_BYTES))


class SmtpCredentialsService:
    """See the module."""

    def __init__(self, database: Database, compiler: BundleCompiler, tokens: PageTokens, random: Random) -> None:
        self._database = database
        self._compiler = compiler
        self._tokens = tokens
        self._random = random

    async def create(
        self, caller: Caller, mutation: Mutation[SmtpCredential], credential: SmtpCredential
    ) -> SmtpCredential | Replay:
        """Create a credential; the answer carries its secret."""
        caller.require_account(credential.account)
        names.check_id(credential.smtp_credential, "smtp_credential_id")
        check_display_name(credential.display_name, "smtp_credential.display_name")
        secret, sha256, verifier = self._make()

        async def action(work: Work) -> SmtpCredential:
            check_expiry(credential.expire_time, await work.now(), "smtp_credential.expire_time")
            await work.accounts.lock(credential.account)
            await _keep_denials_few(work, credential.account)
            await work.smtp_credentials.insert(replace(credential, secret_sha256=sha256), verifier)
            await work.bundles.lift(_name(credential))
            return await self._changed(work, credential, secret)

        return await mutate(self._database, caller, mutation, action)

    async def get(self, caller: Caller, account: str, smtp_credential: str) -> SmtpCredential:
        """Return one credential, without its secret."""
        caller.require_account(account)
        async with self._database.transaction(scope_of(caller)) as work:
            return await work.smtp_credentials.get(account, smtp_credential)

    async def list_page(
        self, caller: Caller, account: str, page_size: int, page_token: str
    ) -> tuple[list[SmtpCredential], str]:
        """Return a page in order of name, and the token of the next."""
        caller.require_account(account)
        size, arguments = coerce_page_size(page_size), ["ListSmtpCredentials", account]
        after = self._tokens.open(page_token, arguments)
        async with self._database.transaction(scope_of(caller)) as work:
            found = await work.smtp_credentials.list_page(account, after[0] if after else "", size + 1)
        more = self._tokens.seal([found[size - 1].smtp_credential], arguments) if len(found) > size else ""
        return found[:size], more

    async def rotate(
        self, caller: Caller, mutation: Mutation[SmtpCredential], account: str, smtp_credential: str, etag_text: str
    ) -> SmtpCredential | Replay:
        """Replace the secret; the answer carries the new one."""
        caller.require_account(account)
        etag = parse_etag(etag_text)
        secret, sha256, verifier = self._make()

        async def action(work: Work) -> SmtpCredential:
            stored = await self._lock_good(work, account, smtp_credential)
            await work.smtp_credentials.replace_secret(replace(stored, secret_sha256=sha256), verifier, etag)
            return await self._changed(work, stored, secret)

        return await mutate(self._database, caller, mutation, action)

    async def revoke(
        self, caller: Caller, mutation: Mutation[SmtpCredential], account: str, smtp_credential: str, etag_text: str
    ) -> SmtpCredential | Replay:
        """Refuse a credential for ever; one that is, stays as it is."""
        caller.require_account(account)
        etag = parse_etag(etag_text)

        async def action(work: Work) -> SmtpCredential:
            await work.accounts.lock(account)
            stored = await work.smtp_credentials.get(account, smtp_credential)
            if stored.revoke_time is not None:
                return stored
            await work.smtp_credentials.revoke(stored, etag)
            await _deny(work, stored)
            return await self._changed(work, stored)

        return await mutate(self._database, caller, mutation, action)

    async def suspend(
        self, caller: Caller, mutation: Mutation[SmtpCredential], account: str, smtp_credential: str, reason: str
    ) -> SmtpCredential | Replay:
        """Stop a credential and all mail that it submitted; again changes the reason only."""
        caller.require_account(account)
        check_reason(reason)

        async def action(work: Work) -> SmtpCredential:
            stored = await self._lock_good(work, account, smtp_credential)
            if stored.suspend_time is None:
                if await work.smtp_credentials.count_suspended(account) >= _DENIED_LIMIT:
                    raise FailedPreconditionError(
                        Reason.TOO_MANY_SUSPENDED_CREDENTIALS,
                        f"{_DENIED_LIMIT:,} SMTP credentials of accounts/{account} are suspended: suspend the account",
                        subject=_name(stored),
                    )
                # Mail that it submitted before is stopped too, which a revocation lets go on.
                await work.bundles.deny(_name(stored), DENIAL_CREDENTIAL, account, None, _EVER)
            await work.smtp_credentials.set_suspension(stored, suspended=True, reason=reason)
            return await work.smtp_credentials.get(account, smtp_credential)

        return await mutate(self._database, caller, mutation, action)

    async def resume(
        self, caller: Caller, mutation: Mutation[SmtpCredential], account: str, smtp_credential: str
    ) -> SmtpCredential | Replay:
        """Lift a suspension; an active credential is left alone."""
        caller.require_account(account)

        async def action(work: Work) -> SmtpCredential:
            stored = await self._lock_good(work, account, smtp_credential)
            if stored.suspend_time is None:
                return stored
            await work.smtp_credentials.set_suspension(stored, suspended=False, reason="")
            await work.bundles.lift(_name(stored))
            return await work.smtp_credentials.get(account, smtp_credential)

        return await mutate(self._database, caller, mutation, action)

    async def _lock_good(self, work: Work, account: str, smtp_credential: str) -> SmtpCredential:
        await work.accounts.lock(account)
        stored = await work.smtp_credentials.get(account, smtp_credential)
        if stored.revoke_time is not None:
            raise FailedPreconditionError(Reason.KEY_REVOKED, f"{_name(stored)} was revoked", subject=_name(stored))
        return stored

    async def delete(
        self,
        caller: Caller,
        mutation: Mutation[None],
        account: str,
        smtp_credential: str,
        etag_text: str,
        *,
        allow_missing: bool,
    ) -> Replay | None:
        """Delete a credential."""
        caller.require_account(account)
        etag = parse_etag(etag_text)

        async def action(work: Work) -> None:
            try:
                await work.accounts.lock(account)
                stored = await work.smtp_credentials.get(account, smtp_credential)
            except NotFoundError:
                if allow_missing:
                    return
                raise
            await work.smtp_credentials.delete(stored, etag)
            await _deny(work, stored)
            await self._compiler.account(work, await work.accounts.get(account), Edited("\0", "name"))

        return await mutate(self._database, caller, mutation, action)

    async def _changed(self, work: Work, credential: SmtpCredential, secret: str = "") -> SmtpCredential:
        account = await work.accounts.get(credential.account)
        edited = Edited(f'credentials["{_name(credential)}"]', "smtp_credential")
        await self._compiler.account(work, account, edited)
        stored = await work.smtp_credentials.get(credential.account, credential.smtp_credential)
        return replace(stored, secret=secret)

    def _make(self) -> tuple[str, bytes, secrets.ScramVerifier]:
        secret = secrets.make_smtp_secret(self._random(secrets.SECRET_BYTES))
        verifier = secrets.make_scram_verifier(secret, self._random(secrets.SALT_BYTES))
        return secret, secrets.hash_secret(secret), verifier


def _name(credential: SmtpCredential) -> str:
    return names.format_name(names.SMTP_CREDENTIAL, credential.account, credential.smtp_credential)


async def _deny(work: Work, credential: SmtpCredential) -> None:
    expire_time = await work.now() + _DENIAL_LIFE
    await work.bundles.deny(_name(credential), DENIAL_CREDENTIAL, credential.account, expire_time)


async def _keep_denials_few(work: Work, account: str) -> None:
    until = await work.bundles.denials_full_until(account, DENIAL_CREDENTIAL, _DENIED_LIMIT)
    if until is not None:
        raise ResourceExhaustedError(
            Reason.TOO_MANY_DENIED_CREDENTIALS,
            f"{_DENIED_LIMIT:,} SMTP credentials of accounts/{account} were revoked or deleted in the last "
            f"{_DENIAL_LIFE.days} days",
            retry_after_s=(until - await work.now()).total_seconds(),
        )


async def _keep_one_operator_key(work: Work, key: ApiKey) -> None:
    if key.account is None and await work.api_keys.lock_operator_keys() <= 1:
        name = names.api_key_name(None, key.api_key)
        raise FailedPreconditionError(Reason.LAST_OPERATOR_KEY, f"{name} is the last key of an operator", subject=name)


def _checked_scopes(key: ApiKey) -> set[Scope]:
    allowed: Iterable[Scope] = ACCOUNT_SCOPES if key.account is not None else {Scope.OPERATOR}
    known = {scope.value: scope for scope in allowed}
    if not key.scopes or any(scope not in known for scope in key.scopes):
        raise invalid("api_key.scopes", f"must be one or more of {', '.join(sorted(known))}")
    return {known[scope] for scope in key.scopes}
