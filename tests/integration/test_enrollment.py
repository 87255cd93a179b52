"""How a node comes to its certificate: over the public port, once a token, whoever else tries."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from controlplane.adapters.pki import create_authority, read_identity
from postroad.control.v1 import node_service_pb2 as pb
from postroad.control.v1.node_pb2 import Node
from postroad.control.v1.node_service_pb2_grpc import NodeServiceStub
from postroad.node.v1.enrollment_service_pb2 import EnrollRequest
from postroad.node.v1.enrollment_service_pb2_grpc import EnrollmentServiceStub
from support.controlplane_app import Serving, serving
from support.databases import Database
from support.fleet import execute, fetch
from support.nodes_port import Certificate, NodeStream, certificate_for, now


def _key_and_csr() -> tuple[bytes, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private, csr.public_bytes(serialization.Encoding.PEM)


@pytest.fixture
async def plane(migrated_database: Database, tmp_path: Path) -> AsyncIterator[Serving]:
    async with serving(migrated_database, tmp_path) as plane:
        yield plane


async def _create_node(plane: Serving, node_id: str = "edge-1") -> str:
    request = pb.CreateNodeRequest(node_id=node_id, node=Node())
    node = await NodeServiceStub(plane.channel()).CreateNode(request, metadata=plane.metadata)
    return str(node.enrollment_token)


def _node_channel(plane: Serving, certificate: Certificate) -> grpc.aio.Channel:
    credentials = grpc.ssl_channel_credentials(plane.ca_pem, certificate.key, certificate.certificate)
    return grpc.aio.secure_channel(f"localhost:{plane.nodes_port}", credentials)


async def test_an_enrolled_node_is_let_in_and_gets_its_configuration(
    plane: Serving, migrated_database: Database
) -> None:
    token = await _create_node(plane)
    key, csr = _key_and_csr()
    enroll = EnrollmentServiceStub(plane.channel()).Enroll

    answer = await enroll(EnrollRequest(token=token, csr_pem=csr, software_version="1.0"))

    assert (answer.node, answer.node_pool, answer.ca_pem) == ("nodes/edge-1", "nodePools/default", plane.ca_pem)
    identity = read_identity(answer.certificate_pem)
    assert identity.node_id == "edge-1"
    assert timedelta(days=29) < identity.not_after - now() <= timedelta(days=30)
    stream = NodeStream(_node_channel(plane, Certificate(key, answer.certificate_pem, "")), "edge-1")
    await stream.hello()
    snapshot = await stream.expect("snapshot")
    assert snapshot.node_pool == "nodePools/default"
    assert "pools/default/settings" in [bundle.name for bundle in snapshot.bundles]
    assert [len(one.key) for one in snapshot.pool_keys] == [32]
    tokens = await fetch(migrated_database, "SELECT token_sha256 FROM postroad.enrollment_tokens")
    assert token.encode() not in [row["token_sha256"] for row in tokens]


async def test_a_token_that_is_unknown_used_or_expired_gets_one_and_the_same_answer(
    plane: Serving, migrated_database: Database
) -> None:
    used, expired = await _create_node(plane, "edge-1"), await _create_node(plane, "edge-2")
    await execute(
        migrated_database,
        """
        UPDATE postroad.enrollment_tokens SET create_time = now() - interval '1 hour', expire_time = now()
        WHERE node = 'edge-2'
        """,
    )
    enroll = EnrollmentServiceStub(plane.channel()).Enroll
    _, csr = _key_and_csr()
    await enroll(EnrollRequest(token=used, csr_pem=csr))
    answers = set()

    for token in (used, expired, "pre_unknown", ""):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await enroll(EnrollRequest(token=token, csr_pem=csr))
        answers.add((caught.value.code(), caught.value.details()))

    assert len(answers) == 1
    code, text = answers.pop()
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert "enrolment token" in (text or "")


async def test_a_bad_request_does_not_use_the_token_up(plane: Serving) -> None:
    token = await _create_node(plane)
    enroll = EnrollmentServiceStub(plane.channel()).Enroll

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await enroll(EnrollRequest(token=token, csr_pem=b"garbage"))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    await enroll(EnrollRequest(token=token, csr_pem=_key_and_csr()[1]))


async def test_a_new_enrolment_makes_the_former_certificate_void(plane: Serving) -> None:
    enroll = EnrollmentServiceStub(plane.channel()).Enroll
    key, csr = _key_and_csr()
    first = await enroll(EnrollRequest(token=await _create_node(plane), csr_pem=csr))
    stream = NodeStream(_node_channel(plane, Certificate(key, first.certificate_pem, "")), "edge-1")
    await stream.hello()
    await stream.expect("snapshot")

    request = pb.ResetNodeEnrollmentRequest(name="nodes/edge-1")
    node = await NodeServiceStub(plane.channel()).ResetNodeEnrollment(request, metadata=plane.metadata)
    await enroll(EnrollRequest(token=node.enrollment_token, csr_pem=_key_and_csr()[1]))

    assert await stream.end_code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_revoked_node_is_sent_away_at_once(plane: Serving) -> None:
    key, csr = _key_and_csr()
    answer = await EnrollmentServiceStub(plane.channel()).Enroll(
        EnrollRequest(token=await _create_node(plane), csr_pem=csr)
    )
    channel = _node_channel(plane, Certificate(key, answer.certificate_pem, ""))
    stream = NodeStream(channel, "edge-1")
    await stream.hello()
    await stream.expect("snapshot")

    await NodeServiceStub(plane.channel()).RevokeNode(
        pb.RevokeNodeRequest(name="nodes/edge-1"), metadata=plane.metadata
    )

    assert await stream.end_code() is grpc.StatusCode.UNAUTHENTICATED
    assert await NodeStream(channel, "edge-1").end_code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_certificate_of_another_ca_with_the_same_name_is_not_let_in(plane: Serving, tmp_path: Path) -> None:
    await _create_node(plane)
    stranger = certificate_for(create_authority(tmp_path / "other", now()), "edge-1")

    assert await NodeStream(_node_channel(plane, stranger), "edge-1").end_code() is grpc.StatusCode.UNAVAILABLE
