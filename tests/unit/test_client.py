"""The client machine against servers that behave, and against those that do not; every script also byte by byte."""

from __future__ import annotations

import base64

import pytest

from dataplane.core.client import DATA_TIMEOUT_S, Client, Phase, Signal
from dataplane.core.config import TlsPolicy
from dataplane.core.transaction import Login, VerdictKind
from support.smtp_script import (
    EHLO_ALL,
    GREETING,
    MESSAGE,
    Begin,
    C,
    Cutter,
    Played,
    S,
    Step,
    Tls,
    byte_by_byte,
    play,
    transaction,
    whole,
)

pytestmark = pytest.mark.parametrize("cut", [whole, byte_by_byte])

OPEN: list[Step] = [S(GREETING), C(b"EHLO relay.test\r\n"), S(EHLO_ALL)]
PLAIN_EHLO = b"250 mx.test\r\n"
OPEN_PLAIN: list[Step] = [S(GREETING), C(b"EHLO relay.test\r\n"), S(PLAIN_EHLO)]
OK = b"250 2.0.0 ok\r\n"
GO = b"354 go\r\n"
SIZE = len(MESSAGE)
ONE = b"MAIL FROM:<a@example.com> SIZE=%d\r\nRCPT TO:<b@example.net>\r\nDATA\r\n" % SIZE
TWO = b"MAIL FROM:<a@example.com> SIZE=%d\r\nRCPT TO:<b@example.net>\r\nRCPT TO:<c@example.net>\r\nDATA\r\n" % SIZE
BOTH = transaction("b@example.net", "c@example.net")
RSET = b"RSET\r\n"


def deliver_one(final: bytes = OK) -> list[Step]:
    return [Begin(transaction()), C(ONE), S(OK + OK + GO), C(MESSAGE + b".\r\n"), S(final)]


# --- opening a session


def test_a_session_opens_after_greeting_and_ehlo(cut: Cutter) -> None:
    played = play(OPEN, cut=cut)
    assert played.signals == [Signal.READY]
    assert played.client.reusable


@pytest.mark.parametrize("greeting", [b"554 5.3.2 no\r\n", b"421 busy\r\n", b"250 hello\r\n", b"354 hello\r\n"])
def test_any_greeting_but_220_is_a_temporary_failure_of_the_session(cut: Cutter, greeting: bytes) -> None:
    played = play([S(greeting), C(b"")], cut=cut)
    assert played.signals[:1] == [Signal.CLOSE]
    assert played.client.failure is not None
    assert played.client.failure.kind is VerdictKind.TEMPORARY
    assert played.client.failure.code == int(greeting[:3])
    assert played.client.failure.text.startswith("greeting: ")


def test_a_server_that_does_not_know_ehlo_is_greeted_with_helo(cut: Cutter) -> None:
    steps: list[Step] = [S(GREETING), C(b"EHLO relay.test\r\n"), S(b"502 what\r\n"), C(b"HELO relay.test\r\n"), S(OK)]
    assert play(steps, cut=cut).signals == [Signal.READY]


@pytest.mark.parametrize("policy", [TlsPolicy.REQUIRED, TlsPolicy.REQUIRED_VERIFIED])
def test_helo_is_no_way_around_required_tls(cut: Cutter, policy: TlsPolicy) -> None:
    played = play([S(GREETING), C(b"EHLO relay.test\r\n"), S(b"502 what\r\n"), C(b"")], policy=policy, cut=cut)
    assert played.signals[:1] == [Signal.CLOSE]


def test_starttls_missing_where_tls_is_required_ends_before_anything_is_sent(cut: Cutter) -> None:
    steps: list[Step] = [S(GREETING), C(b"EHLO relay.test\r\n"), S(b"250-mx\r\n250 PIPELINING\r\n"), C(b"")]
    played = play(steps, policy=TlsPolicy.REQUIRED, cut=cut)
    assert played.signals == [Signal.CLOSE]
    assert played.client.failure is not None
    assert "STARTTLS" in played.client.failure.text


