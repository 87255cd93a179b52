"""Remote text made safe: whatever a server says becomes text that every log, column and screen can hold.

Input is bytes as they came; output is valid UTF-8 text of at most 512 bytes without NUL, control, format or unassigned
characters. Broken UTF-8 becomes U+FFFD, everything unprintable a space. No input fails: an outcome must be storable
whatever the remote said, or mail that was delivered would be sent again.
"""

from __future__ import annotations

import re

MAX_TEXT_BYTES = 512

_CANDIDATE_BYTES = MAX_TEXT_BYTES * 4
_ENHANCED = re.compile(rb"([245])\.([0-9]{1,3})\.([0-9]{1,3})(?![0-9.])")


def safe_text(raw: bytes) -> str:
    """Return `raw` as printable text, at most MAX_TEXT_BYTES long in UTF-8, cut between characters."""
    if len(raw) <= MAX_TEXT_BYTES and raw.isascii():
        text = raw.decode("ascii")
        if text.isprintable():
            return text
    text = raw[:_CANDIDATE_BYTES].decode("utf-8", "replace")
    if not text.isprintable():
        text = "".join(character if character.isprintable() else " " for character in text)
    return text.encode("utf-8")[:MAX_TEXT_BYTES].decode("utf-8", "ignore")


def enhanced_code(code: int, raw: bytes) -> str:
    """Return the enhanced status code at the beginning of a reply's text (RFC 3463), or "" where there is none.

    One whose class contradicts the reply code is no statement at all and counts as missing (RFC 2034, section 4).
    """
    found = _ENHANCED.match(raw)
    if found is None or int(found.group(1)) != code // 100:
        return ""
    return found.group(0).decode("ascii")
