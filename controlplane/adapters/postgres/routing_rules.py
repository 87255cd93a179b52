"""Routing rules with their targets.

Contract. Implements `controlplane.ports.RoutingRules`. A target names its provider; stored is the provider's uid by
foreign key, so that no provider can go while a rule names it. A rule may name its own account's providers and shared
ones: any other name is a provider that does not exist.
"""

from __future__ import annotations

import json

import asyncpg

from controlplane.adapters.postgres.rows import meta_of, rows_changed
from controlplane.adapters.postgres.session import Session
from controlplane.domain import names
from controlplane.domain.errors import FailedPreconditionError, NotFoundError, Reason
from controlplane.domain.etags import Etag
from controlplane.domain.resources import RoutingRule, RuleTarget
from dataplane.core.config import HeaderCondition

_SELECT = """
SELECT r.*, (
    SELECT coalesce(jsonb_agg(jsonb_build_array(p.account, p.provider, t.weight) ORDER BY t.position), '[]')
    FROM postroad.routing_rule_targets t JOIN postroad.providers p ON p.uid = t.provider_uid
    WHERE t.account = r.account AND t.routing_rule = r.routing_rule
) AS targets
FROM postroad.routing_rules r
"""


class RoutingRulesRepository:
    """`controlplane.ports.RoutingRules`."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def get(self, account: str, routing_rule: str) -> RoutingRule:
        """As the port says."""
        row = await self._session.row(
            "routing_rule_get", _SELECT + "WHERE r.account = $1 AND r.routing_rule = $2", account, routing_rule
        )
        if row is None:
            raise NotFoundError(names.format_name(names.ROUTING_RULE, account, routing_rule))
        return _rule(row)

    async def list_page(self, account: str, after: tuple[int, str], limit: int) -> list[RoutingRule]:
        """As the port says."""
        rows = await self._session.rows(
            "routing_rule_list",
            _SELECT
            + """
            WHERE r.account = $1 AND (r.priority, r.routing_rule) > ($2, $3)
            ORDER BY r.priority, r.routing_rule LIMIT $4
            """,
            *(account, *after, limit),
        )
        return [_rule(row) for row in rows]

    async def list_enabled(self, account: str) -> list[RoutingRule]:
        """As the port says."""
        rows = await self._session.rows(
            "routing_rule_list_enabled",
            _SELECT + "WHERE r.account = $1 AND NOT r.disabled ORDER BY r.priority, r.routing_rule",
            account,
        )
        return [_rule(row) for row in rows]

    async def insert(self, rule: RoutingRule) -> None:
        """As the port says."""
        self._session.subject = names.format_name(names.ROUTING_RULE, rule.account, rule.routing_rule)
        await self._session.run(
            "routing_rule_insert",
            """
            INSERT INTO postroad.routing_rules (
                account, routing_rule, display_name, priority, sender_patterns, recipient_patterns, headers,
                min_size_bytes, max_size_bytes, disabled
            )
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
            """,
            *(rule.account, rule.routing_rule, *_values(rule)),
        )
        await self._write_targets(rule)

    async def update(self, rule: RoutingRule, etag: Etag) -> None:
        """As the port says."""
        self._session.subject = names.format_name(names.ROUTING_RULE, rule.account, rule.routing_rule)
        await rows_changed(
            self._session,
            "routing_rule_update",
            """
            UPDATE postroad.routing_rules
            SET display_name = $5, priority = $6, sender_patterns = $7, recipient_patterns = $8, headers = $9,
                min_size_bytes = $10, max_size_bytes = $11, disabled = $12
            WHERE account = $1 AND routing_rule = $2 AND left(uid::text, 8) = $3 AND version = $4
            RETURNING 1
            """,
            *(rule.account, rule.routing_rule, *etag, *_values(rule)),
        )
        if (await self.get(rule.account, rule.routing_rule)).targets != rule.targets:
            await self._write_targets(rule)

    async def delete(self, rule: RoutingRule, etag: Etag) -> None:
        """As the port says."""
        await rows_changed(
            self._session,
            "routing_rule_delete",
            """
            DELETE FROM postroad.routing_rules
            WHERE account = $1 AND routing_rule = $2 AND left(uid::text, 8) = $3 AND version = $4
            RETURNING 1
            """,
            *(rule.account, rule.routing_rule, *etag),
        )

    async def _write_targets(self, rule: RoutingRule) -> None:
        uids = [await self._provider_uid(rule.account, target) for target in rule.targets]
        await self._session.run(
            "routing_rule_targets_clear",
            "DELETE FROM postroad.routing_rule_targets WHERE account = $1 AND routing_rule = $2",
            *(rule.account, rule.routing_rule),
        )
        await self._session.run(
            "routing_rule_targets_insert",
            """
            INSERT INTO postroad.routing_rule_targets (account, routing_rule, position, provider_uid, weight)
            SELECT $1, $2, position, uid, weight
            FROM unnest($3::uuid[], $4::integer[]) WITH ORDINALITY AS t (uid, weight, position)
            """,
            *(rule.account, rule.routing_rule, uids, [target.weight for target in rule.targets]),
        )

    async def _provider_uid(self, account: str, target: RuleTarget) -> str:
        owner, provider = names.parse_owned(
            target.provider, names.PROVIDER, names.SHARED_PROVIDER, "routing_rule.targets.provider"
        )
        uid = None
        if owner in (None, account):
            uid = await self._session.value(
                "routing_rule_target_provider",
                "SELECT uid FROM postroad.providers WHERE account IS NOT DISTINCT FROM $1 AND provider = $2",
                *(owner, provider),
            )
        if uid is None:
            raise FailedPreconditionError(
                Reason.PROVIDER_MISSING, f"{target.provider} does not exist", subject=target.provider
            )
        return str(uid)


def _values(rule: RoutingRule) -> tuple[object, ...]:
    headers = [{"name": one.name, "pattern": one.pattern} for one in rule.headers]
    return (
        *(rule.display_name, rule.priority, list(rule.sender_patterns), list(rule.recipient_patterns)),
        *(json.dumps(headers), rule.min_size_bytes, rule.max_size_bytes, rule.disabled),
    )


def _rule(row: asyncpg.Record) -> RoutingRule:
    return RoutingRule(
        account=row["account"],
        routing_rule=row["routing_rule"],
        display_name=row["display_name"],
        priority=row["priority"],
        sender_patterns=tuple(row["sender_patterns"]),
        recipient_patterns=tuple(row["recipient_patterns"]),
        headers=tuple(HeaderCondition(**one) for one in json.loads(row["headers"])),
        min_size_bytes=row["min_size_bytes"],
        max_size_bytes=row["max_size_bytes"],
        targets=tuple(
            RuleTarget(names.provider_name(account, provider), weight=weight)
            for account, provider, weight in json.loads(row["targets"])
        ),
        disabled=row["disabled"],
        meta=meta_of(row),
    )
