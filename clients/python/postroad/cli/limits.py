"""`postroad limits …`: how much may pass, and what is left of it."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any

import typer
from google.protobuf.duration_pb2 import Duration

from postroad.cli.output import Column, enum_text, short
from postroad.cli.resources import (
    Kind,
    Name,
    add_deletion,
    bound_of,
    call,
    changed,
    create,
    fresh,
    list_some,
    show,
    tell_more,
    update,
)
from postroad.cli.resources import Limit as MaxRows
from postroad.cli.session import Session, session_of
from postroad.control.v1 import limit_service_pb2
from postroad.control.v1.limit_pb2 import Limit, LimitState

_UNITS_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_DURATION = re.compile(r"(\d+)([smhd])")
_WORDS = {1: "a second", 60: "a minute", 3_600: "an hour", 86_400: "a day"}

LIMIT = Kind(
    noun="Limit", collection="limits", service="limits", module=limit_service_pb2, columns=(), may_be_shared=True
)

app = typer.Typer(
    no_args_is_help=True,
    help="Limits: how much accounts, credentials, addresses, providers and destinations may pass.",
)


class Scope(StrEnum):
    """Whose mail or connections are counted together."""

    ACCOUNT = "account"
    CREDENTIAL = "credential"
    ADDRESS = "address"
    PROVIDER = "provider"
    DESTINATION = "destination"


class Unit(StrEnum):
    """What is counted."""

    MESSAGE = "message"
    RECIPIENT = "recipient"
    BYTE = "byte"
    CONNECTION = "connection"


Subject = Annotated[
    str | None,
    typer.Option("--subject", help="The one that it holds for: an id or resource name, an address, a host"),
]
Period = Annotated[
    str | None, typer.Option("--per", help="In which it may pass: `minute`, `hour`, `day` or as `90s`, `10m`, `2h`")
]
Burst = Annotated[
    int | None,
    typer.Option(
        "--burst",
        min=0,
        help="At once after a silence; 0: a tenth, at least 10. What costs more passes when all of it is there, and"
        " nothing after it until the rest is paid",
    ),
]
DisplayName = Annotated[str | None, typer.Option("--display-name", help="For people")]


@app.command("list")
def list_limits(
    context: typer.Context,
    limit: MaxRows = None,
    own: Annotated[bool, typer.Option("--own", help="The account's own only, no shared ones, no defaults")] = False,
    shared: Annotated[bool, typer.Option("--shared", help="Those that belong to no account; operators only")] = False,
) -> None:
    """List what holds for the account, a line for each subject, with what is left of it."""
    session = session_of(context)
    bound = bound_of(session, limit)
    if own or shared:
        found = list_some(session, LIMIT, bound, parent="" if shared else session.account)
    else:
        effective = list(call(session, LIMIT, "ListEffectiveLimits", parent=session.account).limits)
        found = effective[:bound]
        if len(found) < len(effective):
            tell_more(session, len(found))
    if session.printer.is_json:
        session.printer.resources("limits", found, ())
        return
    rows = [row for one in found for row in _rows(one)]
    session.printer.table([column.heading for column in _COLUMNS], ([c.cell(row) for c in _COLUMNS] for row in rows))
    for reason in sorted({one.state.reason for one in found if not one.state.known}):
        session.printer.remark(f"What is left is not known: {reason}")


@app.command("get")
def get_limit(context: typer.Context, name: Name) -> None:
    """Show one limit and what is left of it."""
    session = session_of(context)
    show(session, LIMIT, fresh(session, LIMIT, LIMIT.name(session, name)))


@app.command("create")
def create_limit(
    context: typer.Context,
    *,
    limit_id: Annotated[str, typer.Argument(help="Lower-case letters, digits and '-'")],
    scope: Annotated[Scope, typer.Option("--scope", help="Whose are counted together")],
    unit: Annotated[Unit, typer.Option("--unit", help="What is counted")],
    amount: Annotated[int, typer.Option("--amount", min=1, help="So many a period, or at once")],
    period: Period = None,
    burst: Burst = None,
    subject: Subject = None,
    display_name: DisplayName = None,
    shared: Annotated[bool, typer.Option("--shared", help="For every account")] = False,
) -> None:
    """Create a limit; operators only. Without --per: connections at once, to a provider or destination."""
    _check(scope, unit, has_period=bool(period), shared=shared)
    session = session_of(context)
    limit = Limit(
        display_name=display_name or "",
        scope=Limit.Scope.Value(f"SCOPE_{scope.upper()}"),
        unit=Limit.Unit.Value(f"UNIT_{unit.upper()}"),
        subject=_subject(session, scope, subject or "", shared=shared),
        amount=amount,
        period=_period(period) if period else None,
        burst=burst or 0,
    )
    show(session, LIMIT, create(session, LIMIT, limit_id, limit, "" if shared else None))


@app.command("update")
def update_limit(
    context: typer.Context,
    *,
    name: Name,
    amount: Annotated[int | None, typer.Option("--amount", min=1, help="So many a period, or at once")] = None,
    period: Period = None,
    burst: Burst = None,
    display_name: DisplayName = None,
) -> None:
    """Change what is given; operators only. Of a rate what was left stays left, and fills up from there."""
    session = session_of(context)

    def change(limit: Limit) -> list[str]:
        paths = changed(limit, amount=amount, burst=burst, display_name=display_name)
        if period:
            if not limit.HasField("period"):
                raise typer.BadParameter("--per: this limit is of connections at once; create another one for a rate")
            limit.period.CopyFrom(_period(period))
            paths.append("period")
        return paths

    show(session, LIMIT, update(session, LIMIT, LIMIT.name(session, name), change))


add_deletion(app, LIMIT)


# --- inside ------------------------------------------------------------------------------------


def _check(scope: Scope, unit: Unit, *, has_period: bool, shared: bool) -> None:
    """Say by their options what would be refused by the names of fields."""
    if scope in (Scope.ADDRESS, Scope.DESTINATION) and not shared:
        raise typer.BadParameter(f"--scope {scope}: belongs to no account, give --shared as well")
    at_once = unit is Unit.CONNECTION and scope in (Scope.PROVIDER, Scope.DESTINATION)
    if not has_period and not at_once:
        raise typer.BadParameter("--per is missing: only connections to a provider or destination are counted at once")


def _rows(limit: Limit) -> list[tuple[Limit, LimitState.Subject | None]]:
    return [(limit, subject) for subject in limit.state.subjects] or [(limit, None)]


def _rate(limit: Limit) -> str:
    unit = enum_text(limit, "unit")
    units = unit if limit.amount == 1 else f"{unit}s"
    if not limit.HasField("period"):
        return f"{limit.amount} {units} at once"
    seconds = limit.period.ToTimedelta().total_seconds()
    return (
        f"{limit.amount} {units} {_WORDS[int(seconds)]}"
        if seconds in _WORDS
        else (f"{limit.amount} {units} in {_span(seconds)}")
    )


def _origin(limit: Limit) -> str:
    if limit.origin == Limit.ORIGIN_DEFAULT:
        return "default"
    return limit.name if limit.origin == Limit.ORIGIN_SHARED else short(limit.name)


def _who(row: tuple[Limit, LimitState.Subject | None]) -> str:
    limit, state = row
    return (state.subject if state is not None else limit.subject) or f"each {enum_text(limit, 'scope')}"


def _left(row: tuple[Limit, LimitState.Subject | None]) -> str:
    limit, state = row
    if state is None:
        return "" if limit.state.known else "?"
    return f"{state.available} of {state.capacity}"


def _delay(state: LimitState.Subject | None, field: str) -> str:
    if state is None or not state.HasField(field):  # type: ignore[arg-type] # the stub knows the names one by one
        return ""
    delay: Duration = getattr(state, field)
    return _span(delay.ToTimedelta().total_seconds())


def _span(seconds: float) -> str:
    """A duration in two units at most; below ten seconds with a tenth."""
    if seconds < 10:
        return f"{seconds:.1f}s".replace(".0s", "s")
    rest, parts = round(seconds), []
    for letter, size in sorted(_UNITS_S.items(), key=lambda unit: -unit[1]):
        count, rest = divmod(rest, size)
        if count:
            parts.append(f"{count}{letter}")
    return "".join(parts[:2])


_COLUMNS = (
    Column("LIMIT", lambda row: _origin(row[0])),
    Column("SCOPE", lambda row: enum_text(row[0], "scope")),
    Column("WHO", _who),
    Column("ALLOWED", lambda row: _rate(row[0])),
    Column("LEFT", _left),
    Column("NEXT IN", lambda row: _delay(row[1], "next_delay")),
    Column("FULL IN", lambda row: _delay(row[1], "full_delay")),
)


def _period(text: str) -> Duration:
    for seconds, word in _WORDS.items():
        if text == word.split()[1]:
            return Duration(seconds=seconds)
    match = _DURATION.fullmatch(text)
    if match is None:
        raise typer.BadParameter(f"{text} is none of minute, hour, day, or a number with s, m, h or d")
    return Duration(seconds=int(match[1]) * _UNITS_S[match[2]])


def _subject(session: Session, scope: Scope, text: str, *, shared: bool) -> str:
    """The full name for an id; addresses and hosts are what they are."""
    collections: dict[Scope, Any] = {Scope.CREDENTIAL: "smtpCredentials", Scope.PROVIDER: "providers"}
    if not text or scope in (Scope.ADDRESS, Scope.DESTINATION):
        return text
    if scope is Scope.ACCOUNT:
        return session.name("accounts", text, "")
    return session.name(collections[scope], text, "" if shared and scope is Scope.PROVIDER else None)