def test_starttls_refused_ends_the_session_where_tls_is_required(cut: Cutter) -> None:
    steps = [*OPEN, C(b"STARTTLS\r\n"), S(b"454 4.7.0 not now\r\n"), C(b"")]
    played = play(steps, policy=TlsPolicy.REQUIRED, cut=cut)
    assert played.signals == [Signal.CLOSE]
    assert played.client.failure is not None
    assert played.client.failure.code == 454


def test_starttls_refused_goes_on_in_clear_where_tls_is_opportunistic(cut: Cutter) -> None:
    steps = [*OPEN, C(b"STARTTLS\r\n"), S(b"454 4.7.0 not now\r\n")]
    assert play(steps, policy=TlsPolicy.OPPORTUNISTIC, cut=cut).signals == [Signal.READY]


def test_starttls_is_not_used_where_the_policy_says_none(cut: Cutter) -> None:
    assert play([*OPEN, C(b"")], policy=TlsPolicy.NONE, cut=cut).signals == [Signal.READY]


def test_capabilities_learnt_in_clear_are_forgotten_by_starttls(cut: Cutter) -> None:
    steps = [*OPEN, C(b"STARTTLS\r\n"), S(b"220 go\r\n"), Tls(verified=True), C(b"EHLO relay.test\r\n"), S(PLAIN_EHLO)]
    steps += [Begin(transaction()), C(b"MAIL FROM:<a@example.com>\r\n")]
    played = play(steps, policy=TlsPolicy.REQUIRED_VERIFIED, cut=cut)
    assert played.signals == [Signal.START_TLS, Signal.READY]


def test_what_was_learnt_in_clear_does_not_survive_a_server_that_knows_no_ehlo_under_tls(cut: Cutter) -> None:
    steps = [*OPEN, C(b"STARTTLS\r\n"), S(b"220 go\r\n"), Tls(verified=False), C(b"EHLO relay.test\r\n")]
    steps += [S(b"502 what\r\n"), C(b"HELO relay.test\r\n"), S(b"250 hello\r\n")]
    steps += [Begin(transaction()), C(b"MAIL FROM:<a@example.com>\r\n")]
    play(steps, policy=TlsPolicy.REQUIRED, cut=cut)


@pytest.mark.parametrize("injected", [b"250 injected\r\n", b"2", EHLO_ALL])
@pytest.mark.parametrize("policy", [TlsPolicy.OPPORTUNISTIC, TlsPolicy.REQUIRED_VERIFIED])
def test_plaintext_behind_the_reply_to_starttls_closes(cut: Cutter, injected: bytes, policy: TlsPolicy) -> None:
    played = play([*OPEN, C(b"STARTTLS\r\n"), S(b"220 go\r\n" + injected), C(b"")], policy=policy, cut=cut)
    assert played.signals[-1] is Signal.CLOSE
    assert played.client.phase is Phase.CLOSED
    assert played.client.failure is not None


def test_injected_reply_in_two_segments_before_the_handshake_closes(cut: Cutter) -> None:
    steps = [*OPEN, C(b"STARTTLS\r\n"), S(b"220 go\r\n"), S(b"250-evil\r\n250 AUTH PLAIN\r\n"), C(b"")]
    played = play(steps, policy=TlsPolicy.REQUIRED_VERIFIED, cut=cut)
    assert played.signals[0] is Signal.START_TLS
    assert played.signals[-1] is Signal.CLOSE


# --- AUTH

LOGIN = Login("relay", "pass word")
PLAIN_LINE = b"AUTH PLAIN " + base64.b64encode(b"\0relay\0pass word") + b"\r\n"


def auth_steps(mechanisms: bytes) -> list[Step]:
    ehlo = b"250-mx\r\n250 AUTH " + mechanisms + b"\r\n"
    return [S(GREETING), C(b"EHLO relay.test\r\n"), S(ehlo)]


def play_auth(steps: list[Step], cut: Cutter) -> Played:
    return play(steps, policy=TlsPolicy.REQUIRED_VERIFIED, login=LOGIN, tls_active=True, cut=cut)


def test_auth_plain_with_initial_response(cut: Cutter) -> None:
    played = play_auth([*auth_steps(b"LOGIN PLAIN"), C(PLAIN_LINE), S(b"235 2.7.0 welcome\r\n")], cut)
    assert played.signals == [Signal.READY]


