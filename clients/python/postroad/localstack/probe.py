"""Asking a process of Postroad whether it is ready: GET on its probe port."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass

_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Readiness:
    """The answer of a `/readyz`: whether it is ready, and what it says is wrong; a node serves without all workers."""

    ready: bool
    detail: str


def readiness(url: str) -> Readiness:
    """Ask `url` (`http://host:port`); a process that does not answer is not ready. Blocks for up to 5 s."""
    try:
        # Addresses come from a file of ours, which names http:// only.
        with urllib.request.urlopen(f"{url}/readyz", timeout=_TIMEOUT_S) as answer:  # noqa: S310 - see above
            return Readiness(ready=True, detail=_detail(answer.read()))
    except urllib.error.HTTPError as error:
        with error:
            return Readiness(ready=False, detail=_detail(error.read()))
    except OSError as error:
        return Readiness(ready=False, detail=str(getattr(error, "reason", error)))


def _detail(body: bytes) -> str:
    try:
        answer = json.loads(body)
    except ValueError:
        return ""
    if not isinstance(answer, dict):
        return ""
    # The control plane tells of each check, a node of what is missing.
    failed = [f"{name}: {found}" for name, found in answer.get("checks", {}).items() if found != "ok"]
    return "; ".join([*failed, *(f"missing: {one}" for one in answer.get("missing", []))])
