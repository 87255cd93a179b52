"""API keys and SMTP credentials.

Contract. Implement `controlplane.ports.ApiKeys` and `SmtpCredentials`. Only hashes and verifiers are stored. To
`find_api_key`, and in a transaction of `Database.authentication`, row-level security shows the one key whose readable
part is presented.
"""

from __future__ import annotations

from datetime import datetime, timedelta

import asyncpg

from controlplane.adapters.postgres.rows import meta_of, rows_changed
from controlplane.adapters.postgres.session import Session
from controlplane.domain import names
from controlplane.domain.errors import NotFoundError
from controlplane.domain.etags import Etag
from controlplane.domain.resources import ApiKey, SmtpCredential
from controlplane.domain.secrets import ScramVerifier
from controlplane.ports import AuthenticatedKey

_USE_STEP = timedelta(minutes=1)
_KEY_MATCHES = "account IS NOT DISTINCT FROM $1 AND api_key = $2 AND left(uid::text, 8) = $3 AND version = $4"
_CREDENTIAL_MATCHES = "account = $1 AND smtp_credential = $2 AND left(uid::text, 8) = $3 AND version = $4"


async def find_api_key(session: Session, lookup: str) -> AuthenticatedKey | None:
    """As `controlplane.ports.Database.find_api_key`; outside of a transaction."""
    row = await session.row("api_key_find", "SELECT * FROM postroad.find_api_key($1)", lookup)
    return None if row is None else AuthenticatedKey(_api_key(row), row["secret_sha256"])