def test_auth_login_where_plain_is_not_offered(cut: Cutter) -> None:
    steps = [
        *auth_steps(b"CRAM-MD5 login"),
        C(b"AUTH LOGIN\r\n"),
        S(b"334 VXNlcm5hbWU6\r\n"),
        C(base64.b64encode(b"relay") + b"\r\n"),
        S(b"334 UGFzc3dvcmQ6\r\n"),
        C(base64.b64encode(b"pass word") + b"\r\n"),
        S(b"235 ok\r\n"),
    ]
    assert play_auth(steps, cut).signals == [Signal.READY]


def test_refused_credentials_are_temporary_and_the_text_that_might_repeat_them_is_not_kept(cut: Cutter) -> None:
    echo = b"535 5.7.8 no such login " + PLAIN_LINE
    played = play_auth([*auth_steps(b"PLAIN"), C(PLAIN_LINE), S(echo), C(b"")], cut)
    assert played.signals == [Signal.CLOSE]
    assert played.client.failure is not None
    assert (played.client.failure.kind, played.client.failure.code) == (VerdictKind.TEMPORARY, 535)
    assert base64.b64encode(b"\0relay\0pass word").decode() not in repr(played.client.failure)


def test_a_challenge_too_many_ends_auth(cut: Cutter) -> None:
    played = play_auth([*auth_steps(b"PLAIN"), C(PLAIN_LINE), S(b"334 again\r\n"), C(b"")], cut)
    assert played.signals == [Signal.CLOSE]


@pytest.mark.parametrize("mechanisms", [b"CRAM-MD5", b"XOAUTH2 EXTERNAL"])
def test_no_known_mechanism_is_a_failure_of_the_session(cut: Cutter, mechanisms: bytes) -> None:
    assert play_auth([*auth_steps(mechanisms), C(b"")], cut).signals == [Signal.CLOSE]


@pytest.mark.parametrize("policy", [TlsPolicy.NONE, TlsPolicy.OPPORTUNISTIC])
def test_credentials_never_travel_in_clear(cut: Cutter, policy: TlsPolicy) -> None:
    played = play([*auth_steps(b"PLAIN LOGIN"), C(b"")], policy=policy, login=LOGIN, cut=cut)
    assert played.signals == [Signal.CLOSE]


def test_credentials_never_travel_under_tls_that_is_not_verified(cut: Cutter) -> None:
    steps = [*OPEN, C(b"STARTTLS\r\n"), S(b"220 go\r\n"), Tls(verified=False), C(b"EHLO relay.test\r\n")]
    steps += [S(b"250-mx\r\n250 AUTH PLAIN\r\n"), C(b"")]
    played = play(steps, policy=TlsPolicy.REQUIRED, login=LOGIN, cut=cut)
    assert played.signals == [Signal.START_TLS, Signal.CLOSE]


def test_a_login_shows_nothing_of_itself(cut: Cutter) -> None:
    assert "pass word" not in repr(LOGIN)


# --- a transaction


def test_mail_rcpt_and_data_leave_together_where_pipelining_is_offered(cut: Cutter) -> None:
    played = play([*OPEN, *deliver_one(b"250 2.6.0 queued as 17\r\n")], cut=cut)
    assert played.kinds == ["SENT"]
    (verdict,) = played.outcomes[-1]
    assert verdict == (VerdictKind.SENT, 250, "2.6.0", "2.6.0 queued as 17")
    assert played.client.reusable


def test_the_next_message_follows_on_the_same_connection(cut: Cutter) -> None:
    played = play([*OPEN, *deliver_one(), *deliver_one(b"550 5.7.1 spam\r\n"), *deliver_one()], cut=cut)
    assert [outcome[0].kind.name for outcome in played.outcomes] == ["SENT", "PERMANENT", "SENT"]


def test_one_by_one_where_pipelining_is_not_offered(cut: Cutter) -> None:
    steps = [
        *OPEN_PLAIN,
        Begin(BOTH),
        C(b"MAIL FROM:<a@example.com>\r\n"),
        S(OK),
        C(b"RCPT TO:<b@example.net>\r\n"),
        S(b"550 5.1.1 who\r\n"),
        C(b"RCPT TO:<c@example.net>\r\n"),
        S(OK),
        C(b"DATA\r\n"),
        S(GO),
        C(MESSAGE + b".\r\n"),
        S(OK),
    ]
    played = play(steps, cut=cut)
    assert played.kinds == ["PERMANENT", "SENT"]
    assert played.client.reusable


