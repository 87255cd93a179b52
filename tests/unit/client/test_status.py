"""`postroad status` ends with what it shows; `postroad nodes` says one word for a node's state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from postroad.cli import problems
from postroad.cli.main import run
from postroad.cli.session import Session
from postroad.control.v1.node_pb2 import Node
from postroad.control.v1.node_service_pb2 import GetNodeRequest, ListNodesRequest, ListNodesResponse, UpdateNodeRequest

S = "22222222-2222-4222-8222-222222222222"
DRAIN = "accounts/-/operations/1"


class Nodes:
    """The part of a client that shows and changes nodes."""

    def __init__(self, *found: Node) -> None:
        self.nodes = self
        self.found = {node.name: node for node in found}
        self.updates: list[UpdateNodeRequest] = []

    def ListNodes(self, request: ListNodesRequest) -> ListNodesResponse:
        return ListNodesResponse(nodes=self.found.values())

    def GetNode(self, request: GetNodeRequest) -> Node:
        return self.found[request.name]

    def UpdateNode(self, request: UpdateNodeRequest) -> Node:
        self.updates.append(request)
        return request.node


def spool(**fields: Any) -> Any:
    return Node().spools.add(**{"spool": S, "accepted": True, **fields})


def node(name: str = "mx1", **fields: Any) -> Node:
    return Node(
        name=f"nodes/{name}", **{"state": Node.STATE_ENROLLED, "connected": True, "spools": [spool()], **fields}
    )


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of whoever runs the tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("POSTROAD_SERVER", "POSTROAD_CONTEXT", "POSTROAD_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"drain_operation": DRAIN},
        # Nobody waits for these.
        {"state": Node.STATE_PENDING, "connected": False, "spools": []},
        {"state": Node.STATE_REVOKED, "connected": False},
        # It is on its way.
        {"config_status": Node.CONFIG_STATUS_NOT_SENT},
    ],
)
def test_a_fleet_in_order_is_status_0(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Session, "client", Nodes(node(), node("mx2", **fields)))
    assert run(["status"]) == 0
    assert capsys.readouterr().err == ""
    assert run(["status", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["ready"] is True


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"connected": False}, "mx2: not connected, last seen never"),
        ({"config_status": Node.CONFIG_STATUS_ERROR, "config_error": "no"}, "mx2: refused its configuration: no"),
        ({"spools": [spool(accepted=False)]}, "came back older"),
        ({"spools": [spool(lost_count=2)]}, "messages lost: 2"),
        ({"spools": [spool(unnamed_losses=True)]}, "was damaged"),
        ({"state": Node.STATE_REVOKED, "spools": [spool(accepted=False)]}, "came back older"),
    ],
)
def test_what_is_not_in_order_is_status_1_and_is_said(
    fields: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Session, "client", Nodes(node(), node("mx2", **fields)))
    assert run(["status"]) == problems.FAILED
    assert words in capsys.readouterr().err
    assert run(["status", "-o", "json"]) == problems.FAILED
    assert json.loads(capsys.readouterr().out)["ready"] is False


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({}, "enrolled"),
        ({"drain_operation": DRAIN}, "drained"),
        ({"drain_operation": DRAIN, "state": Node.STATE_REVOKED}, "revoked"),
    ],
)
def test_a_node_is_in_the_same_state_in_list_and_get(
    fields: dict[str, Any], word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Session, "client", Nodes(node(**fields)))
    assert run(["nodes", "list"]) == 0
    assert word in capsys.readouterr().out.splitlines()[1].split()
    assert run(["nodes", "get", "mx1"]) == 0
    assert ["state", word] in [line.split() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    ("words", "paths"),
    [
        (["--display-name", "x"], ["display_name"]),
        (["--pool", "x"], ["node_pool"]),
        (["--pool", "nodePools/x", "--display-name", "x"], ["display_name", "node_pool"]),
    ],
)
def test_an_edit_of_a_node_changes_what_it_names(
    words: list[str], paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Nodes(node(node_pool="nodePools/default"))
    monkeypatch.setattr(Session, "client", client)
    assert run(["nodes", "update", "mx1", *words]) == 0
    (update,) = client.updates
    assert list(update.update_mask.paths) == paths
    assert update.node.node_pool == ("nodePools/x" if "node_pool" in paths else "nodePools/default")
    assert update.node.display_name == ("x" if "display_name" in paths else "")
