"""What a command has at hand: the connection, a client made when it is first needed, and the printer."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from postroad.cli.connection import Connection, ConnectionSettingsError, Flags, find_connection
from postroad.cli.output import Printer
from postroad.cli.problems import NOT_CONFIGURED, CommandError
from postroad.sdk import Client, connect


@dataclass(slots=True)
class Session:
    """One run of the command line."""

    flags: Flags
    printer: Printer
    _connection: Connection | None = None
    _client: Client | None = field(default=None, repr=False)

    @property
    def connection(self) -> Connection:
        """Server, key and the rest, looked up when first needed."""
        if self._connection is None:
            self._connection = find_connection(self.flags, os.environ, Path.cwd())
        return self._connection

    @property
    def client(self) -> Client:
        """The API; ConnectionSettingsError when server or key are not known."""
        if self._client is None:
            connection = self.connection
            self._check_connection()
            try:
                self._client = connect(connection.server, connection.api_key, connection.ca_file)
            except OSError as error:
                raise ConnectionSettingsError(
                    f"the CA file {connection.ca_file} cannot be read: {error.strerror}", "Check --ca-file"
                ) from error
        return self._client

    @property
    def account(self) -> str:
        """`accounts/{account}` that names without a slash belong to."""
        if not self.connection.account:
            # Where nothing is known at all, the server is what to mend first.
            self._check_connection()
            raise CommandError(
                "no account is named", "Give --account, set POSTROAD_ACCOUNT, or write the full name", NOT_CONFIGURED
            )
        return self.connection.account

    def name(self, collection: str, text: str, parent: str | None = None) -> str:
        """The full resource name for what the user typed: an id, or the full name already."""
        if "/" in text:
            return text
        parent = self.account if parent is None else parent
        return f"{parent}/{collection}/{text}" if parent else f"{collection}/{text}"

    def _check_connection(self) -> None:
        if not self.connection.server or not self.connection.api_key:
            missing = "server" if not self.connection.server else "API key"
            raise ConnectionSettingsError(
                f"no {missing} is known",
                "Give --server and --api-key, set POSTROAD_SERVER and POSTROAD_API_KEY, or start in the folder where "
                "`postroad up` runs",
            )

    def close(self) -> None:
        """Drop the connection, if one was made."""
        if self._client is not None:
            self._client.close()


def session_of(context: typer.Context) -> Session:
    """The session that the entrance put into the context."""
    session: Any = context.find_root().obj
    if not isinstance(session, Session):
        raise TypeError("a command was run without its entrance")
    return session
