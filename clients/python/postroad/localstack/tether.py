"""Starts a program that ends with its parent: `python tether.py <parent's pid> <program> <arguments…>`.

On Linux the kernel sends SIGTERM to the program when the parent is gone, however it went (PR_SET_PDEATHSIG, which
survives exec). Elsewhere the program is started as it is, and the next `postroad up` ends it by its pid file. Run as
a file, before the program it becomes, because the setting has to be made in the child itself.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Tie this process to its parent and become the program."""
    parent, program = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        # The parent may have gone before the kernel was told.
        if os.getppid() != parent:
            sys.exit(1)
    os.execv(program[0], program)  # noqa: S606 - this is what the file is for


if __name__ == "__main__":
    main()
