"""Carries EnrollmentService on the public port, where the caller has no key and no certificate yet.

Contract. The one-time token is the authentication; errors are the domain's, and the interceptor of the port puts them
into words. A request that is too large never gets here: the port's receive limit is lower than what a CSR may need
many times.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import grpc.aio

from controlplane.adapters.pki import CertificateAuthority, PkiError
from controlplane.ports_fleet import CertificateRecord
from controlplane.services.enrollment import BadRequestError, EnrollmentService, SignedCertificate, Signer
from postroad.node.v1.enrollment_service_pb2 import EnrollRequest, EnrollResponse
from postroad.node.v1.enrollment_service_pb2_grpc import EnrollmentServiceServicer


class EnrollmentServicer(EnrollmentServiceServicer):
    """EnrollmentService; see the module."""

    def __init__(self, service: EnrollmentService, authority: CertificateAuthority) -> None:
        self._service = service
        self._authority = authority

    async def Enroll(self, request: EnrollRequest, context: grpc.aio.ServicerContext[Any, Any]) -> EnrollResponse:
        """Sign the node's key."""
        enrolled = await self._service.enroll(request.token, request.csr_pem, request.software_version)
        return EnrollResponse(
            node=f"nodes/{enrolled.node_id}",
            node_pool=f"nodePools/{enrolled.pool}",
            certificate_pem=enrolled.certificate_pem,
            ca_pem=self._authority.certificate_pem,
        )


def signer(authority: CertificateAuthority) -> Signer:
    """The CA as the service wants it."""

    def sign(csr_pem: bytes, node_id: str, now: datetime) -> SignedCertificate:
        try:
            issued = authority.sign_node(csr_pem, node_id, now)
        except PkiError as error:
            raise BadRequestError(str(error)) from error
        record = CertificateRecord(issued.serial, issued.fingerprint, issued.not_before, issued.not_after)
        return SignedCertificate(issued.certificate_pem, record)

    return sign
