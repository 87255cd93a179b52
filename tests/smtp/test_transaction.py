"""Typed transcripts of the mail transaction: RFC 5321, 1870, 2920, 6152, 6531, 2034."""

from __future__ import annotations

import pytest

from dataplane.core import replies
from dataplane.core.session_contract import Action, Limits, MailParameters
from support.transcript import Driver, Recorder, Turn, run_every_way, start

EHLO = (
    b"EHLO client.example\r\n",
    b"250-\r\n250-\r\n250-\r\n250-\r\n250-\r\n250-\r\n250-AUTH\r\n250-FUTURERELEASE\r\n250-MT-PRIORITY\r\n250 HELP",
)
MAIL = (b"MAIL FROM:<a@example.com>\r\n", b"250 2.1.0")
RCPT = (b"RCPT TO:<b@example.net>\r\n", b"250 2.1.5")
DATA = (b"DATA\r\n", b"354 ")
BODY = b"Subject: x\r\n\r\nhello\r\n"
SEND = (BODY + b".\r\n", b"250 2.0.0 queued as ")
QUIT = (b"QUIT\r\n", b"221 2.0.0")
OPENED = [EHLO, MAIL, RCPT]
SENT = ("a@example.com", ("b@example.net",), BODY)


def dialog(*turns: Turn, **options: object) -> Driver:
    limits = options.pop("limits", None)
    policy = options.pop("policy", Recorder)
    assert callable(policy)
    return run_every_way(lambda: start(policy(), limits, **options), turns)  # type: ignore[arg-type]  # tests' options


def test_rfc5321_appendix_d1_one_message_and_quit() -> None:
    driver = dialog(EHLO, MAIL, RCPT, DATA, SEND, QUIT)
    assert driver.policy.messages == [SENT]
    assert driver.session.action is Action.CLOSE


def test_rfc5321_4_1_1_1_helo_opens_a_session_without_extensions() -> None:
    driver = dialog((b"HELO client.example\r\n", b"250 relay.example"), MAIL, RCPT, DATA, SEND)
    assert not driver.session.esmtp


def test_rfc2920_3_1_a_whole_group_is_answered_line_by_line() -> None:
    group = MAIL[0] + RCPT[0] + DATA[0]
    driver = dialog(EHLO, (group, b"250 2.1.0\r\n250 2.1.5\r\n354 "), SEND)
    assert driver.policy.messages == [SENT]


def test_rfc2920_3_2_a_group_is_answered_in_one_write() -> None:
    driver = start()
    driver.session.receive(EHLO[0] + MAIL[0] + RCPT[0] + RCPT[0])
    assert driver.session.take_output().count(b"\r\n") == 13
    assert driver.session.take_output() == b""


def test_rfc2920_3_1_the_next_group_may_follow_the_final_dot() -> None:
    group = BODY + b".\r\n" + MAIL[0] + RCPT[0] + DATA[0]
    driver = dialog(*OPENED, DATA, (group, b"250 2.0.0 queued\r\n250 2.1.0\r\n250 2.1.5\r\n354 "), SEND)
    assert driver.policy.messages == [SENT, SENT]


def test_what_follows_the_dot_waits_for_the_commit() -> None:
    driver = start()
    for sent, _ in (*OPENED, DATA):
        driver.send(sent)
    driver.answer()
    driver.session.receive(BODY + b".\r\nMAIL FROM:<c@example.com>\r\n")
    driver.session.receive(b"NOOP\r\n")
    assert driver.session.action is Action.COMMIT
    assert driver.session.take_output() == b""
    driver.settle()
    assert driver.answer().split(b"\r\n")[1:] == [b"250 2.1.0 Sender ok", b"250 2.0.0 Ok", b""]


def test_a_batch_behind_the_dot_is_bounded_while_the_commit_runs() -> None:
    driver = start(limits=Limits(pending_bytes=1_000))
    for sent, _ in (*OPENED, DATA):
        driver.send(sent)
    driver.answer()
    driver.session.receive(BODY + b".\r\n")
    driver.session.receive(b"NOOP\r\n" * 200)
    driver.settle()
    assert driver.answer().split(b"\r\n")[0].startswith(b"250 2.0.0 queued")
    assert driver.session.action is Action.CLOSE


