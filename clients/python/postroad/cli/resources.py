"""What all resources have in common on the command line: their calls, by the naming rules of the API.

A `Kind` says how a resource is called. `call` finds request and method by that name (`CreateProvider`), `add_standard`
gives a family of commands its `list`, `get` and `delete`. Update and Delete want the etag of what was read: `fresh`
reads, so that a command is one edit and a concurrent one is refused by the server instead of overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from google.protobuf.message import Message

from postroad.cli.output import Column, short
from postroad.cli.session import Session, session_of
from postroad.sdk import NotFoundError

_PAGE_SIZE = 500
# What people see of a list unless they say otherwise.
MANY = 1_000

Name = Annotated[str, typer.Argument(help="Id, or full resource name")]
Limit = Annotated[
    int | None,
    typer.Option("--limit", min=0, help="At most so many; 0 is all, as with JSON unless given", show_default=False),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask")]


@dataclass(frozen=True, slots=True)
class Kind:
    """How a resource is called. `parent` is the full name of what it lies under by default, "" for none.

    `service` is the client's attribute, `module` the generated one with the requests, `noun` as in `GetProvider`,
    `collection` as in `accounts/demo/providers/inbox`.
    """

    noun: str
    collection: str
    service: str
    module: Any
    columns: Sequence[Column]
    in_account: bool = True
    hidden: frozenset[str] = frozenset({"uid", "etag"})
    may_be_shared: bool = False
    # What people read in a field that alone does not say it.
    texts: Callable[[Any], Mapping[str, str]] = lambda _: {}

    @property
    def field(self) -> str:
        """The resource's field in requests: RoutingRule is `routing_rule`."""
        return "".join(f"_{c.lower()}" if c.isupper() else c for c in self.noun).lstrip("_")

    @property
    def list_field(self) -> str:
        """The field of the list's answer."""
        return f"{self.field}s"

    def name(self, session: Session, text: str, parent: str | None = None) -> str:
        """The full name for an id or a full name."""
        return session.name(self.collection, text, parent if self.in_account else "")


def call(session: Session, kind: Kind, verb: str, **fields: Any) -> Any:
    """Call `<verb><noun>`; PostroadError when it is refused."""
    request = getattr(kind.module, f"{verb}Request")(**fields)
    return getattr(getattr(session.client, kind.service), verb)(request)


def fresh(session: Session, kind: Kind, name: str) -> Any:
    """The resource as it is now."""
    try:
        return call(session, kind, f"Get{kind.noun}", name=name)
    except NotFoundError as error:
        if kind.may_be_shared and name.startswith("accounts/"):
            error.add_note(f"One of all accounts is named in full: {kind.collection}/{short(name)}")
        raise


def create(session: Session, kind: Kind, identifier: str, resource: Message, parent: str | None = None) -> Any:
    """Create and return it."""
    fields: dict[str, Any] = {f"{kind.field}_id": identifier, kind.field: resource}
    if kind.in_account:
        fields["parent"] = session.account if parent is None else parent
    return call(session, kind, f"Create{kind.noun}", **fields)


def update(session: Session, kind: Kind, name: str, change: Callable[[Any], list[str]]) -> Any:
    """Read, let `change` edit and say which paths it edited, write; without paths nothing is written."""
    resource = fresh(session, kind, name)
    paths = change(resource)
    if not paths:
        raise typer.BadParameter("nothing to change was given")
    return call(session, kind, f"Update{kind.noun}", **{kind.field: resource, "update_mask": {"paths": paths}})


def bound_of(session: Session, limit: int | None, many: int = MANY) -> int | None:
    """How much of a list is shown: what was asked for, else `many` to people, all to programs. None is all."""
    if limit is None:
        return None if session.printer.is_json else many
    return limit or None


def list_some(session: Session, kind: Kind, bound: int | None, **fields: Any) -> list[Any]:
    """The first `bound` resources, over as many pages as it takes; people are told when there are more."""
    found: list[Any] = []
    token = ""
    while bound is None or len(found) < bound:
        page_size = _PAGE_SIZE if bound is None else min(_PAGE_SIZE, bound - len(found))
        answer = call(session, kind, f"List{kind.noun}s", page_size=page_size, page_token=token, **fields)
        found += getattr(answer, kind.list_field)
        token = answer.next_page_token
        if not token:
            return found
    tell_more(session, len(found))
    return found


