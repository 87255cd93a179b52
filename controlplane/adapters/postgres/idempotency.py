"""Request ids (AIP-155) in table `idempotency`: claimed before the change, answered in the same transaction.

Contract. A second request of the same id waits at the claim until the first one has ended: if that one committed, its
answer is returned; if it was undone, the second one goes on as the first. Rows live 24 h (a job deletes them).
"""

from __future__ import annotations

from controlplane.adapters.postgres.session import Session
from controlplane.domain.errors import Reason, invalid


class IdempotencyRepository:
    """`controlplane.ports.Idempotency`."""

    def __init__(self, session: Session, principal: str) -> None:
        self._session = session
        self._principal = principal

    async def begin(self, request_id: str, method: str, payload_sha256: bytes) -> bytes | None:
        """As the port says."""
        claimed = await self._session.value(
            "idempotency_claim",
            """
            INSERT INTO postroad.idempotency (principal, request_id, method, payload_sha256) VALUES ($1, $2, $3, $4)
            ON CONFLICT (principal, request_id) DO NOTHING RETURNING true
            """,
            *(self._principal, request_id, method, payload_sha256),
        )
        if claimed:
            return None
        row = await self._session.row(
            "idempotency_get",
            """
            SELECT method, payload_sha256, response FROM postroad.idempotency WHERE principal = $1 AND request_id = $2
            """,
            *(self._principal, request_id),
        )
        if row is None or (row["method"], row["payload_sha256"]) != (method, payload_sha256):
            raise invalid("request_id", "was used for another request", Reason.REQUEST_ID_REUSED)
        response: bytes = row["response"]
        return response

    async def finish(self, request_id: str, response: bytes) -> None:
        """As the port says."""
        await self._session.run(
            "idempotency_finish",
            "UPDATE postroad.idempotency SET response = $3 WHERE principal = $1 AND request_id = $2",
            *(self._principal, request_id, response),
        )
