"""Asking processes of Postroad: whether one is ready, by its probe port, and whether a node takes a password."""

from __future__ import annotations

import json
import smtplib
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from postroad.localstack.ports import LOOPBACK

_TIMEOUT_S = 5.0
_REFUSED = 535


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


def login_is_refused(port: int, ca_file: Path, username: str, password: str) -> bool:
    """Whether the node at the TLS `port` says for good that this is no login. Blocks for up to 5 s."""
    context = ssl.create_default_context(cafile=ca_file)
    try:
        with smtplib.SMTP_SSL(LOOPBACK, port, timeout=_TIMEOUT_S, context=context) as client:
            client.login(username, password)
    except smtplib.SMTPAuthenticationError as error:
        return error.smtp_code == _REFUSED
    except (OSError, smtplib.SMTPException):
        return False
    return False


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
