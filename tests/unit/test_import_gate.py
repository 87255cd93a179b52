"""The import contract of our own lets through what it should, and stops the rest."""

from __future__ import annotations

import pytest
from grimp import ImportGraph

from tools.import_gate import GateContract


def _graph(*imports: tuple[str, str]) -> ImportGraph:
    graph = ImportGraph()
    for importer, imported in imports:
        graph.add_import(importer=importer, imported=imported, line_number=1, line_contents=f"import {imported}")
    return graph


def _holds(graph: ImportGraph, **options: list[str]) -> bool:
    contract = GateContract(name="gate", session_options={}, contract_options=options)
    return contract.check(graph, verbose=False).kept


@pytest.mark.parametrize(
    ("importer", "imported", "holds"),
    [
        ("app.core.rules", "json", True),
        ("app.core.rules", "app.core.values", True),
        ("app.core.rules", "orjson", False),
        ("app.core", "orjson", False),
        ("app.corelike", "orjson", True),
        ("app.other", "orjson", True),
    ],
)
def test_only_the_standard_library(importer: str, imported: str, holds: bool) -> None:  # noqa: FBT001 - a table
    options = {"importers": ["app.core"], "imported": ["*"], "except_imported": ["stdlib", "app.core"]}
    assert _holds(_graph((importer, imported)), **options) is holds


def test_allowed_importer_passes_and_others_do_not() -> None:
    options = {"imported": ["app.adapters"], "allowed_importers": ["app.root", "app.adapters"]}
    assert _holds(_graph(("app.root", "app.adapters.sql"), ("app.adapters.a", "app.adapters.b")), **options)
    assert not _holds(_graph(("app.services.x", "app.adapters.sql")), **options)
