"""The gates on the contract shut: an edit that breaks users is refused, and so is one without a comment.

Until there is a release tag to compare with, this is what stands for the breaking check: the rules of
buf.yaml, run on a small contract and an edit of it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
BUF = Path(sys.executable).parent / "buf"

CONTRACT = """\
syntax = "proto3";

package postroad.gate.v1;

// A thing.
message Thing {
  // Its name.
  string name = 1;
  // How many.
  int32 count = 2;
}
"""


def _write(folder: Path, contract: str) -> Path:
    """A workspace with our rules and one proto."""
    rules = yaml.safe_load((ROOT / "buf.yaml").read_text(encoding="utf-8"))
    rules["modules"] = [{"path": "proto"}]
    rules["lint"].pop("ignore_only")
    target = folder / "proto" / "postroad" / "gate" / "v1" / "thing.proto"
    target.parent.mkdir(parents=True)
    target.write_text(contract, encoding="utf-8")
    (folder / "buf.yaml").write_text(yaml.safe_dump(rules), encoding="utf-8")
    return folder


def _buf(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BUF, *arguments], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("  // How many.\n  int32 count = 2;\n", "", id="field deleted"),
        pytest.param("int32 count = 2", "int32 count = 3", id="number changed"),
        pytest.param("int32 count", "string count", id="type changed"),
        pytest.param("string name", "string title", id="name changed, as JSON shows it"),
        pytest.param("message Thing {", "message Object {", id="message renamed"),
    ],
)
def test_breaking_edit_is_refused(tmp_path: Path, old: str, new: str) -> None:
    before = _write(tmp_path / "before", CONTRACT)
    after = _write(tmp_path / "after", CONTRACT.replace(old, new))
    result = _buf(after, "breaking", "--against", str(before))
    assert result.returncode == 100, result.stdout + result.stderr


def test_new_field_is_let_through(tmp_path: Path) -> None:
    before = _write(tmp_path / "before", CONTRACT)
    longer = CONTRACT.replace("count = 2;", "count = 2;\n  // Whose it is.\n  string owner = 3;")
    after = _write(tmp_path / "after", longer)
    result = _buf(after, "breaking", "--against", str(before))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("contract", "rule"),
    [
        pytest.param(CONTRACT.replace("// A thing.\n", ""), "comment", id="no comment"),
        pytest.param(CONTRACT.replace("string name", "string Name"), "lower_snake_case", id="field name"),
        pytest.param(CONTRACT + "\n// Kinds.\nenum Kind {\n  NONE = 0;\n}\n", "KIND_", id="enum prefix"),
    ],
)
def test_lint_refuses(tmp_path: Path, contract: str, rule: str) -> None:
    result = _buf(_write(tmp_path, contract), "lint")
    assert result.returncode == 100
    assert rule in result.stdout


def test_lint_lets_the_example_through(tmp_path: Path) -> None:
    result = _buf(_write(tmp_path, CONTRACT), "lint")
    assert result.returncode == 0, result.stdout + result.stderr
