"""Properties of the client machine: how bytes arrive does not matter, and no server can make it lie or crash."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from dataplane.core.address import Mailbox
from dataplane.core.client import Client, Phase, Signal
from dataplane.core.config import TlsPolicy
from dataplane.core.normalize import MAX_TEXT_BYTES, enhanced_code, safe_text
from dataplane.core.replies import NO_ROUTE, queued
from dataplane.core.replies import Reply as ServerReply
from dataplane.core.reply_reader import MAX_REPLY_BYTES, MalformedReplyError, Reply, ReplyReader
from dataplane.core.session import Session
from dataplane.core.session_contract import Action, Limits, MailParameters
from dataplane.core.transaction import Transaction, Verdict, VerdictKind, frame_content
from support.smtp_script import EHLO_ALL, GREETING, MESSAGE, transaction

BOTH = transaction("b@example.net", "c@example.net")
ACCEPTED = [b"250 2.1.0 ok\r\n", b"250 2.1.5 ok\r\n", b"250 2.1.5 ok\r\n", b"354 go\r\n", b"250 2.0.0 queued\r\n"]

codes = st.sampled_from([b"220", b"250", b"251", b"354", b"421", b"450", b"451", b"452", b"550", b"552", b"554"])
texts = st.binary(max_size=30).map(lambda text: text.replace(b"\r", b"").replace(b"\n", b""))
replies = st.builds(lambda code, text: code + b" " + text + b"\r\n", codes, texts)
garbage = st.one_of(replies, st.binary(max_size=40), st.sampled_from([*ACCEPTED, GREETING, EHLO_ALL]))
lines = st.lists(st.text(alphabet=".ab \u00fc", max_size=6), max_size=12)


@st.composite
def split(draw: st.DrawFn, data: st.SearchStrategy[bytes]) -> list[bytes]:
    """Some bytes, cut anywhere."""
    whole = draw(data)
    cuts = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    return [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


def opened() -> Client:
    client = Client("relay.test", TlsPolicy.NONE)
    client.receive(GREETING)
    client.receive(EHLO_ALL)
    client.take_output()
    return client


def read_all(pieces: list[bytes]) -> tuple[list[Reply], bool]:
    """Replies before the first error, and whether there was one."""
    reader = ReplyReader()
    found: list[Reply] = []
    try:
        for piece in pieces:
            reader.feed(piece)
            while (reply := reader.next()) is not None:
                found.append(reply)
    except MalformedReplyError:
        return found, True
    return found, False


@given(split(st.lists(garbage, max_size=8).map(b"".join)))
def test_replies_are_the_same_however_their_bytes_arrive(pieces: list[bytes]) -> None:
    data = b"".join(pieces)
    assert read_all(pieces) == read_all([data])
    assert read_all([data[place : place + 1] for place in range(len(data))]) == read_all([data])


@given(said=st.lists(garbage, max_size=12), used_before=st.booleans())
def test_whatever_a_server_says_every_recipient_gets_one_end_and_nothing_raises(
    *, said: list[bytes], used_before: bool
) -> None:
    client = opened()
    if used_before:
        client.begin(transaction())
        client.receive(b"".join([ACCEPTED[0], ACCEPTED[1], ACCEPTED[3]]))
        client.receive(ACCEPTED[4])
        client.take_output()
    client.begin(BOTH)
    signal = Signal.NOTHING
    for piece in said:
        signal = client.receive(piece)
        client.take_output()
        if signal is not Signal.NOTHING:
            break
    if signal is Signal.NOTHING:
        signal = client.lost("closed")
    assert signal is Signal.DONE
    assert client.outcome is not None
    assert len(client.outcome) == 2
    for verdict in client.outcome:
        assert verdict.text.isprintable()
        assert len(verdict.text.encode()) <= MAX_TEXT_BYTES
        assert (verdict.kind is VerdictKind.SENT) <= (200 <= verdict.code < 300)
        assert (verdict.kind is VerdictKind.PERMANENT) <= (verdict.code >= 500)


@given(
    stray=st.sampled_from([b"250 ok\r\n", b"421 bye\r\n", b"550 5.1.1 no\r\n", b"450 no\r\n", b"354 go\r\n"]),
    envelope=st.lists(st.sampled_from([b"250 ok\r\n", b"550 5.1.1 who\r\n", b"450 later\r\n"]), min_size=3, max_size=3),
    arrives_together=st.booleans(),
)
@example(stray=b"250 ok\r\n", envelope=[b"250 ok\r\n", b"250 ok\r\n", b"550 5.1.1 who\r\n"], arrives_together=True)
def test_one_stray_line_never_settles_a_recipient_on_a_used_connection(
    *, stray: bytes, envelope: list[bytes], arrives_together: bool
) -> None:
    """The server answers honestly, one line late: nobody may be sent, bounced or failed by what is another's answer."""
    client = opened()
    client.begin(transaction())
    client.receive(b"".join([ACCEPTED[0], ACCEPTED[1], ACCEPTED[3]]))
    client.receive(ACCEPTED[4])
    client.begin(BOTH)
    mail, first, second = envelope
    if not mail.startswith(b"2"):
        first = second = b"503 5.5.1 MAIL first\r\n"
    accepted = mail.startswith(b"2") and (first.startswith(b"2") or second.startswith(b"2"))
    said = [stray, mail, first, second, b"354 go\r\n" if accepted else b"554 5.5.1 nobody\r\n"]
    if not accepted:
        said.append(b"250 2.0.0 reset\r\n")
    for piece in [b"".join(said)] if arrives_together else said:
        if client.outcome is None and client.receive(piece) is not Signal.NOTHING:
            break
    if client.outcome is None:
        client.lost("closed")
    assert client.outcome is not None
    settled = {VerdictKind.SENT, VerdictKind.PERMANENT, VerdictKind.UNCERTAIN}
    assert not settled & {verdict.kind for verdict in client.outcome}
    assert not client.reusable


