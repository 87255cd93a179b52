"""The config stream over mutual TLS and PostgreSQL: edits arrive, refusals stay refused, identities hold."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import grpc
import grpc.aio
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from controlplane.adapters.pki import create_authority
from postroad.node.v1 import config_stream_service_pb2 as pb
from support.databases import Database
from support.fleet import accept_spools, execute, fetch
from support.nodes_port import Certificate, NodesPort, NodeStream, certificate_for, nodes_port, now, put_bundle, until

SETTINGS = "pools/default/settings"


@pytest.fixture
async def port(migrated_database: Database, tmp_path: Path) -> AsyncIterator[NodesPort]:
    await put_bundle(migrated_database, SETTINGS, b"settings", kind=4)
    async with nodes_port(migrated_database, tmp_path / "pki") as port:
        yield port


async def _synced(port: NodesPort, node: str = "edge-1", certificate: Certificate | None = None) -> NodeStream:
    certificate = certificate or await port.enrolled(node)
    stream = NodeStream(port.channel(certificate), node)
    await stream.hello()
    await stream.take(await stream.expect("snapshot"))
    return stream


async def _status(database: Database, node: str = "edge-1") -> tuple[int, str, bool]:
    rows = await fetch(
        database, "SELECT config_status, config_error, connected FROM postroad.node_status WHERE node = $1", node
    )
    return tuple(rows[0]) if rows else (0, "", False)


async def test_a_new_node_gets_everything_and_is_synced(port: NodesPort, migrated_database: Database) -> None:
    digest = await put_bundle(migrated_database, "accounts/a", b"one")

    stream = await _synced(port)
    if "accounts/a" not in stream.held:
        await stream.take(await stream.expect("delta"))

    assert stream.held == {"accounts/a": digest, SETTINGS: hashlib.sha256(b"settings").digest()}

    async def is_synced() -> bool:
        return await _status(migrated_database) == (1, "", True)

    await until(is_synced)


async def test_a_node_that_names_its_pool_is_sent_what_it_lacks_without_the_pools_settings(port: NodesPort) -> None:
    stream = NodeStream(port.channel(await port.enrolled("edge-1")), "edge-1")
    await stream.hello(node_pool="nodePools/default")

    delta = await stream.expect("delta")

    assert [one.name for one in delta.upserts] == [SETTINGS]


async def test_an_edit_reaches_the_node_well_under_a_second(port: NodesPort, migrated_database: Database) -> None:
    stream = await _synced(port)
    begun = time.monotonic()

    digest = await put_bundle(migrated_database, "accounts/a", b"two")
    delta = await stream.expect("delta")

    assert time.monotonic() - begun < 0.8
    assert [(one.name, one.hash, one.content) for one in delta.upserts] == [("accounts/a", digest, b"two")]


async def test_a_deleted_bundle_is_named_and_nothing_else_goes(port: NodesPort, migrated_database: Database) -> None:
    await put_bundle(migrated_database, "accounts/a", b"one")
    await until(lambda: "accounts/a" in port.hub.cache.get("default").bundles)
    stream = await _synced(port)

    await execute(
        migrated_database,
        """
        UPDATE postroad.config_bundles SET hash = NULL, content = NULL, change_xid = pg_current_xact_id()
        WHERE bundle = 'accounts/a'
        """,
    )
    delta = await stream.expect("delta")

    assert (list(delta.removed), list(delta.upserts)) == (["accounts/a"], [])


async def test_a_node_that_holds_everything_gets_progress(port: NodesPort) -> None:
    stream = NodeStream(port.channel(await port.enrolled("edge-1")), "edge-1")
    stream.held = {SETTINGS: hashlib.sha256(b"settings").digest()}
    await stream.hello(denials_version=1)

    assert (await stream.receive()).WhichOneof("message") == "progress"


async def test_refused_content_is_recorded_and_comes_again_only_when_it_changed(
    port: NodesPort, migrated_database: Database
) -> None:
    certificate = await port.enrolled("edge-1")
    stream = await _synced(port, certificate=certificate)
    await put_bundle(migrated_database, "accounts/a", b"bad")
    delta = await stream.expect("delta")
    info = AnyMessage()
    info.Pack(ErrorInfo(reason="BUNDLE_REFUSED"))
    error = pb.Nack.BundleError(name="accounts/a", hash=delta.upserts[0].hash, status=Status(message="no such rule"))
    nack = pb.Nack(nonce=delta.nonce, error_detail=Status(message="refused", details=[info]), bundle_errors=[error])
    await stream.call.write(pb.StreamConfigRequest(nack=nack))

    async def is_recorded() -> bool:
        return await _status(migrated_database) == (4, "accounts/a: no such rule", True)

    await until(is_recorded)

    await put_bundle(migrated_database, "accounts/b", b"good")
    other = await stream.expect("delta")
    assert [one.name for one in other.upserts] == ["accounts/b"]
    await stream.take(other)

    again = NodeStream(port.channel(certificate), "edge-1")
    again.held, again.denials_version = stream.held, 1
    await again.hello()
    assert (await again.receive()).WhichOneof("message") == "progress"

    await put_bundle(migrated_database, "accounts/a", b"mended")
    assert [one.content for one in (await again.expect("delta")).upserts] == [b"mended"]


async def test_denials_have_a_lane_of_their_own(port: NodesPort, migrated_database: Database) -> None:
    stream = NodeStream(port.channel(await port.enrolled("edge-1")), "edge-1")
    await stream.hello(denials_version=1)
    await stream.expect("snapshot")  # which stays unanswered

    await execute(
        migrated_database, "INSERT INTO postroad.denials (denial, kind, account) VALUES ('accounts/a', 1, 'a')"
    )
    await execute(migrated_database, "UPDATE postroad.denial_state SET version = 2")
    await execute(migrated_database, "SELECT pg_notify('postroad_denials', '')")

    denials = (await stream.receive()).denials
    assert denials.denials.version == 2
    assert [one.account for one in denials.denials.denials] == ["accounts/a"]
    stream.denials_version = 2
    await stream.ack(denials.nonce)

    async def is_in_force() -> bool:
        rows = await fetch(migrated_database, "SELECT denials_version FROM postroad.node_status")
        return bool(rows) and rows[0][0] == 2

    await until(is_in_force)
    assert await fetch(migrated_database, "SELECT 1 FROM postroad.node_status WHERE denials_time IS NOT NULL")


async def _deny(database: Database, denial: str, kind: int) -> int:
    """As the API does; returns the version that has it."""
    (state,) = await fetch(
        database,
        """
        WITH moved AS (UPDATE postroad.denial_state SET version = version + 1 RETURNING version)
        INSERT INTO postroad.denials (denial, kind, version) SELECT $1, $2, version FROM moved RETURNING version
        """,
        *(denial, kind),
    )
    await execute(database, "SELECT pg_notify('postroad_denials', '')")
    return int(state[0])


async def test_what_a_restored_database_denies_is_news_to_a_node_that_holds_more(
    port: NodesPort, migrated_database: Database
) -> None:
    stored = await _deny(migrated_database, "accounts/a", 1)
    held = int(time.time() * 1000)
    assert held > stored
    stream = NodeStream(port.channel(await port.enrolled("edge-1")), "edge-1")
    await stream.hello(denials_version=held)

    denials = (await stream.next_denials()).denials

    assert denials.version > held
    assert [one.account for one in denials.denials] == ["accounts/a"]


async def test_a_version_of_denials_that_no_clock_has_shown_moves_nothing(
    port: NodesPort, migrated_database: Database
) -> None:
    stored = await _deny(migrated_database, "accounts/a", 1)
    stream = NodeStream(port.channel(await port.enrolled("edge-1")), "edge-1")
    await stream.hello(denials_version=int(time.time() * 1000) + 86_400_000)
    await stream.expect("snapshot")
    assert (await fetch(migrated_database, "SELECT version FROM postroad.denial_state"))[0]["version"] == stored


async def _receipt(database: Database, kind: int) -> tuple[int, int | None]:
    rows = await fetch(database, "SELECT * FROM postroad.denial_receipts(NULL, $1::smallint)", kind)
    return rows[0]["denials_version"], rows[0]["told_since"]


async def test_a_node_that_knows_no_destinations_is_not_told_of_them_and_gets_all_of_them_when_it_learns(
    port: NodesPort, migrated_database: Database
) -> None:
    await _deny(migrated_database, "destinations/example.net", 4)
    version = await _deny(migrated_database, "accounts/a", 1)
    await until(lambda: port.hub._denials is not None and port.hub._denials.version == version)
    certificate = await port.enrolled("edge-1")
    older = NodeStream(port.channel(certificate), "edge-1")
    await older.hello(client_features=["command-filter"])
    denials = (await older.receive()).denials
    assert [one.WhichOneof("subject") for one in denials.denials.denials] == ["account"]
    await older.take_denials(denials)
    await older.take(await older.expect("snapshot"))

    async def is_recorded() -> bool:
        return (await _receipt(migrated_database, 1))[0] == version

    await until(is_recorded)
    assert await _receipt(migrated_database, 1) == (version, 0)
    assert await _receipt(migrated_database, 4) == (version, None)

    # Upgraded, with the set of its former software on its disk: that version says nothing of destinations.
    newer = NodeStream(port.channel(certificate), "edge-1")
    newer.held, newer.denials_version = older.held, version
    await newer.hello(client_features=["command-filter", "destination-denials"])
    denials = await newer.next_denials()
    former, version = version, denials.denials.version
    assert version > former
    assert {one.WhichOneof("subject") for one in denials.denials.denials} == {"account", "destination"}
    assert await _receipt(migrated_database, 4) == (former, version)
    await newer.take_denials(denials)
    await until(is_recorded)

    # Known again, it is told nothing anew.
    again = NodeStream(port.channel(certificate), "edge-1")
    again.held, again.denials_version = newer.held, version
    await again.hello(client_features=["destination-denials"])
    assert (await again.receive()).WhichOneof("message") == "progress"
    assert await _receipt(migrated_database, 4) == (version, version)

    # Downgraded, it is trusted no more.
    await older.call.done_writing()
    back = NodeStream(port.channel(certificate), "edge-1")
    back.held, back.denials_version = newer.held, version
    await back.hello()
    assert (await back.receive()).WhichOneof("message") == "progress"
    assert await _receipt(migrated_database, 4) == (version, None)


async def test_a_node_that_learns_of_destinations_while_none_is_denied_moves_no_version(
    port: NodesPort, migrated_database: Database
) -> None:
    version = await _deny(migrated_database, "accounts/a", 1)
    certificate = await port.enrolled("edge-1")
    stream = NodeStream(port.channel(certificate), "edge-1")
    await stream.hello(client_features=["destination-denials"])
    await stream.expect("snapshot")
    assert (await _receipt(migrated_database, 4))[1] == version
    assert (await fetch(migrated_database, "SELECT version FROM postroad.denial_state"))[0][0] == version


async def test_a_newer_stream_of_a_node_closes_the_older(port: NodesPort) -> None:
    certificate = await port.enrolled("edge-1")
    older = await _synced(port, certificate=certificate)

    newer = NodeStream(port.channel(certificate), "edge-1")
    newer.held = older.held
    await newer.hello()

    assert await older.end_code() is grpc.StatusCode.ABORTED
    assert (await newer.receive()).WhichOneof("message") in {"progress", "denials"}


async def test_a_newer_stream_on_another_replica_closes_the_older(
    port: NodesPort, migrated_database: Database, tmp_path: Path
) -> None:
    certificate = await port.enrolled("edge-1")
    older = await _synced(port, certificate=certificate)
    async with nodes_port(migrated_database, tmp_path / "other") as other:
        foreign = certificate_for(other.authority, "edge-1")
        await execute(
            migrated_database, "UPDATE postroad.nodes SET certificate_serial = $1 WHERE node = 'edge-1'", foreign.serial
        )
        newer = NodeStream(other.channel(foreign), "edge-1")
        newer.held = older.held
        await newer.hello()

        assert await older.end_code() in {grpc.StatusCode.ABORTED, grpc.StatusCode.UNAUTHENTICATED}
        assert (await newer.receive()).WhichOneof("message") in {"progress", "denials"}


async def test_another_nodes_name_in_hello_is_refused(port: NodesPort) -> None:
    stream = NodeStream(port.channel(await port.enrolled("edge-1")), "edge-1")
    await port.enrolled("edge-2")
    await stream.hello(node="nodes/edge-2")

    assert await stream.end_code() is grpc.StatusCode.PERMISSION_DENIED


async def test_another_nodes_spool_is_refused_and_the_stream_goes_on(
    port: NodesPort, migrated_database: Database
) -> None:
    spool = str(uuid.uuid4())
    first = NodeStream(port.channel(await port.enrolled("edge-1")), "edge-1")
    await first.hello(spools=[pb.SpoolStatus(spool=spool, incarnation=1)])
    await first.expect("snapshot")
    second = NodeStream(port.channel(await port.enrolled("edge-2")), "edge-2")
    await second.hello(spools=[pb.SpoolStatus(spool=spool, incarnation=1)])

    refused = await second.expect("directive")
    assert (refused.action, refused.spool) == (pb.Directive.ACTION_REFUSE_SPOOL, spool)
    await second.expect("snapshot")
    (row,) = await fetch(migrated_database, "SELECT node FROM postroad.spools")
    assert row["node"] == "edge-1"


async def _let_send(stream: NodeStream, spool: str) -> None:
    """The node is told that it may send from the spool."""
    directive = await stream.expect("directive")
    assert (directive.action, directive.spool) == (pb.Directive.ACTION_ACCEPT_SPOOL, spool)


async def test_a_spool_that_moves_is_taken_from_the_one_node_and_given_to_the_other(
    port: NodesPort, migrated_database: Database
) -> None:
    spool = str(uuid.uuid4())
    former = NodeStream(port.channel(await port.enrolled("edge-1")), "edge-1")
    await former.hello(spools=[pb.SpoolStatus(spool=spool, incarnation=3, last_record=9)])
    await former.expect("snapshot")
    taker = NodeStream(port.channel(await port.enrolled("edge-2")), "edge-2")
    waiting = pb.SpoolStatus(spool=spool, incarnation=4, last_record=9, refused=True)
    await taker.hello(spools=[waiting])
    # It holds it back already, and so it is told nothing but its configuration.
    await taker.expect("snapshot")

    await execute(migrated_database, "UPDATE postroad.spools SET node = 'edge-2'")
    await execute(migrated_database, "SELECT pg_notify('postroad_commands', '')")

    refused = await former.expect("directive")
    assert (refused.action, refused.spool) == (pb.Directive.ACTION_REFUSE_SPOOL, spool)
    await _let_send(taker, spool)
    # Records come, which its last report does not know of; that is no old copy.
    await execute(migrated_database, "UPDATE postroad.spools SET cursor = 12")
    await execute(migrated_database, "SELECT pg_notify('postroad_commands', '')")
    # Whoever has not heard of it hears it once more.
    await taker.call.write(pb.StreamConfigRequest(status_report=pb.StatusReport(spools=[waiting])))
    await _let_send(taker, spool)
    (row,) = await fetch(migrated_database, "SELECT node, accepted FROM postroad.spools")
    assert tuple(row) == ("edge-2", True)


async def test_a_node_that_was_away_when_its_spool_was_accepted_hears_of_it_when_it_comes_back(
    port: NodesPort, migrated_database: Database
) -> None:
    spool = str(uuid.uuid4())
    certificate = await port.enrolled("edge-1")
    await execute(
        migrated_database,
        "INSERT INTO postroad.spools (spool, node, incarnation, cursor) VALUES ($1, 'edge-1', 5, 40)",
        uuid.UUID(spool),
    )
    stream = NodeStream(port.channel(certificate), "edge-1")
    await stream.hello(spools=[pb.SpoolStatus(spool=spool, incarnation=6, last_record=40, refused=True)])
    await _let_send(stream, spool)


async def test_an_old_copy_of_a_spool_that_moved_is_refused_until_it_is_accepted(
    port: NodesPort, migrated_database: Database
) -> None:
    spool = str(uuid.uuid4())
    certificate = await port.enrolled("edge-1")
    await execute(
        migrated_database,
        "INSERT INTO postroad.spools (spool, node, incarnation, cursor) VALUES ($1, 'edge-1', 5, 40)",
        uuid.UUID(spool),
    )
    stream = NodeStream(port.channel(certificate), "edge-1")
    # Newer by its incarnation, since it was opened again; older by what it holds.
    await stream.hello(
        spools=[pb.SpoolStatus(spool=spool, incarnation=6, acknowledged=37, last_record=39, refused=True)]
    )
    await stream.expect("snapshot")
    (row,) = await fetch(migrated_database, "SELECT accepted, resume_record FROM postroad.spools")
    assert tuple(row) == (False, 37)

    await accept_spools(migrated_database)
    await _let_send(stream, spool)


async def test_a_copy_of_a_spool_that_moved_is_refused_however_much_it_recorded(
    port: NodesPort, migrated_database: Database
) -> None:
    spool, known, unknown = str(uuid.uuid4()), b"k" * 16, b"u" * 16
    certificate = await port.enrolled("edge-1")
    await execute(
        migrated_database,
        "INSERT INTO postroad.spools (spool, node, incarnation, cursor, opening) VALUES ($1, 'edge-1', 5, 40, $2)",
        uuid.UUID(spool),
        known,
    )
    stream = NodeStream(port.channel(certificate), "edge-1")
    status = pb.SpoolStatus(spool=spool, incarnation=9, last_record=90, refused=True, opening_id=b"p" * 16)
    # It knows the opening, and had fewer records at its end than are stored.
    status.former_openings.add(id=known, last_record=39)
    status.former_openings.add(id=unknown, last_record=60)
    await stream.hello(spools=[status])
    await stream.expect("snapshot")
    (row,) = await fetch(migrated_database, "SELECT accepted, opening, reported_opening FROM postroad.spools")
    assert tuple(row) == (False, known, b"p" * 16)

    await accept_spools(migrated_database)
    await _let_send(stream, spool)


async def test_a_spool_that_waits_and_knows_the_opening_that_is_stored_is_let_send(
    port: NodesPort, migrated_database: Database
) -> None:
    spool = str(uuid.uuid4())
    certificate = await port.enrolled("edge-1")
    await execute(
        migrated_database,
        "INSERT INTO postroad.spools (spool, node, incarnation, cursor, opening) VALUES ($1, 'edge-1', 5, 40, $2)",
        uuid.UUID(spool),
        b"k" * 16,
    )
    stream = NodeStream(port.channel(certificate), "edge-1")
    status = pb.SpoolStatus(spool=spool, incarnation=9, last_record=90, refused=True, opening_id=b"p" * 16)
    status.former_openings.add(id=b"k" * 16, last_record=40)
    await stream.hello(spools=[status])
    await _let_send(stream, spool)


async def test_anything_before_hello_is_refused(port: NodesPort) -> None:
    stream = NodeStream(port.channel(await port.enrolled("edge-1")), "edge-1")
    await stream.ack("c1")

    assert await stream.end_code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_certificates_that_are_not_the_nodes_are_refused(port: NodesPort, tmp_path: Path) -> None:
    await port.enrolled("edge-1")
    other_ca = create_authority(tmp_path / "other-ca", now())
    server_chain, server_key = port.authority.issue_server(["localhost"], now())
    strangers = {
        "none": None,
        "of another CA": certificate_for(other_ca, "edge-1"),
        "expired": certificate_for(port.authority, "edge-1", now() - timedelta(days=31)),
        "a server's": Certificate(server_key, server_chain, ""),
    }
    for name, certificate in strangers.items():
        stream = NodeStream(port.channel(certificate), "edge-1")
        assert await stream.end_code() is grpc.StatusCode.UNAVAILABLE, name


async def test_a_certificate_that_was_replaced_or_revoked_is_refused(
    port: NodesPort, migrated_database: Database
) -> None:
    await port.enrolled("edge-1")
    former = NodeStream(port.channel(certificate_for(port.authority, "edge-1")), "edge-1")
    assert await former.end_code() is grpc.StatusCode.UNAUTHENTICATED

    unknown = NodeStream(port.channel(certificate_for(port.authority, "nobody")), "nobody")
    assert await unknown.end_code() is grpc.StatusCode.UNAUTHENTICATED

    revoked = await _synced(port, "edge-2")
    await execute(migrated_database, "UPDATE postroad.nodes SET state = 3 WHERE node = 'edge-2'")
    await execute(migrated_database, "SELECT pg_notify('postroad_commands', '')")
    assert await revoked.end_code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_command_is_sent_until_its_result_is_known(port: NodesPort, migrated_database: Database) -> None:
    spool, command, message = uuid.uuid4(), uuid.uuid4(), uuid.uuid4()
    stream = NodeStream(port.channel(await port.enrolled("edge-1")), "edge-1")
    await stream.hello(spools=[pb.SpoolStatus(spool=str(spool), incarnation=1)])
    await stream.take(await stream.expect("snapshot"))
    await execute(
        migrated_database,
        "INSERT INTO postroad.commands (command, account, verb, spool, message_ids) VALUES ($1, 'a', 1, $2, $3)",
        command,
        spool,
        [message],
    )
    await execute(migrated_database, "SELECT pg_notify('postroad_commands', '')")

    got = await stream.expect("command")
    assert (got.command, got.spool, got.account) == (str(command), str(spool), "accounts/a")
    assert list(got.message_ids) == [message.bytes]

    port.hub.tick(port.hub.slots[0])
    assert (await stream.expect("command")).command == str(command)

    await execute(migrated_database, "UPDATE postroad.commands SET done_time = now()")
    await execute(migrated_database, "SELECT pg_notify('postroad_commands', '')")
    await until(lambda: not port.hub.slots[0].session._commands)


async def test_a_command_with_a_filter_goes_to_nodes_that_know_filters_and_again_when_its_spool_is_opened_anew(
    port: NodesPort, migrated_database: Database
) -> None:
    spool, command, after = uuid.uuid4(), uuid.uuid4(), uuid.uuid4()
    opened = pb.SpoolStatus(spool=str(spool), incarnation=1)
    certificate = await port.enrolled("edge-1")
    older = NodeStream(port.channel(certificate), "edge-1")
    await older.hello(spools=[opened])
    await older.take(await older.expect("snapshot"))
    await execute(
        migrated_database,
        """
        INSERT INTO postroad.commands (command, account, verb, spool, message_ids, provider, accepted_before,
            filter_provider, filter_recipient_domain, filter_states, position)
        VALUES ($1, '-', 6, $2, '{}', 'providers/new', timestamptz 'epoch' + interval '5 s', 'providers/old', 'x.test',
            '{2,5}', $3)
        """,
        *(command, spool, after),
    )
    await execute(migrated_database, "SELECT pg_notify('postroad_commands', '')")
    await until(lambda: bool(port.hub.slots[0].session._commands))
    port.hub.tick(port.hub.slots[0])
    assert (await older.receive()).WhichOneof("message") == "progress"

    newer = NodeStream(port.channel(certificate), "edge-1")
    await newer.hello(spools=[opened], client_features=["command-filter"])
    await newer.take(await newer.expect("snapshot"))
    got = await newer.expect("command")
    assert (got.account, got.verb, got.provider, list(got.message_ids)) == ("accounts/-", 6, "providers/new", [])
    assert got.filter == pb.Command.Filter(
        provider="providers/old",
        recipient_domain="x.test",
        accepted_before_ms=5_000,
        states=[2, 5],
        after=after.bytes,
    )
    # The worker that had it is gone; it had come this far.
    reached = uuid.uuid4()
    await execute(migrated_database, "UPDATE postroad.commands SET position = $1", reached)
    opened.incarnation = 2
    await newer.call.write(pb.StreamConfigRequest(status_report=pb.StatusReport(spools=[opened])))
    assert (await newer.expect("command")).filter.after == reached.bytes


async def test_a_spool_in_use_is_not_judged_by_what_the_ledger_may_have_overtaken(
    port: NodesPort, migrated_database: Database
) -> None:
    spool = str(uuid.uuid4())
    certificate = await port.enrolled("edge-1")
    await execute(
        migrated_database,
        "INSERT INTO postroad.spools (spool, node, incarnation) VALUES ($1, 'edge-1', 5)",
        uuid.UUID(spool),
    )
    stream = NodeStream(port.channel(certificate), "edge-1")
    # Said before the worker started again, and heard after the ledger has heard of that.
    await stream.hello(spools=[pb.SpoolStatus(spool=spool, incarnation=4)])
    await stream.expect("snapshot")

    (row,) = await fetch(migrated_database, "SELECT accepted, reported_incarnation FROM postroad.spools")
    assert tuple(row) == (True, 4)


async def test_a_held_spool_with_an_older_incarnation_is_refused_until_it_is_accepted(
    port: NodesPort, migrated_database: Database
) -> None:
    spool = str(uuid.uuid4())
    certificate = await port.enrolled("edge-1")
    await execute(
        migrated_database,
        "INSERT INTO postroad.spools (spool, node, incarnation) VALUES ($1, 'edge-1', 5)",
        uuid.UUID(spool),
    )
    stream = NodeStream(port.channel(certificate), "edge-1")
    await stream.hello(spools=[pb.SpoolStatus(spool=spool, incarnation=4, refused=True)])
    await stream.expect("snapshot")
    (row,) = await fetch(migrated_database, "SELECT accepted FROM postroad.spools")
    assert not row["accepted"]

    await accept_spools(migrated_database)
    await _let_send(stream, spool)


async def test_draining_asks_every_node_to_come_back(port: NodesPort) -> None:
    stream = await _synced(port)

    port.hub.drain()

    assert (await stream.expect("directive")).action == pb.Directive.ACTION_RECONNECT
    assert await stream.end_code() is grpc.StatusCode.OK
    late = NodeStream(port.channel(await port.enrolled("edge-2")), "edge-2")
    await late.hello()
    assert (await late.expect("directive")).action == pb.Directive.ACTION_RECONNECT


async def test_a_stream_that_ends_leaves_the_node_not_connected(port: NodesPort, migrated_database: Database) -> None:
    stream = await _synced(port)
    stream.call.cancel()

    async def is_gone() -> bool:
        return (await _status(migrated_database))[2] is False

    await until(is_gone)
    assert len(port.hub) == 0


async def test_a_node_that_missed_more_than_a_message_holds_catches_up_in_steps(
    port: NodesPort, migrated_database: Database
) -> None:
    certificate = await port.enrolled("edge-1")
    stream = await _synced(port, certificate=certificate)
    stream.call.cancel()
    large = {f"accounts/a{n}": bytes([n]) * 3_500_000 for n in range(5)}
    wanted = {name: await put_bundle(migrated_database, name, content) for name, content in large.items()}

    back = NodeStream(port.channel(certificate), "edge-1")
    back.held = dict(stream.held)
    await back.hello()
    for _ in range(10):
        if wanted.items() <= back.held.items():
            break
        await back.take(await back.expect("delta"))

    assert wanted.items() <= back.held.items()