def test_one_by_one_stops_when_the_sender_is_refused(cut: Cutter) -> None:
    steps = [*OPEN_PLAIN, Begin(BOTH), C(b"MAIL FROM:<a@example.com>\r\n"), S(b"451 4.7.1 later\r\n"), C(RSET), S(OK)]
    played = play(steps, cut=cut)
    assert played.kinds == ["TEMPORARY", "TEMPORARY"]
    assert played.client.reusable


def test_one_by_one_asks_for_no_data_when_every_recipient_is_refused(cut: Cutter) -> None:
    steps = [*OPEN_PLAIN, Begin(transaction()), C(b"MAIL FROM:<a@example.com>\r\n"), S(OK)]
    steps += [C(b"RCPT TO:<b@example.net>\r\n"), S(b"550 no\r\n"), C(RSET), S(OK)]
    assert play(steps, cut=cut).kinds == ["PERMANENT"]


def test_refused_recipients_keep_their_own_replies_beside_those_that_are_sent_to(cut: Cutter) -> None:
    steps = [*OPEN, Begin(BOTH), C(TWO), S(OK + b"450 4.2.1 busy\r\n" + OK + GO), C(MESSAGE + b".\r\n"), S(OK)]
    played = play(steps, cut=cut)
    assert played.kinds == ["TEMPORARY", "SENT"]
    assert played.codes == [450, 250]


def test_354_with_every_recipient_refused_is_answered_with_a_lone_dot(cut: Cutter) -> None:
    refused = b"550 5.1.1 who\r\n"
    steps = [*OPEN, Begin(BOTH), C(TWO), S(OK + refused + b"451 later\r\n" + GO), C(b".\r\n"), S(b"554 nobody\r\n")]
    played = play(steps, cut=cut)
    assert played.kinds == ["PERMANENT", "TEMPORARY"]
    assert played.codes == [550, 451]
    assert played.client.reusable


def test_a_lone_dot_that_is_accepted_sends_to_nobody(cut: Cutter) -> None:
    steps = [*OPEN, Begin(transaction()), C(ONE), S(OK + b"550 no\r\n" + GO), C(b".\r\n"), S(OK)]
    assert play(steps, cut=cut).kinds == ["PERMANENT"]


def test_data_refused_is_the_verdict_of_the_accepted_recipients_only(cut: Cutter) -> None:
    steps = [*OPEN, Begin(BOTH), C(TWO), S(OK + b"550 5.1.1 no\r\n" + OK + b"452 4.3.1 full\r\n"), C(RSET), S(OK)]
    played = play(steps, cut=cut)
    assert played.codes == [550, 452]
    assert played.client.reusable


def test_sender_refused_under_pipelining_is_the_verdict_of_all(cut: Cutter) -> None:
    steps = [*OPEN, Begin(BOTH), C(TWO), S(b"553 5.1.8 no\r\n" + b"503 bad\r\n" * 3), C(RSET), S(OK)]
    played = play(steps, cut=cut)
    assert played.codes == [553, 553]
    assert played.kinds == ["PERMANENT", "PERMANENT"]


def test_a_server_that_takes_data_of_a_refused_sender_is_left(cut: Cutter) -> None:
    steps = [*OPEN, Begin(transaction()), C(ONE), S(b"553 no\r\n" + OK + GO), C(b"")]
    played = play(steps, cut=cut)
    assert played.kinds == ["TEMPORARY"]
    assert not played.client.reusable


@pytest.mark.parametrize(("text", "kind"), [(b"552 too many\r\n", "TEMPORARY"), (b"552 5.2.2 full\r\n", "PERMANENT")])
def test_552_at_rcpt_after_an_accepted_one_means_too_many_unless_it_says_else(
    cut: Cutter, text: bytes, kind: str
) -> None:
    steps = [*OPEN, Begin(BOTH), C(TWO), S(OK + OK + text + GO), C(MESSAGE + b".\r\n"), S(OK)]
    assert play(steps, cut=cut).kinds == ["SENT", kind]


