"""ProviderService: next hops, of accounts and shared.

Contract. An account's provider is compiled into the account's bundle, a shared one into a bundle of every pool. The
password is sealed before it is stored and never returned. Hosts that are addresses must be public or allowed by the
deployment; names are checked where the connection is made. Suspending is a denial. Cancelling leaves nothing behind.
"""

from __future__ import annotations

import uuid
from dataclasses import replace

from controlplane.domain import names
from controlplane.domain.access import Caller
from controlplane.domain.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError, Reason, Violation
from controlplane.domain.etags import parse_etag
from controlplane.domain.hosts import HostPolicy
from controlplane.domain.masks import merge
from controlplane.domain.paging import PageTokens, coerce_page_size
from controlplane.domain.resources import PROVIDER_FIELDS, Meta, Provider, ProviderState, SmtpSettings
from controlplane.ports import Database, ProbeResult, ProviderProbe, Random, Sealer, Work, scope_of
from controlplane.services.compile import PASSWORD_PLACE, BundleCompiler, Edited, provider_config, refuse
from controlplane.services.mutations import Mutation, Patch, Replay, mutate
from controlplane.services.texts import check_display_name, check_reason
from dataplane.core.config import SealedValue, TlsPolicy, validate_provider

DENIAL_PROVIDER = 3
_PASSWORD_PATH = "smtp.password"  # noqa: S105 - the path of a field
# A token may be long; NUL ends a password in SASL PLAIN (RFC 4616, section 2).
_PASSWORD_LIMIT = 4_096
# Stands for whatever the pool's key will make of the password: only its shape is looked at.
_SOME_PASSWORD = SealedValue("-", bytes(64))
_SUBMISSION_PORT, _SUBMISSIONS_PORT = 587, 465


