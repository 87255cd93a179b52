"""Providers, of accounts and shared.

Contract. Implements `controlplane.ports.Providers`. The password is stored as the sealed bytes that it is given as.
"""

from __future__ import annotations

import json

import asyncpg

from controlplane.adapters.postgres.rows import meta_of, rows_changed
from controlplane.adapters.postgres.session import Session
from controlplane.domain import names
from controlplane.domain.errors import NotFoundError
from controlplane.domain.etags import Etag
from controlplane.domain.resources import Provider, ProviderState, SmtpSettings
from dataplane.core.config import Endpoint, TlsPolicy

_EVERYTHING = 1_000_000


class ProvidersRepository:
    """`controlplane.ports.Providers`."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def get(self, account: str | None, provider: str) -> Provider:
        """As the port says."""
        row = await self._session.row(
            "provider_get",
            "SELECT * FROM postroad.providers WHERE account IS NOT DISTINCT FROM $1 AND provider = $2",
            *(account, provider),
        )
        if row is None:
            raise NotFoundError(names.provider_name(account, provider))
        return _provider(row)

    async def list_page(self, account: str | None, after: str, limit: int) -> list[Provider]:
        """As the port says."""
        rows = await self._session.rows(
            "provider_list",
            """
            SELECT * FROM postroad.providers WHERE account IS NOT DISTINCT FROM $1 AND provider > $2
            ORDER BY provider LIMIT $3
            """,
            *(account, after, limit),
        )
        return [_provider(row) for row in rows]

    async def list_all(self, account: str | None) -> list[Provider]:
        """As the port says."""
        return await self.list_page(account, "", _EVERYTHING)

    async def insert(self, provider: Provider) -> None:
        """As the port says."""
        self._session.subject = names.provider_name(provider.account, provider.provider)
        await self._session.run(
            "provider_insert",
            """
            INSERT INTO postroad.providers (
                uid, account, provider, kind, display_name, endpoints, tls_policy, ca_pem, username, password_sealed,
                max_connections, max_messages_per_connection
            )
            VALUES ($1, $2, $3, 'smtp', $4, $5, $6, $7, $8, $9, $10, $11)
            """,
            *(provider.meta.uid, provider.account, provider.provider, *_values(provider)),
        )

    async def update(self, provider: Provider, etag: Etag) -> None:
        """As the port says."""
        self._session.subject = names.provider_name(provider.account, provider.provider)
        await rows_changed(
            self._session,
            "provider_update",
            """
            UPDATE postroad.providers
            SET display_name = $4, endpoints = $5, tls_policy = $6, ca_pem = $7, username = $8, password_sealed = $9,
                max_connections = $10, max_messages_per_connection = $11
            WHERE uid = $1 AND left(uid::text, 8) = $2 AND version = $3
            RETURNING 1
            """,
            *(provider.meta.uid, *etag, *_values(provider)),
        )

    async def set_state(self, provider: Provider) -> None:
        """As the port says."""
        await self._session.run(
            "provider_set_state",
            "UPDATE postroad.providers SET state = $2, suspend_reason = $3 WHERE uid = $1",
            *(provider.meta.uid, provider.state, provider.suspend_reason),
        )

    async def delete(self, provider: Provider, etag: Etag) -> None:
        """As the port says."""
        self._session.subject = names.provider_name(provider.account, provider.provider)
        await rows_changed(
            self._session,
            "provider_delete",
            """
            DELETE FROM postroad.providers WHERE uid = $1 AND left(uid::text, 8) = $2 AND version = $3 RETURNING 1
            """,
            *(provider.meta.uid, *etag),
        )


def _values(provider: Provider) -> tuple[object, ...]:
    smtp = provider.smtp
    endpoints = [{"host": one.host, "port": one.port, "implicit_tls": one.implicit_tls} for one in smtp.endpoints]
    return (
        *(provider.display_name, json.dumps(endpoints), smtp.tls_policy, smtp.ca_pem, smtp.username),
        *(smtp.password_sealed, smtp.max_connections, smtp.max_messages_per_connection),
    )


def _provider(row: asyncpg.Record) -> Provider:
    return Provider(
        account=row["account"],
        provider=row["provider"],
        display_name=row["display_name"],
        state=ProviderState(row["state"]),
        suspend_reason=row["suspend_reason"],
        smtp=SmtpSettings(
            endpoints=tuple(Endpoint(**one) for one in json.loads(row["endpoints"])),
            tls_policy=TlsPolicy(row["tls_policy"]),
            ca_pem=row["ca_pem"],
            username=row["username"],
            password_sealed=row["password_sealed"],
            max_connections=row["max_connections"],
            max_messages_per_connection=row["max_messages_per_connection"],
        ),
        meta=meta_of(row),
    )
