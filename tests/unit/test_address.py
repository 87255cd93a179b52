"""Addresses: RFC 5321's grammar, RFC 6531's letters, and what an open relay would let through."""

from __future__ import annotations

import pytest

from dataplane.core.address import (
    AddressError,
    Mailbox,
    NonAsciiAddressError,
    parse_domain,
    parse_mailbox,
    parse_path,
    parse_recipient,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("john.smith@example.com", Mailbox("john.smith", "example.com", "john.smith@example.com")),
        ("John@EXAMPLE.Com", Mailbox("John", "example.com", "John@example.com")),
        ("a+b_c-d='~!#$%&*/?^`{|}@x-y.example", None),
        ("root@localhost", Mailbox("root", "localhost", "root@localhost")),
        ("a@1st.example1", Mailbox("a", "1st.example1", "a@1st.example1")),
        ('"a b"@example.com', Mailbox("a b", "example.com", '"a b"@example.com')),
        ('"plain"@example.com', Mailbox("plain", "example.com", "plain@example.com")),
        ('"a\\"b\\\\c"@example.com', Mailbox('a"b\\c', "example.com", '"a\\"b\\\\c"@example.com')),
        ('"\\a"@example.com', Mailbox("a", "example.com", "a@example.com")),
        ('"a@b"@example.com', Mailbox("a@b", "example.com", '"a@b"@example.com')),
        ('""@example.com', Mailbox("", "example.com", '""@example.com')),
        ("a@[192.0.2.1]", Mailbox("a", "[192.0.2.1]", "a@[192.0.2.1]")),
        ("a@[ipv6:2001:DB8:0:0::1]", Mailbox("a", "[IPv6:2001:db8::1]", "a@[IPv6:2001:db8::1]")),
        ("a@xn--bcher-kva.example", Mailbox("a", "xn--bcher-kva.example", "a@xn--bcher-kva.example")),
        ("a@XN--BCHER-KVA.example", Mailbox("a", "xn--bcher-kva.example", "a@xn--bcher-kva.example")),
        ("a@xn--i-7iq.ws", Mailbox("a", "xn--i-7iq.ws", "a@xn--i-7iq.ws")),
    ],
)
def test_a_good_mailbox_has_one_canonical_form(text: str, expected: Mailbox | None) -> None:
    mailbox = parse_mailbox(text)
    assert mailbox == (expected or Mailbox(text.rpartition("@")[0], text.rpartition("@")[2], text))
    assert parse_mailbox(mailbox.text) == mailbox


@pytest.mark.parametrize(
    "text",
    [
        "",
        "@",
        "a",
        "a@",
        "@b",
        "a@b@c",
        ".a@b",
        "a.@b",
        "a..b@c",
        "a b@c",
        "a@b c",
        " a@b",
        "a@b ",
        "a@b.",
        "a@.b",
        "a@b..c",
        "a@-b.c",
        "a@b-.c",
        "a@b_c.d",
        "a@b.c:25",
        "a@1.2.3.4",
        "a@b.1",
        "@a:b@c",
        "@a,@b:c@d",
        "<a@b>",
        "a@[1.2.3]",
        "a@[01.2.3.4]",
        "a@[1.2.3.4",
        "a@1.2.3.4]",
        "a@[IPv6:1.2.3.4]",
        "a@[IPv6:fe80::1%eth0]",
        "a@[tag:content]",
        "a@[\u0661.2.3.4]",
        '"a@b.c',
        'a"@b.c',
        '"a"b@c.d',
        '"a\\"@b.c',
        "a@xn--.de",
        "a@xn--abc-.de",
        "a@xn--99999999999.de",
        "a@xn--a-0000000000000000000000.de",
        "a(comment)@b.c",
        "a,b@c",
        "a;b@c",
    ],
)
def test_a_malformed_mailbox_is_refused(text: str) -> None:
    with pytest.raises(AddressError):
        parse_mailbox(text)


@pytest.mark.parametrize("position", [0, 1, 2, 3, 5, 7])
@pytest.mark.parametrize("bad", [*map(chr, range(32)), "\x7f", "\x80", "\x85", "\u2028", "\u202e", "\ud800"])
@pytest.mark.parametrize("text", ["ab@cd.ef", '"a"@c.ef'])
def test_control_characters_are_refused_everywhere(text: str, bad: str, position: int) -> None:
    spoilt = text[:position] + bad + text[position:]
    for smtputf8 in (False, True):
        with pytest.raises(AddressError):
            parse_mailbox(spoilt, smtputf8)


def test_crlf_behind_an_address_is_refused() -> None:
    for text in ("a@b.c\n", "a@b.c\r\n", "a\r\n@b.c", '"\r\n"@b.c'):
        with pytest.raises(AddressError):
            parse_mailbox(text)


