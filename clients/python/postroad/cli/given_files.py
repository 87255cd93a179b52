"""Files that the line names; one that cannot be used is a `CommandError` of status 3. `-` is standard input."""

from __future__ import annotations

import sys
from pathlib import Path

from postroad.cli.problems import NOT_CONFIGURED, CommandError


def read_bytes(file: Path) -> bytes:
    """The whole content."""
    try:
        return sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise CommandError(f"{file}: {error.strerror}", status=NOT_CONFIGURED) from error


def read_text(file: Path) -> str:
    """The whole content, which is UTF-8, with LF at the end of each line."""
    try:
        return read_bytes(file).decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise CommandError(f"{file}: it is not UTF-8", status=NOT_CONFIGURED) from error
