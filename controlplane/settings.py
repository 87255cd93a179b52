"""The control plane's settings: one frozen object, from `controlplane.yaml` and the environment.

Contract. `load_settings(path)` looks at `path`, else `$POSTROAD_CONFIG` (a file, or a folder with
`controlplane.yaml` in it), else `./controlplane.yaml`, else `/etc/postroad/controlplane.yaml`; none of the
last two need exist. Environment variables `POSTROAD_CONTROLPLANE_…` win over the file, `__` nests. Keys and
variables that mean nothing are errors: every failure is a `SettingsError` whose text says what to mend.
`redacted` is what may be shown to people. docs/settings.md documents each.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import parse_qs, urlsplit

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

FILE_NAME = "controlplane.yaml"
ENVIRONMENT_PREFIX = "POSTROAD_CONTROLPLANE_"
SYSTEM_FOLDER = Path("/etc/postroad")

_HOST_NAME = r"^[A-Za-z0-9._-]{0,253}$"

Port = Annotated[int, Field(ge=0, le=65_535)]


class SettingsError(Exception):
    """The settings cannot be used; the text says where and why."""


def _without_password(dsn: SecretStr) -> str:
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", dsn.get_secret_value())


_REDIS_OPTIONS = frozenset({"db"})
_REDIS_TLS_OPTIONS = frozenset({"ssl_ca_certs", "ssl_ca_path", "ssl_cert_reqs", "ssl_certfile", "ssl_keyfile"})


def _check_redis_url(url: str) -> None:
    """ValueError for what redis-py cannot use, or would take for something else; its text holds nothing of the URL,
    whose parts may be the end of a password.
    """
    try:
        parts = urlsplit(url)
        _ = parts.hostname, parts.port
        options = parse_qs(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        raise ValueError(
            "url cannot be read: its port is no number, an option no NAME=VALUE, or a password not percent-encoded"
        ) from None
    if parts.scheme not in {"redis", "rediss", "unix"} or not url.lower().startswith(f"{parts.scheme}://"):
        raise ValueError("url is no redis://, rediss:// or unix:// URL")
    if parts.fragment:
        raise ValueError("url has a #; a password in it must be percent-encoded")
    if parts.scheme == "unix" and not parts.path.strip("/"):
        raise ValueError("url names no socket: write it as unix:///path/of/the.sock")
    if parts.scheme != "unix" and not re.fullmatch(r"/?|/[0-9]{1,9}", parts.path):
        raise ValueError("url has no number as database behind its host; a password in it must be percent-encoded")
    known = _REDIS_OPTIONS | (_REDIS_TLS_OPTIONS if parts.scheme == "rediss" else frozenset())
    if set(options) - known:
        raise ValueError(f"url has options other than {', '.join(sorted(known))}")
    if not re.fullmatch(r"[0-9]{1,9}", options.get("db", ["0"])[0]):
        raise ValueError("url has no number as db")
    if options.get("ssl_cert_reqs", ["required"])[0] not in {"none", "optional", "required"}:
        raise ValueError("url has no none, optional or required as ssl_cert_reqs")


Dsn = Annotated[SecretStr, PlainSerializer(_without_password, return_type=str)]


class _Section(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)


class DatabaseSettings(_Section):
    """Where PostgreSQL is, once for each role."""

    api_dsn: Dsn
    fleet_dsn: Dsn
    # Only `migrate` uses it: a serving process need not know it.
    owner_dsn: Dsn | None = None
    api_connections: Annotated[int, Field(ge=1, le=500)] = 10
    fleet_connections: Annotated[int, Field(ge=1, le=500)] = 6
    acquire_timeout_s: Annotated[float, Field(gt=0)] = 5.0
    statement_timeout_s: Annotated[float, Field(gt=0)] = 15.0

    @model_validator(mode="after")
    def _check_urls(self) -> DatabaseSettings:
        for name in ("api_dsn", "fleet_dsn", "owner_dsn"):
            dsn: SecretStr | None = getattr(self, name)
            if dsn is not None and urlsplit(dsn.get_secret_value()).scheme not in {"postgresql", "postgres"}:
                raise ValueError(f"{name} is no postgresql:// URL")
        return self


class GrpcSettings(_Section):
    """The public port: API keys over TLS. Files default to those in `pki_dir`."""

    host: str = "127.0.0.1"
    port: Port = 7443
    certificate_file: Path | None = None
    key_file: Path | None = None


class NodesSettings(_Section):
    """The nodes' port: mutual TLS. Its certificate is the built-in CA's, from `pki_dir`."""

    host: str = "127.0.0.1"
    port: Port = 7444
    max_streams: Annotated[int, Field(ge=1)] = 2_000


class HttpSettings(_Section):
    """Probes, metrics and the JSON form of the API: plain HTTP unless both files are set."""

    host: str = "127.0.0.1"
    port: Port = 7480
    certificate_file: Path | None = None
    key_file: Path | None = None

    @model_validator(mode="after")
    def _both_files_or_none(self) -> HttpSettings:
        if (self.certificate_file is None) != (self.key_file is None):
            raise ValueError("certificate_file and key_file go together")
        return self


class RedisSettings(_Section):
    """Where Redis or Valkey is, which the nodes share; without a URL limits show no live state."""

    url: Dsn | None = None

    @model_validator(mode="after")
    def _check_url(self) -> RedisSettings:
        if self.url is not None:
            _check_redis_url(self.url.get_secret_value())
        return self


class ApiSettings(_Section):
    """What callers of the API may do."""

    requests_per_minute: Annotated[int, Field(ge=0, le=1_000_000)] = 100


class AuditSettings(_Section):
    """How often the ledger is compared with each spool."""

    interval_s: Annotated[float, Field(ge=0.05, le=86_400)] = 20.0


class RetentionSettings(_Section):
    """How long the record of mail is kept."""

    messages_days: Annotated[int, Field(ge=1, le=3_650)] = 30


class Settings(BaseSettings):
    """All of them; see the module for where they come from."""

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True
    )

    database: DatabaseSettings
    pki_dir: Path
    keyring_dir: Path
    grpc: GrpcSettings = GrpcSettings()
    nodes: NodesSettings = NodesSettings()
    http: HttpSettings = HttpSettings()
    api: ApiSettings = ApiSettings()
    redis: RedisSettings = RedisSettings()
    retention: RetentionSettings = RetentionSettings()
    audit: AuditSettings = AuditSettings()
    # What `Received` and made-up Message-IDs of mail sent by API name; empty: the system's name.
    hostname: Annotated[str, Field(pattern=_HOST_NAME)] = ""
    allowed_private_networks: tuple[IPv4Network | IPv6Network, ...] = ()
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    stop_timeout_s: Annotated[float, Field(gt=0, le=300)] = 8.0

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment before the file, which arrives as arguments; nothing else."""
        del settings_cls, dotenv_settings, file_secret_settings
        return env_settings, init_settings


