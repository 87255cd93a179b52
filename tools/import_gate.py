"""An import-linter contract: certain modules may be imported directly only by certain others.

import-linter's own contracts name modules that must exist; this one is stated as prefixes of names, so it
holds for
modules that are written later, and it knows "everything that is not the standard library". Keys of a
contract:

    imported            what is behind the gate; `*` is everything
    except_imported     of that, what is free; `stdlib` is the standard library
    importers           whom the gate is closed to; all by default
    allowed_importers   of those, who may pass

A name stands for a module and all below it. Broken when a direct import passes a closed gate, with the line
of it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output


class GateContract(Contract):
    """See the module."""

    # Fields when the class is read, lists of names when a contract is checked.
    imported: Any = fields.ListField(subfield=fields.StringField())
    except_imported: Any = fields.ListField(subfield=fields.StringField(), required=False, default=[])
    importers: Any = fields.ListField(subfield=fields.StringField(), required=False, default=["*"])
    allowed_importers: Any = fields.ListField(subfield=fields.StringField(), required=False, default=[])

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:  # noqa: FBT001 - not our signature
        """Look at every direct import in the graph."""
        broken = [
            detail
            for importer in sorted(graph.modules)
            if _is_below(importer, self.importers) and not _is_below(importer, self.allowed_importers)
            for imported in sorted(graph.find_modules_directly_imported_by(importer))
            if _is_below(imported, self.imported) and not _is_below(imported, self.except_imported)
            for detail in graph.get_import_details(importer=importer, imported=imported)
        ]
        return ContractCheck(kept=not broken, metadata={"broken": broken})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Name each import that passed the gate."""
        for detail in check.metadata["broken"]:
            output.print_error(
                f"{detail['importer']}, line {detail['line_number']}: {detail['line_contents']}", bold=False
            )


def _is_below(module: str, prefixes: Iterable[str]) -> bool:
    return any(
        prefix == "*"
        or (prefix == "stdlib" and module.partition(".")[0] in sys.stdlib_module_names)
        or module == prefix
        or module.startswith(prefix + ".")
        for prefix in prefixes
    )
