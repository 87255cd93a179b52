"""The books as callers read them.

Contract. Implements `controlplane.ports.Books`. Every query names the account beside row-level security, or, with None,
leaves the choice to it: an operator's scope shows every account's.
"""

from __future__ import annotations

import asyncpg

from controlplane.adapters.postgres.session import Session
from controlplane.domain.books import Book, Entries, Finding, FindingKind, LedgerSide, StoredFinding
from controlplane.domain.messages import LEAST_ID
from dataplane.core.waiting import Tally

_BOOKS = """
SELECT * FROM postroad.books
WHERE ($1::text IS NULL OR account = $1) AND (account, spool) > ($2, $3::uuid) ORDER BY account, spool LIMIT $4
"""
_FINDINGS = """
SELECT * FROM postroad.book_findings
WHERE ($1::text IS NULL OR account = $1) AND ($2::bigint IS NULL OR finding < $2) AND ($3 OR resolve_time IS NULL)
    AND (message_id IS NULL OR message_id >= $5)
ORDER BY finding DESC LIMIT $4
"""


class BooksRepository:
    """`controlplane.ports.Books`."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def list_page(self, account: str | None, after: tuple[str, str] | None, limit: int) -> list[Book]:
        """As the port says."""
        last_account, last_spool = after or ("", LEAST_ID)
        rows = await self._session.rows("book_list", _BOOKS, account, last_account, last_spool, limit)
        return [_book(row) for row in rows]

    async def list_findings(
        self, account: str | None, since_id: str, before: int | None, limit: int, *, resolved: bool
    ) -> list[StoredFinding]:
        """As the port says."""
        rows = await self._session.rows("book_finding_list", _FINDINGS, account, before, resolved, limit, since_id)
        return [_finding(row) for row in rows]


def _book(row: asyncpg.Record) -> Book:
    waiting = Tally(row["waiting"], int.from_bytes(row["ledger_digest"]))
    return Book(
        account=row["account"],
        spool=str(row["spool"]),
        node=row["node"],
        as_of_record=row["as_of_record"],
        compare_time=row["compare_time"],
        ledger=LedgerSide(Entries(*(row[name] for name in Entries._fields)), waiting, row["earlier"]),
        spool_waiting=Tally(row["spool_waiting"], int.from_bytes(row["spool_digest"])),
    )


def _finding(row: asyncpg.Record) -> StoredFinding:
    message_id = None if row["message_id"] is None else str(row["message_id"])
    return StoredFinding(
        finding=row["finding"],
        spool=str(row["spool"]),
        node=row["node"],
        what=Finding(FindingKind(row["kind"]), row["account"], message_id, row["recipient_index"], row["detail"]),
        first_seen_time=row["first_seen_time"],
        last_seen_time=row["last_seen_time"],
        resolve_time=row["resolve_time"],
    )
