"""The control plane: configuration and the record of every message, over gRPC."""

from __future__ import annotations
