"""`python -m benchmarks [NAME [ARGUMENT …]]`: run one measurement; without a name, say which there are.

A measurement is a module here with a `main` of its own, or a package with a `__main__`; what it says in its first line
is what is listed.
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

_FOLDER = Path(__file__).parent


def _measurements() -> dict[str, str]:
    """First line of each module that can be run, by name."""
    found = {}
    for path in [*_FOLDER.glob("*.py"), *_FOLDER.glob("*/__main__.py")]:
        source = path.read_text(encoding="utf-8")
        name = path.stem if path.parent == _FOLDER else path.parent.name
        if name != "__main__" and '__name__ == "__main__"' in source:
            found[name] = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    return dict(sorted(found.items()))


def main() -> int:
    """Run what was named; status 2 when there is no such measurement."""
    measurements = _measurements()
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in measurements:
        sys.argv = [f"benchmarks.{name}", *sys.argv[2:]]
        # Imported, not run as a program: processes that it starts look its functions up by their module.
        module = f"benchmarks.{name}.__main__" if (_FOLDER / name).is_dir() else f"benchmarks.{name}"
        status: int | None = importlib.import_module(module).main()
        return status or 0
    width = max(map(len, measurements))
    for each, purpose in measurements.items():
        sys.stdout.write(f"{each:{width}}  {purpose}\n")
    return 2 if name else 0


if __name__ == "__main__":
    sys.exit(main())
