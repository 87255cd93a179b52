"""The command that `postroad up` prints: pasted where it was printed, it finds the stack that printed it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from postroad.cli.connection import Flags, find_connection
from postroad.localstack.run import pasted_command


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POSTROAD_DIR", raising=False)
    monkeypatch.chdir(tmp_path)


def _stack(root: Path) -> Path:
    root.mkdir(parents=True)
    (root / "cli.yaml").touch(mode=0o600)
    (root / "cli.yaml").write_text(f"server: 127.0.0.1:{len(root.parts)}\napi_key: {root.name}\n", encoding="utf-8")
    return root


def _finds(command: str, environment: dict[str, str]) -> str:
    for word in shlex.split(command):
        name, separator, value = word.partition("=")
        if not separator:
            break
        environment = {**environment, name: value}
    return find_connection(Flags(), {"HOME": "/nowhere", **environment}, Path.cwd()).source


@pytest.mark.parametrize("place", ["elsewhere", "with a space", "deep/.postroad", ".postroad"])
@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("nearer", [False, True])
def test_the_printed_command_finds_its_stack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, *, exported: bool, nearer: bool
) -> None:
    root = _stack(tmp_path / place)
    environment = {"POSTROAD_DIR": str(tmp_path / "another")} if exported else {}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if nearer:
        _stack(tmp_path / "here" / ".postroad")
        monkeypatch.chdir(tmp_path / "here")
    assert Path(_finds(pasted_command(root), environment)).samefile(root / "cli.yaml")


def test_nothing_stands_before_the_command_where_the_folder_is_found_by_itself(tmp_path: Path) -> None:
    assert "=" not in pasted_command(_stack(tmp_path / ".postroad"))
