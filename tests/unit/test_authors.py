"""Who speaks in From and Sender: what is read, and what is refused since readers could disagree about it."""

from __future__ import annotations

import pytest

from dataplane.core.authors import MAX_AUTHOR_OCTETS, UnreadableAuthorsError, author_domains


@pytest.mark.parametrize(
    ("value", "domains"),
    [
        (b"a@b.c", ("b.c",)),
        (b" John Smith <john@Example.COM>", ("example.com",)),
        (b' "Smith, John" <a@b.c>', ("b.c",)),
        (b"John Q. Public <a@b.c>", ("b.c",)),
        (b"=?utf-8?q?J=C3=B6rg?= <a@b.c>", ("b.c",)),
        (b"J\xc3\xb6rg <a@b.c>", ("b.c",)),
        (b"J\xf6rg <a@b.c>", ("b.c",)),
        (b"a@b.c, Other <d@e.f>", ("b.c", "e.f")),
        (b"a@b.c, x@b.c", ("b.c",)),
        (b"Group: a@b.c, d@e.f;", ("b.c", "e.f")),
        (b"Group: a@b.c;, d@e.f", ("b.c", "e.f")),
        (b"(a comment (in a comment)) a@b.c (\\) more)", ("b.c",)),
        (b"a@b.c (d@e.f)", ("b.c",)),
        (b'"d@e.f" <a@b.c>', ("b.c",)),
        (b"John\r\n Smith\r\n\t<a@b.c>", ("b.c",)),
        (b'"a b"@c.d', ("c.d",)),
        (b"d@e.f <a@b.c>", ("e.f", "b.c")),
        (b"x d@e.f y <a@b.c>", ("e.f", "b.c")),
        (b"d@e.f: a@b.c;", ("e.f", "b.c")),
        ("\u00fc@b\u00fccher.de".encode(), ("xn--bcher-kva.de",)),
        (b"a @ b.c", ("b.c",)),
    ],
)
def test_every_author_is_found(value: bytes, domains: tuple[str, ...]) -> None:
    assert author_domains([value]) == domains


def test_authors_of_all_fields_come_once_each() -> None:
    assert author_domains([b"a@b.c, d@e.f", b"x@b.c"]) == ("b.c", "e.f")


def test_authors_that_would_hold_the_loop_are_refused_unread() -> None:
    value = b"a@b.c".rjust(MAX_AUTHOR_OCTETS - 3)
    assert author_domains([value, b"d@f"]) == ("b.c", "f")
    with pytest.raises(UnreadableAuthorsError, match="more than anybody"):
        author_domains([value, b"d@ef"])


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b" ",
        b"John Smith",
        b"a@b.c,",
        b",a@b.c",
        b"a@b.c,,d@e.f",
        b"a@b.c d@e.f",
        b"<a@b.c> d@e.f",
        b"<a@b.c> <d@e.f>",
        b"<a@b.c",
        b"a@b.c>",
        b"<<a@b.c>>",
        b"<>",
        b"<@x:a@b.c>",
        b"<@x,@y:a@b.c>",
        b"<a@b@c.d>",
        b"a@b.c;",
        b"Group: a@b.c",
        b"Group: Inner: a@b.c;;",
        b"undisclosed-recipients:;",
        b": a@b.c;",
        b"a@[192.0.2.1]",
        b"x <a@[IPv6:::1]>",
        b"=?utf-8?B?QWRtaW5AbGVnaXQ=?=, <x@evil.example>",
        b"=?utf-8?Q?ceo@bank.example?= <a@b.c>",
        b"<=?utf-8?Q?ceo=40bank.example?=@b.c>",
        b"a@b.c\0",
        b"a@b.c\0@d.e",
        b"a@b.c\x01",
        b'"a@b.c',
        b"(a@b.c",
        b"a@b.c)",
        b"a@\xff.c",
        b"a@b_c.d",
        b"a. b@c.d",
        b"a@b.c\\",
        b"(" * 1_000 + b"a@b.c",
    ],
)
def test_what_readers_could_read_in_two_ways_is_refused(value: bytes) -> None:
    with pytest.raises(UnreadableAuthorsError):
        author_domains([value])


def test_one_bad_field_spoils_all() -> None:
    with pytest.raises(UnreadableAuthorsError):
        author_domains([b"a@b.c", b"nobody"])