@pytest.mark.parametrize("content", [b"", b"\r\n", b"a: b\r\n\r\n", b"x\r\n" * 3000])
def test_rfc5321_4_1_1_4_content_arrives_as_it_was_sent(content: bytes) -> None:
    driver = dialog(*OPENED, DATA, (content + b".\r\n", b"250 "))
    assert driver.policy.messages[0][2] == content


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        (b"..\r\n", b".\r\n"),
        (b".x\r\n", b"x\r\n"),
        (b"a\r\n..\r\n..b\r\n", b"a\r\n.\r\n.b\r\n"),
        (b"..a\r\n...\r\nb.\r\n", b".a\r\n..\r\nb.\r\n"),
    ],
)
def test_rfc5321_4_5_2_leading_dots_are_taken_off(sent: bytes, kept: bytes) -> None:
    driver = dialog(*OPENED, DATA, (sent + b".\r\n", b"250 "))
    assert driver.policy.messages[0][2] == kept


def test_rfc5321_4_1_4_ehlo_ends_the_transaction() -> None:
    dialog(EHLO, MAIL, RCPT, EHLO, (RCPT[0], b"503 5.5.1"), MAIL, RCPT, DATA, SEND)


def test_rfc5321_4_1_1_5_rset_ends_the_transaction_only() -> None:
    dialog(EHLO, MAIL, RCPT, (b"RSET\r\n", b"250 2.0.0"), (DATA[0], b"503 5.5.1"), MAIL, RCPT, DATA, SEND)


@pytest.mark.parametrize(
    ("turns", "answer"),
    [
        ([MAIL[0]], b"503 5.5.1 EHLO"),
        ([EHLO[0], RCPT[0]], b"503 5.5.1 MAIL"),
        ([EHLO[0], DATA[0]], b"503 5.5.1 MAIL"),
        ([EHLO[0], MAIL[0], MAIL[0]], b"503 5.5.1 A transaction"),
        ([EHLO[0], MAIL[0], DATA[0]], b"554 5.5.1 No valid"),
    ],
)
def test_rfc5321_4_1_4_commands_out_of_order_are_refused_and_the_session_lives(
    turns: list[bytes], answer: bytes
) -> None:
    driver = start()
    for sent in turns:
        driver.answer()
        driver.send(sent)
    assert driver.answer().startswith(answer)
    assert driver.session.action is Action.NONE


def test_rfc2920_3_1_data_without_valid_recipient_is_refused_instead_of_354() -> None:
    def policy() -> Recorder:
        return Recorder(recipient_refusals={"b@example.net": replies.NO_ROUTE})

    group = MAIL[0] + RCPT[0] + DATA[0]
    driver = dialog(EHLO, (group, b"250 2.1.0\r\n550 5.4.4\r\n554 5.5.1"), QUIT, policy=policy)
    assert driver.policy.messages == []


def test_one_refused_recipient_leaves_the_others() -> None:
    def policy() -> Recorder:
        return Recorder(recipient_refusals={"no@example.net": replies.NO_ROUTE})

    refused = (b"RCPT TO:<no@example.net>\r\n", b"550 5.4.4")
    driver = dialog(EHLO, MAIL, refused, RCPT, DATA, SEND, policy=policy)
    assert driver.policy.messages == [SENT]


def test_a_limit_refuses_data_instead_of_354_and_the_transaction_stays() -> None:
    def policy() -> Recorder:
        return Recorder(permit_refusal=replies.rate_limited(7.2))

    driver = dialog(*OPENED, (DATA[0], b"450 4.7.1 Limit reached, try again in 8 s"), RCPT, policy=policy)
    assert driver.session.in_transaction


@pytest.mark.parametrize("path", [b"<>", b" <a@example.com>", b'<"a b"@example.com>', b'<"a>b"@example.com>'])
def test_rfc5321_4_1_2_reverse_paths(path: bytes) -> None:
    dialog(EHLO, (b"MAIL FROM:" + path + b"\r\n", b"250 2.1.0"))


@pytest.mark.parametrize(
    "argument",
    [
        b"a@example.com", b"<a@example.com", b"<a>", b"<@x:a@example.com>", b"<a@b@c>", b"<a@example.com>SIZE=1",
        b"<a\x00@example.com>", b"<a\x01@example.com>", b"<a\x7f@example.com>", b"<a@exa\x00mple.com>", b"<a b@c.d>",
    ],
)  # fmt: skip
def test_rfc5321_4_1_2_what_is_no_reverse_path_is_refused(argument: bytes) -> None:
    driver = dialog(EHLO, (b"MAIL FROM:" + argument + b"\r\n", b"5"), (RCPT[0], b"503"))
    assert not driver.policy.calls


