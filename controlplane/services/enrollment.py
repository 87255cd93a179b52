"""How a node gets its certificate: a one-time token for a signature.

Contract. `enroll` answers a token that is unknown, used or expired with one and the same
UnauthenticatedError, and a bad request with InvalidArgumentError; neither uses the token up. The token is
used up in the transaction that records the certificate; a node that lost the answer gets a new token from
its operator.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import NamedTuple

from controlplane.domain.errors import InvalidArgumentError, Reason, UnauthenticatedError, Violation
from controlplane.domain.secrets import hash_secret
from controlplane.ports_fleet import CertificateRecord, FleetRepository

_VERSION_LIMIT = 100


class BadRequestError(Exception):
    """What the signer says to a request that it does not sign; the text is fit for the caller."""


class SignedCertificate(NamedTuple):
    """A certificate in PEM and what is recorded of it."""

    certificate_pem: bytes
    record: CertificateRecord


class Enrolled(NamedTuple):
    """What the node gets."""

    node_id: str
    pool: str
    certificate_pem: bytes


Signer = Callable[[bytes, str, datetime], SignedCertificate]
"""From CSR, node id and now to a certificate; raises BadRequestError."""


class EnrollmentService:
    """See the module."""

    def __init__(self, repository: FleetRepository, sign: Signer, clock: Callable[[], datetime]) -> None:
        self._repository = repository
        self._sign = sign
        self._clock = clock

    async def enroll(self, token: str, csr_pem: bytes, software_version: str) -> Enrolled:
        """Sign the node's key. Cancelled before its commit it leaves the token good."""
        now = self._clock()
        token_sha256 = hash_secret(token)
        node = await self._repository.find_enrollment(token_sha256, now)
        if node is None:
            raise _refusal()
        try:
            signed = self._sign(csr_pem, node.node_id, now)
        except BadRequestError as error:
            raise InvalidArgumentError([Violation("csr_pem", str(error))]) from error
        version = software_version[:_VERSION_LIMIT].replace("\0", "")
        if not await self._repository.complete_enrollment(token_sha256, signed.record, version, now):
            raise _refusal()
        return Enrolled(node.node_id, node.pool, signed.certificate_pem)


def _refusal() -> UnauthenticatedError:
    text = "the enrolment token is unknown, used or expired: ask an operator to reset the node's enrolment"
    return UnauthenticatedError(Reason.ENROLLMENT_TOKEN_INVALID, text)
