"""BookService over gRPC: messages to values and back; see the proto for what each method promises."""

from __future__ import annotations

from typing import Any

from controlplane.adapters.grpc import convert
from controlplane.adapters.grpc.context import caller
from controlplane.domain import names
from controlplane.domain.books import Book, StoredFinding
from controlplane.services.books import BooksService
from postroad.control.v1 import book_pb2 as pb
from postroad.control.v1 import book_service_pb2 as service_pb
from postroad.control.v1 import book_service_pb2_grpc as service_grpc

_EVERY_ACCOUNT = "accounts/-"


class BookHandlers(service_grpc.BookServiceServicer):
    """See the module."""

    def __init__(self, books: BooksService) -> None:
        self._books = books

    async def ListBooks(self, request: service_pb.ListBooksRequest, context: Any) -> service_pb.ListBooksResponse:
        """As the proto says."""
        account = _account(request.parent)
        found, more = await self._books.list_books(caller(), account, request.page_size, request.page_token)
        return service_pb.ListBooksResponse(books=map(_write_book, found), next_page_token=more)

    async def ListBookFindings(
        self, request: service_pb.ListBookFindingsRequest, context: Any
    ) -> service_pb.ListBookFindingsResponse:
        """As the proto says."""
        account = _account(request.parent)
        found, more = await self._books.list_findings(
            caller(), account, request.page_size, request.page_token, resolved=request.show_resolved
        )
        return service_pb.ListBookFindingsResponse(book_findings=map(_write_finding, found), next_page_token=more)


def _account(parent: str) -> str | None:
    return None if parent == _EVERY_ACCOUNT else names.parse_name(parent, names.ACCOUNT, "parent")[0]


def _write_book(book: Book) -> pb.Book:
    entries, waiting = book.ledger.entries, book.ledger.waiting
    return pb.Book(
        name=names.format_name(names.BOOK, book.account, book.spool),
        node=names.format_name(names.NODE, book.node) if book.node else "",
        as_of_record=book.as_of_record,
        compare_time=convert.to_timestamp(book.compare_time),
        accepted_count=entries.accepted,
        sent_count=entries.sent,
        bounced_count=entries.bounced,
        failed_count=entries.failed,
        expired_count=entries.expired,
        cancelled_count=entries.cancelled,
        waiting_count=waiting.count,
        earlier_count=book.ledger.earlier,
        spool_waiting_count=book.spool_waiting.count,
        digest=waiting.digest.to_bytes(16),
        spool_digest=book.spool_waiting.digest.to_bytes(16),
        balances=book.ledger.balances,
        agrees=book.agrees,
    )


def _write_finding(finding: StoredFinding) -> pb.BookFinding:
    what = finding.what
    message = pb.BookFinding(
        name=names.format_name(names.BOOK_FINDING, what.account, str(finding.finding)),
        kind=pb.BookFinding.Kind.ValueType(what.kind),
        spool=finding.spool,
        node=names.format_name(names.NODE, finding.node) if finding.node else "",
        detail=what.detail,
        first_seen_time=convert.to_timestamp(finding.first_seen_time),
        last_seen_time=convert.to_timestamp(finding.last_seen_time),
        resolve_time=convert.to_timestamp(finding.resolve_time),
    )
    if what.message_id is not None:
        message.message = names.format_name(names.MESSAGE, what.account, what.message_id)
    if what.recipient_index is not None:
        message.recipient_index = what.recipient_index
    return message
