"""`postroad credentials …` and `postroad api-keys …`: what submitters and programs present."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

import typer

from postroad.cli.output import Column, short, time_text
from postroad.cli.resources import Kind, Name, add_standard, add_verb, call, create, fresh, show
from postroad.cli.session import Session, session_of
from postroad.cli.suspensions import add_suspension
from postroad.cli.times import later_option, timestamp
from postroad.control.v1 import credential_service_pb2
from postroad.control.v1.credential_pb2 import ApiKey, SmtpCredential


def _life(one: Any) -> str:
    if one.HasField("revoke_time"):
        return "revoked"
    if "suspend_time" in one.DESCRIPTOR.fields_by_name and one.HasField("suspend_time"):
        return "suspended"
    return f"until {time_text(one.expire_time)}" if one.HasField("expire_time") else "good"


SMTP_CREDENTIAL = Kind(
    noun="SmtpCredential",
    collection="smtpCredentials",
    service="credentials",
    module=credential_service_pb2,
    columns=(
        Column("CREDENTIAL", lambda one: short(one.name)),
        Column("USERNAME", lambda one: one.username),
        Column("STATE", _life),
        Column("CREATED", lambda one: time_text(one.create_time)),
    ),
)
API_KEY = Kind(
    noun="ApiKey",
    collection="apiKeys",
    service="credentials",
    module=credential_service_pb2,
    columns=(
        Column("KEY", lambda one: short(one.name)),
        Column("PREFIX", lambda one: one.prefix),
        Column("SCOPES", lambda one: ", ".join(one.scopes)),
        Column("STATE", _life),
        Column("LAST USED", lambda one: time_text(one.last_use_time)),
    ),
)

credentials_app = typer.Typer(no_args_is_help=True, help="SMTP credentials: user names and passwords for submission.")
add_standard(credentials_app, SMTP_CREDENTIAL)
add_verb(credentials_app, SMTP_CREDENTIAL, "Revoke", "Refuse the credential from the next MAIL on, for good.")
add_suspension(
    credentials_app,
    SMTP_CREDENTIAL,
    "Refuse the credential from the next MAIL on; mail that it submitted stays queued.",
    "Lift a suspension.",
)
api_keys_app = typer.Typer(
    no_args_is_help=True, help="API keys of an account, or of operators with `--shared` or full names `apiKeys/…`."
)
add_standard(api_keys_app, API_KEY, shared=True)
add_verb(api_keys_app, API_KEY, "Revoke", "Refuse the key from now on, for good.")

Id = Annotated[str, typer.Argument(help="Lower-case letters, digits and '-'")]
DisplayName = Annotated[str, typer.Option("--display-name", help="For people")]
Expires = Annotated[datetime | None, later_option("--expires", "End of its life, UTC")]


@credentials_app.command("create")
def create_credential(
    context: typer.Context, credential_id: Id, display_name: DisplayName = "", expires: Expires = None
) -> None:
    """Create a credential and show its password, once."""
    session = session_of(context)
    credential = SmtpCredential(display_name=display_name, expire_time=timestamp(expires) if expires else None)
    _show_secret(session, SMTP_CREDENTIAL, create(session, SMTP_CREDENTIAL, credential_id, credential))


@credentials_app.command("rotate")
def rotate_credential(context: typer.Context, name: Name) -> None:
    """Replace the password and show the new one, once; the old one is refused at once."""
    _rotate(session_of(context), SMTP_CREDENTIAL, name)


@api_keys_app.command("create")
def create_api_key(
    context: typer.Context,
    key_id: Id,
    scope: Annotated[
        list[str] | None,
        typer.Option("--scope", help="config.read, config.write, messages.read, messages.write; repeatable"),
    ] = None,
    operator: Annotated[bool, typer.Option("--operator", help="An operator's key, for all accounts")] = False,
    display_name: DisplayName = "",
    expires: Expires = None,
) -> None:
    """Create a key and show it, once."""
    session = session_of(context)
    if operator == bool(scope):
        raise typer.BadParameter("give --scope at least once, or --operator, not both")
    key = ApiKey(
        display_name=display_name,
        scopes=["operator"] if operator else scope or [],
        expire_time=timestamp(expires) if expires else None,
    )
    _show_secret(session, API_KEY, create(session, API_KEY, key_id, key, "" if operator else None))


@api_keys_app.command("rotate")
def rotate_api_key(context: typer.Context, name: Name) -> None:
    """Replace the key and show the new one, once; the old one is refused at once."""
    _rotate(session_of(context), API_KEY, name)


def _rotate(session: Session, kind: Kind, text: str) -> None:
    name = kind.name(session, text)
    rotated = call(session, kind, f"Rotate{kind.noun}", name=name, etag=fresh(session, kind, name).etag)
    _show_secret(session, kind, rotated)


def _show_secret(session: Session, kind: Kind, resource: Any) -> None:
    show(session, kind, resource)
    session.printer.say("The secret is shown this once only: keep it now.", "yellow")
