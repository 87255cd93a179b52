"""The nodes' port on loopback, over a test's database, and nodes that speak to it by hand."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from controlplane.adapters.grpc.node_config import NodeConfigServicer
from controlplane.adapters.grpc.node_ledger import NodeLedgerServicer
from controlplane.adapters.grpc.node_queue import NodeQueueServicer
from controlplane.adapters.grpc.transport import NODE_OPTIONS, TlsFiles, server_credentials
from controlplane.adapters.pki import CertificateAuthority, create_authority, write_private
from controlplane.adapters.postgres.books import PostgresBooks
from controlplane.adapters.postgres.feed import ChangeFeed
from controlplane.adapters.postgres.fleet import PostgresFleet
from controlplane.adapters.postgres.fleet_database import FleetDatabase
from controlplane.adapters.postgres.handovers import PostgresHandovers
from controlplane.adapters.postgres.ledger import PostgresLedger
from controlplane.adapters.postgres.queue import PostgresQueue
from controlplane.domain.books import Comparison
from controlplane.services.auditing import Auditor
from controlplane.services.handovers import Handovers
from controlplane.services.ingest import IngestService
from controlplane.services.queue import QueueService
from controlplane.stream.fleet import FleetService
from controlplane.stream.hub import Hub
from postroad.node.v1 import config_stream_service_pb2 as pb
from postroad.node.v1.config_stream_service_pb2_grpc import ConfigStreamServiceStub
from postroad.node.v1.ledger_service_pb2_grpc import add_LedgerServiceServicer_to_server
from postroad.node.v1.queue_service_pb2_grpc import add_QueueServiceServicer_to_server
from support.databases import Database
from support.fleet import execute, fleet_pool, role_dsn


def now() -> datetime:
    return datetime.now(UTC)


class Certificate(NamedTuple):
    """A client's key and certificate in PEM."""

    key: bytes
    certificate: bytes
    serial: str


def certificate_for(authority: CertificateAuthority, node: str, at: datetime | None = None) -> Certificate:
    """A key and what the CA makes of it, as if issued at `at`."""
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    issued = authority.sign_node(request.public_bytes(serialization.Encoding.PEM), node, at or now())
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Certificate(key_pem, issued.certificate_pem, issued.serial)


@dataclass
class NodesPort:
    """One control-plane replica, as far as nodes see it."""

    port: int
    hub: Hub
    fleet: FleetService
    ledger: NodeLedgerServicer
    authority: CertificateAuthority
    database: Database
    compared: asyncio.Queue[Comparison]
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    async def enrolled(self, node: str, pool: str = "default") -> Certificate:
        """A node that exists, with its certificate."""
        certificate = certificate_for(self.authority, node)
        await execute(
            self.database, "INSERT INTO postroad.node_pools (node_pool) VALUES ($1) ON CONFLICT DO NOTHING", pool
        )
        await execute(
            self.database,
            """
            INSERT INTO postroad.nodes (node, node_pool, state, certificate_serial, certificate_not_after)
            VALUES ($1, $2, 2, $3, now() + interval '30 days')
            """,
            node,
            pool,
            certificate.serial,
        )
        return certificate

    def channel(self, certificate: Certificate | None) -> grpc.aio.Channel:
        credentials = grpc.ssl_channel_credentials(
            root_certificates=self.authority.certificate_pem,
            private_key=certificate.key if certificate else None,
            certificate_chain=certificate.certificate if certificate else None,
        )
        return grpc.aio.secure_channel(f"localhost:{self.port}", credentials)


@asynccontextmanager
async def nodes_port(
    database: Database, folder: Path, *, progress_s: float = 60.0, audit_s: float = 3_600.0
) -> AsyncIterator[NodesPort]:
    """Serve nodes from `database`, with a CA in `folder` (made when it is missing)."""
    authority = _authority(folder)
    async with fleet_pool(database) as pool:
        fleet_database = FleetDatabase(pool)
        hub = Hub(max_streams=50)
        fleet = FleetService(PostgresFleet(fleet_database, lambda _pool, _key, sealed: sealed), hub, now, "test")
        events: list[tuple[str, dict[str, Any]]] = []
        compared: asyncio.Queue[Comparison] = asyncio.Queue()

        def report(name: str, **facts: Any) -> None:
            events.append((name, facts))

        config = NodeConfigServicer(fleet, now, report, progress_s=progress_s)
        store = PostgresLedger(fleet_database, retention=timedelta(days=30))
        auditor = Auditor(
            PostgresBooks(fleet_database),
            now,
            interval_s=audit_s,
            report=lambda spool, reason: report("audit.not_compared", spool=spool, reason=reason),
            concluded=compared.put_nowait,
        )
        handovers = Handovers(PostgresHandovers(fleet_database), now)
        ingest = IngestService(store, now)
        ledger = NodeLedgerServicer(ingest, auditor, handovers, fleet, report, look_back_s=0.2)
        server = grpc.aio.server(options=NODE_OPTIONS)
        server.add_generic_rpc_handlers((config.handler(),))
        add_LedgerServiceServicer_to_server(ledger, server)
        queue = QueueService(PostgresQueue(fleet_database, store), now, time.monotonic)
        add_QueueServiceServicer_to_server(NodeQueueServicer(queue, fleet), server)
        files = TlsFiles(folder / "server.pem", folder / "server.key", folder / "ca.pem")
        port = server.add_secure_port("127.0.0.1:0", server_credentials(files, lambda text: events.append((text, {}))))
        dsn = await role_dsn(database, "postroad_fleet")
        feed = asyncio.create_task(ChangeFeed(dsn, fleet.scan, reconnected=fleet.look_anew).run())
        await server.start()
        try:
            yield NodesPort(port, hub, fleet, ledger, authority, database, compared, events)
        finally:
            feed.cancel()
            await asyncio.gather(feed, return_exceptions=True)
            await server.stop(0)


