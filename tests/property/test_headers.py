"""Headers under arbitrary bytes: never an exception, bounded results, and the content always follows unchanged."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dataplane.core.headers import MAX_HEADER_BYTES, head_of, prepare, scan

_PIECES = st.sampled_from(
    [
        b"From:",
        b"Sender:",
        b"Subject:",
        b"Date:",
        b"Message-ID:",
        b"X-Postroad-A:",
        b"Received: x",
        b" a@b.c",
        b" <d@e.f>",
        b'"',
        b"(",
        b")",
        b",",
        b";",
        b":",
        b"=?utf-8?q?x?=",
        b"\r\n",
        b"\r\n ",
        b"\r",
        b"\n",
        b"\0",
        b"\xff",
        b"body",
    ]
)
_CONTENTS = st.one_of(st.binary(max_size=400), st.lists(_PIECES, max_size=40).map(b"".join))


@given(_CONTENTS)
def test_nothing_raises_and_what_is_kept_can_be_stored(content: bytes) -> None:
    found = scan(content)
    texts = [found.subject, found.message_id, *(value for values in found.rule_values.values() for value in values)]
    for text in texts:
        assert text.isprintable()
        text.encode("utf-8")
    assert 0 <= found.header_bytes <= len(content)


@given(_CONTENTS)
def test_the_content_follows_unchanged_and_its_header_ends_where_it_ended(content: bytes) -> None:
    before = scan(content)
    prepared = prepare(content, before, b"Received: r\r\n", "d", "<m>")
    assert prepared.startswith(b"Received: r\r\n")
    assert prepared.endswith(content)
    if before.problem is None:
        after = scan(prepared)
        assert after.problem is None
        assert after.author_domains == before.author_domains
        assert after.has_from == before.has_from
        assert after.has_date
        assert after.has_message_id
        assert after.received_count == before.received_count + 1


@given(
    st.lists(
        st.sampled_from([b"From: a@b.example\r\n", b"\r\n", b"x: y\r\n", b" folded\r\n", b"no field\r\n"]), max_size=12
    ),
    st.lists(st.integers(1, 30), max_size=6),
    st.booleans(),
)
def test_what_is_seen_of_pieces_is_what_is_seen_of_the_whole(lines: list[bytes], cuts: list[int], long: bool) -> None:  # noqa: FBT001 - drawn, not called
    content = b"".join(lines) + (b"filling: x\r\n" * (MAX_HEADER_BYTES // 12 + 2) if long else b"")
    pieces, position = [], 0
    for cut in [*cuts, len(content)]:
        pieces.append(content[position : position + cut])
        position += cut
    pieces.append(content[position:])
    assert scan(head_of(pieces)) == scan(content)
