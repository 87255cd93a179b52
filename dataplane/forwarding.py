"""Hands a worker's ledger records to the agent, which asks for them.

A pull is answered with the records that gathered, at most 1,000 or 1 MiB of them, so that each batch is worth a
transaction: while records come slowly a pull waits for 50 ms at a time, while they come fast for 500 ms (a transaction
costs the control plane and PostgreSQL about 3 ms beside what its records cost), and full batches follow each other.
What the agent calls stored is acknowledged to the spool. Nothing here is durable, and nothing is lost by it: the spool
keeps a record until it is acknowledged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from dataplane.link import LedgerRecords, Message
from dataplane.ports import EventLog, Spool, SpoolError

MAX_RECORDS = 1_000
MAX_BYTES = 1024 * 1024
GATHER_S = 0.05
MANY_RECORDS = 20
GATHER_MANY_S = 0.5


class RecordForwarder:
    """See the module. `send` gives a message to the agent and answers False when it is not there."""

    def __init__(self, spools: Mapping[str, Spool], send: Callable[[Message], bool], log: EventLog) -> None:
        self._spools = spools
        self._send = send
        self._log = log
        self._pulls: dict[str, int] = {}
        self._served: set[str] = set()
        self._pulled = asyncio.Event()
        self._acknowledgements: set[asyncio.Future[None]] = set()

    def pull(self, spool: str, after: int) -> None:
        """The agent wants what follows `after`."""
        if spool in self._spools:
            self._pulls[spool] = after
            self._served.add(spool)
            self._pulled.set()

    def pause(self, spool: str) -> None:
        """The agent wants nothing of this spool."""
        self._pulls.pop(spool, None)
        self._served.discard(spool)

    def agent_lost(self) -> None:
        """The agent is gone, and what it wanted with it."""
        self._pulls.clear()
        self._served.clear()

    def is_served(self, spool: str) -> bool:
        """Whether somebody takes this spool's records: between a pull's answer and the next one too."""
        return spool in self._served

    def stored(self, spool: str, cursor: int) -> None:
        """Records up to `cursor` are stored by the control plane."""
        owner = self._spools.get(spool)
        if owner is not None:
            future = owner.acknowledge(cursor)
            self._acknowledgements.add(future)
            future.add_done_callback(self._acknowledged)

    def _acknowledged(self, future: asyncio.Future[None]) -> None:
        self._acknowledgements.discard(future)
        # A mark that was not written only means that records are sent twice; a spool that failed ends the worker.
        if not future.cancelled() and (error := future.exception()) is not None:
            self._log.warning("ledger.not_acknowledged", error=str(error))

    async def run(self) -> None:
        """Answer pulls until cancelled."""
        while True:
            await self._pulled.wait()
            await asyncio.sleep(pause_after(await self.answer()))

    async def answer(self) -> int:
        """Answer each pull for which there are records; how many the largest batch holds."""
        most = 0
        for spool, after in list(self._pulls.items()):
            owner = self._spools[spool]
            try:
                first, records = await owner.records(after, MAX_RECORDS, MAX_BYTES)
            except SpoolError as error:
                self._log.warning("ledger.unreadable", spool=spool, error=str(error))
                continue
            # The agent may have changed its mind while the spool was read.
            if records and self._pulls.get(spool) == after:
                del self._pulls[spool]
                self._send(LedgerRecords(spool, owner.identity.incarnation, first, records))
                most = max(most, len(records))
        if not self._pulls:
            self._pulled.clear()
        return most


def pause_after(record_count: int) -> float:
    """How many seconds the next batch gathers after one of so many records."""
    if record_count >= MAX_RECORDS:
        return 0.0
    return GATHER_MANY_S if record_count >= MANY_RECORDS else GATHER_S
