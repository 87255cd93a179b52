"""BookService: the books and what is wrong with them, as the last comparisons left them.

Contract. An account's key sees its own account's; operators every one's, all of them together for the account None.
What is found of a former account's messages is not shown among those of the account that has its id now.
Reading changes nothing, and neither does cancelling it.
"""

from __future__ import annotations

from controlplane.domain.access import Caller
from controlplane.domain.books import Book, StoredFinding
from controlplane.domain.errors import NotFoundError
from controlplane.domain.messages import LEAST_ID, first_id_at
from controlplane.domain.paging import PageTokens, coerce_page_size
from controlplane.ports import Database, Work, scope_of


class BooksService:
    """See the module."""

    def __init__(self, database: Database, tokens: PageTokens) -> None:
        self._database = database
        self._tokens = tokens

    async def list_books(
        self, caller: Caller, account: str | None, page_size: int, page_token: str
    ) -> tuple[list[Book], str]:
        """Return a page in order of account and spool, and the token of the next."""
        caller.require_account(account)
        size, arguments = coerce_page_size(page_size), ["ListBooks", account or ""]
        position = self._tokens.open(page_token, arguments)
        after = (position[0], position[1]) if position else None
        async with self._database.transaction(scope_of(caller)) as work:
            found = await work.books.list_page(account, after, size + 1)
        if len(found) <= size:
            return found, ""
        last = found[size - 1]
        return found[:size], self._tokens.seal([last.account, last.spool], arguments)

    async def list_findings(
        self, caller: Caller, account: str | None, page_size: int, page_token: str, *, resolved: bool
    ) -> tuple[list[StoredFinding], str]:
        """Return a page, newest first, and the token of the next; those that are over where `resolved`."""
        caller.require_account(account)
        size, arguments = coerce_page_size(page_size), ["ListBookFindings", account or "", str(resolved)]
        position = self._tokens.open(page_token, arguments)
        before = int(position[0]) if position else None
        async with self._database.transaction(scope_of(caller)) as work:
            since_id = await _since(work, account)
            found = await work.books.list_findings(account, since_id, before, size + 1, resolved=resolved)
        more = self._tokens.seal([str(found[size - 1].finding)], arguments) if len(found) > size else ""
        return found[:size], more


async def _since(work: Work, account: str | None) -> str:
    """Return the least id of an account's messages: what came before was a former account's."""
    try:
        since = None if account is None else await work.accounts.messages_since(account)
    except NotFoundError:
        # Operators see what is left of an account that was deleted.
        since = None
    return LEAST_ID if since is None else first_id_at(since)
