"""Addresses under arbitrary text: an error of ours or one form, and the quick way says what the slow one says."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dataplane.core.address import AddressError, _parse_unusual, parse_mailbox, parse_path

_PIECES = st.sampled_from(
    [
        "a",
        "B",
        "1",
        ".",
        "-",
        "_",
        "@",
        '"',
        "\\",
        "<",
        ">",
        "[",
        "]",
        ":",
        "%",
        "!",
        " ",
        "\r",
        "\n",
        "\0",
        "xn--",
        "\u00fc",
    ]
)
_SHAPED = st.lists(_PIECES, max_size=12).map("".join)
_TEXTS = st.one_of(st.text(max_size=300), _SHAPED, st.builds(lambda a, b: f"{a}@{b}", _SHAPED, _SHAPED))


@given(_TEXTS, st.booleans())
def test_text_is_refused_or_has_a_form_that_parses_to_itself(text: str, smtputf8: bool) -> None:  # noqa: FBT001 - drawn
    try:
        mailbox = parse_mailbox(text, smtputf8)
    except AddressError:
        return
    assert parse_mailbox(mailbox.text, smtputf8) == mailbox
    assert not any(ord(char) < 32 or ord(char) == 127 for char in mailbox.text)
    assert len(mailbox.text.encode()) <= 254
    assert mailbox.domain == mailbox.domain.lower() or mailbox.domain.startswith("[IPv6:")


@given(_TEXTS)
def test_the_quick_way_and_the_slow_way_agree(text: str) -> None:
    def outcome(parse: object) -> object:
        try:
            return parse()  # type: ignore[operator] # both are called without arguments
        except AddressError:
            return None

    assert outcome(lambda: parse_mailbox(text)) == outcome(lambda: _parse_unusual(text, smtputf8=False))


@given(_TEXTS, _SHAPED)
def test_a_path_is_refused_or_split_where_its_mailbox_ends(text: str, parameters: str) -> None:
    try:
        path = parse_path(f"<{text}> {parameters}")
    except AddressError:
        return
    assert path.mailbox is not None or not text or text.startswith(">")
