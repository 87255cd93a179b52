"""A stack of its own for each test, since each breaks it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.killable_stack import KillableStack
from support.local_stack import stack_folder


@pytest.fixture
def killable_stack() -> Iterator[KillableStack]:
    """A stack that is up."""
    with stack_folder() as folder:
        stack = KillableStack(folder)
        stack.start()
        try:
            yield stack
        finally:
            if stack.is_running:
                stack.stop()
