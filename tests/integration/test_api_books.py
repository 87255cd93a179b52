"""BookService: an account's books and findings, page by page, and nobody else's."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import grpc
import pytest

from controlplane.adapters.postgres.books import PostgresBooks
from controlplane.domain.books import Book, Comparison, Entries, Finding, FindingKind, LedgerSide
from dataplane.core.waiting import Tally
from postroad.control.v1 import book_pb2 as pb
from postroad.control.v1 import book_service_pb2 as service
from postroad.control.v1 import book_service_pb2_grpc as service_grpc
from support.api import ApiStack, Client, running_api
from support.databases import Database
from support.fleet import fleet_database

SPOOLS = sorted(str(uuid.uuid4()) for _ in range(3))
NOW = datetime(2026, 5, 1, tzinfo=UTC)
MESSAGE = "01990000-0000-7000-8000-000000000001"


@pytest.fixture
async def stack(migrated_database: Database) -> AsyncIterator[ApiStack]:
    async with running_api(migrated_database) as running:
        yield running


@pytest.fixture
async def acme(stack: ApiStack, migrated_database: Database) -> Client:
    """Two accounts with books in three spools, and a finding each in every one; a client of one of them."""
    client = await stack.make_account("acme")
    await stack.make_account("other")
    async with fleet_database(migrated_database) as fleet:
        for spool in SPOOLS:
            await PostgresBooks(fleet).conclude(_comparison(spool), NOW)
    return client


def _comparison(spool: str) -> Comparison:
    side = LedgerSide(Entries(accepted=5, sent=2, bounced=1), Tally(2, 77))
    books = tuple(Book(account, spool, "edge-1", 9, NOW, side, Tally(1, 5)) for account in ("acme", "other"))
    findings = tuple(
        Finding(FindingKind.MISSING_IN_SPOOL, account, MESSAGE, 3, "waits in the ledger only")
        for account in ("acme", "other")
    )
    return Comparison(spool, "edge-1", 9, books, findings, ())


async def _call(client: Client, method: str, parent: str, **fields: Any) -> Any:
    request = getattr(service, f"{method}Request")(parent=parent, **fields)
    return await client.call(service_grpc.BookServiceStub, method, request)


async def test_an_account_sees_its_own(acme: Client) -> None:
    books = (await _call(acme, "ListBooks", "accounts/acme")).books
    findings = (await _call(acme, "ListBookFindings", "accounts/acme")).book_findings

    assert [one.name for one in books] == [f"accounts/acme/books/{spool}" for spool in SPOOLS]
    book = books[0]
    assert (book.node, book.as_of_record, book.accepted_count, book.sent_count) == ("nodes/edge-1", 9, 5, 2)
    assert (book.waiting_count, book.spool_waiting_count, book.balances, book.agrees) == (2, 1, True, False)
    assert (book.digest, book.spool_digest) == ((77).to_bytes(16), (5).to_bytes(16))
    assert len(findings) == 3
    finding = findings[0]
    assert finding.kind == pb.BookFinding.KIND_MISSING_IN_SPOOL
    assert (finding.message, finding.recipient_index) == (f"accounts/acme/messages/{MESSAGE}", 3)
    assert (finding.spool, finding.HasField("resolve_time")) == (SPOOLS[2], False)


async def test_what_is_found_of_a_former_account_s_mail_is_shown_to_operators_only(
    stack: ApiStack, acme: Client
) -> None:
    await stack.as_superuser("UPDATE postroad.accounts SET messages_since = now() WHERE account = 'acme'")
    assert not (await _call(acme, "ListBookFindings", "accounts/acme")).book_findings
    every = (await _call(stack.operator, "ListBookFindings", "accounts/-")).book_findings
    assert [one.name.split("/")[1] for one in every].count("acme") == 3


@pytest.mark.parametrize("parent", ["accounts/other", "accounts/-"])
@pytest.mark.parametrize("method", ["ListBooks", "ListBookFindings"])
async def test_others_are_closed_to_an_account(acme: Client, parent: str, method: str) -> None:
    error = await acme.refused(_call(acme, method, parent))
    assert error.code is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.usefixtures("acme")
async def test_an_operator_reads_every_account_page_by_page(stack: ApiStack) -> None:
    for method, field in (("ListBooks", "books"), ("ListBookFindings", "book_findings")):
        names, token = [], ""
        while True:
            page = await _call(stack.operator, method, "accounts/-", page_size=4, page_token=token)
            names += [one.name for one in getattr(page, field)]
            token = page.next_page_token
            if not token:
                break
        assert len(names) == len(set(names)) == 6


async def test_what_is_over_is_shown_where_it_is_asked_for(acme: Client, migrated_database: Database) -> None:
    async with fleet_database(migrated_database) as fleet:
        over = _comparison(SPOOLS[0])._replace(findings=())
        await PostgresBooks(fleet).conclude(over, NOW.replace(hour=1))

    shown = (await _call(acme, "ListBookFindings", "accounts/acme")).book_findings
    every = (await _call(acme, "ListBookFindings", "accounts/acme", show_resolved=True)).book_findings

    assert (len(shown), len(every)) == (2, 3)
    assert [one.spool for one in every if one.HasField("resolve_time")] == [SPOOLS[0]]
