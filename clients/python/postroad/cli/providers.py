"""`postroad providers …`: next hops."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from postroad.cli.given_files import read_text
from postroad.cli.output import Column, enum_text, short
from postroad.cli.problems import FAILED
from postroad.cli.resources import Kind, Name, add_standard, call, changed, create, show, update
from postroad.cli.session import session_of
from postroad.cli.suspensions import add_suspension
from postroad.control.v1 import provider_service_pb2
from postroad.control.v1.provider_pb2 import Provider, SmtpProvider


def _endpoints(provider: Provider) -> str:
    return ", ".join(f"{one.host}:{one.port}" if one.port else one.host for one in provider.smtp.endpoints)


PROVIDER = Kind(
    noun="Provider",
    collection="providers",
    service="providers",
    module=provider_service_pb2,
    may_be_shared=True,
    columns=(
        Column("PROVIDER", lambda one: short(one.name)),
        Column("STATE", lambda one: enum_text(one, "state")),
        Column("ENDPOINTS", _endpoints),
        Column("TLS", lambda one: enum_text(one.smtp, "tls_policy")),
        Column("USER", lambda one: one.smtp.username),
    ),
)

app = typer.Typer(no_args_is_help=True, help="Providers: the SMTP relays that mail can go through.")
add_standard(app, PROVIDER, shared=True)
add_suspension(app, PROVIDER, "Skip the provider at routing; no new attempt begins.", "Use the provider again.")


class TlsPolicy(StrEnum):
    """What TLS must hold before mail or credentials are sent."""

    NONE = "none"
    OPPORTUNISTIC = "opportunistic"
    REQUIRED = "required"
    REQUIRED_VERIFIED = "required-verified"


Endpoints = Annotated[
    list[str] | None, typer.Option("--endpoint", help="host or host:port, tried in order; repeatable")
]
ImplicitTls = Annotated[bool, typer.Option("--implicit-tls", help="TLS from the first byte (usually port 465)")]
Tls = Annotated[TlsPolicy | None, typer.Option("--tls", help="Default: required-verified with a user name")]
Username = Annotated[str | None, typer.Option("--username", help="User for AUTH")]
PasswordFile = Annotated[
    Path | None, typer.Option("--password-file", help="File with the password, `-` for standard input")
]
CaFile = Annotated[Path | None, typer.Option("--provider-ca-file", help="PEM certificates trusted for this provider")]
MaxConnections = Annotated[int | None, typer.Option("--max-connections", min=1, help="Connections a worker")]
DisplayName = Annotated[str | None, typer.Option("--display-name", help="For people")]


@app.command("create")
def create_provider(
    context: typer.Context,
    *,
    provider_id: Annotated[str, typer.Argument(help="Lower-case letters, digits and '-'")],
    endpoint: Endpoints = None,
    implicit_tls: ImplicitTls = False,
    tls: Tls = None,
    username: Username = None,
    password_file: PasswordFile = None,
    provider_ca_file: CaFile = None,
    max_connections: MaxConnections = None,
    display_name: DisplayName = None,
    shared: Annotated[bool, typer.Option("--shared", help="For every account; operators only")] = False,
) -> None:
    """Create an SMTP provider."""
    session = session_of(context)
    if not endpoint:
        raise typer.BadParameter("give --endpoint at least once")
    provider = Provider(display_name=display_name or "", smtp=SmtpProvider())
    _change_smtp(provider.smtp, endpoint, implicit_tls, tls, username, password_file, provider_ca_file, max_connections)
    show(session, PROVIDER, create(session, PROVIDER, provider_id, provider, "" if shared else None))


@app.command("update")
def update_provider(
    context: typer.Context,
    *,
    name: Name,
    endpoint: Endpoints = None,
    implicit_tls: ImplicitTls = False,
    tls: Tls = None,
    username: Username = None,
    password_file: PasswordFile = None,
    provider_ca_file: CaFile = None,
    max_connections: MaxConnections = None,
    display_name: DisplayName = None,
) -> None:
    """Change what is given; endpoints are replaced whole, with --implicit-tls as given beside them."""
    session = session_of(context)

    def change(provider: Provider) -> list[str]:
        paths = _change_smtp(
            provider.smtp, endpoint, implicit_tls, tls, username, password_file, provider_ca_file, max_connections
        )
        return changed(provider, display_name=display_name) + [f"smtp.{path}" for path in paths]

    show(session, PROVIDER, update(session, PROVIDER, PROVIDER.name(session, name), change))


@app.command("verify")
def verify_provider(context: typer.Context, name: Name) -> None:
    """Connect, start TLS and authenticate as a delivery would, without sending; status 1 when that fails."""
    session = session_of(context)
    answer = call(session, PROVIDER, "VerifyProvider", name=PROVIDER.name(session, name))
    session.printer.resource(answer)
    if not answer.ok:
        raise typer.Exit(FAILED)


def _change_smtp(
    smtp: SmtpProvider,
    endpoints: list[str] | None,
    implicit_tls: bool,
    tls: TlsPolicy | None,
    username: str | None,
    password_file: Path | None,
    ca_file: Path | None,
    max_connections: int | None,
) -> list[str]:
    """Write what is given into the provider; returns the paths that changed."""
    paths = changed(
        smtp,
        username=username,
        password=read_text(password_file).removesuffix("\n") if password_file else None,
        ca_pem=read_text(ca_file) if ca_file else None,
        max_connections=max_connections,
    )
    if endpoints:
        del smtp.endpoints[:]
        smtp.endpoints.extend(_endpoint(text, implicit_tls) for text in endpoints)
        paths.append("endpoints")
    if tls is not None:
        smtp.tls_policy = SmtpProvider.TlsPolicy.Value(f"TLS_POLICY_{tls.upper().replace('-', '_')}")
        paths.append("tls_policy")
    return paths


def _endpoint(text: str, implicit_tls: bool) -> SmtpProvider.Endpoint:
    # host, host:port, address, [v6]:port; a bare IPv6 address has more than one colon.
    host, port = text, ""
    if text.startswith("[") or text.count(":") == 1:
        host, _, port = text.rpartition(":") if not text.endswith("]") else (text, "", "")
    if port and not port.isdecimal():
        raise typer.BadParameter(f"{text} is no host:port")
    return SmtpProvider.Endpoint(host=host.strip("[]"), port=int(port or 0), implicit_tls=implicit_tls)
