"""What is wrong with a content is the same, whether it comes by DATA or is there as a whole."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from dataplane.core.datastream import ContentReader, content_problem
from dataplane.core.transaction import frame_content

PIECES = st.sampled_from([b"a", b".", b"\r\n", b"\r", b"\n", b"\0", b"\r\n.", b"x" * 400, b"y" * 998])


@given(pieces=st.lists(PIECES, max_size=12), max_bytes=st.sampled_from([5, 900, 10_000]))
@example(pieces=[b"x" * 998], max_bytes=10_000)
@example(pieces=[b"x" * 999], max_bytes=10_000)
@example(pieces=[b"."], max_bytes=10_000)
def test_both_doors_find_the_same(pieces: list[bytes], max_bytes: int) -> None:
    content = b"".join([*pieces, b"\r\n"])
    reader = ContentReader(max_bytes, 1_000_000)
    rest = reader.feed(b"".join(frame_content(content)))
    if rest is None:
        # A stray line end right before the dot hides the end of the data.
        assert b"\r\r\n" in content or b"\n\r\n" in content or content.startswith(b"\n")
        return
    assert content_problem(content, max_bytes) is reader.problem
