"""PostgreSQL fails over and has lost its last commits: what nodes were told of them is put right, and what comes next
is told, though it has the numbers of what was lost.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from support.databases import Database
from support.fleet import execute, fetch
from support.nodes_port import NodesPort, NodeStream, nodes_port, put_bundle, until

BUNDLE, OTHER = "accounts/a", "pools/default/settings"


@pytest.fixture
async def port(migrated_database: Database, tmp_path: Path) -> AsyncIterator[NodesPort]:
    await put_bundle(migrated_database, OTHER, b"settings", kind=4)
    async with nodes_port(migrated_database, tmp_path / "pki") as port:
        yield port


async def synced(port: NodesPort) -> NodeStream:
    """A node that holds what there is."""
    stream = NodeStream(port.channel(await port.enrolled("edge-1")), "edge-1")
    await stream.hello()
    await stream.take(await stream.expect("snapshot"))
    return stream


async def fail_over(database: Database) -> None:
    """What a failover does beside losing commits: it cuts the connections."""
    await fetch(
        database,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1 AND datname = $2",
        "postroad-feed",
        database.name,
    )


async def test_a_lost_edit_is_taken_back_and_the_next_one_is_told(port: NodesPort, migrated_database: Database) -> None:
    await put_bundle(migrated_database, BUNDLE, b"one")
    await until(lambda: BUNDLE in port.hub.cache.get("default").bundles)
    stream = await synced(port)
    kept = await fetch(
        migrated_database,
        "SELECT revision, hash, content, change_xid::text FROM postroad.config_bundles WHERE bundle = $1",
        BUNDLE,
    )
    await put_bundle(migrated_database, BUNDLE, b"lost")
    await stream.take(await stream.expect("delta"))
    await put_bundle(migrated_database, "accounts/lost", b"lost")
    await stream.take(await stream.expect("delta"))

    await execute(
        migrated_database,
        "UPDATE postroad.config_bundles SET revision = $1, hash = $2, content = $3, change_xid = $4::text::xid8"
        " WHERE bundle = $5",
        *(*kept[0], BUNDLE),
    )
    await execute(migrated_database, "DELETE FROM postroad.config_bundles WHERE bundle = 'accounts/lost'")
    await fail_over(migrated_database)

    back = await stream.expect("delta")
    assert ([one.content for one in back.upserts], list(back.removed)) == ([b"one"], ["accounts/lost"])
    await stream.take(back)
    await put_bundle(migrated_database, BUNDLE, b"another")
    assert [one.content for one in (await stream.expect("delta")).upserts] == [b"another"]


async def test_denials_that_were_lost_are_lifted_under_a_version_that_nodes_take(
    port: NodesPort, migrated_database: Database
) -> None:
    stream = await synced(port)
    await execute(
        migrated_database, "INSERT INTO postroad.denials (denial, kind, account) VALUES ('accounts/a', 1, 'a')"
    )
    far = 9_000_000_000_000
    await execute(migrated_database, "UPDATE postroad.denial_state SET version = $1", far)
    await execute(migrated_database, "NOTIFY postroad_denials")
    told = await stream.expect_denials(far)
    assert len(told.denials.denials) == 1

    await execute(migrated_database, "DELETE FROM postroad.denials")
    await execute(migrated_database, "UPDATE postroad.denial_state SET version = 1")
    await fail_over(migrated_database)

    told = await stream.expect_denials(far + 1)
    assert not told.denials.denials