class ApiKeysRepository:
    """`controlplane.ports.ApiKeys`."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def mark_use(self, lookup: str, time: datetime) -> None:
        """As the port says."""
        await self._session.run(
            "api_key_mark_use",
            """
            UPDATE postroad.api_keys SET last_use_time = $2
            WHERE lookup = $1 AND (last_use_time IS NULL OR last_use_time <= $3)
            """,
            *(lookup, time, time - _USE_STEP),
        )

    async def get(self, account: str | None, api_key: str) -> ApiKey:
        """As the port says."""
        row = await self._session.row(
            "api_key_get",
            "SELECT * FROM postroad.api_keys WHERE account IS NOT DISTINCT FROM $1 AND api_key = $2",
            *(account, api_key),
        )
        if row is None:
            raise NotFoundError(names.api_key_name(account, api_key))
        return _api_key(row)

    async def list_page(self, account: str | None, after: str, limit: int) -> list[ApiKey]:
        """As the port says."""
        rows = await self._session.rows(
            "api_key_list",
            """
            SELECT * FROM postroad.api_keys WHERE account IS NOT DISTINCT FROM $1 AND api_key > $2
            ORDER BY api_key LIMIT $3
            """,
            *(account, after, limit),
        )
        return [_api_key(row) for row in rows]

    async def insert(self, key: ApiKey, sha256: bytes) -> None:
        """As the port says."""
        self._session.subject = names.api_key_name(key.account, key.api_key)
        await self._session.run(
            "api_key_insert",
            """
            INSERT INTO postroad.api_keys (account, api_key, display_name, scopes, lookup, secret_sha256, expire_time)
            VALUES ($1, $2, $3, $4, $5, $6, $7)
            """,
            *(key.account, key.api_key, key.display_name, list(key.scopes), key.lookup, sha256, key.expire_time),
        )

    async def replace_secret(self, key: ApiKey, lookup: str, sha256: bytes, etag: Etag) -> None:
        """As the port says."""
        await rows_changed(
            self._session,
            "api_key_rotate",
            f"UPDATE postroad.api_keys SET lookup = $5, secret_sha256 = $6 WHERE {_KEY_MATCHES} RETURNING 1",
            *(key.account, key.api_key, *etag, lookup, sha256),
        )

    async def revoke(self, key: ApiKey, etag: Etag) -> None:
        """As the port says."""
        await rows_changed(
            self._session,
            "api_key_revoke",
            f"UPDATE postroad.api_keys SET revoke_time = transaction_timestamp() WHERE {_KEY_MATCHES} RETURNING 1",
            *(key.account, key.api_key, *etag),
        )

    async def delete(self, key: ApiKey, etag: Etag) -> None:
        """As the port says."""
        await rows_changed(
            self._session,
            "api_key_delete",
            f"DELETE FROM postroad.api_keys WHERE {_KEY_MATCHES} RETURNING 1",
            *(key.account, key.api_key, *etag),
        )

    async def lock_operator_keys(self) -> int:
        """As the port says."""
        await self._session.run(
            "operator_keys_lock", "SELECT pg_advisory_xact_lock(hashtextextended('postroad.operator_keys', 0))"
        )
        count: int = await self._session.value(
            "operator_keys_count",
            """
            SELECT count(*) FROM postroad.api_keys
            WHERE account IS NULL AND revoke_time IS NULL
                AND (expire_time IS NULL OR expire_time > transaction_timestamp())
            """,
        )
        return count


class SmtpCredentialsRepository:
    """`controlplane.ports.SmtpCredentials`."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def get(self, account: str, smtp_credential: str) -> SmtpCredential:
        """As the port says."""
        row = await self._session.row(
            "smtp_credential_get",
            "SELECT * FROM postroad.smtp_credentials WHERE account = $1 AND smtp_credential = $2",
            *(account, smtp_credential),
        )
        if row is None:
            raise NotFoundError(names.format_name(names.SMTP_CREDENTIAL, account, smtp_credential))
        return _smtp_credential(row)

    async def list_page(self, account: str, after: str, limit: int) -> list[SmtpCredential]:
        """As the port says."""
        rows = await self._session.rows(
            "smtp_credential_list",
            """
            SELECT * FROM postroad.smtp_credentials WHERE account = $1 AND smtp_credential > $2
            ORDER BY smtp_credential LIMIT $3
            """,
            *(account, after, limit),
        )
        return [_smtp_credential(row) for row in rows]

    async def list_good(self, account: str) -> list[SmtpCredential]:
        """As the port says."""
        rows = await self._session.rows(
            "smtp_credential_list_good",
            """
            SELECT * FROM postroad.smtp_credentials WHERE account = $1 AND revoke_time IS NULL ORDER BY smtp_credential
            """,
            account,
        )
        return [_smtp_credential(row) for row in rows]

    async def insert(self, credential: SmtpCredential, verifier: ScramVerifier) -> None:
        """As the port says."""
        self._session.subject = names.format_name(names.SMTP_CREDENTIAL, credential.account, credential.smtp_credential)
        await self._session.run(
            "smtp_credential_insert",
            """
            INSERT INTO postroad.smtp_credentials (
                account, smtp_credential, display_name, expire_time, secret_sha256,
                scram_salt, scram_iterations, scram_stored_key, scram_server_key
            )
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
            """,
            *(credential.account, credential.smtp_credential, credential.display_name, credential.expire_time),
            *(credential.secret_sha256, *verifier),
        )

    async def replace_secret(self, credential: SmtpCredential, verifier: ScramVerifier, etag: Etag) -> None:
        """As the port says."""
        await rows_changed(
            self._session,
            "smtp_credential_rotate",
            f"""
            UPDATE postroad.smtp_credentials
            SET secret_sha256 = $5, scram_salt = $6, scram_iterations = $7, scram_stored_key = $8, scram_server_key = $9
            WHERE {_CREDENTIAL_MATCHES} RETURNING 1
            """,
            *(credential.account, credential.smtp_credential, *etag, credential.secret_sha256, *verifier),
        )

    async def revoke(self, credential: SmtpCredential, etag: Etag) -> None:
        """As the port says."""
        await rows_changed(
            self._session,
            "smtp_credential_revoke",
            f"""
            UPDATE postroad.smtp_credentials SET revoke_time = transaction_timestamp()
            WHERE {_CREDENTIAL_MATCHES} RETURNING 1
            """,
            *(credential.account, credential.smtp_credential, *etag),
        )

    async def set_suspension(self, credential: SmtpCredential, *, suspended: bool, reason: str) -> None:
        """As the port says."""
        await self._session.run(
            "smtp_credential_suspend",
            """
            UPDATE postroad.smtp_credentials
            SET suspend_time = CASE WHEN $3 THEN coalesce(suspend_time, transaction_timestamp()) END,
                suspend_reason = $4
            WHERE account = $1 AND smtp_credential = $2
            """,
            *(credential.account, credential.smtp_credential, suspended, reason),
        )

    async def count_suspended(self, account: str) -> int:
        """As the port says."""
        count: int = await self._session.value(
            "smtp_credentials_suspended",
            "SELECT count(*) FROM postroad.smtp_credentials WHERE account = $1 AND suspend_time IS NOT NULL",
            account,
        )
        return count

    async def delete(self, credential: SmtpCredential, etag: Etag) -> None:
        """As the port says."""
        await rows_changed(
            self._session,
            "smtp_credential_delete",
            f"DELETE FROM postroad.smtp_credentials WHERE {_CREDENTIAL_MATCHES} RETURNING 1",
            *(credential.account, credential.smtp_credential, *etag),
        )


def _api_key(row: asyncpg.Record) -> ApiKey:
    return ApiKey(
        account=row["account"],
        api_key=row["api_key"],
        display_name=row["display_name"],
        scopes=tuple(row["scopes"]),
        lookup=row["lookup"],
        expire_time=row["expire_time"],
        revoke_time=row["revoke_time"],
        last_use_time=row["last_use_time"],
        meta=meta_of(row),
    )


def _smtp_credential(row: asyncpg.Record) -> SmtpCredential:
    return SmtpCredential(
        account=row["account"],
        smtp_credential=row["smtp_credential"],
        display_name=row["display_name"],
        secret_sha256=row["secret_sha256"],
        expire_time=row["expire_time"],
        revoke_time=row["revoke_time"],
        suspend_time=row["suspend_time"],
        suspend_reason=row["suspend_reason"],
        meta=meta_of(row),
    )
