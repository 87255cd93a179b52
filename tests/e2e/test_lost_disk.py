"""A node that is lost with its disk, as an operator sees it: what waited there ends, and nothing waits for it."""

from __future__ import annotations

from typing import Any

import pytest

from support.killable_stack import wait_until
from support.local_stack import LocalStack

pytestmark = pytest.mark.timeout(240)


def test_what_waits_on_a_lost_disk_is_given_up_by_a_command(own_stack: LocalStack) -> None:
    stack = own_stack.start()
    stack.json("providers", "suspend", "inbox")
    assert stack.cli("send", "--to", "someone@example.net", "--subject", "lost", "--no-follow").returncode == 0

    def waiting() -> list[dict[str, Any]]:
        (node,) = stack.json("spool", "list")["nodes"]
        return [spool for spool in node["spools"] if int(spool.get("waitingCount", 0))]

    wait_until(lambda: bool(waiting()), "the mail is reported")
    (spool,) = waiting()
    words = ("spool", "give-up", spool["spool"], "--node", "node-1")
    refused = stack.cli(*words, "--yes")
    assert refused.returncode == 1
    assert "reason: SPOOL_IN_USE" in refused.stderr
    asked = stack.cli(*words)
    assert (asked.returncode, "refuse its disk for ever" in asked.stdout + asked.stderr) == (1, True)

    stack.json("nodes", "revoke", "node-1")
    left = stack.json(*words)
    assert spool["spool"] not in {one["spool"] for one in left["spools"]}
    wait_until(lambda: _message(stack)["state"] == "RECIPIENT_STATE_FAILED", "what waited there has ended")
    told = stack.json("messages", "get", _message(stack)["name"].rpartition("/")[2])["events"]
    assert "the disk it waited on was given up" in str(told)
    assert stack.cli("audit").returncode == 0


def _message(stack: LocalStack) -> dict[str, Any]:
    message: dict[str, Any]
    (message,) = stack.json("messages", "list")["messages"]
    return message
