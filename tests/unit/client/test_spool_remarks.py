"""What `postroad status` says of spools that need somebody."""

from __future__ import annotations

from typing import Any

from postroad.cli.spools import spool_remarks
from postroad.control.v1.node_pb2 import Node

S = "22222222-2222-4222-8222-222222222222"


def remarks(**fields: Any) -> list[str]:
    node = Node(name="nodes/mx1")
    node.spools.add(spool=S, **fields)
    return list(spool_remarks(node))


def test_a_spool_in_order_is_not_spoken_of() -> None:
    assert remarks(accepted=True) == []


def test_a_refused_spool_is_named_with_what_to_do() -> None:
    (text,) = remarks(accepted=False)
    assert f"`postroad spool accept {S} --node mx1`" in text


def test_lost_messages_are_named() -> None:
    (text,) = remarks(accepted=True, lost_messages=["a", "b"], lost_count=2)
    assert text == f"mx1: spool {S} was damaged, messages lost: 2: a, b"
    (text,) = remarks(accepted=True, lost_messages=[str(number) for number in range(11)], lost_count=11)
    assert text.endswith("8, 9; `postroad nodes get mx1` names more")


def test_losses_that_nobody_can_name_are_not_spoken_of_as_losses() -> None:
    (text,) = remarks(accepted=True, unnamed_losses=True)
    assert text == f"mx1: spool {S} was damaged: no message is known to be lost, but parts cannot be read"
    (text,) = remarks(accepted=True, unnamed_losses=True, lost_count=1, lost_messages=["a"])
    assert text == f"mx1: spool {S} was damaged, messages lost: 1 or more: a"
