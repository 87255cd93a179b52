from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import grpc
import pytest
from google.longrunning.operations_pb2 import GetOperationRequest, Operation
from google.longrunning.operations_pb2_grpc import OperationsStub
from google.protobuf.field_mask_pb2 import FieldMask
from google.rpc import code_pb2

from controlplane.domain.secrets import hash_secret
from postroad.config.v1 import bundle_pb2
from postroad.control.v1 import account_pb2, account_service_pb2
from postroad.control.v1 import node_pb2 as pb
from postroad.control.v1 import node_service_pb2 as service
from support.api import ApiStack, running_api
from support.databases import Database

UUID_1 = "11111111-1111-4111-8111-111111111111"
SPOOL = "22222222-2222-4222-8222-222222222222"


@pytest.fixture
async def stack(migrated_database: Database) -> AsyncIterator[ApiStack]:
    async with running_api(migrated_database) as running:
        yield running


async def settings_of(stack: ApiStack, pool: str = "default") -> bundle_pb2.NodeSettingsBundle:
    (row,) = await stack.as_superuser(
        "SELECT content FROM postroad.config_bundles WHERE bundle = $1", f"pools/{pool}/settings"
    )
    return bundle_pb2.NodeSettingsBundle.FromString(row["content"])


async def test_a_node_is_born_with_a_token_that_is_shown_once(stack: ApiStack) -> None:
    request = service.CreateNodeRequest(node_id="edge-1", request_id=UUID_1)
    made = await stack.operator.node("CreateNode", request)
    assert made.state == pb.Node.STATE_PENDING
    assert made.enrollment_token.startswith("pre_")
    left = made.enrollment_expire_time.ToDatetime(tzinfo=UTC) - datetime.now(UTC)
    assert timedelta(minutes=14) < left <= timedelta(minutes=15)
    again = await stack.operator.node("CreateNode", request)
    assert (again.uid, again.enrollment_token) == (made.uid, "")
    (row,) = await stack.as_superuser("SELECT token_sha256 FROM postroad.enrollment_tokens")
    assert row["token_sha256"] == hash_secret(made.enrollment_token)


async def test_a_new_token_voids_the_old_one(stack: ApiStack) -> None:
    made = await stack.operator.node("CreateNode", service.CreateNodeRequest(node_id="edge-1"))
    reset = await stack.operator.node("ResetNodeEnrollment", service.ResetNodeEnrollmentRequest(name=made.name))
    assert reset.enrollment_token not in ("", made.enrollment_token)
    (row,) = await stack.as_superuser("SELECT token_sha256 FROM postroad.enrollment_tokens")
    assert row["token_sha256"] == hash_secret(reset.enrollment_token)


async def test_the_pool_knows_how_many_nodes_share_its_limits(stack: ApiStack) -> None:
    assert (await settings_of(stack)).node_count == 1
    for number in range(3):
        await stack.operator.node("CreateNode", service.CreateNodeRequest(node_id=f"edge-{number}"))
    assert (await settings_of(stack)).node_count == 3
    revoked = await stack.operator.node("RevokeNode", service.RevokeNodeRequest(name="nodes/edge-0"))
    assert revoked.state == pb.Node.STATE_REVOKED
    assert (await settings_of(stack)).node_count == 2
    await stack.operator.node("CreateNodePool", service.CreateNodePoolRequest(node_pool_id="other"))
    node = await stack.operator.node("GetNode", service.GetNodeRequest(name="nodes/edge-1"))
    node.node_pool = "nodePools/other"
    await stack.operator.node("UpdateNode", service.UpdateNodeRequest(node=node))
    assert (await settings_of(stack)).node_count == 1
    assert (await settings_of(stack, "other")).node_count == 1


async def test_revoking_voids_the_token(stack: ApiStack) -> None:
    await stack.operator.node("CreateNode", service.CreateNodeRequest(node_id="edge-1"))
    await stack.operator.node("RevokeNode", service.RevokeNodeRequest(name="nodes/edge-1"))
    assert await stack.as_superuser("SELECT 1 FROM postroad.enrollment_tokens") == []