@pytest.mark.parametrize(
    "path",
    [
        b"<>", b"<b>", b"<user%host@example.net>", b"<host!user@example.net>", b"<@a:b@c>", b'<"a@b"@c.d>',
        b"<b@[192.0.2.1]>", b"<b@[IPv6:::1]>", b"<b@127.0.0.1>", b"<b@example.net:26>", b"<b@example.net >",
        b"<b\x00@example.net>", b"<b@example.net>\x00",
    ],
)  # fmt: skip
def test_open_relay_forms_of_recipients_are_refused(path: bytes) -> None:
    driver = dialog(EHLO, MAIL, (b"RCPT TO:" + path + b"\r\n", b"5"), (DATA[0], b"554 5.5.1"))
    assert driver.policy.recipients == []


@pytest.mark.parametrize("parameters", [b"SIZE=20", b"size=0", b"SIZE=1000"])
def test_rfc1870_6_1_a_declared_size_within_the_limit_is_taken(parameters: bytes) -> None:
    line = b"MAIL FROM:<a@example.com> " + parameters + b"\r\n"
    dialog(EHLO, (line, b"250"), limits=Limits(max_message_bytes=1_000))


def test_rfc1870_6_1_a_declared_size_above_the_limit_is_refused_at_mail() -> None:
    line = b"MAIL FROM:<a@example.com> SIZE=1001\r\n"
    dialog(EHLO, (line, b"552 5.3.4"), (RCPT[0], b"503"), limits=Limits(max_message_bytes=1_000))


def test_rfc1870_6_3_content_above_the_limit_is_refused_after_its_end() -> None:
    limits = Limits(max_message_bytes=1_000)
    content = b"x" * 98 + b"\r\n"
    driver = dialog(*OPENED, DATA, (content * 11 + b".\r\n", b"552 5.3.4"), MAIL, RCPT, DATA, SEND, limits=limits)
    assert driver.policy.messages == [SENT]


def test_content_of_exactly_the_limit_is_taken_and_stuffed_dots_do_not_count() -> None:
    limits = Limits(max_message_bytes=1_000)
    content = b"." + b"x" * 97 + b"\r\n"
    driver = dialog(*OPENED, DATA, ((b"." + content) * 10 + b".\r\n", b"250"), limits=limits)
    assert driver.policy.messages[0][2] == content * 10


def test_oversized_content_is_read_over_to_a_cap_only() -> None:
    limits = Limits(max_message_bytes=1_000, drain_bytes=500)
    driver = dialog(*OPENED, DATA, (b"x" * 98 + b"\r\n", b""), (b"y\r\n" * 600, b"552 5.3.4"), limits=limits)
    assert driver.session.action is Action.CLOSE
    assert driver.session.held_bytes == 0


@pytest.mark.parametrize(
    ("text", "parameters"),
    [
        (b"BODY=8BITMIME", MailParameters(body_8bit=True)),
        (b"body=7bit", MailParameters()),
        (b"SMTPUTF8 SIZE=7", MailParameters(size_bytes=7, smtputf8=True)),
        (b"AUTH=<>", MailParameters()),
        (b"AUTH=e+3Dmc2@example.com", MailParameters()),
    ],
)
def test_rfc6152_6531_4954_parameters_of_mail_are_understood(text: bytes, parameters: MailParameters) -> None:
    driver = dialog(EHLO, (b"MAIL FROM:<a@example.com> " + text + b"\r\n", b"250"))
    assert driver.policy.parameters == parameters


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (b"SIZE=", b"501 5.5.4"), (b"SIZE=x", b"501 5.5.4"), (b"SIZE=-1", b"501 5.5.4"), (b"SIZE=1 SIZE=2", b"501"),
        (b"SIZE=" + b"9" * 21, b"501 5.5.4"), (b"BODY=BINARYMIME", b"501 5.5.4"), (b"SMTPUTF8=1", b"501 5.5.4"),
        (b"RET=HDRS", b"555 5.5.4"), (b"ENVID=x", b"555 5.5.4"), (b"X", b"555 5.5.4"), ("SIZE=²".encode(), b"501"),
    ],
)  # fmt: skip
def test_rfc5321_4_1_1_11_parameters_of_mail_that_are_not_understood_are_refused(text: bytes, answer: bytes) -> None:
    dialog(EHLO, (b"MAIL FROM:<a@example.com> " + text + b"\r\n", answer), (RCPT[0], b"503"))


def test_rfc3461_parameters_of_rcpt_are_not_offered_and_refused() -> None:
    dialog(EHLO, MAIL, (b"RCPT TO:<b@example.net> NOTIFY=NEVER\r\n", b"555 5.5.4"))


