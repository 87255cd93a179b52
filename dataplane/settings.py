"""The node's settings: one frozen object, from `node.yaml` and the environment.

Contract. `load_settings(path)` looks at `path`, else `$POSTROAD_CONFIG` (a file, or a folder with `node.yaml`
in it), else `./node.yaml`, else `/etc/postroad/node.yaml`; neither of the last two need exist. Environment
variables `POSTROAD_NODE_…` win over the file, `__` nests. Keys and variables that mean nothing are errors:
every failure is a `SettingsError` whose text says what to mend. Relative paths are made absolute against the
file's folder (the current one without a file), because the processes of a node work in its data directory.
`redacted` is what may be shown to people. docs/settings-node.md documents each.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Network, IPv6Network, ip_address
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args
from urllib.parse import parse_qs, urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    SecretStr,
    SerializationInfo,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

FILE_NAME = "node.yaml"
ENVIRONMENT_PREFIX = "POSTROAD_NODE_"
SYSTEM_FOLDER = Path("/etc/postroad")


class SettingsError(Exception):
    """The settings cannot be used; the text says where and why."""


# The context of a dump that is not for people: secrets stand in it.
SECRETS_SHOWN: dict[str, bool] = {"secrets": True}


def _without_password(url: SecretStr, info: SerializationInfo) -> str:
    text = url.get_secret_value()
    return text if info.context == SECRETS_SHOWN else re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", text)


def _hidden(secret: SecretStr, info: SerializationInfo) -> str:
    return secret.get_secret_value() if info.context == SECRETS_SHOWN else "***"


def _is_address(text: str) -> str:
    ip_address(text)
    return text


def _has_port(text: str) -> str:
    host, separator, port = text.rpartition(":")
    if not separator or not host.strip("[]") or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise ValueError("write it as host:port")
    return text


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


Port = Annotated[int, Field(ge=0, le=65_535)]
Address = Annotated[str, AfterValidator(_is_address)]
HostAndPort = Annotated[str, AfterValidator(_has_port)]
Seconds = Annotated[float, Field(gt=0)]
Url = Annotated[SecretStr, PlainSerializer(_without_password, return_type=str)]


class _Section(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)


class ControlPlaneSettings(_Section):
    """Where the control plane is: its node port for the streams, its public port for enrolment."""

    address: HostAndPort = "127.0.0.1:7444"
    enroll_address: HostAndPort = "127.0.0.1:7443"
    # Verifies the public port at enrolment; from then on the CA that came with the certificate counts.
    ca_file: Path | None = None


class ListenerSettings(_Section):
    """A port for submission: STARTTLS, TLS from the first byte, or plain for networks bound to an account."""

    address: Address = "127.0.0.1"
    port: Port
    mode: Literal["starttls", "tls", "plain"]


class TlsSettings(_Section):
    """Certificate chain and key of the listeners, PEM."""

    certificate_file: Path
    key_file: Path


class RedisSettings(_Section):
    """Where the token buckets are; without, each worker's local share of a limit decides."""

    url: Url

    @model_validator(mode="after")
    def _check_url(self) -> RedisSettings:
        _check_redis_url(self.url.get_secret_value())
        return self


class DeliverySettings(_Section):
    """Sending."""

    allowed_private_networks: tuple[IPv4Network | IPv6Network, ...] = ()
    handover_bytes: Annotated[int, Field(ge=1)] = 64 * 1024 * 1024


class MetricsSettings(_Section):
    """Where `/metrics`, `/healthz` and `/readyz` are served."""

    address: Address = "127.0.0.1"
    port: Port = 7481


class IngressSettings(_Section):
    """Bounds of submission on this node."""

    connections_per_address: Annotated[int, Field(ge=1)] = 50
    connections: Annotated[int, Field(ge=1)] = 10_000
    content_bytes: Annotated[int, Field(ge=1024 * 1024)] = 256 * 1024 * 1024
    # Above what is looked at of a header, or a content would go to its file before its header is known.
    spill_bytes: Annotated[int, Field(ge=264 * 1024)] = 512 * 1024
    delay_bytes: Annotated[int, Field(ge=1024 * 1024)] = 128 * 1024 * 1024
    answer_delay_s: Seconds = 5.0
    command_timeout_s: Seconds = 300.0
    command_before_auth_timeout_s: Seconds = 30.0
    handshake_timeout_s: Seconds = 30.0
    commit_timeout_s: Seconds = 30.0
    data_bytes_per_s: Annotated[int, Field(ge=1)] = 500


