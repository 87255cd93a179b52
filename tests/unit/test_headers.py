"""What is found in a header, what is refused, and what is put on top."""

from __future__ import annotations

import pytest

from dataplane.core.headers import (
    MAX_HEADER_BYTES,
    MAX_KEY_CHARS,
    HeaderProblem,
    Receipt,
    decode_words,
    format_date,
    prepare,
    received_line,
    scan,
    without_key,
)

USUAL = (
    b"Received: from x by y; Fri, 20 Nov 2026 10:00:00 +0000\r\n"
    b"From: John <john@example.com>\r\n"
    b"Sender: office@example.org\r\n"
    b"Subject: Hello\r\n there\r\n"
    b"DATE: Fri, 20 Nov 2026 10:00:00 +0000\r\n"
    b"Message-Id: <1@example.com>\r\n"
    b"X-Postroad-Tag: one\r\n"
    b"x-postroad-TAG: two\r\n"
    b"X-Other: not kept\r\n"
    b"Bcc: secret@example.net\r\n"
    b"\r\nFrom: body@example.net\r\n"
)


def test_a_usual_header_is_read() -> None:
    found = scan(USUAL)
    assert found.header_bytes == USUAL.index(b"\r\n\r\n")
    assert found.field_count == 10
    assert found.received_count == 1
    assert (found.has_date, found.has_message_id, found.has_from, found.body_only) == (True, True, True, False)
    assert found.author_domains == ("example.com", "example.org")
    assert found.subject == "Hello there"
    assert found.message_id == "<1@example.com>"
    assert found.rule_values == {"subject": ("Hello there",), "x-postroad-tag": ("one", "two")}
    assert found.problem is None


@pytest.mark.parametrize("content", [b"", b"\r\n", b"\r\nbody\r\n", b"\r\nFrom: a@b\r\n\r\n"])
def test_no_header_is_no_problem(content: bytes) -> None:
    found = scan(content)
    assert (found.field_count, found.body_only, found.problem) == (0, False, None)


@pytest.mark.parametrize(
    "content",
    [
        b"only a body\r\n",
        b"no line end",
        b" Folded: first\r\n\r\n",
        b"From : a@b.c\r\n\r\n",
        b": no name\r\n\r\n",
        b"Fr\xc3\xb6m: a@b.c\r\n\r\n",
        b"From:\ra@b.c\r\n\r\n",
        b"Hello, this is\r\nFrom: a@b.c\r\n\r\n",
        b"x" * (MAX_HEADER_BYTES + 100),
    ],
)
def test_a_first_line_that_is_no_field_begins_the_body(content: bytes) -> None:
    found = scan(content)
    assert (found.body_only, found.has_from, found.author_domains, found.problem) == (True, False, (), None)
    assert prepare(content, found, b"R: x\r\n", "d", "<m>") == b"R: x\r\nDate: d\r\nMessage-ID: <m>\r\n\r\n" + content


@pytest.mark.parametrize("content", [b"Subject: x\r\n", b"Subject: x", b"Subject: x\r\n\r\n", b"Subject:x\r\n\r\nbody"])
def test_a_header_without_body_or_blank_line_is_read(content: bytes) -> None:
    assert (scan(content).field_count, scan(content).subject) == (1, "x")


@pytest.mark.parametrize(
    "header",
    [
        b"A: b\r\ngarbage\r\nFrom: a@b.c",
        b"A: b\r\nFrom : a@b.c",
        b"A: b\r\n: x",
        b"A: b\r\nFrom\r\n : a@b.c",
        b"A: b\r\n \r\nFrom: a@b.c",
        b"A: b\r\n \t ",
        b"A: b\nFrom: a@b.c\r\nC: d",
        b"A: b\r\nC: d\rFrom: a@b.c",
        b"A: b\r\nC: d\0",
        b"A: b\r\nFr om: a@b.c",
        b"A: b\r\nFrom\xa0: a@b.c",
        b"A: b\r\n>From x",
        b"A: b\r\nFrom",
    ],
)
def test_lines_that_readers_read_in_two_ways_are_refused(header: bytes) -> None:
    found = scan(header + b"\r\n\r\nbody\r\n")
    if found.body_only:
        # The header is over before it began: nothing in it can be taken for an author's.
        assert b"\n" in header.split(b"\r\n")[0]
    else:
        assert found.problem == HeaderProblem(550, "5.6.0", "the header has a line that is no field")