def load_settings(path: Path | None = None) -> Settings:
    """The settings in force; SettingsError when there are none or they are wrong."""
    file = _find_file(path)
    values = {} if file is None else _read_file(file)
    unknown = sorted(set(_unknown_variables(os.environ)))
    if unknown:
        raise SettingsError(f"environment: no such setting: {', '.join(unknown)}")
    try:
        return Settings(**values)
    except ValidationError as error:
        raise SettingsError(_explain(error, file)) from None


def host_name(text: str) -> str:
    """The system's name, if a header field can name it."""
    return text if text and re.fullmatch(_HOST_NAME, text) else "localhost"


def redacted(settings: Settings) -> str:
    """The effective settings as YAML, without passwords."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


def setting_names() -> list[str]:
    """Every setting there is, as `section.key`."""
    return sorted(_names(Settings, ""))


def _find_file(path: Path | None) -> Path | None:
    if path is not None:
        return _existing(path, "--config")
    named = os.environ.get("POSTROAD_CONFIG")
    if named:
        return _existing(Path(named), "$POSTROAD_CONFIG")
    for folder in (Path(), SYSTEM_FOLDER):
        if (folder / FILE_NAME).is_file():
            return folder / FILE_NAME
    return None


def _existing(path: Path, source: str) -> Path:
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise SettingsError(f"{source}: there is no file {file}")
    return file


def _read_file(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{file}: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise SettingsError(f"{file}: this is no YAML mapping of settings")
    return values


def _unknown_variables(environment: Mapping[str, str]) -> Iterator[str]:
    # pydantic-settings passes over variables of the first level that it does not know.
    known = {ENVIRONMENT_PREFIX + name.replace(".", "__").upper() for name in setting_names()}
    nested = [name for name in setting_names() if "." in name]
    sections = {ENVIRONMENT_PREFIX + name.partition(".")[0].upper() for name in nested}
    for name in environment:
        if name.upper().startswith(ENVIRONMENT_PREFIX) and name.upper() not in known | sections:
            yield name


def _names(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _names(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def _explain(error: ValidationError, file: Path | None) -> str:
    # Without the offending input: it may be a password.
    problems = [
        f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
        for problem in error.errors(include_input=False, include_url=False)
    ]
    origin = f"no {FILE_NAME} found, and the environment is not enough" if file is None else str(file)
    return f"{origin}: " + "; ".join(problems)