def _authority(folder: Path) -> CertificateAuthority:
    authority = create_authority(folder, now())
    chain, key = authority.issue_server(["localhost"], now())
    write_private(folder / "server.pem", chain)
    write_private(folder / "server.key", key)
    return authority


class NodeStream:
    """A node's config stream, typed by hand."""

    def __init__(self, channel: grpc.aio.Channel, node: str) -> None:
        self.node = node
        self.call = ConfigStreamServiceStub(channel).StreamConfig()
        self.held: dict[str, bytes] = {}
        self.denials_version = 0

    async def hello(self, **more: Any) -> None:
        bundles = [pb.BundleVersion(name=name, revision=1, hash=digest) for name, digest in self.held.items()]
        hello = pb.Hello(
            node=f"nodes/{self.node}",
            boot_id="b",
            software_version="1.0",
            bundles=bundles,
            denials_version=self.denials_version,
        )
        hello.MergeFrom(pb.Hello(**more))
        await self.call.write(pb.StreamConfigRequest(hello=hello))

    async def receive(self) -> pb.StreamConfigResponse:
        async with asyncio.timeout(10):
            response: Any = await self.call.read()
        assert response is not grpc.aio.EOF, f"the stream ended: {await self.call.code()} {await self.call.details()}"
        assert isinstance(response, pb.StreamConfigResponse)
        return response

    async def expect(self, kind: str) -> Any:
        """The next message of this kind; denials that come before it are taken, as they may at any time."""
        while True:
            response = await self.receive()
            if response.WhichOneof("message") == kind:
                return getattr(response, kind)
            if response.WhichOneof("message") == "denials":
                await self.take_denials(response.denials)
            else:
                assert response.WhichOneof("message") == "progress", response

    async def expect_denials(self, version: int) -> pb.Denials:
        """The next denials of this version or a later one; what comes before it is taken."""
        while True:
            denials: pb.Denials = (await self.receive()).denials
            await self.take_denials(denials)
            if denials.denials.version >= version:
                return denials

    async def next_denials(self) -> pb.Denials:
        """The next denials, unanswered."""
        while True:
            response = await self.receive()
            if response.WhichOneof("message") == "denials":
                return response.denials
            assert response.WhichOneof("message") == "progress", response

    async def take_denials(self, denials: pb.Denials) -> None:
        self.denials_version = denials.denials.version
        await self.ack(denials.nonce)

    async def take(self, response: pb.Snapshot | pb.Delta) -> None:
        """Hold what came, and say so."""
        if isinstance(response, pb.Snapshot):
            self.held = {bundle.name: bundle.hash for bundle in response.bundles}
        else:
            self.held |= {bundle.name: bundle.hash for bundle in response.upserts}
            for name in response.removed:
                del self.held[name]
        await self.ack(response.nonce)

    async def ack(self, nonce: str) -> None:
        ack = pb.Ack(nonce=nonce, denials_version=self.denials_version)
        await self.call.write(pb.StreamConfigRequest(ack=ack))

    async def end_code(self) -> grpc.StatusCode:
        """How the server, or the handshake, ended the stream."""
        async with asyncio.timeout(10):
            with contextlib.suppress(grpc.aio.AioRpcError):
                while await self.call.read() is not grpc.aio.EOF:
                    pass
            return await self.call.code()


async def put_bundle(database: Database, name: str, content: bytes, *, pool: str = "default", kind: int = 1) -> bytes:
    """Write a bundle as an edit does; returns its hash."""
    digest = hashlib.sha256(content).digest()
    await execute(database, "INSERT INTO postroad.node_pools (node_pool) VALUES ($1) ON CONFLICT DO NOTHING", pool)
    await execute(
        database,
        """
        WITH put AS (
            INSERT INTO postroad.config_bundles (node_pool, bundle, kind, account, revision, hash, content)
            VALUES ($1, $2, $3, $6, 1, $4, $5)
            ON CONFLICT (node_pool, bundle) DO UPDATE
            SET revision = config_bundles.revision + 1, hash = $4, content = $5, change_xid = pg_current_xact_id()
            RETURNING 1
        )
        SELECT pg_notify('postroad_config', $1) FROM put
        """,
        pool,
        name,
        kind,
        digest,
        content,
        name.partition("/")[2] if kind == 1 else None,
    )
    return digest


async def until(is_so: Callable[[], Any], timeout_s: float = 10.0) -> None:
    """Wait for something that another process or task brings about."""
    async with asyncio.timeout(timeout_s):
        while True:
            answer = is_so()
            if asyncio.iscoroutine(answer):
                answer = await answer
            if answer:
                return
            await asyncio.sleep(0.01)
