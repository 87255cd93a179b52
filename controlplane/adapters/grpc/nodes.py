"""NodeService over gRPC: messages to values and back; see the proto for what each method promises.

An enrolment token is written into the answer of the call that made it, never into the one kept for its request id.
"""

from __future__ import annotations

from typing import Any

from google.longrunning import operations_pb2
from google.protobuf.empty_pb2 import Empty

from controlplane.adapters.grpc import convert
from controlplane.adapters.grpc.context import caller
from controlplane.adapters.grpc.operations import drain_name, write_drain
from controlplane.domain import names
from controlplane.domain.resources import NODE_FIELDS, NODE_POOL_FIELDS, Node, NodePool, SubmissionLimits
from controlplane.services.nodes import NodePoolsService, NodesService
from postroad.control.v1 import node_pb2 as pb
from postroad.control.v1 import node_service_pb2 as service_pb
from postroad.control.v1 import node_service_pb2_grpc as service_grpc

_LIMITS = ("account_messages_per_hour", "credential_messages_per_hour", "address_connections_per_minute")


class NodeHandlers(service_grpc.NodeServiceServicer):
    """See the module."""

    def __init__(self, nodes: NodesService, pools: NodePoolsService) -> None:
        self._nodes = nodes
        self._pools = pools

    async def CreateNode(self, request: service_pb.CreateNodeRequest, context: Any) -> pb.Node:
        """As the proto says."""
        mutation = convert.mutation("CreateNode", request, write_node, validate_only=request.validate_only)
        result = await self._nodes.create(caller(), mutation, _read_node(request.node, request.node_id))
        return convert.answer(result, pb.Node, write_node if request.validate_only else _write_new_node)

    async def GetNode(self, request: service_pb.GetNodeRequest, context: Any) -> pb.Node:
        """As the proto says."""
        return write_node(await self._nodes.get(caller(), _node_id(request.name)))

    async def ListNodes(self, request: service_pb.ListNodesRequest, context: Any) -> service_pb.ListNodesResponse:
        """As the proto says."""
        found, more = await self._nodes.list_page(caller(), request.page_size, request.page_token)
        return service_pb.ListNodesResponse(nodes=[write_node(node) for node in found], next_page_token=more)

    async def UpdateNode(self, request: service_pb.UpdateNodeRequest, context: Any) -> pb.Node:
        """As the proto says."""
        mutation = convert.mutation("UpdateNode", request, write_node, validate_only=request.validate_only)
        sent = _read_node(request.node, _node_id(request.node.name, "node.name"))
        patch = convert.patch_of(request.node, request, NODE_FIELDS)
        return convert.answer(await self._nodes.update(caller(), mutation, sent, patch), pb.Node, write_node)

    async def DeleteNode(self, request: service_pb.DeleteNodeRequest, context: Any) -> Empty:
        """As the proto says."""
        mutation = convert.mutation("DeleteNode", request, convert.write_empty)
        await self._nodes.delete(
            caller(), mutation, _node_id(request.name), request.etag, allow_missing=request.allow_missing
        )
        return Empty()

    async def ResetNodeEnrollment(self, request: service_pb.ResetNodeEnrollmentRequest, context: Any) -> pb.Node:
        """As the proto says."""
        mutation = convert.mutation("ResetNodeEnrollment", request, write_node)
        result = await self._nodes.reset_enrollment(caller(), mutation, _node_id(request.name))
        return convert.answer(result, pb.Node, _write_new_node)

    async def RevokeNode(self, request: service_pb.RevokeNodeRequest, context: Any) -> pb.Node:
        """As the proto says."""
        mutation = convert.mutation("RevokeNode", request, write_node)
        result = await self._nodes.revoke(caller(), mutation, _node_id(request.name))
        return convert.answer(result, pb.Node, write_node)

    async def AcceptSpool(self, request: service_pb.AcceptSpoolRequest, context: Any) -> pb.Node:
        """As the proto says."""
        mutation = convert.mutation("AcceptSpool", request, write_node)
        result = await self._nodes.accept_spool(caller(), mutation, _node_id(request.name), request.spool)
        return convert.answer(result, pb.Node, write_node)

    async def AttachSpool(self, request: service_pb.AttachSpoolRequest, context: Any) -> pb.Node:
        """As the proto says."""
        mutation = convert.mutation("AttachSpool", request, write_node)
        result = await self._nodes.attach_spool(
            caller(), mutation, _node_id(request.name), request.spool, force=request.force
        )
        return convert.answer(result, pb.Node, write_node)

    async def GiveUpSpool(self, request: service_pb.GiveUpSpoolRequest, context: Any) -> pb.Node:
        """As the proto says."""
        mutation = convert.mutation("GiveUpSpool", request, write_node)
        result = await self._nodes.give_up_spool(caller(), mutation, _node_id(request.name), request.spool)
        return convert.answer(result, pb.Node, write_node)

    async def DrainNode(self, request: service_pb.DrainNodeRequest, context: Any) -> operations_pb2.Operation:
        """As the proto says."""
        mutation = convert.mutation("DrainNode", request, write_drain)
        result = await self._nodes.drain(caller(), mutation, _node_id(request.name))
        return convert.answer(result, operations_pb2.Operation, write_drain)

    async def UndrainNode(self, request: service_pb.UndrainNodeRequest, context: Any) -> pb.Node:
        """As the proto says."""
        mutation = convert.mutation("UndrainNode", request, write_node)
        result = await self._nodes.undrain(caller(), mutation, _node_id(request.name))
        return convert.answer(result, pb.Node, write_node)

    async def CreateNodePool(self, request: service_pb.CreateNodePoolRequest, context: Any) -> pb.NodePool:
        """As the proto says."""
        mutation = convert.mutation("CreateNodePool", request, write_pool, validate_only=request.validate_only)
        result = await self._pools.create(caller(), mutation, _read_pool(request.node_pool, request.node_pool_id))
        return convert.answer(result, pb.NodePool, write_pool)

    async def GetNodePool(self, request: service_pb.GetNodePoolRequest, context: Any) -> pb.NodePool:
        """As the proto says."""
        return write_pool(await self._pools.get(caller(), _pool_id(request.name)))

    async def ListNodePools(
        self, request: service_pb.ListNodePoolsRequest, context: Any
    ) -> service_pb.ListNodePoolsResponse:
        """As the proto says."""
        found, more = await self._pools.list_page(caller(), request.page_size, request.page_token)
        return service_pb.ListNodePoolsResponse(node_pools=[write_pool(pool) for pool in found], next_page_token=more)

    async def UpdateNodePool(self, request: service_pb.UpdateNodePoolRequest, context: Any) -> pb.NodePool:
        """As the proto says."""
        mutation = convert.mutation("UpdateNodePool", request, write_pool, validate_only=request.validate_only)
        sent = _read_pool(request.node_pool, _pool_id(request.node_pool.name, "node_pool.name"))
        patch = convert.patch_of(request.node_pool, request, NODE_POOL_FIELDS)
        return convert.answer(await self._pools.update(caller(), mutation, sent, patch), pb.NodePool, write_pool)

    async def DeleteNodePool(self, request: service_pb.DeleteNodePoolRequest, context: Any) -> Empty:
        """As the proto says."""
        mutation = convert.mutation("DeleteNodePool", request, convert.write_empty)
        await self._pools.delete(
            caller(), mutation, _pool_id(request.name), request.etag, allow_missing=request.allow_missing
        )
        return Empty()


