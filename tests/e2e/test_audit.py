"""The books of a node that runs: they balance, and mail that a hand deleted on either side is named."""

from __future__ import annotations

import asyncio
import json
import smtplib
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from postroad.localstack import PostgresServer
from support.local_stack import LocalStack

pytestmark = pytest.mark.timeout(180)

WAIT_S = 60.0


def _audit(stack: LocalStack) -> tuple[int, dict[str, Any]]:
    """What `postroad audit` says."""
    result = stack.cli("audit", "--output", "json")
    assert result.returncode in {0, 1}, result.stderr
    return result.returncode, json.loads(result.stdout)


def _until(stack: LocalStack, holds: Callable[[dict[str, Any]], bool]) -> tuple[int, dict[str, Any]]:
    deadline = time.monotonic() + WAIT_S
    while True:
        status, said = _audit(stack)
        if holds(said):
            return status, said
        assert time.monotonic() < deadline, (said, stack.logs())


def _named(said: dict[str, Any], kind: str) -> list[str]:
    return [one.get("message", "") for one in said["bookFindings"] if one["kind"] == f"KIND_{kind}"]


def _submit(stack: LocalStack, count: int) -> list[str]:
    """Messages that wait, since their provider is suspended; returns their ids."""
    ids = []
    with smtplib.SMTP_SSL("127.0.0.1", stack.ready["ports"]["smtps"], context=stack.tls_context()) as client:
        client.login(stack.ready["smtp_username"], stack.ready["smtp_password"])
        for _ in range(count):
            client.mail("app@example.com")
            client.rcpt("someone@example.net")
            code, answer = client.data(b"Subject: audit\r\n\r\nHello\r\n")
            assert code == 250, answer
            ids.append(answer.split()[-1].decode())
    return ids


def _delete_in_spool(stack: LocalStack, message: str) -> None:
    """From whichever worker's spool has it."""
    deleted = 0
    for file in (stack.folder / ".postroad" / "node-1" / "spool").glob("*/spool.db"):
        with closing(sqlite3.connect(file, timeout=20)) as database, database:
            deleted += database.execute("DELETE FROM recipient WHERE message_id = ?", (UUID(message).bytes,)).rowcount
    assert deleted == 1


async def _delete_in_ledger(stack: LocalStack, message: str) -> None:
    server = PostgresServer(stack.folder / ".postroad" / "postgres", stack.ready["ports"]["postgres"])
    connection = await asyncpg.connect(server.dsn(database="postroad"))
    try:
        answer = await connection.execute("DELETE FROM postroad.recipients WHERE message_id = $1", UUID(message))
        assert answer == "DELETE 1"
    finally:
        await connection.close()


def test_mail_that_a_hand_deleted_is_named(own_stack: LocalStack) -> None:
    own_stack.extra_environment["POSTROAD_CONTROLPLANE_AUDIT__INTERVAL_S"] = "0.2"
    stack = own_stack.start()
    assert stack.cli("providers", "suspend", "inbox").returncode == 0
    in_spool, in_ledger, _ = _submit(stack, 3)

    status, said = _until(stack, lambda said: sum(int(one.get("waitingCount", 0)) for one in said["books"]) == 3)
    assert status == 0, said
    assert all(one["balances"] and one["agrees"] for one in said["books"])

    _delete_in_spool(stack, in_spool)
    status, said = _until(stack, lambda said: bool(said["bookFindings"]))
    assert status == 1
    assert _named(said, "MISSING_IN_SPOOL") == [f"accounts/demo/messages/{in_spool}"]

    asyncio.run(_delete_in_ledger(stack, in_ledger))
    status, said = _until(stack, lambda said: len(said["bookFindings"]) == 3)
    assert status == 1
    assert _named(said, "MISSING_IN_LEDGER") == [f"accounts/demo/messages/{in_ledger}"]
    assert _named(said, "UNBALANCED") == [""]
    shown = stack.cli("audit")
    assert in_spool in shown.stdout, shown
