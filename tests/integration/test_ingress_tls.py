"""TLS and AUTH over real sockets: STARTTLS, implicit TLS, and what must never be logged."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import resource
import smtplib
import ssl
import statistics
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import aiosmtplib
import pytest

from dataplane.core.config import Credential, Denials
from dataplane.core.policy import compile_networks
from dataplane.ingress.admission import Admission
from dataplane.ingress.listeners import Mode
from dataplane.ingress.tls import TlsHolder, server_context
from support.certificates import write_certificate
from support.ingress import ACCOUNT, SECRET, Node, Peer, make_node, running, until

EHLO = b"EHLO client.example\r\n"
MAIL = b"MAIL FROM:<app@example.com>\r\n"
GROUP = MAIL + b"RCPT TO:<someone@example.net>\r\nDATA\r\n"
BODY = b"From: app@example.com\r\nSubject: hello\r\n\r\nbody\r\n"
USER = "demo.app"
NAME = "accounts/demo/smtpCredentials/app"
_FAR_MS = 1 << 50


def plain_login(username: str, secret: str) -> bytes:
    return b"AUTH PLAIN " + base64.b64encode(f"\0{username}\0{secret}".encode()) + b"\r\n"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_certificate(tmp_path_factory.mktemp("tls"), "relay.example")


@pytest.fixture
async def node(certificate: tuple[Path, Path]) -> AsyncIterator[Node]:
    made = make_node(tls=TlsHolder(server_context(*certificate)), networks=())
    async with running(made, Mode.STARTTLS, Mode.TLS):
        yield made


@pytest.fixture
def trusting(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate[0]))


async def encrypted(node: Node, context: ssl.SSLContext) -> Peer:
    peer = await node.greeted(Mode.TLS, ssl=context, server_hostname="relay.example")
    await peer.ask(EHLO)
    return peer


async def test_starttls_auth_and_mail_in_one_session(node: Node, trusting: ssl.SSLContext) -> None:
    peer = await node.greeted(Mode.STARTTLS)
    assert b"STARTTLS" in await peer.ask(EHLO)
    assert (await peer.ask(b"STARTTLS\r\n")).startswith(b"220 2.0.0")
    await peer.writer.start_tls(trusting, server_hostname="relay.example")
    hello = await peer.ask(EHLO)
    assert b"AUTH PLAIN LOGIN" in hello
    assert b"STARTTLS" not in hello
    assert (await peer.ask(plain_login(USER, SECRET))).startswith(b"235 2.7.0")
    assert (await peer.ask(GROUP, 3)).startswith(b"354")
    assert (await peer.ask(BODY + b".\r\n")).startswith(b"250 2.0.0 queued as ")
    envelope, content, _ = node.delivery.delivered[0]
    assert envelope.credential == NAME
    assert envelope.client_tls == "TLSv1.3"
    assert b" (TLSv1.3)\r\n\tby relay.example with ESMTPSA id " in content
    assert node.counters.auth_succeeded == 1


async def test_smtplib_over_both_kinds_of_tls(node: Node, trusting: ssl.SSLContext) -> None:
    def send() -> None:
        with smtplib.SMTP("127.0.0.1", node.ports[Mode.STARTTLS], timeout=10) as client:
            client._host = "relay.example"  # type: ignore[attr-defined]  # the name to check, not to resolve
            client.starttls(context=trusting)
            client.login(USER, SECRET)
            client.sendmail("app@example.com", ["a@example.net"], BODY)
        trusting.check_hostname = False
        with smtplib.SMTP_SSL("127.0.0.1", node.ports[Mode.TLS], timeout=10, context=trusting) as client:
            client.login(USER, SECRET)
            client.sendmail("app@example.com", ["a@example.net"], BODY)

    await asyncio.to_thread(send)
    assert node.counters.messages_enqueued == 2


async def test_aiosmtplib_sends_utf8_addresses(node: Node, trusting: ssl.SSLContext) -> None:
    trusting.check_hostname = False
    client = aiosmtplib.SMTP(
        hostname="127.0.0.1", port=node.ports[Mode.TLS], use_tls=True, tls_context=trusting, timeout=10
    )
    async with client:
        await client.login(USER, SECRET)
        await client.sendmail("ü@example.com", ["ö@example.net"], BODY, mail_options=["SMTPUTF8"])
    assert node.delivery.delivered[0][0].sender == "ü@example.com"
    assert node.delivery.delivered[0][0].smtputf8


async def test_plaintext_behind_starttls_closes_and_is_never_executed(node: Node) -> None:
    peer = await node.greeted(Mode.STARTTLS)
    await peer.ask(EHLO)
    peer.writer.write(b"STARTTLS\r\n" + plain_login(USER, SECRET) + b"NOOP\r\n" * 1_000)
    assert (await peer.end()).endswith(b"503 5.5.1 Nothing may follow that command before its reply\r\n")
    assert node.counters.auth_succeeded == 0


async def test_a_command_that_arrives_with_the_end_of_the_handshake_is_answered(
    node: Node, trusting: ssl.SSLContext
) -> None:
    peer = await node.greeted(Mode.STARTTLS)
    await peer.ask(EHLO)
    await peer.ask(b"STARTTLS\r\n")
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    inside = trusting.wrap_bio(incoming, outgoing, server_hostname="relay.example")
    with pytest.raises(ssl.SSLWantReadError):
        inside.do_handshake()
    while True:
        peer.writer.write(outgoing.read())
        incoming.write(await peer.reader.read(65_536))
        try:
            inside.do_handshake()
        except ssl.SSLWantReadError:
            continue
        break
    # The client's last flight and its first command leave in one segment.
    inside.write(EHLO)
    peer.writer.write(outgoing.read())
    answer = b""
    async with asyncio.timeout(10):
        while not answer:
            incoming.write(await peer.reader.read(65_536))
            try:
                answer = inside.read()
            except ssl.SSLWantReadError:
                continue
    assert answer.startswith(b"250-relay.example\r\n")


async def test_plaintext_instead_of_a_handshake_closes(node: Node) -> None:
    peer = await node.greeted(Mode.STARTTLS)
    await peer.ask(EHLO)
    await peer.ask(b"STARTTLS\r\n")
    peer.writer.write(plain_login(USER, SECRET) + b"x" * 4_000)
    await peer.end()
    await until(lambda: node.counters.connections_tls_failed == 1)
    await until(lambda: node.counters.sessions_active == 0)
    assert node.admission.total == 0
    assert node.counters.auth_succeeded == 0


async def test_a_stalled_handshake_ends_with_its_deadline(certificate: tuple[Path, Path]) -> None:
    made = make_node(tls=TlsHolder(server_context(*certificate)), networks=())
    made.ingress.service.timeouts = replace(made.ingress.service.timeouts, handshake_s=0.05)
    async with running(made, Mode.STARTTLS, Mode.TLS):
        peer = await made.greeted(Mode.STARTTLS)
        await peer.ask(EHLO)
        await peer.ask(b"STARTTLS\r\n")
        assert await peer.end() == b""
        silent = await made.connect(Mode.TLS)
        assert await silent.end() == b""
        await until(lambda: made.counters.connections_tls_failed == 2)
        assert made.admission.total == 0


async def test_a_client_that_leaves_during_the_handshake_frees_its_place(node: Node) -> None:
    for mode in (Mode.STARTTLS, Mode.TLS):
        peer = await node.connect(mode)
        if mode is Mode.STARTTLS:
            await peer.line()
            await peer.ask(EHLO)
            await peer.ask(b"STARTTLS\r\n")
        peer.reset()
        await until(lambda: node.admission.total == 0)
        assert node.counters.sessions_active == 0


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_tls_1_2_and_1_3_are_served_with_forward_secrecy_only(
    node: Node, trusting: ssl.SSLContext, version: ssl.TLSVersion
) -> None:
    trusting.minimum_version = trusting.maximum_version = version
    peer = await encrypted(node, trusting)
    suite = peer.writer.get_extra_info("ssl_object").cipher()[0]
    assert suite.startswith(("ECDHE-", "TLS_"))


async def test_old_tls_and_suites_without_forward_secrecy_are_refused(node: Node) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname = False
    old.verify_mode = ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    old.set_ciphers("AES128-SHA:AES256-GCM-SHA384@SECLEVEL=0")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await node.connect(Mode.TLS, ssl=old, server_hostname="relay.example")
    context = node.ingress.service.tls
    assert context is not None
    assert context.context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert context.context.num_tickets > 0


async def test_a_new_certificate_serves_the_next_handshake_and_the_old_session_goes_on(
    node: Node, trusting: ssl.SSLContext, tmp_path: Path
) -> None:
    before = await encrypted(node, trusting)
    files = write_certificate(tmp_path, "relay.example")
    assert node.ingress.service.tls is not None
    node.ingress.service.tls.context = server_context(*files)
    after = await encrypted(node, ssl.create_default_context(cafile=str(files[0])))
    for peer in (before, after):
        assert (await peer.ask(b"NOOP\r\n")).startswith(b"250")


@pytest.mark.parametrize(
    ("username", "secret"),
    [
        (USER, "wrong"),
        ("demo.other", SECRET),
        ("nobody.app", SECRET),
        ("demo", SECRET),
        ("", ""),
        ("demo.app.x", SECRET),
    ],
)
async def test_every_failed_login_is_answered_alike(
    node: Node, trusting: ssl.SSLContext, username: str, secret: str
) -> None:
    peer = await encrypted(node, trusting)
    answer = await peer.ask(plain_login(username, secret))
    assert answer == b"535 5.7.8 Authentication credentials invalid\r\n"
    assert (await peer.ask(MAIL)).startswith(b"530 5.7.0")
    assert node.counters.auth_failed == 1


async def test_revoked_expired_and_unknown_credentials_are_answered_alike(node: Node, trusting: ssl.SSLContext) -> None:
    node.config.denials = Denials(version=1, credentials={NAME: _FAR_MS}, credentials_since={NAME: 1})
    peer = await encrypted(node, trusting)
    answers = {await peer.ask(plain_login(USER, SECRET))}
    node.config.denials = Denials(version=2)
    digest = hashlib.sha256(SECRET.encode()).digest()
    node.config.set_account(replace(ACCOUNT, credentials={NAME: Credential(NAME, digest, expire_ms=1)}))
    answers.add(await peer.ask(plain_login(USER, SECRET)))
    assert answers == {b"535 5.7.8 Authentication credentials invalid\r\n"}


@pytest.mark.parametrize(
    "denials",
    [Denials(version=1, credentials={NAME: 0}), Denials(version=1, accounts={ACCOUNT.name: 0})],
    ids=["credential", "account"],
)
async def test_who_has_the_password_of_what_is_suspended_is_told_to_come_again(
    node: Node, trusting: ssl.SSLContext, denials: Denials
) -> None:
    node.config.denials = denials
    peer = await encrypted(node, trusting)
    assert await peer.ask(plain_login(USER, SECRET)) == b"454 4.7.0 Sending is suspended, try again later\r\n"
    assert (await peer.ask(plain_login(USER, "wrong"))).startswith(b"535 5.7.8")
    assert (await peer.ask(MAIL)).startswith(b"530 5.7.0")


async def test_logins_to_what_is_suspended_are_no_guesses(node: Node, trusting: ssl.SSLContext) -> None:
    node.config.denials = Denials(version=1, accounts={ACCOUNT.name: 0})
    for _ in range(10):
        peer = await encrypted(node, trusting)
        for _ in range(2):
            assert (await peer.ask(plain_login(USER, SECRET))).startswith(b"454 4.7.0 Sending is suspended")
        await peer.ask(b"QUIT\r\n")
    node.config.denials = Denials(version=2)
    peer = await encrypted(node, trusting)
    assert (await peer.ask(plain_login(USER, SECRET))).startswith(b"235 2.7.0")


async def test_a_login_counts_anew_at_every_mail(node: Node, trusting: ssl.SSLContext) -> None:
    peer = await encrypted(node, trusting)
    await peer.ask(plain_login(USER, SECRET))
    assert (await peer.ask(MAIL)).startswith(b"250")
    await peer.ask(b"RSET\r\n")
    node.config.denials = Denials(version=1, credentials={NAME: 0})
    assert (await peer.ask(MAIL)).startswith(b"451 4.7.1 Sending is suspended")
    node.config.denials = Denials(version=1, credentials={NAME: _FAR_MS}, credentials_since={NAME: 1})
    assert (await peer.ask(MAIL)).startswith(b"550 5.7.1")
    node.config.denials = Denials(version=2)
    node.config.set_account(replace(ACCOUNT, credentials={}))
    assert (await peer.ask(MAIL)).startswith(b"550 5.7.1")


async def test_without_a_configuration_to_be_sure_of_a_login_is_refused_for_now(
    node: Node, trusting: ssl.SSLContext
) -> None:
    node.config.stale = True
    node.config.accounts.clear()
    peer = await encrypted(node, trusting)
    assert (await peer.ask(plain_login(USER, SECRET))).startswith(b"454 4.7.0")


async def test_an_address_that_fails_too_often_is_throttled_and_then_let_in(
    node: Node, trusting: ssl.SSLContext
) -> None:
    for _ in range(20):
        node.admission.note_auth_failure("127.0.0.1", node.clock.monotonic())
    peer = await encrypted(node, trusting)
    assert (await peer.ask(plain_login(USER, SECRET))).startswith(b"454 4.7.0")
    node.clock.seconds += 61
    assert (await peer.ask(plain_login(USER, SECRET))).startswith(b"235")
    assert node.counters.auth_throttled == 1


async def test_neither_secrets_nor_content_are_logged(node: Node, trusting: ssl.SSLContext) -> None:
    peer = await encrypted(node, trusting)
    await peer.ask(plain_login(USER, "canary-wrong-secret"))
    await peer.ask(b"AUTH LOGIN\r\n")
    await peer.ask(base64.b64encode(USER.encode()) + b"\r\n")
    await peer.ask(base64.b64encode(SECRET.encode()) + b"\r\n")
    await peer.ask(GROUP, 3)
    await peer.ask(b"From: app@example.com\r\nSubject: canary-subject\r\n\r\ncanary-body\r\n.\r\n")
    assert {"auth.failed", "message.accepted"} <= set(node.log.events())
    lines = repr(node.log.lines)
    for canary in ("canary", SECRET, base64.b64encode(SECRET.encode()).decode(), USER):
        assert canary not in lines


async def test_clients_of_an_accounts_network_need_no_login_on_any_port(node: Node, trusting: ssl.SSLContext) -> None:
    node.config.networks = compile_networks([("127.0.0.0/8", ACCOUNT.name)])
    clear = await node.greeted(Mode.STARTTLS)
    await clear.ask(EHLO)
    assert (await clear.ask(MAIL)).startswith(b"250")
    peer = await encrypted(node, trusting)
    assert (await peer.ask(MAIL)).startswith(b"250")


async def test_refusals_before_a_tls_session_say_nothing_in_clear(certificate: tuple[Path, Path]) -> None:
    made = make_node(
        tls=TlsHolder(server_context(*certificate)),
        networks=(),
        admission=Admission(max_connections=0, max_per_address=1),
    )
    async with running(made, Mode.TLS):
        peer = await made.connect(Mode.TLS)
        assert await peer.end() == b""


@pytest.mark.nightly
async def test_a_login_takes_as_long_whoever_it_names(node: Node) -> None:
    """Difference of medians against the spread within one kind, over 20,000 timings."""
    submitter = node.ingress.service.submission.submitter("192.0.2.1")
    node.admission._max_auth_failures = 1_000_000_000
    names = {"wrong secret": USER, "no credential": "demo.nobody", "no account": "nobody.app"}
    times: dict[str, list[int]] = {kind: [] for kind in names}
    for _ in range(20_000):
        for kind, username in names.items():
            begin = time.perf_counter_ns()
            submitter.authenticate(username, "prs_some-secret-or-other")
            times[kind].append(time.perf_counter_ns() - begin)
    medians = {kind: statistics.median(taken) for kind, taken in times.items()}
    quartiles = statistics.quantiles(times["wrong secret"], n=4)
    noise = max(quartiles[2] - quartiles[0], 1_000)
    assert max(medians.values()) - min(medians.values()) < noise, medians


@pytest.mark.nightly
@pytest.mark.timeout(300)
async def test_aborted_handshakes_leave_nothing_behind(node: Node) -> None:
    async def abort_some(count: int) -> None:
        for _ in range(count):
            peer = await node.connect(Mode.TLS)
            peer.writer.write(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 40)
            peer.reset()
            node.peers.clear()
        await until(lambda: node.admission.total == 0)

    await abort_some(1_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    await abort_some(10_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000
    await until(lambda: not node.ingress.service._tasks)