@pytest.mark.parametrize(
    ("content", "wire"),
    [
        (b"", b".\r\n"),
        (b"a\r\n", b"a\r\n.\r\n"),
        (b"a", b"a\r\n.\r\n"),
        (b".\r\n", b"..\r\n.\r\n"),
        (b"..\r\n.a\r\n", b"...\r\n..a\r\n.\r\n"),
        (b"a\r\n.\r\nb\r\n", b"a\r\n..\r\nb\r\n.\r\n"),
        (b"a\r\n\r\n.", b"a\r\n\r\n..\r\n.\r\n"),
        (b"a.b\r\n", b"a.b\r\n.\r\n"),
    ],
)
def test_dots_are_stuffed_where_a_line_begins_with_one_and_nowhere_else(
    cut: Cutter, content: bytes, wire: bytes
) -> None:
    mail = b"MAIL FROM:<a@example.com> SIZE=%d\r\nRCPT TO:<b@example.net>\r\nDATA\r\n" % len(content)
    play([*OPEN, Begin(transaction(content=content)), C(mail), S(OK + OK + GO), C(wire), S(OK)], cut=cut)


@pytest.mark.parametrize("content", [b"a\n", b"a\rb\r\n", b"a\r\r\n", b"a\n\r\n", b"a\r\n\r", b"\n.\r\n", b"\r.\r\n"])
def test_content_with_stray_line_ends_is_never_sent(cut: Cutter, content: bytes) -> None:
    played = play([*OPEN, Begin(transaction(content=content)), C(b"")], cut=cut)
    assert played.kinds == ["REFUSED"]
    assert played.client.reusable


@pytest.mark.parametrize("address", ["b@x\r\nDATA", "b\n@x", "b\0@x", "b\x7f@x", "a\tb@x"])
def test_control_characters_in_addresses_never_reach_the_wire(cut: Cutter, address: str) -> None:
    assert play([*OPEN, Begin(transaction(address)), C(b"")], cut=cut).kinds == ["REFUSED"]
    assert play([*OPEN, Begin(transaction(sender=address)), C(b"")], cut=cut).kinds == ["REFUSED"]


def test_parameters_only_where_they_are_offered(cut: Cutter) -> None:
    content = "Subject: ü\r\n\r\n".encode()
    wanted = transaction("ü@example.net", content=content, smtputf8=True, body_8bit=True)
    line = "MAIL FROM:<a@example.com> SIZE=15 BODY=8BITMIME SMTPUTF8\r\nRCPT TO:<ü@example.net>\r\nDATA\r\n"
    play([*OPEN, Begin(wanted), C(line.encode())], cut=cut)
    assert play([*OPEN_PLAIN, Begin(wanted), C(b"")], cut=cut).kinds == ["REFUSED"]


@pytest.mark.parametrize(
    ("recipient", "content", "enhanced"),
    [
        ("ü@example.net", MESSAGE, "5.6.7"),
        ("b@example.net", "Subject: ü\r\n\r\n".encode(), "5.6.7"),
    ],
)
def test_mail_that_needs_smtputf8_is_refused_by_us_where_it_is_missing(
    cut: Cutter, recipient: str, content: bytes, enhanced: str
) -> None:
    played = play([*OPEN_PLAIN, Begin(transaction(recipient, content=content, smtputf8=True)), C(b"")], cut=cut)
    assert played.kinds == ["REFUSED"]
    assert played.outcomes[-1][0].enhanced == enhanced
    assert played.client.reusable


def test_mail_that_was_declared_smtputf8_without_need_goes_without_it(cut: Cutter) -> None:
    steps = [*OPEN_PLAIN, Begin(transaction(smtputf8=True)), C(b"MAIL FROM:<a@example.com>\r\n")]
    play(steps, cut=cut)


def test_8bit_content_is_refused_by_us_without_8bitmime(cut: Cutter) -> None:
    played = play([*OPEN_PLAIN, Begin(transaction(body_8bit=True)), C(b"")], cut=cut)
    assert played.kinds == ["REFUSED"]
    assert played.outcomes[-1][0].enhanced == "5.6.3"


