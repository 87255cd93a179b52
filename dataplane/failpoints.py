"""Points in the code where a test may end the process as a power cut would; nothing unless the environment names them.

`POSTROAD_FAILPOINTS` is a comma-separated list of `name:n`: the n-th time that the process passes `failpoint(name)` it
gets SIGKILL, so neither handlers nor buffers nor `finally` run. Without the variable `failpoint` is an empty function.
A text that is no such list is an error at import, so that a misspelt campaign cannot pass for a survived one.

A supervisor starts the killed process again, with the same environment: `POSTROAD_FAILPOINTS_SPENT` names a folder
where each point that struck leaves a file of its name, and does not strike again, in whichever process it is passed.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

VARIABLE = "POSTROAD_FAILPOINTS"
SPENT_VARIABLE = "POSTROAD_FAILPOINTS_SPENT"


def _off(name: str) -> None:
    """Do nothing."""


def make_failpoint(text: str, spent_folder: str = "") -> Callable[[str], None]:
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
        if left == 1 and _spend(name, spent_folder):
            os.kill(os.getpid(), signal.SIGKILL)
        remaining[name] = left - 1

    return pass_point


def _spend(name: str, folder: str) -> bool:
    """Whether the point may strike: without a folder always, with one once for all processes."""
    if not folder:
        return True
    try:
        os.close(os.open(Path(folder, name), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    return True


failpoint = make_failpoint(os.environ.get(VARIABLE, ""), os.environ.get(SPENT_VARIABLE, ""))