class Settings(BaseSettings):
    """All of them; see the module for where they come from."""

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True
    )

    data_dir: Path
    hostname: Annotated[str, Field(pattern=r"^[A-Za-z0-9.-]{1,253}$", default_factory=socket.getfqdn)]
    # 0: one for each core that the node may use.
    workers: Annotated[int, Field(ge=0, le=256)] = 0
    control_plane: ControlPlaneSettings = ControlPlaneSettings()
    listeners: tuple[ListenerSettings, ...] = (ListenerSettings(port=2587, mode="starttls"),)
    tls: TlsSettings | None = None
    redis: RedisSettings | None = None
    ingress: IngressSettings = IngressSettings()
    delivery: DeliverySettings = DeliverySettings()
    metrics: MetricsSettings = MetricsSettings()
    config_max_age_s: Seconds = 7 * 86_400.0
    drain_timeout_s: Annotated[float, Field(gt=0, le=600)] = 30.0
    # Base64 of 32 bytes; wins over the file, which is made when it is missing.
    seal_key: Annotated[SecretStr, PlainSerializer(_hidden, return_type=str)] | None = None
    seal_key_file: Path | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @model_validator(mode="after")
    def _check_listeners(self) -> Settings:
        if not self.listeners:
            raise ValueError("listeners: name at least one")
        if self.tls is None and any(listener.mode != "plain" for listener in self.listeners):
            raise ValueError("tls: certificate_file and key_file are needed by listeners that are not plain")
        taken = [(listener.address, listener.port) for listener in self.listeners if listener.port]
        if len(set(taken)) < len(taken):
            raise ValueError("listeners: an address and port stand there twice")
        return self

    @model_validator(mode="before")
    @classmethod
    def _make_paths_absolute(cls, values: Any) -> Any:
        folder = values.pop(_FOLDER, None) if isinstance(values, dict) else None
        return values if folder is None else _absolute(cls, values, Path(folder))

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


# Carries the folder that relative paths are meant from through the merge of file and environment.
_FOLDER = "_relative_to"


def load_settings(path: Path | None = None, here: Path | None = None) -> Settings:
    """The settings that stand in file and environment; SettingsError when there are none or they are wrong.

    Relative names of files are meant from `here`, the current folder unless given.
    """
    here = Path.cwd() if here is None else here
    file = _find_file(path, here)
    values = {} if file is None else _read_file(file)
    unknown = sorted(set(_unknown_variables(os.environ)))
    if unknown:
        raise SettingsError(f"environment: no such setting: {', '.join(unknown)}")
    folder = here if file is None else file.parent
    try:
        return Settings(**{**values, _FOLDER: folder})
    except ValidationError as error:
        raise SettingsError(_explain(error, file)) from None


def redacted(settings: Settings) -> str:
    """The effective settings as YAML, without passwords."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


def setting_names() -> list[str]:
    """Every setting there is, as `section.key`."""
    return sorted(_names(Settings, ""))


def _find_file(path: Path | None, here: Path) -> Path | None:
    if path is not None:
        return _existing(here / path, "--config")
    named = os.environ.get("POSTROAD_CONFIG")
    if named:
        return _existing(here / named, "$POSTROAD_CONFIG")
    for folder in (here, SYSTEM_FOLDER):
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
    names = setting_names()
    known = {ENVIRONMENT_PREFIX + name.replace(".", "__").upper() for name in names}
    known |= {ENVIRONMENT_PREFIX + name.partition(".")[0].upper() for name in names}
    for name in environment:
        if name.upper().startswith(ENVIRONMENT_PREFIX) and name.upper() not in known:
            yield name


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)


def _names(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        sections = list(_sections(field.annotation))
        for section in sections:
            yield from _names(section, f"{prefix}{name}.")
        if not sections:
            yield prefix + name


def _absolute(model: type[BaseModel], values: dict[str, Any], folder: Path) -> dict[str, Any]:
    made = dict(values)
    for name, field in model.model_fields.items():
        value = made.get(name)
        sections = list(_sections(field.annotation))
        if sections and isinstance(value, dict):
            made[name] = _absolute(sections[0], value, folder)
        elif isinstance(value, str) and Path in (field.annotation, *get_args(field.annotation)):
            made[name] = str(folder / Path(value).expanduser())
    return made


def _explain(error: ValidationError, file: Path | None) -> str:
    # Without the offending input: it may be a password.
    problems = [
        f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}".removeprefix(": ")
        for problem in error.errors(include_input=False, include_url=False)
    ]
    origin = f"no {FILE_NAME} found, and the environment is not enough" if file is None else str(file)
    return f"{origin}: " + "; ".join(problems)