async def test_a_node_that_is_connected_or_holds_mail_cannot_be_deleted(stack: ApiStack) -> None:
    made = await stack.operator.node("CreateNode", service.CreateNodeRequest(node_id="edge-1"))
    delete = service.DeleteNodeRequest(name=made.name, etag=made.etag)
    await stack.as_superuser("INSERT INTO postroad.node_status (node, connected) VALUES ('edge-1', true)")
    error = await stack.operator.refused(stack.operator.node("DeleteNode", delete))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NODE_IN_USE")
    await stack.as_superuser("UPDATE postroad.node_status SET connected = false")
    await stack.as_superuser("INSERT INTO postroad.spools (spool, node, waiting_count) VALUES ($1, 'edge-1', 4)", SPOOL)
    assert (await stack.operator.refused(stack.operator.node("DeleteNode", delete))).reason == "NODE_IN_USE"
    await stack.as_superuser("UPDATE postroad.spools SET waiting_count = 0")
    await stack.operator.node("DeleteNode", delete)
    assert list((await stack.operator.node("ListNodes", service.ListNodesRequest())).nodes) == []


async def test_what_a_node_reports_is_shown_and_is_no_edit(stack: ApiStack) -> None:
    made = await stack.operator.node("CreateNode", service.CreateNodeRequest(node_id="edge-1"))
    await stack.as_superuser(
        "INSERT INTO postroad.node_status (node, connected, config_status, config_error, software_version)"
        " VALUES ('edge-1', true, 4, 'accounts/acme: bad', '1.2')"
    )
    await stack.as_superuser(
        "INSERT INTO postroad.spools (spool, node, incarnation, cursor) VALUES ($1, 'edge-1', 3, 77)", SPOOL
    )
    node = await stack.operator.node("GetNode", service.GetNodeRequest(name=made.name))
    assert (node.connected, node.config_error, node.software_version) == (True, "accounts/acme: bad", "1.2")
    assert node.config_status == pb.Node.CONFIG_STATUS_ERROR
    (spool,) = node.spools
    assert (spool.spool, spool.incarnation, spool.cursor, spool.accepted) == (SPOOL, 3, 77, True)
    assert node.etag == made.etag


async def test_a_refused_spool_is_accepted_as_it_reported_itself(stack: ApiStack) -> None:
    await stack.operator.node("CreateNode", service.CreateNodeRequest(node_id="edge-1"))
    await stack.as_superuser(
        "INSERT INTO postroad.spools (spool, node, incarnation, cursor, accepted, reported_incarnation,"
        " resume_record, opening, reported_opening)"
        " VALUES ($1, 'edge-1', 9, 500, false, 4, 120, '\\x01', '\\x02')",
        SPOOL,
    )
    request = service.AcceptSpoolRequest(name="nodes/edge-1", spool=SPOOL)
    (spool,) = (await stack.operator.node("AcceptSpool", request)).spools
    assert (spool.incarnation, spool.cursor, spool.accepted) == (4, 120, True)
    (row,) = await stack.as_superuser("SELECT opening FROM postroad.spools")
    assert row["opening"] == b"\x02"
    error = await stack.operator.refused(stack.operator.node("AcceptSpool", request))
    assert error.reason == "SPOOL_NOT_REFUSED"
    unknown = service.AcceptSpoolRequest(name="nodes/edge-1", spool=UUID_1)
    assert (await stack.operator.refused(stack.operator.node("AcceptSpool", unknown))).code is (
        grpc.StatusCode.NOT_FOUND
    )


async def attach(stack: ApiStack, node: str = "edge-2", spool: str = SPOOL, **more: Any) -> pb.Node:
    request = service.AttachSpoolRequest(name=f"nodes/{node}", spool=spool, **more)
    answer: pb.Node = await stack.operator.node("AttachSpool", request)
    return answer


async def with_spool(stack: ApiStack, *nodes: str) -> None:
    """Nodes, the first of which has a spool and was heard of just now."""
    for node in nodes:
        await stack.operator.node("CreateNode", service.CreateNodeRequest(node_id=node))
    await stack.as_superuser(
        "INSERT INTO postroad.spools (spool, node, incarnation, cursor, waiting_count) VALUES ($1, $2, 3, 77, 5)",
        *(SPOOL, nodes[0]),
    )
    await stack.as_superuser("INSERT INTO postroad.node_status (node, last_seen_time) VALUES ($1, now())", nodes[0])