def list_all(session: Session, kind: Kind, **fields: Any) -> list[Any]:
    """All resources, over as many pages as it takes."""
    return list_some(session, kind, None, **fields)


def tell_more(session: Session, count: int, option: str = "--limit") -> None:
    """Tell people that a list ends before its end; a program that is given a part has asked for it."""
    if not session.printer.is_json:
        session.printer.remark(f"{count} shown, more exist: {option} NUMBER shows more, {option} 0 all")


def changed(resource: Message, **values: Any) -> list[str]:
    """Set the fields whose value is not None (a list replaces all), and return their paths."""
    paths = []
    for path, value in values.items():
        if value is None:
            continue
        if isinstance(value, list):
            resource.ClearField(path)
            getattr(resource, path).extend(value)
        else:
            setattr(resource, path, value)
        paths.append(path)
    return paths


def show(session: Session, kind: Kind, resource: Message) -> None:
    """Print one resource."""
    session.printer.resource(resource, hidden=kind.hidden, texts=kind.texts(resource))


def json_name(name: str) -> str:
    """The name of a field in protobuf JSON."""
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def add_standard(app: typer.Typer, kind: Kind, *, shared: bool = False) -> None:
    """Give `app` the commands list, get and delete; with `shared` also `--shared`, for those without an account."""
    add_reading(app, kind, f"List the {_words(kind)}s by name.", shared=shared)
    add_deletion(app, kind)


def add_reading(app: typer.Typer, kind: Kind, list_text: str, *, shared: bool = False) -> None:
    """Give `app` the commands list and get."""

    def list_own(context: typer.Context, limit: Limit = None) -> None:
        session = session_of(context)
        parent = {"parent": session.account} if kind.in_account else {}
        found = list_some(session, kind, bound_of(session, limit), **parent)
        session.printer.resources(json_name(kind.list_field), found, kind.columns)

    def list_own_or_shared(
        context: typer.Context,
        limit: Limit = None,
        without_account: Annotated[bool, typer.Option("--shared", help="Those that belong to no account")] = False,
    ) -> None:
        if not without_account:
            list_own(context, limit)
            return
        session = session_of(context)
        found = list_some(session, kind, bound_of(session, limit), parent="")
        session.printer.resources(json_name(kind.list_field), found, kind.columns)

    def get(context: typer.Context, name: Name) -> None:
        session = session_of(context)
        show(session, kind, fresh(session, kind, kind.name(session, name)))

    app.command("list", help=list_text)(list_own_or_shared if shared else list_own)
    app.command("get", help=f"Show one {_words(kind)}.")(get)


def confirm(session: Session, question: str, *, yes: bool) -> None:
    """Ask before what cannot be taken back, unless --yes or JSON is wanted; who says no ends the command."""
    if not yes and not session.printer.is_json:
        typer.confirm(question, abort=True)


def add_deletion(app: typer.Typer, kind: Kind) -> None:
    """Give `app` the command delete."""

    def delete(context: typer.Context, name: Name, yes: Yes = False) -> None:
        session = session_of(context)
        full_name = kind.name(session, name)
        resource = fresh(session, kind, full_name)
        confirm(session, f"Delete {full_name}?", yes=yes)
        call(session, kind, f"Delete{kind.noun}", name=full_name, etag=resource.etag)
        session.printer.say(f"Deleted {full_name}")
        if session.printer.is_json:
            session.printer.json({"name": full_name, "deleted": True})

    app.command("delete", help=f"Delete one {_words(kind)}; asks first unless --yes or JSON is wanted.")(delete)


def _words(kind: Kind) -> str:
    return kind.field.replace("_", " ")


def add_verb(app: typer.Typer, kind: Kind, verb: str, help_text: str) -> None:
    """Give `app` a command for a verb that takes a name, returns the resource and cannot be undone; it asks first."""

    def run(context: typer.Context, name: Name, yes: Yes = False) -> None:
        session = session_of(context)
        fields: dict[str, Any] = {"name": kind.name(session, name)}
        resource = fresh(session, kind, fields["name"])
        confirm(session, f"{verb} {fields['name']}?", yes=yes)
        if "etag" in getattr(kind.module, f"{verb}{kind.noun}Request").DESCRIPTOR.fields_by_name:
            fields["etag"] = resource.etag
        show(session, kind, call(session, kind, f"{verb}{kind.noun}", **fields))

    app.command(verb.lower(), help=f"{help_text} Asks first unless --yes or JSON is wanted.")(run)
