"""RoutingRuleService over gRPC: messages to values and back; see the proto for what each method promises."""

from __future__ import annotations

from typing import Any

from google.protobuf.empty_pb2 import Empty

from controlplane.adapters.grpc import convert
from controlplane.adapters.grpc.context import caller
from controlplane.domain import names
from controlplane.domain.resources import ROUTING_RULE_FIELDS, RoutingRule, RuleTarget
from controlplane.services.routing_rules import RoutingRulesService
from dataplane.core.config import HeaderCondition
from postroad.control.v1 import routing_rule_pb2 as pb
from postroad.control.v1 import routing_rule_service_pb2 as service_pb
from postroad.control.v1 import routing_rule_service_pb2_grpc as service_grpc


class RoutingRuleHandlers(service_grpc.RoutingRuleServiceServicer):
    """See the module."""

    def __init__(self, rules: RoutingRulesService) -> None:
        self._rules = rules

    async def CreateRoutingRule(self, request: service_pb.CreateRoutingRuleRequest, context: Any) -> pb.RoutingRule:
        """As the proto says."""
        mutation = convert.mutation("CreateRoutingRule", request, write_rule, validate_only=request.validate_only)
        account = names.parse_name(request.parent, names.ACCOUNT, "parent")[0]
        value = _read(request.routing_rule, account, request.routing_rule_id)
        return convert.answer(await self._rules.create(caller(), mutation, value), pb.RoutingRule, write_rule)

    async def GetRoutingRule(self, request: service_pb.GetRoutingRuleRequest, context: Any) -> pb.RoutingRule:
        """As the proto says."""
        return write_rule(await self._rules.get(caller(), *_ids(request.name)))

    async def ListRoutingRules(
        self, request: service_pb.ListRoutingRulesRequest, context: Any
    ) -> service_pb.ListRoutingRulesResponse:
        """As the proto says."""
        account = names.parse_name(request.parent, names.ACCOUNT, "parent")[0]
        found, more = await self._rules.list_page(caller(), account, request.page_size, request.page_token)
        return service_pb.ListRoutingRulesResponse(
            routing_rules=[write_rule(rule) for rule in found], next_page_token=more
        )

    async def UpdateRoutingRule(self, request: service_pb.UpdateRoutingRuleRequest, context: Any) -> pb.RoutingRule:
        """As the proto says."""
        mutation = convert.mutation("UpdateRoutingRule", request, write_rule, validate_only=request.validate_only)
        sent = _read(request.routing_rule, *_ids(request.routing_rule.name, "routing_rule.name"))
        patch = convert.patch_of(request.routing_rule, request, ROUTING_RULE_FIELDS)
        return convert.answer(await self._rules.update(caller(), mutation, sent, patch), pb.RoutingRule, write_rule)

    async def DeleteRoutingRule(self, request: service_pb.DeleteRoutingRuleRequest, context: Any) -> Empty:
        """As the proto says."""
        mutation = convert.mutation("DeleteRoutingRule", request, convert.write_empty)
        await self._rules.delete(
            caller(), mutation, *_ids(request.name), request.etag, allow_missing=request.allow_missing
        )
        return Empty()


def _ids(name: str, field: str = "name") -> tuple[str, str]:
    account, rule = names.parse_name(name, names.ROUTING_RULE, field)
    return account, rule


def _read(message: pb.RoutingRule, account: str, rule: str) -> RoutingRule:
    return RoutingRule(
        account=account,
        routing_rule=rule,
        display_name=message.display_name,
        priority=message.priority,
        sender_patterns=tuple(message.sender_patterns),
        recipient_patterns=tuple(message.recipient_patterns),
        headers=tuple(HeaderCondition(one.name, one.pattern) for one in message.headers),
        min_size_bytes=message.min_size_bytes,
        max_size_bytes=message.max_size_bytes,
        targets=tuple(RuleTarget(one.provider, one.egress_source, one.weight) for one in message.targets),
        disabled=message.disabled,
    )


def write_rule(rule: RoutingRule) -> pb.RoutingRule:
    """Return the message of a rule."""
    message = pb.RoutingRule(
        name=names.format_name(names.ROUTING_RULE, rule.account, rule.routing_rule),
        display_name=rule.display_name,
        priority=rule.priority,
        sender_patterns=rule.sender_patterns,
        recipient_patterns=rule.recipient_patterns,
        headers=[pb.RoutingRule.HeaderCondition(name=one.name, pattern=one.pattern) for one in rule.headers],
        min_size_bytes=rule.min_size_bytes,
        max_size_bytes=rule.max_size_bytes,
        targets=[pb.RoutingRule.Target(provider=one.provider, weight=one.weight) for one in rule.targets],
        disabled=rule.disabled,
    )
    convert.write_meta(message, rule.meta)
    return message
