"""docs/cli.md says what the command line has: commands, options for all, ports, statuses."""

from __future__ import annotations

import re
from pathlib import Path

import typer.main

from postroad.cli import main, problems
from postroad.localstack.ports import DEFAULT_PORTS

_TEXT = (Path(__file__).parents[3] / "docs" / "cli.md").read_text(encoding="utf-8")


def _section(title: str) -> str:
    return _TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def _documented_commands() -> set[str]:
    found = set()
    for row in re.findall(r"^\| (`.*?`) \|", _section("Commands"), re.MULTILINE):
        words = re.findall(r"`([^`]+)`", row)
        family = words[0].split()[0]
        found |= {words[0], *(f"{family} {word}" for word in words[1:])}
    return found


def _real_commands() -> set[str]:
    group = typer.main.get_group(main.app)
    found = set()
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None)
        found |= {name} if inner is None else {f"{name} {verb}" for verb in inner}
    return found


def test_the_commands_are_those_that_exist() -> None:
    assert _documented_commands() == _real_commands()


def test_the_options_for_all_commands_are_those_that_exist() -> None:
    documented = set(re.findall(r"`(--?[a-z-]+)`", _TEXT.partition("\n## ")[0].partition("| option")[2]))
    assert documented == main._COMMON_OPTIONS


def test_the_ports_are_those_that_exist() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \| (\d+) \|", _section("`postroad up`"), re.MULTILINE)
    assert {name: int(port) for name, port in rows} == DEFAULT_PORTS


def test_the_statuses_are_those_that_exist() -> None:
    documented = {int(status) for status in re.findall(r"^\| (\d+) \|", _section("For programs"), re.MULTILINE)}
    ours = {
        problems.FAILED,
        problems.NOT_CONFIGURED,
        problems.UNREACHABLE,
        problems.NOT_ALLOWED,
        problems.NOT_THERE,
    }
    assert documented == ours | {0, 2, 130}
    described = {int(status) for status in re.findall(r"^    (\d+) ", problems.__doc__ or "", re.MULTILINE)}
    assert described == documented
