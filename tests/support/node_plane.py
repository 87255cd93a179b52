"""A control plane for tests of nodes: real gRPC over mutual TLS, scripted by the test, and the certificates for it."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import ipaddress
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from postroad.node.v1.config_stream_service_pb2 import (
    Nack,
    StreamConfigRequest,
    StreamConfigResponse,
)
from postroad.node.v1.config_stream_service_pb2_grpc import (
    ConfigStreamServiceServicer,
    add_ConfigStreamServiceServicer_to_server,
)
from postroad.node.v1.enrollment_service_pb2 import EnrollRequest, EnrollResponse
from postroad.node.v1.enrollment_service_pb2_grpc import (
    EnrollmentServiceServicer,
    add_EnrollmentServiceServicer_to_server,
)
from postroad.node.v1.ledger_service_pb2 import (
    LedgerCursor,
    LedgerRefusal,
    ReportLedgerRequest,
    ReportLedgerResponse,
)
from postroad.node.v1.ledger_service_pb2_grpc import LedgerServiceServicer, add_LedgerServiceServicer_to_server

TOKEN = "one-time"
WAIT_S = 20.0


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


class Pki:
    """A CA and what it signs."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA")])
        self.certificate_pem = self._sign(self._name, self._key.public_key(), [], is_ca=True)

    def _sign(self, name: x509.Name, key: Any, names: list[x509.GeneralName], *, is_ca: bool = False) -> bytes:
        now = dt.datetime.now(dt.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def server(self) -> tuple[bytes, bytes]:
        """Key and certificate for 127.0.0.1 and localhost."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")])
        return _pem(key), self._sign(name, key.public_key(), [*names])

    def node(self, node_id: str, public_key: Any) -> bytes:
        """A node's certificate."""
        uri = x509.UniformResourceIdentifier(f"spiffe://postroad/node/{node_id}")
        return self._sign(x509.Name([]), public_key, [uri])

    def write_identity(self, data_dir: Path, node_id: str = "n1") -> None:
        """Enrol a node without asking anybody."""
        folder = data_dir / "identity"
        folder.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        (folder / "key.pem").write_bytes(_pem(key))
        (folder / "certificate.pem").write_bytes(self.node(node_id, key.public_key()))
        (folder / "ca.pem").write_bytes(self.certificate_pem)


@dataclass
class Stream:
    """One configuration stream as the test sees it: `received` in order, `send` to answer, `close` to end it."""

    received: asyncio.Queue[StreamConfigRequest] = field(default_factory=asyncio.Queue)
    outgoing: asyncio.Queue[StreamConfigResponse | None] = field(default_factory=asyncio.Queue)

    def send(self, response: StreamConfigResponse) -> None:
        self.outgoing.put_nowait(response)

    def close(self) -> None:
        self.outgoing.put_nowait(None)

    async def next(self) -> StreamConfigRequest:
        async with asyncio.timeout(WAIT_S):
            return await self.received.get()

    async def ack(self, nonce: str) -> None:
        """Wait for the Ack of this nonce; a Nack of it fails the test."""
        while True:
            request = await self.next()
            if request.nack.nonce == nonce:
                raise AssertionError(f"refused: {request.nack}")
            if request.ack.nonce == nonce:
                return

    async def nack(self, nonce: str) -> Nack:
        while True:
            request = await self.next()
            if request.nack.nonce == nonce:
                return request.nack


class ControlPlane:
    """Both node services and enrolment on one port. Records that come are kept and acknowledged at once; a spool that
    opens with fewer than are kept is refused. While `judging` is not set, spools that open wait for an answer.
    """

    def __init__(self, pki: Pki) -> None:
        self.pki = pki
        self.streams: asyncio.Queue[Stream] = asyncio.Queue()
        self.records: dict[str, list[bytes]] = {}
        self.opened: list[Any] = []
        self.judging = asyncio.Event()
        self.judging.set()
        self.record_arrived = asyncio.Condition()
        self.port = 0
        self._server: grpc.aio.Server

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self, port: int = 0) -> None:
        server = grpc.aio.server()
        add_ConfigStreamServiceServicer_to_server(_Config(self), server)
        add_LedgerServiceServicer_to_server(_Ledger(self), server)
        add_EnrollmentServiceServicer_to_server(_Enrollment(self.pki), server)
        key, certificate = self.pki.server()
        credentials = grpc.ssl_server_credentials(
            [(key, certificate)], root_certificates=self.pki.certificate_pem, require_client_auth=False
        )
        self.port = server.add_secure_port(f"127.0.0.1:{port}", credentials)
        await server.start()
        self._server = server

    async def stop(self) -> None:
        await self._server.stop(0)

    async def next_stream(self) -> Stream:
        async with asyncio.timeout(WAIT_S):
            return await self.streams.get()

    async def wait_for_records(self, spool: str, count: int) -> list[bytes]:
        async with asyncio.timeout(WAIT_S), self.record_arrived:
            await self.record_arrived.wait_for(lambda: len(self.records.get(spool, ())) >= count)
        return self.records[spool]


@contextlib.asynccontextmanager
async def control_plane(pki: Pki) -> AsyncIterator[ControlPlane]:
    plane = ControlPlane(pki)
    await plane.start()
    try:
        yield plane
    finally:
        await plane.stop()


class _Config(ConfigStreamServiceServicer):
    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane

    async def StreamConfig(self, request_iterator: Any, context: Any) -> AsyncIterator[StreamConfigResponse]:
        stream = Stream()
        self._plane.streams.put_nowait(stream)

        async def read() -> None:
            async for request in request_iterator:
                stream.received.put_nowait(request)

        reader = asyncio.create_task(read())
        try:
            while (response := await stream.outgoing.get()) is not None:
                yield response
        finally:
            reader.cancel()


class _Ledger(LedgerServiceServicer):
    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane

    async def ReportLedger(self, request_iterator: Any, context: Any) -> AsyncIterator[ReportLedgerResponse]:
        async for request in request_iterator:
            message: ReportLedgerRequest = request
            if message.HasField("open"):
                spool = message.open.spool
                self._plane.opened.append(message.open)
                await self._plane.judging.wait()
                if message.open.last_record < len(self._plane.records.get(spool, ())):
                    backwards = LedgerRefusal(spool=spool, reason=LedgerRefusal.REASON_WENT_BACKWARDS)
                    yield ReportLedgerResponse(refusal=backwards)
                    continue
            else:
                spool = message.batch.spool
                kept = self._plane.records.setdefault(spool, [])
                assert message.batch.first_record == len(kept) + 1
                kept.extend(message.batch.records)
                async with self._plane.record_arrived:
                    self._plane.record_arrived.notify_all()
            cursor = LedgerCursor(spool=spool, cursor=len(self._plane.records.get(spool, ())))
            yield ReportLedgerResponse(cursor=cursor)


class _Enrollment(EnrollmentServiceServicer):
    def __init__(self, pki: Pki) -> None:
        self._pki = pki

    async def Enroll(self, request: EnrollRequest, context: Any) -> EnrollResponse:
        if request.token != TOKEN:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no such token")
        csr = x509.load_pem_x509_csr(request.csr_pem)
        return EnrollResponse(
            node="nodes/n1",
            node_pool="nodePools/default",
            certificate_pem=self._pki.node("n1", csr.public_key()),
            ca_pem=self._pki.certificate_pem,
        )