async def test_a_spool_moves_when_its_node_is_silent_revoked_or_it_is_forced(stack: ApiStack) -> None:
    await with_spool(stack, "edge-1", "edge-2", "edge-3")
    error = await stack.operator.refused(attach(stack))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "SPOOL_IN_USE")
    (spool,) = (await attach(stack, force=True)).spools
    assert (spool.spool, spool.incarnation, spool.cursor, spool.waiting_count) == (SPOOL, 3, 77, 5)
    assert list((await stack.operator.node("GetNode", service.GetNodeRequest(name="nodes/edge-1"))).spools) == []
    await stack.as_superuser(
        "INSERT INTO postroad.node_status (node, connected, last_seen_time)"
        " VALUES ('edge-2', true, now() - $1::interval)",
        timedelta(seconds=89),
    )
    assert (await stack.operator.refused(attach(stack, "edge-3"))).reason == "SPOOL_IN_USE"
    # A replica that died leaves `connected` as it was; the time tells.
    await stack.as_superuser(
        "UPDATE postroad.node_status SET last_seen_time = now() - $1::interval", timedelta(seconds=91)
    )
    await attach(stack, "edge-3")
    await stack.as_superuser("INSERT INTO postroad.node_status (node, last_seen_time) VALUES ('edge-3', now())")
    await stack.operator.node("RevokeNode", service.RevokeNodeRequest(name="nodes/edge-3"))
    assert [one.spool for one in (await attach(stack)).spools] == [SPOOL]
    rows = await stack.as_superuser("SELECT count(*) FROM postroad.audit_log WHERE table_name = 'spools'")
    assert rows[0][0] == 3


async def test_a_spool_does_not_move_to_where_its_mail_cannot_go_on(stack: ApiStack) -> None:
    await with_spool(stack, "edge-1", "edge-2")
    assert (await stack.operator.refused(attach(stack, "edge-1", force=True))).reason == "SPOOL_ATTACHED"
    await stack.operator.node("CreateNodePool", service.CreateNodePoolRequest(node_pool_id="dmz"))
    node = pb.Node(node_pool="nodePools/dmz")
    await stack.operator.node("CreateNode", service.CreateNodeRequest(node_id="far", node=node))
    assert (await stack.operator.refused(attach(stack, "far", force=True))).reason == "SPOOL_POOL_DIFFERS"
    await stack.operator.node("RevokeNode", service.RevokeNodeRequest(name="nodes/edge-2"))
    assert (await stack.operator.refused(attach(stack, force=True))).reason == "NODE_REVOKED"
    unknown = await stack.operator.refused(attach(stack, "edge-1", spool=UUID_1))
    assert unknown.code is grpc.StatusCode.NOT_FOUND
    no_uuid = await stack.operator.refused(attach(stack, "edge-1", spool="no uuid"))
    assert no_uuid.fields == ["spool"]


async def with_takers(stack: ApiStack, *nodes: str) -> None:
    """Nodes that are enrolled and connected."""
    for node in nodes:
        await stack.operator.node("CreateNode", service.CreateNodeRequest(node_id=node))
        await stack.as_superuser("INSERT INTO postroad.node_status (node, connected) VALUES ($1, true)", node)
    await stack.as_superuser(
        "UPDATE postroad.nodes SET state = 2, certificate_not_after = now() + interval '1 day' WHERE state = 1"
    )


def drain_of(operation: Operation) -> service.DrainNodeMetadata:
    metadata = service.DrainNodeMetadata()
    assert operation.metadata.Unpack(metadata)
    return metadata


async def drain(stack: ApiStack, node: str = "edge-1") -> Operation:
    answer: Operation = await stack.operator.node("DrainNode", service.DrainNodeRequest(name=f"nodes/{node}"))
    return answer


