"""The local stack: real PostgreSQL and Valkey as child processes, from wheels, with no system package.

`postroad up` and the tests use the same two classes, `PostgresServer` and `ValkeyServer`. Everything here is
plain, blocking code without asyncio: starting and stopping take place before and after an event loop runs, or
in a thread. Every failure that a person can mend is a `LocalStackError` that says how.
"""

from __future__ import annotations

from postroad.localstack.errors import LocalStackError
from postroad.localstack.postgres import UNSAFE_BUT_FAST, PostgresServer
from postroad.localstack.server import LocalServer
from postroad.localstack.valkey import ValkeyServer

__all__ = ["UNSAFE_BUT_FAST", "LocalServer", "LocalStackError", "PostgresServer", "ValkeyServer"]
