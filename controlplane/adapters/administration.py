"""What operators do beside serving: migrations, the first key, the CA.

Contract. Each function does one command and returns what to print, line by line; it raises `AdministrationError` with
a text that says what to do, or what the part it calls raises. None of them runs beside a loop: each starts one where
it needs one.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
from cryptography.hazmat.primitives import hashes
from pydantic import SecretStr

from controlplane.adapters.grpc.api import ApiParts, build_api
from controlplane.adapters.pki import (
    PkiError,
    create_authority,
    load_authority,
    read_certificate,
    write_private,
)
from controlplane.adapters.postgres import migrate
from controlplane.adapters.postgres.database import PostgresDatabase, open_api_pool
from controlplane.adapters.postgres.fleet_database import CONNECTION_ERRORS, FleetDatabase, open_pool
from controlplane.adapters.postgres.leader import PostgresJobs
from controlplane.adapters.postgres.signal import PostgresLedgerSignal
from controlplane.adapters.sealing import Keyring, KeyringError
from controlplane.domain.errors import ControlPlaneError
from controlplane.domain.hosts import HostPolicy
from controlplane.services.bootstrap import AlreadyBootstrappedError, bootstrap
from controlplane.settings import DatabaseSettings, Settings

Answer = TypeVar("Answer")

SERVER_CERTIFICATE, SERVER_KEY = "server.pem", "server.key"


class AdministrationError(Exception):
    """A command cannot be done; the text says why and what to do."""


# --- migrations ----------------------------------------------------------------------------------------------------


def migrate_up(settings: Settings) -> list[str]:
    """Apply what is missing."""
    names = _run(migrate.migrate_up(_owner_dsn(settings)))
    return [f"applied {name}" for name in names] or ["nothing to do"]


def migrate_down(settings: Settings, to: int) -> list[str]:
    """Undo everything above number `to`."""
    names = _run(migrate.migrate_down(_owner_dsn(settings), to=to))
    return [f"undone {name}" for name in names] or ["nothing to do"]


def migrate_status(settings: Settings) -> list[str]:
    """Every migration, applied or not."""
    rows = _run(migrate.migration_status(_owner_dsn(settings)))
    return [f"{'applied' if applied else 'missing':8} {one.name}" for one, applied in rows]


def migrate_verify(settings: Settings) -> list[str]:
    """Say that code and database fit together, or raise."""
    problems = _run(migrate.verify(_owner_dsn(settings)))
    if problems:
        raise AdministrationError("; ".join(problems))
    return ["code and database fit together"]


# --- the first key -------------------------------------------------------------------------------------------------


def make_first_key(settings: Settings) -> list[str]:
    """Make the keyring, the default pool, the partitions and the first operator's key; the key, once."""
    return [_run(_bootstrap(settings))]


async def _bootstrap(settings: Settings) -> str:
    keyring = Keyring.load_or_create(settings.keyring_dir)
    dsn = settings.database.fleet_dsn.get_secret_value()
    fleet_pool = await open_pool(dsn, 1)
    api_pool = await open_api_pool(settings.database.api_dsn.get_secret_value(), connections=1)
    try:
        problems = await _schema_problems(settings.database)
        if problems:
            raise AdministrationError("; ".join(problems))
        await PostgresJobs(FleetDatabase(fleet_pool)).ensure_partitions(_yesterday(), 5)
        database = PostgresDatabase(api_pool)
        signal = PostgresLedgerSignal(lambda: asyncpg.connect(dsn))
        api = build_api(ApiParts(database, keyring, signal, HostPolicy(settings.allowed_private_networks)))
        return await bootstrap(database, api.pools, os.urandom)
    finally:
        api_pool.terminate()
        fleet_pool.terminate()


async def _schema_problems(database: DatabaseSettings) -> list[str]:
    return await migrate.verify(database.fleet_dsn.get_secret_value())


def _yesterday() -> date:
    return (datetime.now(UTC) - timedelta(days=1)).date()


# --- the CA --------------------------------------------------------------------------------------------------------


def pki_init(settings: Settings) -> list[str]:
    """Make the CA."""
    create_authority(settings.pki_dir, datetime.now(UTC))
    return [f"made {settings.pki_dir / 'ca.pem'}; keep {settings.pki_dir / 'ca.key'} safe"]


def pki_issue_server(
    settings: Settings, names: list[str], certificate: Path | None = None, key: Path | None = None
) -> list[str]:
    """Issue a server certificate; the ports' own unless other files are named."""
    certificate = certificate or settings.pki_dir / SERVER_CERTIFICATE
    key = key or settings.pki_dir / SERVER_KEY
    chain_pem, key_pem = load_authority(settings.pki_dir).issue_server(names, datetime.now(UTC))
    # A server that reads between the two finds a key that does not fit, keeps what it has and looks again.
    write_private(key, key_pem)
    write_private(certificate, chain_pem, mode=0o644)
    return [f"made {certificate} for {', '.join(names)}"]


def pki_show(settings: Settings) -> list[str]:
    """What the CA and the ports' certificate are."""
    lines = []
    for file in (settings.pki_dir / "ca.pem", settings.pki_dir / SERVER_CERTIFICATE):
        if not file.exists():
            lines.append(f"{file}: missing")
            continue
        certificate = read_certificate(file)
        fingerprint = certificate.fingerprint(hashes.SHA256()).hex()
        lines.append(f"{file}: {certificate.subject.rfc4514_string()}")
        lines.append(f"  good until {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, SHA-256 {fingerprint}")
    return lines


# --- what they share -----------------------------------------------------------------------------------------------


def _owner_dsn(settings: Settings) -> str:
    dsn: SecretStr | None = settings.database.owner_dsn
    if dsn is None:
        raise AdministrationError("set database.owner_dsn: migrations run as postroad_owner")
    return dsn.get_secret_value()


def _run(work: Coroutine[Any, Any, Answer]) -> Answer:
    """Run on a loop of its own, with what goes wrong in words."""
    try:
        return asyncio.run(work)
    except AlreadyBootstrappedError as error:
        raise AdministrationError(f"{error}: make further keys with it, or reset it in the database") from error
    except (migrate.MigrationError, KeyringError, PkiError, ControlPlaneError) as error:
        raise AdministrationError(str(error)) from error
    except CONNECTION_ERRORS as error:
        raise AdministrationError(f"the database: {str(error) or type(error).__name__}") from error