def test_rfc6531_3_5_addresses_in_utf8_need_the_parameter() -> None:
    sender = "MAIL FROM:<ü@example.com>".encode()
    recipient = "RCPT TO:<ö@example.net>\r\n".encode()
    dialog(EHLO, (sender + b"\r\n", b"553 5.6.7"), MAIL, (recipient, b"553 5.6.7"))
    driver = dialog(EHLO, (sender + b" SMTPUTF8\r\n", b"250"), (recipient, b"250"), DATA, SEND)
    assert driver.policy.messages == [("ü@example.com", ("ö@example.net",), BODY)]


def test_rfc5321_4_5_3_1_10_recipients_above_the_limit_are_refused_for_now() -> None:
    limits = Limits(max_recipients=2)
    driver = dialog(EHLO, MAIL, RCPT, RCPT, (RCPT[0], b"452 4.5.3"), DATA, SEND, limits=limits)
    assert len(driver.policy.messages[0][1]) == 2


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        (b"NOOP\r\n", b"250 2.0.0"), (b"noop anything\r\n", b"250 2.0.0"), (b"VRFY postmaster\r\n", b"252 2.0.0"),
        (b"VRFY\r\n", b"501 5.5.4"), (b"EXPN list\r\n", b"502 5.5.1"), (b"HELP\r\n", b"214 2.0.0"),
        (b"TURN\r\n", b"500 5.5.2"), (b"\r\n", b"500 5.5.2"), (b"RSET x\r\n", b"501 5.5.4"), (b"DATA x\r\n", b"501"),
        (b"MAIL TO:<a@b.c>\r\n", b"501 5.5.4"), (b"RCPT FROM:<a@b.c>\r\n", b"501 5.5.4"), (b"EHLO\r\n", b"501 5.5.2"),
        (b"EHLO a b\r\n", b"501 5.5.2"), (b"EHLO a\x00b\r\n", b"501 5.5.2"), (b"EHLO \xff\r\n", b"501 5.5.2"),
        (b"HELO " + b"a" * 256 + b"\r\n", b"501 5.5.2"), (b"MAIL FROM:<\xff@b.c>\r\n", b"501 5.5.2"),
    ],
)  # fmt: skip
def test_rfc5321_4_1_1_other_commands(command: bytes, answer: bytes) -> None:
    driver = dialog((command, answer), EHLO, MAIL, RCPT, DATA, SEND)
    assert driver.policy.messages == [SENT]


def test_bdat_is_not_offered_and_what_follows_it_is_never_read_as_commands() -> None:
    for behind in (b"", b"MAIL FROM:<a@example.com>\r\n"):
        driver = start()
        driver.send(EHLO[0])
        assert b"CHUNKING" not in driver.answer()
        driver.send(b"BDAT 27 LAST\r\n" + behind)
        assert driver.answer().startswith(b"502 5.5.1")
        assert driver.session.action is Action.CLOSE
        assert not driver.policy.calls


def test_a_fault_of_the_policy_is_temporary_and_tells_a_reference_only() -> None:
    def policy() -> Recorder:
        return Recorder(broken=RuntimeError("password=hunter2"))

    answer = b"451 4.3.0 Internal error, try again later (reference ref-1)"
    driver = dialog(EHLO, (MAIL[0], answer), policy=policy)
    assert driver.session.action is Action.NONE
    assert isinstance(driver.policy.errors[0], RuntimeError)
    driver = start()
    for sent, _ in (EHLO, MAIL):
        driver.send(sent)
    driver.answer()
    driver.policy.broken = KeyError("x")
    driver.send(RCPT[0])
    assert driver.answer().startswith(answer)


def test_rfc2034_every_reply_but_greeting_hello_and_intermediate_has_an_enhanced_code_of_its_class() -> None:
    table = [reply for reply in vars(replies).values() if isinstance(reply, replies.Reply)]
    assert len(table) > 50
    for reply in table:
        assert bool(reply.enhanced) == (reply.code // 100 != 3)
        assert not reply.enhanced or reply.enhanced[0] == str(reply.code)[0]
        assert reply.wire.endswith(b"\r\n")
        assert reply.wire.count(b"\r\n") == 1


def test_reasons_of_replies_are_distinct() -> None:
    reasons = [reply.reason for reply in vars(replies).values() if isinstance(reply, replies.Reply)]
    assert len(reasons) == len(set(reasons))


@pytest.mark.parametrize("text", ["a\r\nb", "a\0", "ü", "x" * 600])
def test_a_text_that_does_not_fit_one_line_is_no_reply(text: str) -> None:
    with pytest.raises(ValueError, match="not one line"):
        replies.make_reply(250, "0.0", text, "x")
