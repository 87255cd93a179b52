"""A content on the wire: in pieces or at once, the octets are the same, and undoing it gives the content back."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.core.transaction import Framing, frame_content, is_canonical

PARTS = st.lists(st.sampled_from([b"\r\n", b".", b"\r", b"\n", b"x", b"xyz" * 5, b"\r\n.", b"\r\n.\r\n"]), max_size=30)
LINES = st.lists(st.sampled_from([b"", b".", b"..", b"x", b"x." * 9, b".x"]), max_size=30)


def pieces_of(content: bytes, piece_bytes: int) -> list[bytes]:
    framing, pieces, is_last = Framing(content, piece_bytes), [], False
    while not is_last:
        piece, is_last = framing.next()
        pieces.append(piece)
        assert len(pieces) <= len(content) + 1
    return pieces


@settings(max_examples=400)
@given(PARTS.map(b"".join), st.integers(2, 40))
def test_pieces_are_the_content_framed_at_once(content: bytes, piece_bytes: int) -> None:
    pieces = pieces_of(content, piece_bytes)
    assert b"".join(pieces) == b"".join(frame_content(content))
    # Stuffing at most doubles a piece, and the last one has the end.
    assert max(map(len, pieces)) <= 2 * piece_bytes + 5


@given(LINES.map(lambda lines: b"".join(line + b"\r\n" for line in lines)), st.integers(2, 40))
def test_undoing_the_framing_gives_the_content(content: bytes, piece_bytes: int) -> None:
    wire = b"".join(pieces_of(content, piece_bytes))
    assert wire.endswith(b"\r\n.\r\n") or wire == b".\r\n"
    assert (b"\r\n" + wire).find(b"\r\n.\r\n") == len(wire) - 3, "its end is found nowhere but at its end"
    assert b"".join(line.removeprefix(b".") for line in wire[:-3].splitlines(keepends=True)) == content


@settings(max_examples=400)
@given(PARTS.map(b"".join), st.integers(1, 40))
def test_line_ends_are_looked_at_alike_in_pieces_of_any_size(content: bytes, piece_bytes: int) -> None:
    rest = content.replace(b"\r\n", b"")
    assert is_canonical(content, piece_bytes) is (b"\r" not in rest and b"\n" not in rest)
