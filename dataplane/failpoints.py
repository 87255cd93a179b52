"""Points in the code where a test may end the process as a power cut would; nothing unless the environment names them.

`POSTROAD_FAILPOINTS` is a comma-separated list of `name:n`: the n-th time that the process passes `failpoint(name)` it
gets SIGKILL, so neither handlers nor buffers nor `finally` run. Without the variable `failpoint` is an empty function.
A text that is no such list is an error at import, so that a misspelt campaign cannot pass for a survived one.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

VARIABLE = "POSTROAD_FAILPOINTS"


def _off(name: str) -> None:
    """Do nothing."""


def make_failpoint(text: str) -> Callable[[str], None]:
    """Return the function that counts passes and kills at those that `text` names. ValueError for a malformed text."""
    if not text:
        return _off
    remaining: dict[str, int] = {}
    for item in text.split(","):
        name, separator, count = item.strip().rpartition(":")
        if not separator or not name or int(count) < 1:
            raise ValueError(f"{VARIABLE}: {item!r} is not name:n with n from 1")
        remaining[name] = int(count)

    def pass_point(name: str) -> None:
        left = remaining.get(name)
        if left is None:
            return
        if left == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        remaining[name] = left - 1

    return pass_point


failpoint = make_failpoint(os.environ.get(VARIABLE, ""))
