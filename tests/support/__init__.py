"""Helpers that tests share: `from support.databases import Database`. Fixtures stand in conftest.py files."""

from __future__ import annotations