def _node_id(name: str, field: str = "name") -> str:
    return names.parse_name(name, names.NODE, field)[0]


def _pool_id(name: str, field: str = "name") -> str:
    return names.parse_name(name, names.NODE_POOL, field)[0]


def _read_node(message: pb.Node, node: str) -> Node:
    pool = _pool_id(message.node_pool, "node.node_pool") if message.node_pool else ""
    return Node(node=node, display_name=message.display_name, node_pool=pool)


def write_node(node: Node) -> pb.Node:
    """Return the message of a node, without its token."""
    message = pb.Node(
        name=names.format_name(names.NODE, node.node),
        display_name=node.display_name,
        node_pool=names.format_name(names.NODE_POOL, node.node_pool),
        state=pb.Node.State.ValueType(node.state),
        enrollment_expire_time=convert.to_timestamp(node.enrollment_expire_time),
        certificate_not_before=convert.to_timestamp(node.certificate_not_before),
        certificate_not_after=convert.to_timestamp(node.certificate_not_after),
        connected=node.connected,
        last_seen_time=convert.to_timestamp(node.last_seen_time),
        software_version=node.software_version,
        config_status=pb.Node.ConfigStatus.ValueType(node.config_status),
        config_error=node.config_error,
        denials_version=node.denials_version,
        spools=[
            pb.Node.Spool(
                spool=spool.spool,
                incarnation=spool.incarnation,
                cursor=spool.cursor,
                accepted=spool.accepted,
                waiting_count=spool.waiting_count,
                lost_messages=spool.lost_messages,
                lost_count=spool.lost_count,
                unnamed_losses=spool.unnamed_losses,
            )
            for spool in node.spools
        ],
        drain_operation=drain_name(node.drain) if node.drain else "",
    )
    convert.write_meta(message, node.meta)
    return message


def _write_new_node(node: Node) -> pb.Node:
    message = write_node(node)
    message.enrollment_token = node.enrollment_token
    return message


def _read_pool(message: pb.NodePool, node_pool: str) -> NodePool:
    limits = message.submission_limits
    present = {descriptor.name for descriptor, _ in limits.ListFields()}
    given = {name: getattr(limits, name) for name in _LIMITS if name in present}
    return NodePool(
        node_pool=node_pool,
        display_name=message.display_name,
        submission_limits=SubmissionLimits(**given),
        max_message_bytes=message.max_message_bytes,
        max_recipients=message.max_recipients,
        max_connections=message.max_connections,
        max_connections_per_address=message.max_connections_per_address,
        log_level=message.log_level,
    )


def write_pool(pool: NodePool) -> pb.NodePool:
    """Return the message of a node pool."""
    message = pb.NodePool(
        name=names.format_name(names.NODE_POOL, pool.node_pool),
        display_name=pool.display_name,
        max_message_bytes=pool.max_message_bytes,
        max_recipients=pool.max_recipients,
        max_connections=pool.max_connections,
        max_connections_per_address=pool.max_connections_per_address,
        log_level=pool.log_level,
    )
    for name in _LIMITS:
        value = getattr(pool.submission_limits, name)
        if value is not None:
            setattr(message.submission_limits, name, value)
    convert.write_meta(message, pool.meta)
    return message
