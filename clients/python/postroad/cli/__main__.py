"""`python -m postroad.cli`: the `postroad` command without its script."""

from __future__ import annotations

from postroad.cli.main import main

main()
