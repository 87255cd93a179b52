"""A stack of its own for each test, since each breaks it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.chaos.books import Books
from support.chaos.stack import ChaosStack
from support.fault_proxy import in_thread
from support.local_stack import stack_folder


@pytest.fixture
def chaos_stack() -> Iterator[ChaosStack]:
    """A stack that is up, with a proxy on every link and the judge's sink behind it."""
    with stack_folder() as folder, in_thread() as thread:
        stack = ChaosStack(folder, Books(folder / "books"), thread)
        try:
            stack.bring_up()
            yield stack
        finally:
            if stack.is_running:
                stack.stop()
            stack.take_down()