class ProvidersService:
    """See the module."""

    def __init__(
        self,
        database: Database,
        compiler: BundleCompiler,
        tokens: PageTokens,
        *,
        sealer: Sealer,
        probe: ProviderProbe,
        hosts: HostPolicy,
        random: Random,
    ) -> None:
        self._database = database
        self._compiler = compiler
        self._tokens = tokens
        self._sealer = sealer
        self._probe = probe
        self._hosts = hosts
        self._random = random

    async def create(self, caller: Caller, mutation: Mutation[Provider], provider: Provider) -> Provider | Replay:
        """Create a provider."""
        caller.require_account(provider.account)
        names.check_id(provider.provider, "provider_id")
        uid = uuid.UUID(bytes=self._random(16), version=4)
        wanted = self._sealed(self._checked(replace(provider, meta=Meta(uid=str(uid)))))

        async def action(work: Work) -> Provider:
            if wanted.account is not None:
                await work.accounts.lock(wanted.account)
            await work.providers.insert(wanted)
            # Suspensions of a former provider of this name do not speak of this one.
            await work.bundles.lift(_name(wanted))
            return await self._changed(work, wanted)

        return await mutate(self._database, caller, mutation, action)

    async def get(self, caller: Caller, account: str | None, provider: str) -> Provider:
        """Return one provider; a shared one without its login for those who are no operators."""
        if account is not None:
            caller.require_account(account)
        async with self._database.transaction(scope_of(caller)) as work:
            return _shown(caller, await work.providers.get(account, provider))

    async def list_page(
        self, caller: Caller, account: str | None, page_size: int, page_token: str
    ) -> tuple[list[Provider], str]:
        """Return a page in order of name, and the token of the next."""
        if account is not None:
            caller.require_account(account)
        size, arguments = coerce_page_size(page_size), ["ListProviders", account or ""]
        after = self._tokens.open(page_token, arguments)
        async with self._database.transaction(scope_of(caller)) as work:
            found = await work.providers.list_page(account, after[0] if after else "", size + 1)
        more = self._tokens.seal([found[size - 1].provider], arguments) if len(found) > size else ""
        return [_shown(caller, one) for one in found[:size]], more

    async def update(
        self, caller: Caller, mutation: Mutation[Provider], sent: Provider, patch: Patch
    ) -> Provider | Replay:
        """Change the fields of the mask; a password that was not sent stays."""
        caller.require_account(sent.account)
        etag = parse_etag(patch.etag, "provider.etag")

        async def action(work: Work) -> Provider:
            stored = await self._lock(work, sent.account, sent.provider)
            merged = self._checked(merge(stored, sent, patch.mask, patch.populated, PROVIDER_FIELDS))
            keeps = not merged.smtp.password and _PASSWORD_PATH not in patch.mask and merged.smtp.username
            kept = stored.smtp.password_sealed if keeps else None
            wanted = self._sealed(replace(merged, smtp=replace(merged.smtp, password_sealed=kept)))
            await work.providers.update(wanted, etag)
            return await self._changed(work, wanted)

        return await mutate(self._database, caller, mutation, action)

    async def delete(
        self,
        caller: Caller,
        mutation: Mutation[None],
        account: str | None,
        provider: str,
        etag_text: str,
        *,
        allow_missing: bool,
    ) -> Replay | None:
        """Delete a provider that no rule names."""
        caller.require_account(account)
        etag = parse_etag(etag_text)

        async def action(work: Work) -> None:
            try:
                stored = await self._lock(work, account, provider)
            except NotFoundError:
                if allow_missing:
                    return
                raise
            await work.providers.delete(stored, etag)
            await work.bundles.lift(_name(stored))
            await self._compile(work, stored)

        return await mutate(self._database, caller, mutation, action)

    async def suspend(
        self, caller: Caller, mutation: Mutation[Provider], account: str | None, provider: str, reason: str
    ) -> Provider | Replay:
        """Stop deliveries through the provider; again changes the reason only."""
        caller.require_account(account)
        check_reason(reason)

        async def action(work: Work) -> Provider:
            stored = await self._lock(work, account, provider)
            await work.providers.set_state(replace(stored, state=ProviderState.SUSPENDED, suspend_reason=reason))
            if stored.state is not ProviderState.SUSPENDED:
                await work.bundles.deny(_name(stored), DENIAL_PROVIDER, account, None)
            return await work.providers.get(account, provider)

        return await mutate(self._database, caller, mutation, action)

    async def resume(
        self, caller: Caller, mutation: Mutation[Provider], account: str | None, provider: str
    ) -> Provider | Replay:
        """Lift a suspension; an active provider is left alone."""
        caller.require_account(account)

        async def action(work: Work) -> Provider:
            stored = await self._lock(work, account, provider)
            if stored.state is ProviderState.ACTIVE:
                return stored
            await work.providers.set_state(replace(stored, state=ProviderState.ACTIVE, suspend_reason=""))
            await work.bundles.lift(_name(stored))
            return await work.providers.get(account, provider)

        return await mutate(self._database, caller, mutation, action)

    async def verify(self, caller: Caller, account: str | None, provider: str) -> ProbeResult:
        """Look at the provider's first endpoint as the control plane; changes nothing."""
        caller.require_account(account)
        async with self._database.transaction(scope_of(caller)) as work:
            stored = await work.providers.get(account, provider)
        if stored.state is ProviderState.SUSPENDED:
            name = _name(stored)
            raise FailedPreconditionError(Reason.PROVIDER_SUSPENDED, f"{name} is suspended", subject=name)
        return await self._probe.probe(stored, self._password(stored))

    async def _lock(self, work: Work, account: str | None, provider: str) -> Provider:
        if account is None:
            await work.nodes.lock_pools()
        else:
            await work.accounts.lock(account)
        return await work.providers.get(account, provider)

    async def _changed(self, work: Work, provider: Provider) -> Provider:
        await self._compile(work, provider)
        return await work.providers.get(provider.account, provider.provider)

    async def _compile(self, work: Work, provider: Provider) -> None:
        if provider.account is None:
            await self._compiler.shared_providers(work)
        else:
            account = await work.accounts.get(provider.account)
            await self._compiler.account(work, account, Edited(f'providers["{_name(provider)}"]', "provider"))

    def _checked(self, provider: Provider) -> Provider:
        """Fill in defaults; refuse hosts that must not be connected to. The rest is for the compiler."""
        check_display_name(provider.display_name, "provider.display_name")
        smtp = provider.smtp
        problems = [(index, self._hosts.problem(one.host)) for index, one in enumerate(smtp.endpoints)]
        violations = [Violation(f"provider.smtp.endpoints[{n}].host", text) for n, text in problems if text]
        if smtp.password and not smtp.username:
            violations.append(Violation("provider.smtp.password", "must be set together with a username"))
        if "\0" in smtp.password or len(smtp.password.encode()) > _PASSWORD_LIMIT:
            text = f"must be at most {_PASSWORD_LIMIT} bytes, without NUL"
            violations.append(Violation("provider.smtp.password", text))
        if violations:
            raise InvalidArgumentError(violations)
        return replace(provider, smtp=_with_defaults(smtp))

    def _sealed(self, provider: Provider) -> Provider:
        """Put the password that was sent, if any, where it is stored."""
        smtp = provider.smtp
        if not smtp.password:
            return _valid(provider)
        table, column = PASSWORD_PLACE
        place = (provider.account or "", table, provider.meta.uid, column)
        sealed = self._sealer.seal(smtp.password.encode(), *place)
        return _valid(replace(provider, smtp=replace(smtp, password="", password_sealed=sealed)))

    def _password(self, provider: Provider) -> str:
        if provider.smtp.password_sealed is None:
            return ""
        table, column = PASSWORD_PLACE
        place = (provider.account or "", table, provider.meta.uid, column)
        return self._sealer.unseal(provider.smtp.password_sealed, *place).decode()


def _valid(provider: Provider) -> Provider:
    """Return the provider; InvalidArgumentError when a node would refuse it."""
    sealed = None if provider.smtp.password_sealed is None else _SOME_PASSWORD
    refuse(validate_provider(provider_config(provider, sealed)), Edited("", "provider"))
    return provider


def _with_defaults(smtp: SmtpSettings) -> SmtpSettings:
    endpoints = tuple(
        replace(one, port=one.port or (_SUBMISSIONS_PORT if one.implicit_tls else _SUBMISSION_PORT))
        for one in smtp.endpoints
    )
    usual = TlsPolicy.REQUIRED_VERIFIED if smtp.username else TlsPolicy.OPPORTUNISTIC
    return replace(
        smtp,
        endpoints=endpoints,
        tls_policy=smtp.tls_policy or usual,
        max_connections=smtp.max_connections or SmtpSettings().max_connections,
        max_messages_per_connection=smtp.max_messages_per_connection or SmtpSettings().max_messages_per_connection,
    )


def _name(provider: Provider) -> str:
    return names.provider_name(provider.account, provider.provider)


def _shown(caller: Caller, provider: Provider) -> Provider:
    if provider.account is not None or caller.is_operator:
        return provider
    return replace(provider, smtp=replace(provider.smtp, username="", password_sealed=None))