@pytest.mark.parametrize("name", [b"From", b"FROM", b"Sender"])
def test_two_authors_fields_are_refused(name: bytes) -> None:
    content = name + b": a@b.c\r\n" + name.lower() + b": a@b.c\r\n\r\n"
    problem = scan(content).problem
    assert problem is not None
    assert (problem.code, problem.enhanced_code) == (550, "5.6.0")
    assert "more than one" in problem.text


def test_authors_that_cannot_be_read_are_refused() -> None:
    problem = scan(b"From: nobody\r\n\r\n").problem
    assert problem is not None
    assert "cannot be read" in problem.text


def test_a_missing_from_is_said_and_is_no_problem() -> None:
    found = scan(b"Subject: x\r\n\r\n")
    assert (found.has_from, found.problem) == (False, None)


@pytest.mark.parametrize(
    ("content", "code", "enhanced_code"),
    [
        (b"A: b\r\n" * 1_001 + b"\r\n", 552, "5.3.4"),
        (b"A: " + b"b" * MAX_HEADER_BYTES + b"\r\n\r\n", 552, "5.3.4"),
        (b"A: b\r\n" * 60_000, 552, "5.3.4"),
        (b"Received: x\r\n" * 101 + b"\r\n", 554, "5.4.6"),
    ],
)
def test_limits_are_permanent_refusals(content: bytes, code: int, enhanced_code: str) -> None:
    problem = scan(content).problem
    assert problem is not None
    assert (problem.code, problem.enhanced_code) == (code, enhanced_code)


def test_what_lies_just_within_the_limits_is_taken() -> None:
    assert scan(b"A: b\r\n" * 1_000 + b"\r\n").problem is None
    assert scan(b"Received: x\r\n" * 100 + b"\r\n").problem is None
    assert scan(b"A: " + b"b" * (MAX_HEADER_BYTES - 3) + b"\r\n\r\n").problem is None


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("=?utf-8?B?w6TDtsO8?=", "\u00e4\u00f6\u00fc"),
        ("=?UTF-8?q?a=C3=A4_b?= c", "a\u00e4 b c"),
        ("=?utf-8?q?a?= =?utf-8?q?b?=", "ab"),
        ("=?iso-8859-1*de?q?=E4?=", "\u00e4"),
        ("=?utf-8?B?w6Q?=", "\u00e4"),
        ("=?utf-8?B?!?=", ""),
        ("=?utf-8?q?=FF?=", "\ufffd"),
        ("=?rot13?q?nop?=", "=?rot13?q?nop?="),
        ("=?idna?q?x?=", "=?idna?q?x?="),
        ("=?iso-nothing?q?x?=", "=?iso-nothing?q?x?="),
        ("=?utf-8?x?y?=", "=?utf-8?x?y?="),
        ("a =? b", "a =? b"),
    ],
)
def test_encoded_words_are_decoded_where_they_can_be(written: str, read: str) -> None:
    assert decode_words(written) == read


def test_a_subject_is_decoded_cut_and_safe_to_store() -> None:
    assert scan(b"Subject: =?utf-8?q?a=00b=0D=0A?= c\r\n\r\n").subject == "a b   c"
    assert scan(b"Subject: \xff\xfe\r\n\r\n").subject == "\ufffd\ufffd"
    assert len(scan(b"Subject: " + b"x" * 900 + b"\r\n\r\n").subject) == 200
    many = b" ".join([b"=?utf-8?B?8J+YgPCfmIDwn5iA?="] * 100)
    assert scan(b"Subject: " + many + b"\r\n\r\n").subject == "\U0001f600" * 200


def test_a_message_id_above_998_octets_counts_as_there_and_is_not_kept() -> None:
    found = scan(b"Message-ID: <" + b"x" * 1_000 + b">\r\n\r\n")
    assert (found.has_message_id, found.message_id) == (True, "")


def test_values_for_rules_are_bounded() -> None:
    fields = b"".join(b"X-Postroad-%d: v\r\n" % number for number in range(300)) + b"Subject: s\r\n" * 300
    found = scan(fields + b"\r\n")
    assert sum(len(values) for values in found.rule_values.values()) == 50
    long = scan(b"X-Tag: " + b"x" * 5_000 + b"\r\n\r\n")
    assert len(long.rule_values["x-tag"][0]) == 1_000


