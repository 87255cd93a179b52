"""REPLICATED mail end to end, on two nodes: it survives the loss of its node, and nobody sends it twice."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import smtplib
import ssl
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
from google.protobuf.duration_pb2 import Duration

from postroad.control.v1.account_pb2 import Account, RetryPolicy
from postroad.control.v1.account_service_pb2 import CreateAccountRequest
from postroad.control.v1.credential_service_pb2 import CreateSmtpCredentialRequest
from postroad.control.v1.provider_pb2 import Provider, SmtpProvider
from postroad.control.v1.provider_service_pb2 import CreateProviderRequest
from postroad.control.v1.routing_rule_pb2 import RoutingRule
from postroad.control.v1.routing_rule_service_pb2 import CreateRoutingRuleRequest
from postroad.inbox import InboxError
from postroad.localstack import PostgresServer
from support.fault_proxy import LoopThread, in_thread
from support.killable_stack import KillableStack, pids_below, wait_until
from support.local_stack import stack_folder
from support.mail_clients import send_by_session, smtplib_session
from support.second_node import SecondNode

pytestmark = pytest.mark.timeout(300)

ACCOUNT = "accounts/safe"
WAITING = 200
# Long enough for a lease to end and for another node to ask: what is promised.
ADOPTED_S = 30.0
HELD_S = 8
_LOCAL = b"From: app@example.com\r\nSubject: local %d\r\n\r\nhi\r\n"
_LIMIT = 16 * 1024 * 1024


class Hop:
    """A next hop that can hold every transaction at DATA: then no dot can have left."""

    def __init__(self, thread: LoopThread) -> None:
        self._thread = thread
        self._open = asyncio.Event()
        self._server: asyncio.Server
        self.port = 0
        self.held = 0
        self.cut = 0
        self.subjects: Counter[str] = Counter()
        self.size_bytes: dict[str, int] = {}
        self.arrived_s: dict[str, float] = {}
        thread.run(self._start())

    def hold(self) -> None:
        """From now on nothing gets beyond DATA."""
        self.held = self.cut = 0
        self._thread.call(self._open.clear)

    def let_go(self) -> None:
        """Answer what waits, and what comes."""
        self._thread.call(self._open.set)

    def copies(self, subjects: list[str]) -> list[int]:
        return [self.subjects[subject] for subject in subjects]

    def end(self) -> None:
        self._thread.run(self._end())

    async def _end(self) -> None:
        self._server.close()

    async def _start(self) -> None:
        self._open.set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=_LIMIT)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            writer.write(b"220 hop ESMTP\r\n")
            while line := await reader.readline():
                verb = line[:4].upper()
                if verb == b"DATA":
                    await self._data(reader, writer)
                elif verb == b"EHLO":
                    writer.write(b"250-hop\r\n250 PIPELINING\r\n")
                else:
                    writer.write(b"250 ok\r\n" if verb != b"QUIT" else b"221 bye\r\n")
        writer.close()

    async def _data(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.held += not self._open.is_set()
        await self._open.wait()
        writer.write(b"354 go\r\n")
        try:
            content = await reader.readuntil(b"\r\n.\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            self.cut += 1
            raise ConnectionResetError from None
        (subject,) = [line[9:].decode() for line in content.split(b"\r\n") if line.startswith(b"Subject: ")]
        self.subjects[subject] += 1
        self.size_bytes[subject] = len(content)
        self.arrived_s[subject] = time.time()
        writer.write(b"250 ok\r\n")


class Stage:
    """A local stack, a second node, and an account `safe` whose mail is REPLICATED and goes to one next hop."""

    def __init__(self, stack: KillableStack, node: SecondNode, hop: Hop) -> None:
        self.stack, self.node, self.hop = stack, node, hop
        self._context = ssl.create_default_context(cafile=stack.ready["ca_file"])
        self._login = ("", "")

    def set_up(self) -> None:
        with contextlib.closing(self.stack.client()) as client:
            account = Account(
                sender_domains=["safe.example"],
                durability=Account.DURABILITY_REPLICATED,
                retry_policy=RetryPolicy(base=Duration(seconds=1), cap=Duration(seconds=1)),
            )
            client.accounts.CreateAccount(CreateAccountRequest(account_id="safe", account=account))
            smtp = SmtpProvider(
                endpoints=[SmtpProvider.Endpoint(host="127.0.0.1", port=self.hop.port)],
                tls_policy=SmtpProvider.TLS_POLICY_NONE,
            )
            provider = Provider(smtp=smtp)
            client.providers.CreateProvider(CreateProviderRequest(parent=ACCOUNT, provider_id="hop", provider=provider))
            rule = RoutingRule(priority=1, targets=[RoutingRule.Target(provider=f"{ACCOUNT}/providers/hop")])
            client.routing_rules.CreateRoutingRule(
                CreateRoutingRuleRequest(parent=ACCOUNT, routing_rule_id="all", routing_rule=rule)
            )
            made = client.credentials.CreateSmtpCredential(
                CreateSmtpCredentialRequest(parent=ACCOUNT, smtp_credential_id="app")
            )
        self._login = (made.username, made.secret)
        for port in (self.node.port, self.stack.port("smtp")):
            wait_until(lambda port=port: self.takes_mail(port), "both nodes take the account's mail")  # type: ignore[misc]

    def takes_mail(self, port: int) -> bool:
        with contextlib.suppress(smtplib.SMTPException, OSError), self._session(port) as session:
            return session.mail("a@safe.example")[0] == 250
        return False

    def submit(self, count: int, port: int, *options: str) -> list[str]:
        """Submit so many messages in one session; their subjects. `options` are parameters of MAIL."""
        subjects = [f"mail {number} of {time.monotonic_ns()}" for number in range(count)]
        with self._session(port) as session:
            for subject in subjects:
                text = f"From: a@safe.example\r\nTo: b@example.net\r\nSubject: {subject}\r\n\r\nHello.\r\n"
                self.send(session, text, *options)
        return subjects

    def send(self, session: smtplib.SMTP, text: str, *options: str) -> None:
        """Submit a message; again, as submitters do, while the worker that took the session has no lease."""
        wait_until(lambda: self._is_taken(session, text, options), "the worker has a lease")

    def _is_taken(self, session: smtplib.SMTP, text: str, options: Sequence[str]) -> bool:
        try:
            session.sendmail("a@safe.example", ["b@example.net"], text, options)
        except smtplib.SMTPSenderRefused:
            return False
        return True

    def wait_delivered(self, subjects: list[str], timeout_s: float = 60.0) -> None:
        wait_until(lambda: min(self.hop.copies(subjects)) > 0, "every message has arrived", timeout_s)

    @contextlib.contextmanager
    def _session(self, port: int) -> Iterator[smtplib.SMTP]:
        with smtplib.SMTP("127.0.0.1", port, timeout=60) as session:
            session.starttls(context=self._context)
            session.login(*self._login)
            yield session


def has_arrived(stack: KillableStack, message: str) -> bool:
    try:
        stack.delivered(message)
    except InboxError:
        return False
    return True


@contextlib.contextmanager
def stopped_postgresql(stack: KillableStack) -> Iterator[None]:
    """The server and each process of it stand still, as on a machine that hangs."""
    server = PostgresServer(stack.root / "postgres", stack.port("postgres"))
    postmaster = int(server._pid_file.read_text(encoding="ascii"))
    os.kill(postmaster, signal.SIGSTOP)  # so that it starts no more
    pids = [*pids_below(postmaster), postmaster]
    assert len(pids) > 1
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with stack_folder() as folder, in_thread() as thread:
        stack = KillableStack(folder)
        stack.start()
        node, hop = SecondNode(stack), Hop(thread)
        try:
            made = Stage(stack, node.start(), hop)
            made.set_up()
            yield made
        finally:
            node.end()
            stack.stop()
            hop.end()


@pytest.fixture(autouse=True)
def _afterwards(stage: Stage) -> Iterator[None]:
    yield
    stage.hop.let_go()
    stage.node.signal_all(signal.SIGCONT)


def test_mail_is_delivered_by_whoever_took_it(stage: Stage) -> None:
    subjects = [*stage.submit(20, stage.node.port), *stage.submit(20, stage.stack.port("smtp"))]
    stage.wait_delivered(subjects)
    assert set(stage.hop.copies(subjects)) == {1}


def test_a_large_message_goes_through_postgresql_and_arrives_whole(stage: Stage) -> None:
    subject = f"large {time.monotonic_ns()}"
    lines = "\r\n".join(f"{number:070d}" for number in range(30_000))
    text = f"From: a@safe.example\r\nTo: b@example.net\r\nSubject: {subject}\r\n\r\n{lines}\r\n"
    with stage._session(stage.node.port) as session:
        stage.send(session, text)
    stage.wait_delivered([subject])
    assert stage.hop.size_bytes[subject] > len(text)


def test_mail_that_is_held_until_its_time_goes_then_with_either_node_lost(stage: Stage) -> None:
    """The node that took it is gone when its time comes: it waited in PostgreSQL."""
    submitted_s = time.time()
    held = stage.submit(20, stage.node.port, f"HOLDFOR={HELD_S}", "MT-PRIORITY=3")
    stage.node.signal_all(signal.SIGKILL)
    stage.wait_delivered(held)
    assert set(stage.hop.copies(held)) == {1}
    assert min(stage.hop.arrived_s[subject] for subject in held) >= submitted_s + HELD_S
    stage.node.start()
    wait_until(lambda: stage.takes_mail(stage.node.port), "the node is back")


def test_a_node_that_sleeps_past_its_lease_sends_no_dot(stage: Stage) -> None:
    """The other node sends its mail meanwhile; awake again it finds the lease over, by the clock of that moment."""
    stage.hop.hold()
    subjects = stage.submit(1, stage.node.port)
    wait_until(lambda: stage.hop.held == 1, "the message is about to be sent")
    stage.node.signal_all(signal.SIGSTOP)
    stage.hop.let_go()
    stage.wait_delivered(subjects)
    stage.node.signal_all(signal.SIGCONT)
    wait_until(lambda: stage.hop.cut == 1, "the node gave the transaction up")
    wait_until(lambda: stage.takes_mail(stage.node.port), "it has a lease again")
    assert stage.hop.copies(subjects) == [1]


def test_without_postgresql_replicated_mail_is_451_and_local_mail_goes_on(stage: Stage) -> None:
    stack = stage.stack
    with stopped_postgresql(stack):
        with stage._session(stage.node.port) as session, pytest.raises(smtplib.SMTPResponseException) as refused:
            session.sendmail("a@safe.example", ["b@example.net"], "Subject: refused\r\n\r\nHello.\r\n")
        assert refused.value.smtp_code == 451
        wait_until(lambda: not stage.takes_mail(stack.port("smtp")), "no lease lives on")
        with smtplib_session(stack) as session:
            delivered = [send_by_session(session, _LOCAL % one, ["b@example.net"]) for one in range(5)]
        wait_until(lambda: all(has_arrived(stack, message) for message in delivered), "local mail is delivered")
    wait_until(lambda: stage.takes_mail(stage.node.port), "PostgreSQL is asked again")
    subjects = stage.submit(3, stage.node.port)
    stage.wait_delivered(subjects)
    assert set(stage.hop.copies(subjects)) == {1}


def test_a_node_that_is_lost_leaves_its_mail_to_the_other(stage: Stage) -> None:
    stage.hop.hold()
    subjects = stage.submit(WAITING, stage.node.port)
    wait_until(lambda: stage.hop.held > 0, "some are about to be sent")
    stage.node.signal_all(signal.SIGKILL)
    begun_s = time.monotonic()
    stage.hop.let_go()
    wait_until(lambda: max(stage.hop.copies(subjects)) > 0, "the other node has some", ADOPTED_S)
    stage.wait_delivered(subjects, ADOPTED_S + begun_s - time.monotonic() + 15)
    assert set(stage.hop.copies(subjects)) == {1}
    stage.node.start()
    wait_until(lambda: stage.takes_mail(stage.node.port), "the node is back")