async def test_a_drain_is_an_operation_that_says_how_far_it_is(stack: ApiStack) -> None:
    await with_takers(stack, "edge-1", "edge-2")
    await stack.as_superuser(
        "INSERT INTO postroad.spools (spool, node, waiting_count) VALUES ($1, 'edge-1', 5)", UUID(SPOOL)
    )
    operation = await drain(stack)
    assert operation.name.startswith("accounts/-/operations/")
    assert (await drain(stack)).name == operation.name
    node = await stack.operator.node("GetNode", service.GetNodeRequest(name="nodes/edge-1"))
    assert node.drain_operation == operation.name
    found = drain_of(operation)
    assert (found.node, found.closed, found.waiting_count, found.moving_count) == ("nodes/edge-1", False, 5, 0)
    drain_id = operation.name.rpartition("/")[2]
    await stack.as_superuser("INSERT INTO postroad.drain_targets VALUES ($1, 'edge-2', 3, 4)", UUID(drain_id))
    await stack.as_superuser("UPDATE postroad.node_drains SET end_time = now()")
    done = await stack.operator.call(OperationsStub, "GetOperation", GetOperationRequest(name=operation.name))
    result = service.DrainNodeResult()
    assert done.response.Unpack(result)
    assert [(one.node, one.message_count, one.recipient_count) for one in result.targets] == [("nodes/edge-2", 3, 4)]


async def test_an_undrained_node_ends_its_operation(stack: ApiStack) -> None:
    await with_takers(stack, "edge-1", "edge-2")
    undrain = service.UndrainNodeRequest(name="nodes/edge-1")
    assert (await stack.operator.refused(stack.operator.node("UndrainNode", undrain))).reason == "NODE_NOT_DRAINED"
    operation = await drain(stack)
    assert (await stack.operator.node("UndrainNode", undrain)).drain_operation == ""
    ended = await stack.operator.call(OperationsStub, "GetOperation", GetOperationRequest(name=operation.name))
    assert (ended.done, ended.error.code) == (True, code_pb2.CANCELLED)
    assert (await drain(stack)).name != operation.name


async def test_a_node_that_is_alone_or_revoked_is_not_drained(stack: ApiStack) -> None:
    await with_takers(stack, "edge-1", "edge-2")
    await drain(stack, "edge-2")
    assert (await stack.operator.refused(drain(stack))).reason == "NODE_ALONE"
    await stack.operator.node("UndrainNode", service.UndrainNodeRequest(name="nodes/edge-2"))
    await stack.as_superuser("UPDATE postroad.node_status SET connected = false WHERE node = 'edge-2'")
    assert (await stack.operator.refused(drain(stack))).reason == "NODE_ALONE"
    await stack.operator.node("RevokeNode", service.RevokeNodeRequest(name="nodes/edge-1"))
    assert (await stack.operator.refused(drain(stack))).reason == "NODE_REVOKED"
    unknown = await stack.operator.refused(drain(stack, "nobody"))
    assert unknown.code is grpc.StatusCode.NOT_FOUND


async def test_what_a_spool_lost_is_named(stack: ApiStack) -> None:
    await with_spool(stack, "edge-1")
    await stack.as_superuser(
        "UPDATE postroad.spools SET lost_messages = $1, lost_count = 2, unnamed_losses = true", [UUID_1, SPOOL]
    )
    (spool,) = (await stack.operator.node("GetNode", service.GetNodeRequest(name="nodes/edge-1"))).spools
    assert (list(spool.lost_messages), spool.lost_count, spool.unnamed_losses) == ([UUID_1, SPOOL], 2, True)


async def test_a_pool_is_born_with_a_key_and_its_bundles(stack: ApiStack) -> None:
    request = service.CreateNodePoolRequest(node_pool_id="dmz", node_pool=pb.NodePool(max_recipients=7))
    made = await stack.operator.node("CreateNodePool", request)
    assert made.max_recipients == 7
    rows = await stack.as_superuser("SELECT bundle FROM postroad.config_bundles WHERE node_pool = 'dmz' ORDER BY 1")
    assert [row["bundle"] for row in rows] == ["pools/dmz/networks", "pools/dmz/settings", "shared/providers"]
    assert len(await stack.as_superuser("SELECT 1 FROM postroad.pool_keys WHERE node_pool = 'dmz'")) == 1
    assert (await settings_of(stack, "dmz")).max_recipients == 7
    assert (await settings_of(stack, "dmz")).account_messages_per_hour == 100_000


