"""docs/logs.md and the code tell of the same events with the same fields, and no field is one that is left out."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import dataplane.event_log

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "logs.md").read_text(encoding="utf-8")
NODE, CONTROL_PLANE = DOCUMENT.split("\n## Control plane\n")
_EVENT = re.compile(r"[a-z_]+\.[a-z_]+")
_LOGS = {"debug", "info", "warning", "error", "_report", "_failed"}
# Written by the log itself around the fields, and what it makes of `exc_info`.
_HEAD = {"time", "level", "event", "process", "node", "exception"}
_ATTEMPT = "see below"


class Line(NamedTuple):
    """A place in the code that writes a line; no fields where they are made elsewhere."""

    place: str
    event: str
    fields: set[str] | None


def events_of(node: ast.expr) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and _EVENT.fullmatch(part.value):
            yield part.value


def lines_of(plane: str) -> Iterator[Line]:
    for file in sorted((ROOT / plane).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            place = f"{file.name}:{getattr(node, 'lineno', 0)}"
            match node:
                case ast.Call(func=ast.Attribute(attr=name), args=[event, *_]) if name in _LOGS:
                    fields = {keyword.arg for keyword in node.keywords}
                    known = None if None in fields else {field for field in fields if field} - {"exc_info"}
                    for found in events_of(event):
                        yield Line(place, found, known)
                case ast.Call(func=ast.Name(id="_emit"), args=[_, _, ast.Constant(value=str(found)), *_]):
                    yield Line(place, found, None)
                case ast.AnnAssign(target=ast.Name(id="_EVENTS"), value=ast.Dict(values=values)):
                    for value in values:
                        for found in events_of(value):
                            yield Line(place, found, None)


def documented(text: str) -> dict[str, str]:
    """Events and the column behind them."""
    return {
        event: columns[1]
        for line in text.splitlines()
        if line.startswith("| `") and len(columns := line.split(" | ")) > 1
        for event in re.findall(r"`([^`]+)`", columns[0])
        if _EVENT.fullmatch(event)
    }


def test_every_event_of_a_node_is_documented_and_every_documented_one_exists() -> None:
    assert set(documented(NODE)) == {line.event for line in lines_of("dataplane")}


def test_every_event_of_a_control_plane_is_documented_and_every_documented_one_exists() -> None:
    assert set(documented(CONTROL_PLANE)) == {line.event for line in lines_of("controlplane")}


def test_fields_are_documented_as_they_are() -> None:
    fields: dict[str, set[str]] = {}
    for line in lines_of("dataplane"):
        if line.fields is not None:
            fields.setdefault(line.event, set()).update(line.fields)
    for event, column in documented(NODE).items():
        if event in fields and not column.startswith(_ATTEMPT):
            assert fields[event] == set(re.findall(r"`(\w+)`", column)), event


def test_fields_of_an_attempt_are_documented() -> None:
    text = NODE.split("Lines of attempts have")[1].split("\n\n")[0]
    source = (ROOT / "dataplane" / "delivery" / "dispatch.py").read_text(encoding="utf-8")
    (fields,) = (
        {keyword.arg for keyword in node.keywords}
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "self._log.info"
    )
    assert fields == set(re.findall(r"`(\w+)`", text))


def test_what_may_be_held_back_is_marked_and_exists() -> None:
    marked = set(re.findall(r"^\| `([a-z_.]+)` ~ \|", DOCUMENT, re.MULTILINE))
    assert marked == dataplane.event_log.NOISY


def test_no_field_has_a_name_that_the_log_uses_itself_or_leaves_out() -> None:
    for line in lines_of("dataplane"):
        assert not (line.fields or set()) & _HEAD, line
        assert not (line.fields or set()) & dataplane.event_log.NEVER_WRITTEN, line
