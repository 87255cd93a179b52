"""The data plane: a node, which accepts and delivers mail."""

from __future__ import annotations