def test_a_refusal_by_us_leaves_the_connection_for_the_next_message(cut: Cutter) -> None:
    played = play([*OPEN, Begin(transaction(content=b"a\n")), C(b""), *deliver_one()], cut=cut)
    assert played.kinds == ["SENT"]


def test_quit_ends_with_221(cut: Cutter) -> None:
    played = play(OPEN, cut=cut)
    played.client.quit()
    assert played.client.take_output() == [b"QUIT\r\n"]
    assert played.client.receive(b"221 bye\r\n") is Signal.CLOSE
    assert played.client.failure is None


# --- hostile and broken servers


def test_a_doubled_250_keeps_the_verdict_and_closes(cut: Cutter) -> None:
    played = play([*OPEN, *deliver_one(OK)], cut=cut)
    assert played.client.receive(OK) is Signal.CLOSE
    assert played.client.phase is Phase.CLOSED
    whole_reply = play([*OPEN, *deliver_one(OK + OK)])
    assert whole_reply.kinds == ["SENT"]
    assert not whole_reply.client.reusable


def test_a_421_behind_the_verdict_leaves_the_verdict_and_closes(cut: Cutter) -> None:
    played = play([*OPEN, *deliver_one(OK + b"421 bye\r\n")], cut=cut)
    assert played.outcomes[0][0].kind is VerdictKind.SENT
    assert played.client.phase is Phase.CLOSED


@pytest.mark.parametrize("stray", [b"250 ok\r\n", b"421 idle\r\n", b"354 go\r\n", b"550 no\r\n", b"\0", b"2"])
def test_anything_said_by_an_idle_server_closes(cut: Cutter, stray: bytes) -> None:
    played = play([*OPEN, *deliver_one(), S(stray), C(b"")], cut=cut)
    assert played.signals[-1] is Signal.CLOSE
    assert played.client.phase is Phase.CLOSED


@pytest.mark.parametrize("stray", [b"250 ok\r\n", b"421 idle\r\n", b"550 5.1.1 no\r\n", b"354 go\r\n"])
@pytest.mark.parametrize(
    "replies",
    [
        [OK, OK, OK, GO],
        [OK, b"550 5.1.1 who\r\n", OK, GO],
        [OK, OK, b"550 5.1.1 who\r\n", GO],
        [OK, b"550 5.1.1 who\r\n", b"550 5.1.1 who\r\n", b"554 nobody\r\n"],
        [b"451 later\r\n", b"503 no\r\n", b"503 no\r\n", b"503 no\r\n"],
    ],
)
def test_a_late_line_of_the_last_transaction_never_becomes_a_verdict_of_the_next(
    cut: Cutter, stray: bytes, replies: list[bytes]
) -> None:
    played = play([*OPEN, *deliver_one(), Begin(BOTH), C(TWO)], cut=cut)
    client = played.client
    for reply in [stray, *replies, OK]:
        for piece in cut(reply):
            if client.phase is not Phase.CLOSED:
                client.receive(piece)
        client.take_output()
    if client.outcome is None:
        client.lost("timeout")
    assert client.outcome is not None
    assert not client.reusable
    assert {verdict.kind for verdict in client.outcome} <= {VerdictKind.TEMPORARY, VerdictKind.INTERRUPTED}


def test_a_refusal_on_a_used_connection_counts_once_rset_was_answered(cut: Cutter) -> None:
    steps = [*OPEN, *deliver_one(), Begin(transaction()), C(ONE), S(OK + b"550 5.1.1 who\r\n554 nobody\r\n"), C(RSET)]
    played = play([*steps, S(OK)], cut=cut)
    assert played.kinds == ["PERMANENT"]
    assert played.client.reusable


@pytest.mark.parametrize(("code", "kind"), [(b"502", "PERMANENT"), (b"421", "PERMANENT"), (b"503", "TEMPORARY")])
def test_rset_that_is_not_accepted_closes(cut: Cutter, code: bytes, kind: str) -> None:
    steps = [*OPEN, Begin(transaction()), C(ONE), S(OK + b"550 5.1.1 who\r\n554 nobody\r\n"), C(RSET)]
    played = play([*steps, S(code + b" what\r\n")], cut=cut)
    assert played.kinds == [kind]
    assert not played.client.reusable


