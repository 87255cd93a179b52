"""docs/errors.md names every reason of the API with its status, and no reason comes with two of them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from controlplane.adapters.grpc.errors import STATUS_CODES
from controlplane.domain import errors
from controlplane.domain.errors import ControlPlaneError, Reason
from postroad.sdk.errors import BY_CODE, BY_REASON

ROOT = Path(__file__).parents[2]
_DOCUMENT = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
DOCUMENTED = {
    columns[1].strip(" `"): columns[2].strip()
    for line in _DOCUMENT.splitlines()
    if line.startswith("| `") and (columns := line.split("|"))
}


def raised() -> Iterator[tuple[str, str, str]]:
    """Where an error is made with a reason, the reason, and the status of its class."""
    for file in sorted((ROOT / "controlplane").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Name(id=name), args=arguments):
                    kind = getattr(errors, name, None)
                    if not (isinstance(kind, type) and issubclass(kind, ControlPlaneError)):
                        continue
                    for argument in arguments:
                        match argument:
                            case ast.Attribute(value=ast.Name(id="Reason"), attr=reason):
                                yield f"{file.name}:{node.lineno}", reason, STATUS_CODES[kind].name


def test_every_reason_is_documented_and_no_other() -> None:
    assert set(DOCUMENTED) == {reason.name for reason in Reason} == set(BY_REASON)


@pytest.mark.parametrize("reason", sorted(DOCUMENTED))
def test_clients_have_the_class_of_the_documented_status(reason: str) -> None:
    codes = {code.name for code, kind in BY_CODE.items() if issubclass(BY_REASON[reason], kind)}
    assert DOCUMENTED[reason] in codes


def test_each_reason_comes_with_its_status_only() -> None:
    found = list(raised())
    assert len({reason for _, reason, _ in found}) > len(Reason) / 2
    assert [(place, reason, status) for place, reason, status in found if DOCUMENTED[reason] != status] == []
