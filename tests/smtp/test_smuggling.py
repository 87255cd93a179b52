"""The smuggling matrix: every malformed end of data, everywhere, cut everywhere: one message or one rejection."""

from __future__ import annotations

from itertools import product

import pytest

from dataplane.core.session_contract import Action, Limits
from support.transcript import Driver, start

BEFORE = {"crlf": b"\r\n", "lf": b"\n", "cr": b"\r", "crcrlf": b"\r\r\n", "crlfnul": b"\r\n\0"}
AFTER = {"crlf": b"\r\n", "lf": b"\n", "cr": b"\r", "crcrlf": b"\r\r\n", "nulcrlf": b"\0\r\n"}
PAYLOADS = {
    f"{before}.{after}": BEFORE[before] + b"." + AFTER[after]
    for before, after in product(BEFORE, AFTER)
    if (before, after) != ("crlf", "crlf")
}
SMUGGLED = b"MAIL FROM:<admin@example.com>\r\nRCPT TO:<victim@example.net>\r\nDATA\r\nSubject: forged\r\n\r\nx\r\n"
OPENING = b"EHLO c\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.net>\r\nDATA\r\n"
PLACES = {
    "start": (b"", b""),
    "header": (b"Subject: a", b"To: b\r\n\r\nbody\r\n"),
    "body": (b"S: a\r\n\r\nb", b"c\r\n"),
}


def opened(limits: Limits | None = None) -> Driver:
    driver = start(limits=limits)
    driver.send(OPENING)
    assert b"\r\n354 " in driver.answer()
    return driver


def verdicts(driver: Driver, pieces: list[bytes]) -> tuple[int, list[bytes]]:
    """How many messages were taken, and the replies to what looked like an end of data."""
    for piece in pieces:
        driver.send(piece)
    lines = driver.answer().split(b"\r\n")[:-1]
    return len(driver.policy.messages), lines


def test_the_matrix_has_every_payload_but_the_legal_one() -> None:
    assert len(PAYLOADS) == 24


@pytest.mark.parametrize("max_bytes", [100_000, 100], ids=["within", "over-limit"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_malformed_end_of_data_makes_one_rejection_however_it_is_cut(
    payload: str, place: str, max_bytes: int
) -> None:
    limits = Limits(max_message_bytes=max_bytes)
    before, after = PLACES[place]
    filler = b"x" * 60 + b"\r\n"
    stream = (filler * 3 if max_bytes == 100 else b"") + before + PAYLOADS[payload] + SMUGGLED + after + b".\r\n"
    middle = stream.index(SMUGGLED)
    for cut in range(max(0, middle - 12), middle + 4):
        driver = opened(limits)
        taken, replies = verdicts(driver, [stream[:cut], stream[cut:]])
        assert_one_rejection(driver, taken, replies)
    driver = opened(limits)
    taken, replies = verdicts(driver, [stream[index : index + 1] for index in range(len(stream))])
    assert_one_rejection(driver, taken, replies)


def assert_one_rejection(driver: Driver, taken: int, replies: list[bytes]) -> None:
    assert taken == 0
    assert len(replies) == 1
    assert replies[0][:3] in {b"550", b"552"}
    # No second message can come: the session is closed, so what stands behind is never read as commands.
    assert driver.session.action is Action.CLOSE
    assert ("mail", "admin@example.com") not in driver.policy.calls


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_rejection_waits_for_the_real_end_of_data(payload: str) -> None:
    if b"\r\n.\r\n" in PAYLOADS[payload]:
        # CR CR LF dot CR LF holds a real end: it is the end, and a bare CR stands before it.
        return
    driver = opened()
    driver.send(b"body" + PAYLOADS[payload] + b"more\r\n")
    assert driver.answer() == b""
    assert driver.session.action is Action.NONE


@pytest.mark.parametrize("stray", [b"a\rb\r\n", b"a\nb\r\n", b"a\0b\r\n", b"\n\r\n", b"\r\r\n", b"\ra\n\r\n"])
def test_stray_octets_are_refused_never_repaired(stray: bytes) -> None:
    for cut in range(len(stray) + 1):
        driver = opened()
        taken, replies = verdicts(driver, [b"S: x\r\n\r\n" + stray[:cut], stray[cut:] + b"\r\n.\r\n"])
        assert (taken, len(replies)) == (0, 1)
        assert replies[0].startswith(b"550 5.6.0")


def test_the_legal_end_ends_wherever_it_is_cut() -> None:
    stream = b"S: x\r\n\r\nbody\r\n..\r\n.\r\n"
    for first in range(len(stream)):
        for second in range(first, len(stream)):
            driver = opened()
            taken, replies = verdicts(driver, [stream[:first], stream[first:second], stream[second:]])
            assert (taken, len(replies)) == (1, 1)
            assert driver.policy.messages[0][2] == b"S: x\r\n\r\nbody\r\n.\r\n"


@pytest.mark.parametrize("line", [b"NOOP\n", b"NOOP\rX\r\n", b"NOOP\r\r\n", b"\n", b"MAIL FROM:<a@example.com>\nX\r\n"])
def test_commands_with_stray_line_ends_are_refused_and_close(line: bytes) -> None:
    for cut in range(len(line) + 1):
        driver = start()
        driver.send(line[:cut])
        driver.send(line[cut:])
        answer = driver.answer()
        assert answer == b"500 5.5.2 Commands end with CR LF and hold neither alone\r\n"
        assert driver.session.action is Action.CLOSE
