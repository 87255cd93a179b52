"""One local stack for all end-to-end tests of a worker process: `stack`. Tests that stop or break one make their own.

Its folder can be passed through by the user that the database runs as. What a test leaves behind in it (accounts,
messages) is under names of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.local_stack import LocalStack, stack_folder


@pytest.fixture(scope="session")
def stack() -> Iterator[LocalStack]:
    with stack_folder() as folder:
        running = LocalStack(folder).start()
        try:
            yield running
        finally:
            if running.is_running:
                running.stop()


@pytest.fixture
def own_stack() -> Iterator[LocalStack]:
    """A stack that is not started yet, for tests of its life."""
    with stack_folder() as folder:
        stack = LocalStack(folder)
        try:
            yield stack
        finally:
            if stack.is_running:
                stack.stop()