def test_a_server_that_refuses_and_hangs_up_has_refused(cut: Cutter) -> None:
    steps = [*OPEN, Begin(transaction()), C(ONE), S(OK + b"550 5.1.1 who\r\n554 nobody\r\n"), C(RSET)]
    played = play(steps, cut=cut)
    assert played.client.lost("closed") is Signal.DONE
    assert played.client.outcome is not None
    assert played.client.outcome[0].kind is VerdictKind.PERMANENT


def test_a_farewell_behind_a_refusal_leaves_the_refusal(cut: Cutter) -> None:
    del cut
    steps = [*OPEN, Begin(transaction()), C(ONE), S(OK + b"550 5.1.1 who\r\n554 nobody\r\n221 bye\r\n"), C(b"")]
    played = play(steps)
    assert played.kinds == ["PERMANENT"]
    assert not played.client.reusable


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_421_within_the_envelope_is_temporary_for_all_and_closes(cut: Cutter, place: int) -> None:
    replies = [*[OK, OK, OK, GO][:place], b"421 4.3.2 going down\r\n"]
    played = play([*OPEN, Begin(BOTH), C(TWO), S(b"".join(replies)), C(b"")], cut=cut)
    assert played.kinds == ["TEMPORARY", "TEMPORARY"]
    assert played.codes == [421, 421]
    assert not played.client.reusable


def test_421_after_the_dot_is_a_plain_temporary_answer(cut: Cutter) -> None:
    played = play([*OPEN, *deliver_one(b"421 4.3.2 going down\r\n")], cut=cut)
    assert played.kinds == ["TEMPORARY"]
    assert not played.client.reusable


def test_bytes_behind_354_close_before_any_content_is_sent(cut: Cutter) -> None:
    del cut
    played = play([*OPEN, Begin(transaction()), C(ONE), S(OK + OK + GO + OK), C(b"")])
    assert played.kinds == ["TEMPORARY"]
    assert not played.client.reusable


@pytest.mark.parametrize(
    "reply",
    [
        b"2_0 ok\r\n",
        b"+25 ok\r\n",
        b"25 ok\r\n",
        b"2500 ok\r\n",
        b"250\tok\r\n",
        b"250ok\r\n",
        b"199 ok\r\n",
        b"600 ok\r\n",
        b"250 ok\n",
        b"250-ok\r\n550 no\r\n",
        b"250-ok\r\n250_ok\r\n",
        b"\xb2\xb5\xb0 ok\r\n",
        b" 250 ok\r\n",
        b"\xef\xbc\x92\xef\xbc\x95\xef\xbc\x90 ok\r\n",
        b"\r\n",
        b"\0\0\0\0\r\n",
        b"x" * 40_000,
        b"250-" + b"x" * 40_000,
        b"250-x\r\n" * 501,
        b"250-" + b"x" * 70 + b"\r\n" + (b"250-" + b"y" * 900 + b"\r\n") * 40,
    ],
)
@pytest.mark.parametrize("place", ["in the envelope", "after the dot"])
def test_a_malformed_reply_is_temporary_and_closes(cut: Cutter, reply: bytes, place: str) -> None:
    steps: list[Step] = [*OPEN, Begin(transaction()), C(ONE)]
    kind = VerdictKind.TEMPORARY
    if place == "after the dot":
        steps += [S(OK + OK + GO), C(MESSAGE + b".\r\n")]
        kind = VerdictKind.UNCERTAIN
    played = play([*steps, S(reply)], cut=cut)
    assert played.outcomes[0][0].kind is kind
    assert played.client.phase is Phase.CLOSED


def test_3yz_to_the_final_dot_leaves_the_outcome_uncertain(cut: Cutter) -> None:
    played = play([*OPEN, *deliver_one(GO)], cut=cut)
    assert played.kinds == ["UNCERTAIN"]


@pytest.mark.parametrize("text", [b"a\0b", b"\xff\xfe", b"\x1b[2J", "\u202eevil".encode(), b"x" * 9_000])
def test_whatever_a_reply_says_its_text_can_be_stored(cut: Cutter, text: bytes) -> None:
    played = play([*OPEN, *deliver_one(b"250 2.0.0 " + text + b"\r\n")], cut=cut)
    (verdict,) = played.outcomes[-1]
    assert verdict.kind is VerdictKind.SENT
    assert verdict.text.isprintable()
    assert len(verdict.text.encode()) <= 512


