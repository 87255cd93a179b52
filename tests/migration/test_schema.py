"""What must hold of the schema whatever migrations come: read from the catalog."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime
from typing import Any

import asyncpg
import pytest

from controlplane.adapters.postgres.constraints import UNREACHABLE, domain_error
from controlplane.adapters.postgres.roles import ROLES
from dataplane.core.ids import format_message_id, new_message_id
from support.databases import Database

_NAMES = {
    "p": re.compile(r"pk_\w+"),
    "u": re.compile(r"uq_\w+"),
    "f": re.compile(r"fk_\w+"),
    "c": re.compile(r"ck_\w+"),
    "x": re.compile(r"ex_\w+"),
}
_TABLES = """
SELECT c.oid, c.relname, c.relrowsecurity, c.relforcerowsecurity FROM pg_class c
WHERE c.relnamespace = 'postroad'::regnamespace AND c.relkind IN ('r', 'p') AND NOT c.relispartition
"""
# Neither an account's nor anybody's secret: versions and switches of the installation.
_OPEN_TABLES = {"schema_migrations", "schema_compat", "denial_state"}


async def fetch(database: Database, sql: str, *arguments: object) -> list[Any]:
    connection = await asyncpg.connect(database.dsn())
    try:
        return await connection.fetch(sql, *arguments)
    finally:
        await connection.close()


async def test_every_table_forces_row_level_security_and_has_policies(migrated_database: Database) -> None:
    policies = {row["tablename"] for row in await fetch(migrated_database, "SELECT tablename FROM pg_policies")}
    for row in await fetch(migrated_database, _TABLES):
        if row["relname"] not in _OPEN_TABLES:
            assert (row["relrowsecurity"], row["relforcerowsecurity"]) == (True, True), row["relname"]
            assert row["relname"] in policies


async def test_every_partition_forces_row_level_security_too(migrated_database: Database) -> None:
    await fetch(migrated_database, "SELECT postroad.ensure_partitions(current_date, 2)")
    rows = await fetch(
        migrated_database,
        "SELECT relname, relforcerowsecurity FROM pg_class WHERE relispartition AND relkind = 'r'"
        " AND relnamespace = 'postroad'::regnamespace",
    )
    assert len(rows) == 6
    assert all(row["relforcerowsecurity"] for row in rows)


async def test_every_constraint_and_index_is_named_after_what_it_is(migrated_database: Database) -> None:
    rows = await fetch(
        migrated_database,
        "SELECT conname, contype::text FROM pg_constraint"
        " WHERE connamespace = 'postroad'::regnamespace AND contype <> 'n' AND conrelid <> 0",
    )
    assert len(rows) > 80
    for row in rows:
        assert _NAMES[row["contype"]].fullmatch(row["conname"]), row["conname"]
    indexes = await fetch(migrated_database, "SELECT indexname FROM pg_indexes WHERE schemaname = 'postroad'")
    assert all(re.match("(pk|uq|ix|ex)_", row["indexname"]) for row in indexes)


async def test_every_constraint_that_a_request_can_meet_is_an_error_of_the_domain(migrated_database: Database) -> None:
    rows = await fetch(
        migrated_database,
        "SELECT conname FROM pg_constraint"
        " WHERE connamespace = 'postroad'::regnamespace AND contype <> 'n' AND conrelid <> 0",
    )
    names = {row["conname"] for row in rows}
    assert names >= UNREACHABLE
    unmapped = {name for name in names - UNREACHABLE if domain_error(name, "accounts/a") is None}
    assert unmapped == set()


async def test_every_time_knows_its_zone(migrated_database: Database) -> None:
    rows = await fetch(
        migrated_database,
        "SELECT table_name, column_name FROM information_schema.columns"
        " WHERE table_schema = 'postroad' AND data_type IN ('timestamp without time zone', 'time without time zone')",
    )
    assert rows == []


async def test_no_role_of_ours_passes_row_level_security_or_owns_what_it_serves(migrated_database: Database) -> None:
    rows = await fetch(
        migrated_database,
        "SELECT rolname, rolsuper, rolbypassrls, rolcreaterole FROM pg_roles WHERE rolname = ANY($1)",
        list(ROLES),
    )
    assert {row["rolname"] for row in rows} == set(ROLES)
    assert not any(row["rolsuper"] or row["rolbypassrls"] or row["rolcreaterole"] for row in rows)
    owners = await fetch(
        migrated_database,
        "SELECT DISTINCT pg_get_userbyid(relowner) AS owner FROM pg_class"
        " WHERE relnamespace = 'postroad'::regnamespace",
    )
    assert [row["owner"] for row in owners] == ["postroad_owner"]


async def test_functions_that_run_as_the_owner_fix_their_search_path(migrated_database: Database) -> None:
    rows = await fetch(
        migrated_database,
        "SELECT proname, proconfig FROM pg_proc WHERE prosecdef AND pronamespace = 'postroad'::regnamespace",
    )
    assert {row["proname"] for row in rows} == {"audit", "ensure_partitions", "drop_partitions", "denial_receipts"}
    assert all(any(one.startswith("search_path=") for one in row["proconfig"]) for row in rows)


async def test_configuration_keeps_an_audit_and_mail_has_no_triggers(migrated_database: Database) -> None:
    rows = await fetch(
        migrated_database,
        "SELECT DISTINCT tgrelid::regclass::text AS name FROM pg_trigger WHERE tgname = 'audit' AND NOT tgisinternal",
    )
    audited = {row["name"].removeprefix("postroad.") for row in rows}
    assert audited == {
        *("accounts", "account_sender_domains", "account_networks", "api_keys", "smtp_credentials"),
        *(
            "providers",
            "suspended_destinations",
            "routing_rules",
            "routing_rule_targets",
            "limit_policies",
            "node_pools",
            "nodes",
            "pool_keys",
        ),
        # The verbs that change none of these.
        *("commands", "enrollment_tokens", "spools", "given_up_spools"),
    }


@pytest.mark.parametrize("day", [date(1970, 1, 1), date(2026, 11, 20), date(2100, 2, 28)])
async def test_partitions_begin_where_the_days_ids_begin(migrated_database: Database, day: date) -> None:
    begin_ms = int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp() * 1000)
    (row,) = await fetch(migrated_database, "SELECT postroad.message_id_bound($1) AS bound", day)
    bound = str(row["bound"])
    assert bound <= format_message_id(new_message_id(begin_ms, bytes(10)))
    if begin_ms:
        assert format_message_id(new_message_id(begin_ms - 1, b"\xff" * 10)) < bound


async def test_partitions_are_made_once_and_dropped_by_day(migrated_database: Database) -> None:
    make = "SELECT postroad.ensure_partitions(date '2026-01-01', 3) AS count"
    assert (await fetch(migrated_database, make))[0]["count"] == 9
    assert (await fetch(migrated_database, make))[0]["count"] == 0
    drop = "SELECT postroad.drop_partitions(date '2026-01-02') AS count"
    assert (await fetch(migrated_database, drop))[0]["count"] == 3
    assert (await fetch(migrated_database, make))[0]["count"] == 3