def test_lengths_are_those_of_rfc_5321() -> None:
    label = "x" * 63
    domain = f"{label}.{label}.{label}"
    assert parse_mailbox(f"{'l' * 62}@{domain}").text == f"{'l' * 62}@{domain}"
    for text in (
        f"{'l' * 63}@{domain}",
        f"{'l' * 65}@b.c",
        f'"{"l" * 63}"@b.c',
        f"a@{label}x.c",
        f"a@{'.'.join([label] * 4)}",
        f"a@{'x.' * 126}xx",
    ):
        with pytest.raises(AddressError):
            parse_mailbox(text)
    assert parse_mailbox(f"{'l' * 64}@b.c").local == "l" * 64


def test_other_letters_need_smtputf8() -> None:
    for text in ("jos\u00e9@example.com", "a@b\u00fccher.example"):
        with pytest.raises(NonAsciiAddressError):
            parse_mailbox(text)
    assert parse_mailbox("jos\u00e9@B\u00fccher.example", smtputf8=True) == Mailbox(
        "jos\u00e9", "xn--bcher-kva.example", "jos\u00e9@xn--bcher-kva.example"
    )


def test_lengths_of_other_letters_are_counted_in_octets() -> None:
    letters = "\u00e9" * 32
    assert parse_mailbox(letters + "@b.c", smtputf8=True).local == letters
    with pytest.raises(AddressError):
        parse_mailbox(letters + "\u00e9@b.c", smtputf8=True)


def test_a_sharp_s_stays_what_it_is_and_does_not_reach_somebody_elses_domain() -> None:
    assert parse_domain("stra\u00dfe.de", smtputf8=True) == "xn--strae-oqa.de"
    assert parse_domain("STRA\u00dfE.de", smtputf8=True) == "xn--strae-oqa.de"


def test_one_name_in_two_unicode_spellings_is_one_domain() -> None:
    assert parse_domain("bu\u0308cher.de", smtputf8=True) == parse_domain("b\u00fccher.de", smtputf8=True)


@pytest.mark.parametrize(
    "domain",
    ["\u2460.de", "\uff41.de", "\u0301a.de", "a\u200db.de", "\U0001f600.de", "a\u3002de", "-\u00fc.de", "\u00fc-.de"],
)
def test_characters_that_idna_2008_does_not_know_are_refused(domain: str) -> None:
    with pytest.raises(AddressError):
        parse_domain(domain, smtputf8=True)


@pytest.mark.parametrize(
    "text",
    [
        "user%host@example.com",
        "host!user@example.com",
        '"user@host"@example.com',
        '"user%host"@example.com',
        "user@[192.0.2.1]",
        "user@[IPv6:::1]",
        "@a:b@c",
        "user@host@example.com",
        "user@example.com:25",
        "user%host",
        "host!user",
        '"user@host"',
    ],
)
def test_a_recipient_that_reads_as_a_route_is_refused(text: str) -> None:
    with pytest.raises(AddressError):
        parse_recipient(text)


def test_a_sender_may_hold_what_reads_as_a_route() -> None:
    assert parse_mailbox("bounce%x!y@example.com").local == "bounce%x!y"


@pytest.mark.parametrize(
    ("argument", "text", "parameters"),
    [
        ("<a@b.c>", "a@b.c", ""),
        (" <a@b.c> ", "a@b.c", ""),
        ("<a@b.c> SIZE=10 BODY=8BITMIME", "a@b.c", "SIZE=10 BODY=8BITMIME"),
        ('<"a>b"@b.c> SIZE=10', '"a>b"@b.c', "SIZE=10"),
        ('<"a\\">b"@b.c>', '"a\\">b"@b.c', ""),
    ],
)
def test_a_path_ends_at_its_bracket(argument: str, text: str, parameters: str) -> None:
    path = parse_path(argument)
    assert path.mailbox is not None
    assert (path.mailbox.text, path.parameters) == (text, parameters)


def test_the_null_path_is_for_senders_only() -> None:
    assert parse_path("<> SIZE=1") == (None, "SIZE=1")
    with pytest.raises(AddressError):
        parse_path("<>", recipient=True)


@pytest.mark.parametrize(
    "argument", ["a@b.c", "<a@b.c", "a@b.c>", "<a@b.c>SIZE=1", "", "<", '<"a>b@c', '<"a"@b', "\t<a@b.c>", "<<a@b.c>>"]
)
def test_a_path_without_its_brackets_is_refused(argument: str) -> None:
    with pytest.raises(AddressError):
        parse_path(argument)


def test_a_recipient_path_keeps_the_rule_for_recipients() -> None:
    with pytest.raises(AddressError):
        parse_path("<a%b@c.d>", recipient=True)


def test_errors_repeat_nothing_of_the_input() -> None:
    for text in ("canary..x@b.c", "canary@b_c.d", "canary@[1.2.3]", "canary%x@d.e"):
        with pytest.raises(AddressError) as caught:
            parse_recipient(text)
        assert "canary" not in str(caught.value)
