"""Accounts with their sender domains and networks.

Contract. Implements `controlplane.ports.Accounts`. The version and update time move by trigger; the lists are replaced
whole, in their order. Two accounts never own the same domain, nor one of them a name below the other's wildcard: a lock
for all edits of domains makes the look and the write one step.
"""

from __future__ import annotations

from datetime import datetime

import asyncpg

from controlplane.adapters.postgres.rows import meta_of, rows_changed
from controlplane.adapters.postgres.session import Session
from controlplane.domain import names
from controlplane.domain.errors import FailedPreconditionError, NotFoundError, Reason
from controlplane.domain.etags import Etag
from controlplane.domain.resources import Account, AccountState, Durability, RetryPolicy, UncertainPolicy

_SELECT = """
SELECT a.*,
    ARRAY(SELECT d.domain FROM postroad.account_sender_domains d WHERE d.account = a.account ORDER BY d.position)
        AS sender_domains,
    ARRAY(SELECT n.network::text FROM postroad.account_networks n WHERE n.account = a.account ORDER BY n.position)
        AS networks
FROM postroad.accounts a
"""


class AccountsRepository:
    """`controlplane.ports.Accounts`."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def lock(self, account: str) -> Account:
        """As the port says."""
        found = await self._session.value(
            "account_lock", "SELECT 1 FROM postroad.accounts WHERE account = $1 FOR NO KEY UPDATE", account
        )
        if found is None:
            raise NotFoundError(names.format_name(names.ACCOUNT, account))
        # A statement of its own, so that it sees what the former holder of the lock committed.
        return await self.get(account)

    async def get(self, account: str) -> Account:
        """As the port says."""
        row = await self._session.row("account_get", _SELECT + "WHERE a.account = $1", account)
        if row is None:
            raise NotFoundError(names.format_name(names.ACCOUNT, account))
        return _account(row)

    async def list_page(self, after: str, limit: int) -> list[Account]:
        """As the port says."""
        rows = await self._session.rows(
            "account_list", _SELECT + "WHERE a.account > $1 ORDER BY a.account LIMIT $2", after, limit
        )
        return [_account(row) for row in rows]

    async def insert(self, account: Account) -> None:
        """As the port says."""
        self._session.subject = names.format_name(names.ACCOUNT, account.account)
        await self._session.run(
            "account_insert",
            """
            INSERT INTO postroad.accounts (
                account, display_name, durability, node_pool, retry_base_s, retry_factor, retry_cap_s, retry_lifetime_s,
                delivery_weight, uncertain_policy, messages_since
            )
            SELECT $1, $2, $3, $4, $5, $6, $7, $8, $9, $10,
                (SELECT transaction_timestamp() FROM postroad.former_accounts WHERE account = $1)
            """,
            *(account.account, *_values(account)),
        )
        await self._write_lists(account)

    async def update(self, account: Account, etag: Etag) -> None:
        """As the port says."""
        self._session.subject = names.format_name(names.ACCOUNT, account.account)
        await rows_changed(
            self._session,
            "account_update",
            """
            UPDATE postroad.accounts
            SET display_name = $4, durability = $5, node_pool = $6, retry_base_s = $7, retry_factor = $8,
                retry_cap_s = $9, retry_lifetime_s = $10, delivery_weight = $11,
                uncertain_policy = $12
            WHERE account = $1 AND left(uid::text, 8) = $2 AND version = $3
            RETURNING 1
            """,
            *(account.account, *etag, *_values(account)),
        )
        stored = await self.get(account.account)
        if (stored.sender_domains, stored.networks) != (account.sender_domains, account.networks):
            await self._write_lists(account)

    async def set_state(self, account: Account) -> None:
        """As the port says."""
        await self._session.run(
            "account_set_state",
            "UPDATE postroad.accounts SET state = $2, suspend_reason = $3 WHERE account = $1",
            *(account.account, account.state, account.suspend_reason),
        )

    async def delete(self, account: str, etag: Etag) -> None:
        """As the port says."""
        self._session.subject = names.format_name(names.ACCOUNT, account)
        # The cascade takes providers and rules in turn, and a provider that a rule still names cannot go.
        await self._session.run(
            "account_rules_delete", "DELETE FROM postroad.routing_rules WHERE account = $1", account
        )
        await rows_changed(
            self._session,
            "account_delete",
            """
            DELETE FROM postroad.accounts WHERE account = $1 AND left(uid::text, 8) = $2 AND version = $3 RETURNING 1
            """,
            *(account, *etag),
        )
        await self._session.run(
            "account_remember",
            """
            INSERT INTO postroad.former_accounts (account) VALUES ($1)
            ON CONFLICT (account) DO UPDATE SET delete_time = excluded.delete_time
            """,
            account,
        )

    async def networks(self, node_pool: str) -> list[tuple[str, str]]:
        """As the port says."""
        rows = await self._session.rows(
            "account_networks",
            """
            SELECT n.network::text AS network, n.account
            FROM postroad.account_networks n JOIN postroad.accounts a USING (account)
            WHERE a.node_pool = $1 ORDER BY n.network
            """,
            node_pool,
        )
        return [(row["network"], row["account"]) for row in rows]

    async def messages_since(self, account: str) -> datetime | None:
        """As the port says."""
        row = await self._session.row(
            "account_since", "SELECT messages_since FROM postroad.accounts WHERE account = $1", account
        )
        if row is None:
            raise NotFoundError(names.format_name(names.ACCOUNT, account))
        since: datetime | None = row["messages_since"]
        return since

    async def _write_lists(self, account: Account) -> None:
        await self._session.run(
            "account_domains_lock",
            "SELECT pg_advisory_xact_lock(hashtextextended('postroad.account_sender_domains', 0))",
        )
        for table in ("account_sender_domains", "account_networks"):
            await self._session.run(
                f"{table}_clear",
                f"DELETE FROM postroad.{table} WHERE account = $1",
                account.account,
            )
        await self._refuse_covered(account)
        await self._session.run(
            "account_domains_insert",
            """
            INSERT INTO postroad.account_sender_domains (account, domain, position)
            SELECT $1, domain, position FROM unnest($2::text[]) WITH ORDINALITY AS d (domain, position)
            """,
            *(account.account, list(account.sender_domains)),
        )
        await self._session.run(
            "account_networks_insert",
            """
            INSERT INTO postroad.account_networks (account, network, position)
            SELECT $1, network::cidr, position FROM unnest($2::text[]) WITH ORDINALITY AS n (network, position)
            """,
            *(account.account, list(account.networks)),
        )

    async def _refuse_covered(self, account: Account) -> None:
        taken = await self._session.value(
            "account_domains_covered",
            """
            SELECT mine FROM unnest($2::text[]) AS mine
            JOIN postroad.account_sender_domains AS other ON other.account <> $1 AND (
                other.domain = mine
                OR starts_with(mine, '*.') AND right(other.domain, length(mine) - 1) = substr(mine, 2)
                OR starts_with(other.domain, '*.') AND right(mine, length(other.domain) - 1) = substr(other.domain, 2)
            )
            LIMIT 1
            """,
            *(account.account, list(account.sender_domains)),
        )
        if taken is not None:
            raise FailedPreconditionError(
                Reason.SENDER_DOMAIN_TAKEN,
                f"{taken} belongs to another account, in whole or in part",
                subject=self._session.subject,
            )


def _values(account: Account) -> tuple[object, ...]:
    policy = account.retry_policy
    return (
        *(account.display_name, account.durability, account.node_pool),
        *(
            policy.base_s,
            policy.factor,
            policy.cap_s,
            policy.lifetime_s,
            account.delivery_weight,
            account.uncertain_policy,
        ),
    )


def _account(row: asyncpg.Record) -> Account:
    return Account(
        account=row["account"],
        display_name=row["display_name"],
        state=AccountState(row["state"]),
        suspend_reason=row["suspend_reason"],
        sender_domains=tuple(row["sender_domains"]),
        networks=tuple(row["networks"]),
        durability=Durability(row["durability"]),
        node_pool=row["node_pool"],
        retry_policy=RetryPolicy(row["retry_base_s"], row["retry_factor"], row["retry_cap_s"], row["retry_lifetime_s"]),
        delivery_weight=row["delivery_weight"],
        uncertain_policy=UncertainPolicy(row["uncertain_policy"]),
        meta=meta_of(row),
    )
