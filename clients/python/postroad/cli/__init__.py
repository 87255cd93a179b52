"""The `postroad` command line: main.py is its entrance, one module for each family of commands."""

from __future__ import annotations