@given(st.binary(max_size=2_000))
def test_any_bytes_become_text_that_can_be_stored(raw: bytes) -> None:
    text = safe_text(raw)
    assert text.isprintable()
    assert len(text.encode("utf-8")) <= MAX_TEXT_BYTES
    assert safe_text(text.encode()) == text


@given(st.integers(200, 599), st.binary(max_size=20))
def test_an_enhanced_code_never_contradicts_its_reply(code: int, raw: bytes) -> None:
    found = enhanced_code(code, raw)
    assert found == "" or found[0] == str(code)[0]


@given(lines)
def test_stuffing_can_be_undone_and_no_lone_dot_is_left(content_lines: list[str]) -> None:
    content = "".join(f"{line}\r\n" for line in content_lines).encode()
    wire = b"".join(frame_content(content))
    assert wire.endswith(b".\r\n")
    body = wire[: -len(b".\r\n")]
    unstuffed = [line[1:] if line.startswith(b".") else line for line in body.split(b"\r\n")]
    assert b"\r\n".join(unstuffed) == content
    assert b"." not in body.split(b"\r\n")


@settings(max_examples=10)
@given(st.integers(1, 3_000))
def test_an_endless_reply_ends_at_its_bound(step: int) -> None:
    client = opened()
    client.begin(transaction())
    fed = 0
    while client.phase is not Phase.CLOSED:
        client.receive(b"x" * step)
        fed += step
        assert fed <= MAX_REPLY_BYTES + step


# --- against our own server


class Everyone:
    """A policy that refuses nobody but those who are called so."""

    def __init__(self) -> None:
        self.recipients: list[str] = []
        self.sender = ""

    def authenticate(self, username: str, secret: str) -> ServerReply | None:
        return None

    def mail(self, sender: Mailbox | None, parameters: MailParameters) -> ServerReply | None:
        self.sender = sender.text if sender else ""
        self.recipients = []
        return None

    def recipient(self, address: Mailbox) -> ServerReply | None:
        if address.local.startswith("refused"):
            return NO_ROUTE
        self.recipients.append(address.text)
        return None

    def latest_release_ms(self) -> int:
        return 0

    def reset(self) -> None:
        return

    def forget(self) -> None:
        return

    def failed(self, error: Exception) -> str:
        raise error


class Pair:
    """Client and server machine in one pipe that cuts as it is told."""

    def __init__(self, cut: int) -> None:
        self.policy = Everyone()
        self.server = Session(
            self.policy, Limits(), "sink.test", tls_available=False, tls_active=False, authorized=True
        )
        self.client = Client("relay.test", TlsPolicy.NONE)
        self.cut = cut
        self.taken: list[tuple[str, tuple[str, ...], bytes]] = []

    def pieces(self, data: bytes) -> list[bytes]:
        return [data[place : place + self.cut] for place in range(0, len(data), self.cut)]

    def run(self, greeting: bytes = b"") -> Signal:
        """Pass bytes to and fro until the client has something to say to its driver."""
        to_client, signal = greeting, Signal.NOTHING
        for _ in range(100):
            for piece in self.pieces(to_client):
                signal = self.client.receive(piece) or signal
            sent = b"".join(self.client.take_output())
            for piece in self.pieces(sent):
                self.server.receive(piece)
                self.serve()
            to_client = self.server.take_output()
            if not to_client:
                return signal
        raise AssertionError("the machines go on for ever")

    def serve(self) -> None:
        while self.server.action in (Action.PERMIT, Action.COMMIT, Action.MORE):
            if self.server.action is Action.PERMIT:
                self.server.permit(None)
            elif self.server.action is Action.MORE:
                self.server.resume()
            else:
                self.taken.append((self.policy.sender, tuple(self.policy.recipients), self.server.take_content()))
                self.server.committed(queued("0190f5d2-0000-7000-8000-000000000000"))


names = st.lists(st.sampled_from(["a", "b", "refused1", "refused2"]), min_size=1, max_size=4, unique=True)


@settings(deadline=None)
@given(st.integers(1, 4_000), st.lists(st.tuples(names, lines), min_size=1, max_size=4))
def test_our_client_and_our_server_understand_each_other(cut: int, messages: list[tuple[list[str], list[str]]]) -> None:
    pair = Pair(cut)
    assert pair.run(GREETING) is Signal.READY
    for local_parts, content_lines in messages:
        recipients = tuple(f"{local}@example.net" for local in local_parts)
        content = MESSAGE + "".join(f"{line}\r\n" for line in content_lines).encode()
        before = len(pair.taken)
        signal = pair.client.begin(Transaction("a@example.com", recipients, content, body_8bit=True))
        assert signal is Signal.NOTHING
        assert pair.run() is Signal.DONE
        outcome: tuple[Verdict, ...] = pair.client.outcome or ()
        accepted = tuple(name for name in recipients if not name.startswith("refused"))
        sent = tuple(
            name for name, verdict in zip(recipients, outcome, strict=True) if verdict.kind is VerdictKind.SENT
        )
        assert sent == accepted
        assert pair.taken[before:] == ([("a@example.com", accepted, content)] if accepted else [])
        assert pair.client.reusable
