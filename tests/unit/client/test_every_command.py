"""What holds for the options of every command, whoever adds one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main

from postroad.cli import main


def _commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    for name, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, (*words, name))
    if words and not hasattr(command, "commands"):
        yield " ".join(words), command


_ALL = list(_commands(typer.main.get_group(main.app)))


def _names(command: Any) -> list[str]:
    return [name for option in command.params for name in (*option.opts, *option.secondary_opts)]


def test_the_walk_sees_the_commands_of_families() -> None:
    assert {"send", "nodes update", "messages list"} <= {words for words, _ in _ALL}


@pytest.mark.parametrize(("words", "command"), _ALL, ids=[words for words, _ in _ALL])
def test_no_option_of_a_command_has_the_name_of_another(words: str, command: Any) -> None:
    twice = [name for name, count in Counter(_names(command)).items() if count > 1]
    assert not twice, f"postroad {words}"


@pytest.mark.parametrize(("words", "command"), _ALL, ids=[words for words, _ in _ALL])
def test_no_option_of_a_command_is_taken_by_the_options_for_all(words: str, command: Any) -> None:
    assert not main._COMMON_OPTIONS.intersection(_names(command)), f"postroad {words}"


@pytest.mark.parametrize("words", [words for words, _ in _ALL if words.endswith(" list") and "contexts" not in words])
def test_every_list_can_be_had_whole(words: str) -> None:
    command = dict(_ALL)[words]
    (bound,) = [option for option in command.params if {"--limit", "--last"}.intersection(option.opts)]
    assert bound.default is None
    assert "0 is all" in bound.help
