"""`postroad contexts …`: servers by name, in the user's folder of settings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from postroad.cli.connection import account_name, read_contexts, user_folder, write_contexts
from postroad.cli.given_files import read_text
from postroad.cli.problems import NOT_CONFIGURED, NOT_THERE, CommandError
from postroad.cli.resources import Yes, confirm
from postroad.cli.session import session_of

app = typer.Typer(no_args_is_help=True, help="Named servers, kept in your own folder of settings (0600).")

ContextName = Annotated[str, typer.Argument(help="Name of the context")]


@app.command("list")
def list_contexts(context: typer.Context) -> None:
    """List the contexts; the current one is marked."""
    printer = session_of(context).printer
    current, contexts = read_contexts(user_folder(os.environ))
    if printer.is_json:
        rows = [{"name": name, "server": one.get("server", "")} for name, one in sorted(contexts.items())]
        printer.json({"current": current, "contexts": rows})
        return
    printer.table(
        ("", "CONTEXT", "SERVER", "ACCOUNT"),
        (
            ("*" if name == current else "", name, str(one.get("server", "")), str(one.get("account", "")))
            for name, one in sorted(contexts.items())
        ),
    )


@app.command("set")
def set_context(
    context: typer.Context,
    name: ContextName,
    key_file: Annotated[
        Path | None, typer.Option("--api-key-file", help="File with the API key; `-` is standard input")
    ] = None,
) -> None:
    """Keep --server, --ca-file, --account and the API key under a name; the first one becomes current."""
    session = session_of(context)
    folder = user_folder(os.environ)
    current, contexts = read_contexts(folder)
    flags = session.flags
    key = flags.api_key
    if key_file is not None:
        key = read_text(key_file).strip()
        if not key:
            raise CommandError(f"{key_file}: there is no key in it: nothing was kept", status=NOT_CONFIGURED)
    given: dict[str, Any] = {
        "server": flags.server,
        "api_key": key,
        "ca_file": str(flags.ca_file.absolute()) if flags.ca_file else None,
        "account": account_name(flags.account) if flags.account else None,
    }
    contexts[name] = {**contexts.get(name, {}), **{key: value for key, value in given.items() if value}}
    write_contexts(folder, current or name, contexts)
    session.printer.say(f"Kept {name} in {folder / 'contexts.yaml'}")


@app.command("use")
def use_context(context: typer.Context, name: ContextName) -> None:
    """Make a context the current one; a `.postroad/cli.yaml` nearby still comes first."""
    folder = user_folder(os.environ)
    _, contexts = _existing(folder, name)
    write_contexts(folder, name, contexts)
    session_of(context).printer.say(f"Current context: {name}")


@app.command("delete")
def delete_context(context: typer.Context, name: ContextName, yes: Yes = False) -> None:
    """Forget a context and the key in it; asks first unless --yes or JSON is wanted."""
    session = session_of(context)
    printer = session.printer
    folder = user_folder(os.environ)
    current, contexts = _existing(folder, name)
    confirm(session, f"Delete context {name}?", yes=yes)
    del contexts[name]
    write_contexts(folder, "" if current == name else current, contexts)
    printer.say(f"Forgot {name}")
    if printer.is_json:
        printer.json({"name": name, "deleted": True})


def _existing(folder: Path, name: str) -> tuple[str, dict[str, dict[str, Any]]]:
    current, contexts = read_contexts(folder)
    if name not in contexts:
        raise CommandError(f"there is no context {name!r}", "`postroad contexts list` shows them", NOT_THERE)
    return current, contexts