def test_a_multi_line_final_reply_is_one_text(cut: Cutter) -> None:
    played = play([*OPEN, *deliver_one(b"250-2.0.0 first\r\n250 second\r\n")], cut=cut)
    assert played.outcomes[-1][0] == (VerdictKind.SENT, 250, "2.0.0", "2.0.0 first second")


def test_an_enhanced_code_of_another_class_counts_as_missing(cut: Cutter) -> None:
    played = play([*OPEN, *deliver_one(b"550 2.1.1 odd\r\n")], cut=cut)
    assert played.outcomes[-1][0].enhanced == ""


# --- cut connections


def test_cut_before_the_dot_is_interrupted(cut: Cutter) -> None:
    played = play([*OPEN, Begin(transaction()), C(ONE), S(OK + OK)], cut=cut)
    assert played.client.lost("closed") is Signal.DONE
    assert played.client.outcome is not None
    assert played.client.outcome[0].kind is VerdictKind.INTERRUPTED


def test_cut_after_the_dot_is_uncertain_unless_the_dot_never_left(cut: Cutter) -> None:
    steps = [*OPEN, Begin(transaction()), C(ONE), S(OK + OK + GO), C(MESSAGE + b".\r\n"), S(b"250-half\r\n")]
    for dot_may_have_left, kind in ((True, VerdictKind.UNCERTAIN), (False, VerdictKind.INTERRUPTED)):
        client = play(steps, cut=cut).client
        assert client.lost("closed", dot_may_have_left=dot_may_have_left) is Signal.DONE
        assert client.outcome is not None
        assert client.outcome[0].kind is kind


@pytest.mark.parametrize(("used", "kind"), [(False, VerdictKind.PERMANENT), (True, VerdictKind.INTERRUPTED)])
@pytest.mark.parametrize("end", ["lost", "421"])
def test_a_refusal_that_nothing_confirmed_counts_on_a_fresh_connection_only(
    cut: Cutter, end: str, *, used: bool, kind: VerdictKind
) -> None:
    steps = [*OPEN, *(deliver_one() if used else []), Begin(BOTH), C(TWO), S(OK + b"550 5.1.1 who\r\n")]
    client = play(steps, cut=cut).client
    if end == "lost":
        client.lost("closed")
    else:
        client.receive(b"421 bye\r\n")
        kind = VerdictKind.TEMPORARY if used else kind
    assert client.outcome is not None
    assert client.outcome[0].kind is kind


def test_a_recipient_refused_before_the_cut_after_the_dot_stays_refused(cut: Cutter) -> None:
    steps = [*OPEN, Begin(BOTH), C(TWO), S(OK + b"550 5.1.1 who\r\n" + OK + GO), C(MESSAGE + b".\r\n")]
    client = play(steps, cut=cut).client
    client.lost("closed")
    assert client.outcome is not None
    assert [verdict.kind for verdict in client.outcome] == [VerdictKind.PERMANENT, VerdictKind.UNCERTAIN]


def test_an_idle_connection_that_ends_fails_nothing(cut: Cutter) -> None:
    client = play([*OPEN, *deliver_one()], cut=cut).client
    assert client.lost("closed") is Signal.CLOSE
    assert not client.reusable


def test_answered_tells_a_stale_connection_from_a_refusal(cut: Cutter) -> None:
    client = play([*OPEN, *deliver_one(), Begin(transaction()), C(ONE)], cut=cut).client
    assert not client.answered
    client.receive(OK)
    assert client.answered


def test_timeouts_follow_the_phase(cut: Cutter) -> None:
    client = Client("relay.test", TlsPolicy.NONE)
    assert client.timeout_s == 300
    client = play(OPEN, cut=cut).client
    assert client.timeout_s == 0
    client.begin(transaction())
    assert client.timeout_s == 300
    client.receive(OK + OK)
    assert client.timeout_s == DATA_TIMEOUT_S == 120
    client.receive(GO)
    assert client.timeout_s == 600
