"""What a client can make the machine hold: 64 MiB in any position, empty lines, floods."""

from __future__ import annotations

import pytest

from dataplane.core.datastream import ContentReader, Problem
from dataplane.core.session_contract import Action, Limits
from support.transcript import Driver, start

CHUNK = b"x" * 65_536
OPENING = b"EHLO c\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.net>\r\nDATA\r\n"


def held(driver: Driver) -> int:
    session = driver.session
    carry = len(session._reader._carry) if session._reader is not None else 0
    return len(session._buffer) + carry + session.held_bytes


@pytest.mark.parametrize("beginning", [b"", b"NOOP ", b"MAIL FROM:<", b"AUTH PLAIN ", b"EHLO ", b"MAIL FROM:<a@b.c> "])
def test_an_endless_command_is_not_kept_and_ends_the_session(beginning: bytes) -> None:
    driver = start()
    driver.send(beginning)
    for _ in range(1_024):
        driver.send(CHUNK)
        assert held(driver) <= 12_288
    assert driver.answer() == b"500 5.5.2 Line too long\r\n"
    assert driver.session.action is Action.CLOSE


def test_an_endless_line_of_content_is_not_kept_and_ends_the_session() -> None:
    driver = start()
    driver.send(OPENING)
    driver.answer()
    for _ in range(1_024):
        driver.send(CHUNK)
        assert held(driver) <= 1_001
    assert driver.answer() == b"552 5.3.4 Message is too big\r\n"
    assert driver.session.action is Action.CLOSE


def test_content_above_the_limit_is_not_kept_while_it_is_read_over() -> None:
    driver = start(limits=Limits(max_message_bytes=100_000))
    driver.send(OPENING)
    for _ in range(200):
        driver.send(b"x" * 998 + b"\r\n")
        assert held(driver) <= 100_000
    driver.answer()
    driver.send(b".\r\n")
    assert driver.answer().startswith(b"552 5.3.4")


@pytest.mark.parametrize("piece", [b"\r\n", b"\r\n" * 3, b"ab\r\n"])
def test_tiny_lines_in_tiny_segments_cost_no_object_each(piece: bytes) -> None:
    reader = ContentReader(1_000_000, 0)
    for _ in range(100_000 // len(piece)):
        assert reader.feed(piece) is None
    assert len(reader._chunks) <= 100_000 // 16_384 + 1
    assert reader.feed(b".\r\n") == b""
    assert reader.content() == piece * (100_000 // len(piece))


@pytest.mark.parametrize(
    ("length", "problem"), [(998, Problem.NONE), (999, Problem.LONG_LINE), (5_000, Problem.LONG_LINE)]
)
def test_rfc5321_4_5_3_1_6_lines_of_content_have_998_octets_at_most(length: int, problem: Problem) -> None:
    for before in (b"", b"a: b\r\n\r\n", b"x" * 998 + b"\r\n"):
        stream = before + b"y" * length + b"\r\nz\r\n.\r\n"
        for cut in (0, len(before) + 1, len(before) + length, len(before) + length + 1, len(stream) - 4):
            reader = ContentReader(100_000, 0)
            reader.feed(stream[:cut])
            assert reader.feed(stream[cut:]) == b""
            assert reader.problem is problem


def test_a_stuffed_dot_does_not_count_as_part_of_a_line() -> None:
    stream = b"." * 999 + b"\r\n.\r\n"
    for cut in range(990, len(stream)):
        reader = ContentReader(100_000, 0)
        reader.feed(stream[:cut])
        assert reader.feed(stream[cut:]) == b""
        assert reader.problem is Problem.NONE
        assert reader.content() == b"." * 998 + b"\r\n"


def test_unknown_commands_are_answered_up_to_a_cap() -> None:
    driver = start()
    driver.send(b"X\r\n" * 100)
    lines = driver.answer().split(b"\r\n")
    assert lines.count(b"500 5.5.2 Command not recognized") == 20
    assert lines[-2].startswith(b"421 4.7.0")
    assert driver.session.action is Action.CLOSE


def test_commands_that_move_no_mail_are_capped_and_a_message_forgives_them() -> None:
    driver = start(authorized=False)
    driver.send(b"NOOP\r\n" * 40)
    assert driver.answer().count(b"250 2.0.0") == 25
    driver = start()
    for _ in range(3):
        driver.send(b"NOOP\r\n" * 600 + OPENING + b".\r\n" * 0)
        driver.send(b".\r\n")
    assert driver.session.action is Action.NONE
    assert len(driver.policy.messages) == 3


def test_a_long_batch_gives_others_a_turn() -> None:
    driver = start()
    driver.session.receive(b"NOOP\r\n" * 450)
    turns = 1
    while driver.session.action is Action.MORE:
        driver.session.resume()
        turns += 1
    assert turns == 3
    assert driver.session.take_output().count(b"250") == 450
