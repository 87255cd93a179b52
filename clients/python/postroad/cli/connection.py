"""Where the command line finds its server and its key.

Contract. `find_connection` looks, for each value, at the flags, then at `POSTROAD_SERVER`, `POSTROAD_API_KEY`,
`POSTROAD_CA_FILE` and `POSTROAD_ACCOUNT`, then at one file: the named context where one was asked for, else `cli.yaml`
in `POSTROAD_DIR`, which names the folder of a local stack, else the nearest `.postroad/cli.yaml` in this folder or
above, else the current context of the user's `contexts.yaml`. A file's key goes to that file's server only: where
flags or environment name another server, the file is not used at all. Files hold secrets, so they must belong to us
(or root) and be closed to others (0600); one that is not is refused, not skipped.

Inputs are passed in (flags, environment, folders): nothing here looks around by itself. Failures are
`ConnectionSettingsError` with what to do about it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from postroad.files import write_private

LOCAL_FILE = Path(".postroad") / "cli.yaml"
_FILE_KEYS = frozenset({"server", "api_key", "ca_file", "account", "smtp", "inbox", "http", "node_http"})
_SMTP_KEYS = frozenset({"server", "tls_server", "username", "password", "ca_file", "sender"})


class ConnectionSettingsError(Exception):
    """The settings for the connection are missing or unusable; `advice` says what to do."""

    def __init__(self, problem: str, advice: str) -> None:
        super().__init__(problem)
        self.advice = advice


@dataclass(frozen=True, slots=True)
class SmtpSettings:
    """How `postroad send` submits: host:port for STARTTLS, and for TLS from the start; empty is not known."""

    server: str = ""
    tls_server: str = ""
    username: str = ""
    password: str = field(default="", repr=False)
    ca_file: Path | None = None
    sender: str = ""


@dataclass(frozen=True, slots=True)
class Connection:
    """What was found; empty values were found nowhere. `source` names the file, for people."""

    server: str = ""
    api_key: str = field(default="", repr=False)
    ca_file: Path | None = None
    account: str = ""
    smtp: SmtpSettings = SmtpSettings()
    inbox: Path | None = None
    http: str = ""
    node_http: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Flags:
    """What the command line said; None where it said nothing."""

    server: str | None = None
    api_key: str | None = None
    ca_file: Path | None = None
    account: str | None = None
    context: str | None = None


def user_folder(environment: Mapping[str, str]) -> Path:
    """The user's folder of settings for Postroad."""
    base = environment.get("XDG_CONFIG_HOME") or str(Path(environment.get("HOME", "~")).expanduser() / ".config")
    return Path(base) / "postroad"


def find_connection(flags: Flags, environment: Mapping[str, str], folder: Path) -> Connection:
    """The connection to use. See the module."""
    named = flags.context or environment.get("POSTROAD_CONTEXT")
    server = flags.server or environment.get("POSTROAD_SERVER") or ""
    found = _from_files(named, environment, folder)
    if server and server != found.server:
        found = Connection()
    ca_file = flags.ca_file or (Path(text) if (text := environment.get("POSTROAD_CA_FILE")) else None)
    return replace(
        found,
        server=server or found.server,
        api_key=flags.api_key or environment.get("POSTROAD_API_KEY") or found.api_key,
        ca_file=ca_file or found.ca_file,
        account=account_name(flags.account or environment.get("POSTROAD_ACCOUNT") or found.account),
    )


def account_name(text: str) -> str:
    """`demo` and `accounts/demo` alike as `accounts/demo`; empty stays empty."""
    return text if not text or text.startswith("accounts/") else f"accounts/{text}"


def read_contexts(folder: Path) -> tuple[str, dict[str, dict[str, Any]]]:
    """The current context's name and all contexts of the user's folder; empty when there is no file."""
    file = folder / "contexts.yaml"
    if not file.exists():
        return "", {}
    values = _read_private(file)
    contexts = values.get("contexts") or {}
    if not isinstance(contexts, dict) or set(values) - {"current", "contexts"}:
        raise ConnectionSettingsError(f"{file} is no file of contexts", "Mend it, or delete it and add contexts anew")
    return str(values.get("current") or ""), contexts


def write_contexts(folder: Path, current: str, contexts: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace the user's contexts, whole or not at all."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_private(
        folder / "contexts.yaml",
        yaml.safe_dump({"current": current, "contexts": dict(contexts)}, sort_keys=False),
    )


def _from_files(named: str | None, environment: Mapping[str, str], folder: Path) -> Connection:
    if named is None and (file := _local_file(environment, folder)) is not None:
        return _parse(_read_private(file), file.parent, str(file))
    user = user_folder(environment)
    current, contexts = read_contexts(user)
    name = named or current
    if not name:
        return Connection()
    if name not in contexts:
        known = ", ".join(sorted(contexts)) or "none"
        raise ConnectionSettingsError(
            f"there is no context {name!r} in {user / 'contexts.yaml'}",
            f"Contexts there: {known}. Add one with `postroad contexts set {name} …`",
        )
    return _parse(contexts[name], user, f"context {name}")


def _local_file(environment: Mapping[str, str], folder: Path) -> Path | None:
    if stack := environment.get("POSTROAD_DIR"):
        file = folder / stack / LOCAL_FILE.name
        if not file.exists():
            # What lies elsewhere may be a server that nobody meant.
            raise ConnectionSettingsError(
                f"POSTROAD_DIR names {stack}, where no {LOCAL_FILE.name} is", "Run `postroad up` first, or unset it"
            )
        return file
    return next((file for parent in (folder, *folder.parents) if (file := parent / LOCAL_FILE).exists()), None)


def _read_private(file: Path) -> dict[str, Any]:
    try:
        with file.open(encoding="utf-8") as stream:
            status = os.fstat(stream.fileno())
            if status.st_uid not in {os.geteuid(), 0}:
                raise ConnectionSettingsError(
                    f"{file} belongs to another user, who could send your key anywhere",
                    "Start from another folder, or name server and key by flags",
                )
            if stat.S_IMODE(status.st_mode) & 0o077:
                raise ConnectionSettingsError(f"{file} holds keys, and others may read it", f"Run: chmod 600 {file}")
            values = yaml.safe_load(stream)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConnectionSettingsError(f"{file} cannot be read: {error}", "Mend or delete it") from error
    if not isinstance(values, dict):
        raise ConnectionSettingsError(f"{file} holds no settings", "Mend or delete it")
    return values


def _parse(values: Mapping[str, Any], folder: Path, source: str) -> Connection:
    smtp = values.get("smtp") or {}
    unknown = set(values) - _FILE_KEYS | {f"smtp.{key}" for key in set(smtp) - _SMTP_KEYS}
    if unknown:
        raise ConnectionSettingsError(f"{source}: unknown keys: {', '.join(sorted(unknown))}", "Remove them")

    def path(text: Any) -> Path | None:
        return folder / str(text) if text else None

    return Connection(
        server=str(values.get("server") or ""),
        api_key=str(values.get("api_key") or ""),
        ca_file=path(values.get("ca_file")),
        account=str(values.get("account") or ""),
        smtp=SmtpSettings(
            server=str(smtp.get("server") or ""),
            tls_server=str(smtp.get("tls_server") or ""),
            username=str(smtp.get("username") or ""),
            password=str(smtp.get("password") or ""),
            ca_file=path(smtp.get("ca_file")),
            sender=str(smtp.get("sender") or ""),
        ),
        inbox=path(values.get("inbox")),
        http=str(values.get("http") or ""),
        node_http=str(values.get("node_http") or ""),
        source=source,
    )
