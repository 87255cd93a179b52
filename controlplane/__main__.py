"""The program `postroad-controlplane`: reads arguments and settings, runs one command, says in a line what went wrong.

Exit status: 0 done; 1 it could not be done; 2 wrong arguments or settings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from controlplane.app import AdministrationError, StartError, commands, serve
from controlplane.settings import Settings, SettingsError, load_settings, redacted


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the arguments name; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        settings = load_settings(options.config)
        return _run(options, settings)
    except SettingsError as error:
        return _complain(error, 2)
    except (AdministrationError, StartError) as error:
        return _complain(error, 1)


def _run(options: argparse.Namespace, settings: Settings) -> int:
    if options.command == "serve":
        return serve(settings)
    for line in _lines(options, settings):
        print(line)
    return 0


def _lines(options: argparse.Namespace, settings: Settings) -> list[str]:
    name = options.command + "-" + getattr(options, "action", "")
    run: dict[str, Callable[[], list[str]]] = {
        "check-config-": lambda: [redacted(settings).rstrip()],
        "bootstrap-": lambda: commands.make_first_key(settings),
        "migrate-up": lambda: commands.migrate_up(settings),
        "migrate-down": lambda: commands.migrate_down(settings, options.to),
        "migrate-status": lambda: commands.migrate_status(settings),
        "migrate-verify": lambda: commands.migrate_verify(settings),
        "pki-init": lambda: commands.pki_init(settings),
        "pki-issue-server": lambda: commands.pki_issue_server(settings, options.name, options.certificate, options.key),
        "pki-show": lambda: commands.pki_show(settings),
    }
    return run[name]()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("postroad-controlplane", description="The control plane of Postroad.")
    parser.add_argument("--config", type=Path, help="settings file, or the folder of controlplane.yaml")
    verbs = parser.add_subparsers(dest="command", required=True, metavar="command")
    verbs.add_parser("serve", help="serve until SIGTERM")
    verbs.add_parser("check-config", help="print the settings in force, without passwords")
    verbs.add_parser("bootstrap", help="print the first operator's key, once")

    migrate = verbs.add_parser("migrate", help="change the database's schema").add_subparsers(
        dest="action", required=True, metavar="action"
    )
    migrate.add_parser("up", help="apply what is missing")
    down = migrate.add_parser("down", help="undo migrations")
    down.add_argument("--to", type=int, required=True, metavar="NUMBER", help="undo everything above this one")
    migrate.add_parser("status", help="list migrations")
    migrate.add_parser("verify", help="check that code and database fit together")

    pki = verbs.add_parser("pki", help="the built-in CA").add_subparsers(dest="action", required=True, metavar="action")
    pki.add_parser("init", help="make the CA")
    issue = pki.add_parser("issue-server", help="issue a server certificate")
    issue.add_argument("--name", action="append", required=True, help="host name or address; may be repeated")
    issue.add_argument("--certificate", type=Path, help="where it goes, instead of the ports' own")
    issue.add_argument("--key", type=Path, help="where its key goes")
    pki.add_parser("show", help="print what there is")
    return parser


def _complain(error: Exception, status: int) -> int:
    print(f"postroad-controlplane: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
