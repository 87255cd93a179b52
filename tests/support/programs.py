"""Programs of the system that tests drive: found, or the test is skipped with what to install.

`.ci/run` installs them where it can, as root on a machine with apt. There a missing one is a failure, so that a gate
never passes because nothing was looked at.
"""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest

_SYSTEM_FOLDERS = "/usr/sbin:/sbin"  # not on an ordinary user's PATH


def find_program(name: str, package: str | None = None) -> str:
    """The program's path; skips or fails the test when it is missing."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:{_SYSTEM_FOLDERS}")
    if path is None:
        missing(f"{name} is not installed (Debian package {package or name})")
    return path


def missing(reason: str) -> NoReturn:
    """Skip the test, or fail it where `.ci/run` should have seen to it."""
    if os.environ.get("CI") == "true" and os.geteuid() == 0 and shutil.which("apt-get"):
        pytest.fail(reason)
    pytest.skip(reason)
