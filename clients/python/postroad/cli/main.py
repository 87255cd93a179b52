"""The entrance of the `postroad` command.

Contract. `main()` runs one command and ends the process with the status that problems.py lists. Options that hold for
every command (`--server`, `--output`, …) may stand anywhere on the line, before the command or behind it; a `--` ends
that. Modules that take long to import are imported by the commands that need them, so that `--help` is quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from postroad.cli import (
    accounts,
    contexts,
    credentials,
    destinations,
    inbox,
    limits,
    messages,
    nodes,
    providers,
    rules,
    spools,
)
from postroad.cli.audit import audit
from postroad.cli.connection import ConnectionSettingsError, Flags
from postroad.cli.output import Output, make_printer
from postroad.cli.problems import FAILED, NOT_CONFIGURED, CommandError, report
from postroad.cli.send import send
from postroad.cli.send_message import send_message
from postroad.cli.session import Session
from postroad.cli.status import health, status
from postroad.cli.up import up
from postroad.inbox import InboxError
from postroad.localstack import LocalStackError
from postroad.sdk import PostroadError

_COMMON_OPTIONS = frozenset({"--server", "--api-key", "--ca-file", "--account", "--context", "--output", "-o"})
# With this variable typer prints a completion script instead of running a command.
_COMPLETE_VARIABLE = "_POSTROAD_COMPLETE"

app = typer.Typer(
    name="postroad",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="The options above may stand behind a command, too. Statuses: 0 done, 1 failed, 2 usage, 3 not configured, "
    "4 unreachable, 5 not allowed, 6 not there.",
)
app.command()(up)
app.command()(send)
messages.app.command("send")(send_message)
app.add_typer(messages.app, name="messages")
app.command()(audit)
app.add_typer(inbox.app, name="inbox")
app.add_typer(accounts.app, name="accounts")
app.add_typer(credentials.credentials_app, name="credentials")
app.add_typer(credentials.api_keys_app, name="api-keys")
app.add_typer(providers.app, name="providers")
app.add_typer(destinations.app, name="destinations")
app.add_typer(rules.app, name="rules")
app.add_typer(limits.app, name="limits")
app.add_typer(nodes.nodes_app, name="nodes")
app.add_typer(nodes.pools_app, name="pools")
app.add_typer(spools.app, name="spool")
app.command()(status)
app.command()(health)
app.add_typer(contexts.app, name="contexts")


class Shell(StrEnum):
    """Shells with completion."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


@app.command()
def completion(shell: Shell) -> None:
    """Print the completion script for a shell; `--install-completion` puts it in place instead."""
    os.environ[_COMPLETE_VARIABLE] = f"source_{shell}"
    try:
        app(args=[], prog_name="postroad")
    finally:
        del os.environ[_COMPLETE_VARIABLE]


@app.callback()
def entrance(
    context: typer.Context,
    server: Annotated[str | None, typer.Option(help="host:port of the control plane [$POSTROAD_SERVER]")] = None,
    api_key: Annotated[str | None, typer.Option(help="API key [$POSTROAD_API_KEY]; better not on a line")] = None,
    ca_file: Annotated[Path | None, typer.Option(help="CA of the server [$POSTROAD_CA_FILE]")] = None,
    account: Annotated[str | None, typer.Option(help="Account of short names [$POSTROAD_ACCOUNT]")] = None,
    context_: Annotated[str | None, typer.Option("--context", help="Named context [$POSTROAD_CONTEXT]")] = None,
    output: Annotated[Output, typer.Option("--output", "-o", help="For people, or for programs")] = Output.TEXT,
) -> None:
    """Postroad: a self-hosted SMTP relay. `postroad up` starts it here, `postroad send --to …` tries it."""
    printer = make_printer(output)
    flags = Flags(server=server, api_key=api_key, ca_file=ca_file, account=account, context=context_)
    session = Session(flags, printer)
    context.obj = session
    context.call_on_close(session.close)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and end the process."""
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    words = hoist(arguments)
    output = Output.JSON if any(word in words for word in ("--output=json", "-ojson")) else Output.TEXT
    printer = make_printer(output)
    try:
        app(args=words, prog_name="postroad")
    except SystemExit as end:  # usage errors, too: typer has explained them
        return end.code if isinstance(end.code, int) else 1
    except (PostroadError, CommandError, ConnectionSettingsError, LocalStackError, InboxError) as error:
        return report(error, printer)
    except OSError as error:
        # With a file's name it is one that the user named, or one of ours that cannot be used.
        status = FAILED if error.filename is None else NOT_CONFIGURED
        text = f"{error.filename or ''}: {error.strerror or error}".lstrip(": ")
        return report(CommandError(text, status=status), printer)
    return 0


def hoist(arguments: Sequence[str]) -> list[str]:
    """Move the options that hold for every command to the front, each as one word with its value."""
    front: list[str] = []
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--":
            rest += [word, *words]
        elif word in _COMMON_OPTIONS:
            name = "--output" if word == "-o" else word
            value = next(words, None)
            # Without a value the parser says so, better than we would.
            front.append(name if value is None else f"{name}={value}")
        elif word.partition("=")[0] in _COMMON_OPTIONS:
            front.append(word)
        else:
            rest.append(word)
    return front + rest


if __name__ == "__main__":
    main()