async def test_a_pool_bounds_connections_and_says_what_is_logged(stack: ApiStack) -> None:
    pool = await default_pool(stack)
    assert (pool.max_connections, pool.max_connections_per_address, pool.log_level) == (0, 0, "")
    pool.max_connections, pool.max_connections_per_address, pool.log_level = 900, 70, "debug"
    paths = ["max_connections", "max_connections_per_address", "log_level"]
    request = service.UpdateNodePoolRequest(node_pool=pool, update_mask=FieldMask(paths=paths))
    for answer in (await stack.operator.node("UpdateNodePool", request), await settings_of(stack)):
        assert (answer.max_connections, answer.max_connections_per_address, answer.log_level) == (900, 70, "debug")
    back = service.UpdateNodePoolRequest(
        node_pool=pb.NodePool(name=pool.name, etag=(await default_pool(stack)).etag), update_mask=FieldMask(paths=paths)
    )
    await stack.operator.node("UpdateNodePool", back)
    settings = await settings_of(stack)
    assert (settings.max_connections, settings.max_connections_per_address, settings.log_level) == (0, 0, "")


async def default_pool(stack: ApiStack) -> pb.NodePool:
    pool: pb.NodePool = await stack.operator.node("GetNodePool", service.GetNodePoolRequest(name="nodePools/default"))
    return pool


async def test_a_limit_of_zero_is_none_and_an_absent_one_the_default(stack: ApiStack) -> None:
    pool = await stack.operator.node("GetNodePool", service.GetNodePoolRequest(name="nodePools/default"))
    pool.submission_limits.account_messages_per_hour = 0
    update = service.UpdateNodePoolRequest(
        node_pool=pool, update_mask=FieldMask(paths=["submission_limits.account_messages_per_hour"])
    )
    changed = await stack.operator.node("UpdateNodePool", update)
    assert changed.submission_limits.HasField("account_messages_per_hour")
    settings = await settings_of(stack)
    assert (settings.account_messages_per_hour, settings.credential_messages_per_hour) == (0, 50_000)


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"max_recipients": 10_001}, "node_pool.max_recipients"),
        ({"max_message_bytes": 1}, "node_pool.max_message_bytes"),
        ({"max_connections": -1}, "node_pool.max_connections"),
        ({"max_connections_per_address": 1_000_001}, "node_pool.max_connections_per_address"),
        ({"log_level": "loud"}, "node_pool.log_level"),
    ],
)
async def test_settings_out_of_range_are_refused(stack: ApiStack, fields: dict[str, Any], path: str) -> None:
    request = service.CreateNodePoolRequest(node_pool_id="dmz", node_pool=pb.NodePool(**fields))
    error = await stack.operator.refused(stack.operator.node("CreateNodePool", request))
    assert error.fields == [path]


async def test_the_default_pool_and_a_pool_in_use_stay(stack: ApiStack) -> None:
    operator = stack.operator
    default = await operator.node("GetNodePool", service.GetNodePoolRequest(name="nodePools/default"))
    delete = service.DeleteNodePoolRequest(name=default.name, etag=default.etag)
    error = await operator.refused(operator.node("DeleteNodePool", delete))
    assert error.reason == "NODE_POOL_DEFAULT"
    pool = await operator.node("CreateNodePool", service.CreateNodePoolRequest(node_pool_id="dmz"))
    account = account_pb2.Account(node_pool=pool.name)
    create = account_service_pb2.CreateAccountRequest(account_id="acme", account=account)
    made = await operator.account("CreateAccount", create)
    delete = service.DeleteNodePoolRequest(name=pool.name, etag=pool.etag)
    error = await operator.refused(operator.node("DeleteNodePool", delete))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NODE_POOL_IN_USE")
    remove = account_service_pb2.DeleteAccountRequest(name=made.name, etag=made.etag)
    await operator.account("DeleteAccount", remove)
    await operator.node("DeleteNodePool", delete)
    rows = await stack.as_superuser(
        "SELECT 1 FROM postroad.config_bundles WHERE node_pool = 'dmz' AND hash IS NOT NULL"
    )
    assert rows == []


async def test_what_belongs_to_a_missing_pool_is_refused(stack: ApiStack) -> None:
    node = service.CreateNodeRequest(node_id="edge-1", node=pb.Node(node_pool="nodePools/nowhere"))
    account = account_service_pb2.CreateAccountRequest(
        account_id="acme", account=account_pb2.Account(node_pool="nodePools/nowhere")
    )
    for call in (stack.operator.node("CreateNode", node), stack.operator.account("CreateAccount", account)):
        error = await stack.operator.refused(call)
        assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NODE_POOL_MISSING")
