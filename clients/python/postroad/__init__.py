"""Postroad for Python: the generated API, the SDK, the `postroad` command and the local stack."""

from __future__ import annotations
