"""What `postroad up` says while it works: a spinner and ticks on a terminal, plain lines elsewhere.

Every remark is one line and names what it is about first, so that a log of it can be read and searched. Programs
(`--output json`) get one JSON object a line instead, with an `event`. A reader that has gone (a closed pipe, a closed
terminal) is no error: the stack runs on, and above all it stops in order.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.text import Text


class Progress(Protocol):
    """Somebody to talk to."""

    def step(self, what: str) -> Any:
        """A context manager around a step; says how long it took, or that it failed."""

    def remark(self, text: str) -> None:
        """Something that happened by itself: a server died, a mail came in."""

    def ready(self, facts: Mapping[str, Any], text: str) -> None:
        """All is up: the facts for programs, the text for people."""


class _SteadyConsole(Console):
    """A console that does not end the program when its reader has gone."""

    def on_broken_pipe(self) -> None:
        """Nothing: whoever read is gone."""


class PlainProgress:
    """A line for each step that is done."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """See Progress."""
        start = time.monotonic()
        yield
        self._line(f"{what}: done in {time.monotonic() - start:.1f} s")

    def remark(self, text: str) -> None:
        """See Progress."""
        self._line(text)

    def ready(self, facts: Mapping[str, Any], text: str) -> None:
        """See Progress."""
        self._line(text)

    def _line(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._console.print(Text(text), soft_wrap=True)
            self._console.file.flush()


class TerminalProgress(PlainProgress):
    """A spinner with what is being done, and a tick for what is done."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._running: list[str] = []
        self._status = console.status("")

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """See Progress; steps may run side by side."""
        start = time.monotonic()
        self._running.append(what)
        self._show()
        try:
            yield
            with contextlib.suppress(OSError):
                self._console.print(Text.assemble(("✓ ", "green"), f"{what}  {time.monotonic() - start:.1f} s"))
        finally:
            self._running.remove(what)
            self._show()

    def _show(self) -> None:
        with contextlib.suppress(OSError):
            if self._running:
                self._status.update(Text(", ".join(self._running) + " …"))
                self._status.start()
            else:
                self._status.stop()


class JsonProgress:
    """One JSON object a line on standard output."""

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """See Progress."""
        start = time.monotonic()
        yield
        _emit(event="up.step", step=what, seconds=round(time.monotonic() - start, 3))

    def remark(self, text: str) -> None:
        """See Progress."""
        _emit(event="up.remark", text=text)

    def ready(self, facts: Mapping[str, Any], text: str) -> None:
        """See Progress."""
        _emit(event="up.ready", **facts)


def progress_for(*, json_lines: bool) -> Progress:
    """The progress that fits whoever reads standard output."""
    if json_lines:
        return JsonProgress()
    console = _SteadyConsole(highlight=False)
    return TerminalProgress(console) if console.is_terminal else PlainProgress(console)


def _emit(**fields: Any) -> None:
    with contextlib.suppress(OSError):
        sys.stdout.write(json.dumps(fields) + "\n")
        sys.stdout.flush()
