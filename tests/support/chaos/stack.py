"""A whole local stack with a fault proxy on every link, whose servers can be killed, paused and started again.

What makes that possible is given to `postroad up` by the environment alone: the addresses of the proxies, two workers,
and the passwords, which are laid into its folder before the first start. The next hop is the judge's own, reached by
the demo's provider. A disk that fails on demand comes with `support.chaos.disk`.

    link         from              to
    submission   applications      node
    next-hop     node              the judge's sink
    nodes        agent             control plane
    valkey       workers           Valkey
    postgres     control plane     PostgreSQL
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import apsw
import asyncpg
from google.protobuf.field_mask_pb2 import FieldMask

from postroad.control.v1.account_service_pb2 import GetAccountRequest, UpdateAccountRequest
from postroad.control.v1.book_pb2 import Book, BookFinding
from postroad.control.v1.book_service_pb2 import ListBookFindingsRequest, ListBooksRequest
from postroad.control.v1.provider_service_pb2 import GetProviderRequest, UpdateProviderRequest
from postroad.localstack import PostgresServer
from postroad.localstack.database import API, DATABASE, FLEET, OWNER
from postroad.localstack.demo import ACCOUNT, PROVIDER
from postroad.localstack.ports import DEFAULT_PORTS
from postroad.sdk import AsyncClient, Client, PostroadError, connect_async
from support.chaos.books import Books, Strike
from support.chaos.disk import disk_environment
from support.chaos.judge import TERMINAL, Told
from support.chaos.sink import Sink
from support.fault_proxy import Fault, FaultProxy, LoopThread, Plan
from support.killable_stack import KillableStack, wait_until
from support.ports import own_ports

LINKS = ("submission", "next-hop", "nodes", "valkey", "postgres")
SERVERS = ("worker", "agent", "supervisor", "controlplane", "postgres", "valkey", "everything")
_PORT_OF_LINK = {"submission": "smtp", "nodes": "nodes", "valkey": "valkey", "postgres": "postgres"}
_DELIVERING = frozenset({"worker", "supervisor", "everything", "second worker"})
_PASSWORD = "chaos-0123456789-abcdefghij"
_UNCERTAIN = 8
_EVERY_ACCOUNT = "accounts/-"
SAFE = "safe"  # the account whose mail is REPLICATED, where there is one
WORKERS = 2


class ChaosStack(KillableStack):
    """See the module. `start` brings up proxies, sink and stack; `thread` is where proxies and sink live."""

    def __init__(self, folder: Path, books: Books, thread: LoopThread) -> None:
        self.ports = own_ports(DEFAULT_PORTS)
        super().__init__(folder, ports=self.ports)
        self.books = books
        self.thread = thread
        self.sink = Sink(books)
        self.disk = folder / "disk"
        self.proxies: dict[str, FaultProxy] = {}

    def bring_up(self) -> None:
        """Start everything, and send the demo's mail to the sink."""
        self.thread.run(self.sink.start())
        for link in LINKS:
            target = self.sink.port if link == "next-hop" else self.ports[_PORT_OF_LINK[link]]
            self.proxies[link] = self.thread.run(FaultProxy(target).start())
        self._lay_passwords()
        self.extra_environment = {**self._environment(), **disk_environment(self.disk)}
        self.start()
        asyncio.run(self._point_to_sink())

    def take_down(self) -> None:
        for proxy in self.proxies.values():
            self.thread.run(proxy.stop())
        self.thread.run(self.sink.stop())

    def _lay_passwords(self) -> None:
        for name, text in (
            ("keys/database.json", json.dumps(dict.fromkeys((OWNER, API, FLEET), _PASSWORD))),
            ("valkey/password", _PASSWORD + "\n"),
        ):
            file = self.root / name
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            file.chmod(0o600)

    def _environment(self) -> dict[str, str]:
        def dsn(role: str) -> str:
            return f"postgresql://{role}:{_PASSWORD}@127.0.0.1:{self.proxies['postgres'].port}/{DATABASE}"

        return {
            "POSTROAD_CONTROLPLANE_DATABASE__API_DSN": dsn(API),
            "POSTROAD_CONTROLPLANE_DATABASE__FLEET_DSN": dsn(FLEET),
            "POSTROAD_CONTROLPLANE_AUDIT__INTERVAL_S": "0.5",
            "POSTROAD_NODE_CONTROL_PLANE__ADDRESS": f"127.0.0.1:{self.proxies['nodes'].port}",
            "POSTROAD_NODE_REDIS__URL": f"redis://:{_PASSWORD}@127.0.0.1:{self.proxies['valkey'].port}/0",
            "POSTROAD_NODE_WORKERS": str(WORKERS),
        }

    def operator(self) -> AsyncClient:
        """The SDK with the operator's key; a context manager."""
        key = (self.root / "keys" / "operator.key").read_text(encoding="ascii").strip()
        return connect_async(f"127.0.0.1:{self.ports['grpc']}", key, self.root / "pki" / "ca.pem")

    async def _point_to_sink(self) -> None:
        async with self.operator() as client:
            provider = await client.providers.GetProvider(GetProviderRequest(name=PROVIDER))
            provider.smtp.endpoints[0].port = self.proxies["next-hop"].port
            mask = FieldMask(paths=["smtp.endpoints"])
            await client.providers.UpdateProvider(UpdateProviderRequest(provider=provider, update_mask=mask))
            account = await client.accounts.GetAccount(GetAccountRequest(name=ACCOUNT))
            account.retry_policy.base.seconds = account.retry_policy.cap.seconds = 1
            mask = FieldMask(paths=["retry_policy"])
            await client.accounts.UpdateAccount(UpdateAccountRequest(account=account, update_mask=mask))

    # --- faults ----------------------------------------------------------------------------------

    def strike_server(self, name: str) -> None:
        """SIGKILL for a server; everything at once is started again here, the rest by whoever watches it."""
        self.books.note_strike(Strike(name, "SIGKILL", ends_worker=name in _DELIVERING))
        if name == "everything":
            self.kill_everything()
            self.start()
        else:
            self.kill_server(name)

    def pause(self, name: str, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after a while."""
        self.books.note_strike(Strike(name, f"SIGSTOP for {seconds:.1f} s"))
        pids = self.pids_of(name)
        self._signal(pids, signal.SIGSTOP)
        time.sleep(seconds)
        self._signal(pids, signal.SIGCONT)

    def _signal(self, pids: list[int], number: signal.Signals) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def strike_link(self, link: str, fault: Fault, *, open_too: bool) -> None:
        """Break new connections of a link from now on, and with `open_too` those that are open, once."""
        self.books.note_strike(Strike(link, str(fault)))
        proxy = self.proxies[link]
        self.plan(link, lambda: fault)
        if open_too:
            self.thread.run(proxy.strike(fault))

    def plan(self, link: str, plan: Plan) -> None:
        """Choose the fault of each new connection of a link."""
        self.proxies[link].plan = plan

    def heal(self) -> None:
        """Let everything pass."""
        for proxy in self.proxies.values():
            self.thread.run(proxy.heal())

    def lift_quarantines(self) -> bool:
        """Restart nodes that left spools out since their workers were killed thrice within seconds; whether it had."""
        said = [json.loads(file.read_text(encoding="utf-8")) for file in self.root.glob("node-*/run/ready.json")]
        if not any(one["quarantined"] for one in said):
            return False
        self.stop()
        self.start()
        return True

    # --- what Postroad says ----------------------------------------------------------------------

    def ledger(self) -> dict[str, list[Told]]:
        """What the ledger says, read as the superuser; OSError or PostgresError while PostgreSQL is away."""
        return _read_ledger(asyncio.run(self.fetch(_LEDGER)))

    async def fetch(self, query: str) -> list[Any]:
        """Rows as PostgreSQL's superuser; OSError or PostgresError while PostgreSQL is away."""
        server = PostgresServer(self.root / "postgres", self.ports["postgres"])
        connection: Any = await asyncpg.connect(server.dsn("postgres", DATABASE), timeout=10)
        try:
            rows: list[Any] = await connection.fetch(query, timeout=30)
        finally:
            await connection.close()
        return rows

    def left_in_spools(self) -> list[str]:
        """Recipients that the spools still hold."""
        return [row for file in self.root.glob("node-*/spool/*/spool.db") for row in spool_rows(file)]

    def wrong_in_books(self, timeout_s: float = 60.0) -> list[str]:
        """What Postroad's own books say is wrong, by comparisons that began after this call."""
        begun_s = time.time()
        found: list[Book] = []

        def compared(client: Client) -> bool:
            nonlocal found
            with contextlib.suppress(PostroadError):
                found = list(client.books.ListBooks(ListBooksRequest(parent=_EVERY_ACCOUNT)).books)
            return bool(found) and all(book.compare_time.ToNanoseconds() / 1e9 > begun_s for book in found)

        with self.client() as client:
            try:
                wait_until(lambda: compared(client), "the books were compared", timeout_s)
            except AssertionError as error:
                raise AssertionError(f"{error}: {found}") from error
            findings = client.books.ListBookFindings(ListBookFindingsRequest(parent=_EVERY_ACCOUNT)).book_findings
        return [
            *(f"does not balance or agree: {book}" for book in found if not (book.balances and book.agrees)),
            *(f"{one.name}: {BookFinding.Kind.Name(one.kind)} {one.message} {one.detail}" for one in findings),
        ]

    def wait_quiet(self, timeout_s: float) -> None:
        """Wait until nothing waits in a spool and the ledger shows no recipient that has not ended."""
        wait_until(self._is_quiet, "all mail has ended and is in the ledger", timeout_s)

    def _is_quiet(self) -> bool:
        try:
            if self.left_in_spools():
                return False
            ledger = self.ledger()
        except (OSError, asyncpg.PostgresError, apsw.Error):
            return False
        tries, copies, _, _ = self.books.snapshot()
        stored = {entry.message_id for entry in tries if entry.code == 250} | {copy.message_id for copy in copies}
        return stored <= set(ledger) and all(one.state in TERMINAL for rows in ledger.values() for one in rows)


_LEDGER = """
SELECT m.message_id::text AS id, m.header_message_id AS token, m.account, r.address, r.state,
       array_remove(array_agg(e.type ORDER BY e.position), NULL) AS events
FROM postroad.messages m
JOIN postroad.recipients r USING (message_id)
LEFT JOIN postroad.delivery_events e ON e.message_id = r.message_id AND e.recipient_index = r.recipient_index
GROUP BY 1, 2, 3, 4, 5
"""
# Events that end a recipient, as the states that they end it in.
_ENDS = {2: 6, 4: 7, 5: 8, 6: 9, 7: 10}


def _read_ledger(rows: list[Any]) -> dict[str, list[Told]]:
    found: dict[str, list[Told]] = {}
    for row in rows:
        told = Told(
            row["token"].strip("<>").partition("@")[0],
            row["address"],
            row["state"],
            [_ENDS[kind] for kind in row["events"] if kind in _ENDS],
            row["events"].count(_UNCERTAIN),
            row["account"] == SAFE,
        )
        found.setdefault(row["id"], []).append(told)
    return found


def spool_rows(file: Path) -> list[str]:
    """What a spool still holds, a line for each recipient."""
    return [
        f"{file.parent.name}: {message} for {recipient}: {state}, attempt {attempt}"
        for message, recipient, state, attempt in _read(file, "SELECT message, recipient, state, attempt FROM waiting")
    ]


def spool_opening(file: Path) -> str:
    """The id of a spool's present opening, in hexadecimal digits."""
    ((opening,),) = _read(file, "SELECT lower(hex(id)) FROM opening WHERE last_record IS NULL")
    return str(opening)


def _read(file: Path, query: str) -> list[Any]:
    connection = apsw.Connection(str(file), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        connection.set_busy_timeout(1_000)
        return connection.execute(query).fetchall()
    finally:
        connection.close()
