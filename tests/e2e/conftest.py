"""One local stack for all end-to-end tests of a worker process: `stack`. Tests that stop or break one make their own.

Its folder can be passed through by the user that the database runs as. What a test leaves behind in it (accounts,
messages) is under names of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from postroad.localstack import PostgresServer, ValkeyServer
from support import folders
from support.local_stack import LocalStack


@contextlib.contextmanager
def _stack_folder() -> Iterator[Path]:
    with folders.passable_folder() as folder:
        try:
            yield folder
        finally:
            # What a failed test left running must not outlive it.
            PostgresServer(folder / ".postroad" / "postgres").destroy()
            ValkeyServer(folder / ".postroad" / "valkey").destroy()


@pytest.fixture(scope="session")
def stack() -> Iterator[LocalStack]:
    with _stack_folder() as folder:
        running = LocalStack(folder).start()
        try:
            yield running
        finally:
            if running.is_running:
                running.stop()


@pytest.fixture
def own_stack() -> Iterator[LocalStack]:
    """A stack that is not started yet, for tests of its life."""
    with _stack_folder() as folder:
        stack = LocalStack(folder)
        try:
            yield stack
        finally:
            if stack.is_running:
                stack.stop()