def test_prepare_puts_received_first_and_what_is_missing_next_and_changes_nothing_else() -> None:
    received = b"Received: r\r\n"
    assert prepare(USUAL, scan(USUAL), received, "d", "<m>") == received + USUAL
    bare = b"Subject: x\r\n\r\nbody\r\n"
    assert prepare(bare, scan(bare), received, "d", "<m>") == received + b"Date: d\r\nMessage-ID: <m>\r\n" + bare
    for content in (b"", b"\r\nbody\r\n"):
        assert prepare(content, scan(content), received, "d", "<m>").endswith(b"Message-ID: <m>\r\n" + content)


def test_a_date_is_written_as_rfc_5322_says() -> None:
    assert format_date(1_795_171_046_999) == "Fri, 20 Nov 2026 10:37:26 +0000"
    assert format_date(0) == "Thu, 1 Jan 1970 00:00:00 +0000"


def test_a_received_field_tells_the_hop() -> None:
    receipt = Receipt(
        helo="client.example",
        client_address="192.0.2.7",
        hostname="mx.example.net",
        protocol="ESMTPSA",
        message_id="0192",
        date="Fri, 20 Nov 2026 10:37:26 +0000",
        recipient="a@b.c",
        tls="TLSv1.3",
    )
    assert received_line(receipt) == (
        b"Received: from client.example ([192.0.2.7]) (TLSv1.3)\r\n"
        b"\tby mx.example.net with ESMTPSA id 0192\r\n\tfor <a@b.c>;\r\n"
        b"\tFri, 20 Nov 2026 10:37:26 +0000\r\n"
    )
    assert b"([IPv6:2001:db8::1])" in received_line(receipt._replace(client_address="2001:db8::1", recipient=""))
    assert b"for <" not in received_line(receipt._replace(recipient=""))


@pytest.mark.parametrize("helo", ["", "a\r\nX: y", "a b", "a(b", "x" * 300, "\u00e4"])
def test_a_helo_that_could_break_the_line_is_left_out(helo: str) -> None:
    line = received_line(Receipt(helo, "192.0.2.7", "h", "ESMTP", "i", "d"))
    assert line.startswith(b"Received: from unknown (")
    assert line.count(b"\r\n") == 3


@pytest.mark.parametrize("header", [b"Idempotency-Key: %b", b"idempotency-KEY:%b", b"Idempotency-Key:\r\n\t%b \t"])
@pytest.mark.parametrize("key", [b"a", b"order-4711", b'!"#~', b"x" * MAX_KEY_CHARS, b"Idempotency-Key:"])
def test_a_key_is_read_and_taken_out(header: bytes, key: bytes) -> None:
    content = b"From: a@b.c\r\n" + header % key + b"\r\nSubject: x\r\n\r\nbody\r\n"
    found = scan(content)
    assert (found.idempotency_key, found.problem) == (key, None)
    assert "idempotency-key" not in found.rule_values
    assert without_key(content, found) == b"From: a@b.c\r\nSubject: x\r\n\r\nbody\r\n"


@pytest.mark.parametrize(
    "value", [b"", b" ", b" \t", b" a b", b" a\r\n b", b" a\tb", b" \xc3\xa9", b" a\x7f", b" " + b"x" * 256]
)
def test_a_key_that_is_none_is_refused(value: bytes) -> None:
    problem = HeaderProblem(550, "5.6.0", "the Idempotency-Key is not 1 to 255 visible ASCII characters")
    found = scan(b"From: a@b.c\r\nIdempotency-Key:" + value + b"\r\n\r\n")
    assert (found.idempotency_key, found.problem) == (b"", problem)


@pytest.mark.parametrize("second", [b"Idempotency-Key: a", b"idempotency-key: b", b"Idempotency-Key:"])
def test_two_keys_are_refused(second: bytes) -> None:
    problem = HeaderProblem(550, "5.6.0", "the header has more than one Idempotency-Key field")
    found = scan(b"Idempotency-Key: a\r\nFrom: a@b.c\r\n" + second + b"\r\n\r\n")
    assert (found.idempotency_key, found.problem) == (b"", problem)


@pytest.mark.parametrize("name", [b"X-Idempotency-Key", b"Idempotency-Keys", b"Idempotency", b"Subject"])
def test_another_field_is_no_key(name: bytes) -> None:
    found = scan(name + b": Idempotency-Key: a\r\nFrom: a@b.c\r\n\r\nIdempotency-Key: a\r\n")
    assert (found.idempotency_key, found.problem) == (b"", None)
