"""The session machine under arbitrary octets: it never raises, and how they are cut changes nothing."""

from __future__ import annotations

import itertools

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dataplane.core.datastream import ContentReader, Problem
from dataplane.core.session_contract import Action, Limits
from support.transcript import Recorder, start

SMALL = Limits(
    max_message_bytes=120,
    max_recipients=3,
    drain_bytes=40,
    command_bytes=64,
    auth_bytes=128,
    overlong_bytes=200,
    commands_per_turn=3,
    max_errors=6,
    max_idle_commands=5,
)
LINES = st.sampled_from(
    [
        b"EHLO c\r\n", b"HELO c\r\n", b"MAIL FROM:<a@example.com>\r\n", b"MAIL FROM:<> SIZE=9\r\n", b"QUIT\r\n",
        b"RCPT TO:<b@example.net>\r\n", b"RCPT TO:<>\r\n", b"RSET\r\n", b"NOOP\r\n", b"VRFY x\r\n", b"X\r\n", b"\r\n",
        b"MAIL FROM:<a@example.com> SIZE=999\r\n", b"HELP\r\n", b"*\r\n", b"YXBw\r\n", b"\xff\xfe\r\n",
        b"N" * 70 + b"\r\n",
    ]
)  # fmt: skip
LAST = st.sampled_from([b"DATA\r\n", b"AUTH LOGIN\r\n", b"AUTH PLAIN AGFwcABzZWNyZXQ=\r\n", b"STARTTLS\r\n", b""])
PIECES = st.sampled_from(
    [b"\r\n", b"\n", b"\r", b".", b"\0", b"\r\n.", b".\r\n", b"a", b"a: b\r\n", b"x" * 30, b"x" * 1_001, b"\xff"]
)
CONTENT = st.lists(PIECES, max_size=14).map(b"".join)
GROUPS = st.lists(
    st.one_of(
        st.tuples(st.lists(LINES, max_size=6).map(b"".join), LAST).map(b"".join),
        CONTENT.map(lambda content: content + b"\r\n.\r\n"),
        st.binary(max_size=40),
    ),
    max_size=8,
)  # fmt: skip


def split(data: bytes, places: list[int]) -> list[bytes]:
    marks = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(marks)]


def play(groups: list[bytes], places: list[int] | None) -> tuple[list[bytes], object, object, Action]:
    """Run the groups; `hold_permit` keeps what depends on the speed of our answers out of the comparison."""
    policy = Recorder()
    driver = start(policy, SMALL)
    answers = []
    for group in groups:
        driver.hold_permit = True
        for piece in [group] if places is None else split(group, places):
            driver.send(piece)
        driver.hold_permit = False
        driver.settle()
        answers.append(driver.answer())
    return answers, policy.messages, policy.calls, driver.session.action


def compare(groups: list[bytes], places: list[int]) -> None:
    """Both runs must agree, unless the client broke RFC 2920 behind a command that is answered at once.

    Then whole octets close the session, and slow ones are commands of their own: no cut is worse than another.
    """
    whole = play(groups, None)
    assume(b"Nothing may follow" not in b"".join(whole[0]))
    assert play(groups, places) == whole


@given(GROUPS, st.lists(st.integers(0, 300), max_size=8))
def test_how_octets_are_cut_changes_nothing(groups: list[bytes], places: list[int]) -> None:
    compare(groups, places)


@given(GROUPS)
def test_octet_by_octet_is_as_good_as_whole(groups: list[bytes]) -> None:
    compare(groups, list(range(3_000)))


@given(st.lists(st.binary(max_size=200), max_size=10), st.booleans(), st.booleans())
def test_garbage_is_answered_and_nothing_else(pieces: list[bytes], tls: bool, authorized: bool) -> None:  # noqa: FBT001 - drawn, not called
    driver = start(limits=SMALL, tls_active=tls, authorized=authorized)
    for piece in pieces:
        driver.send(piece)
        assert driver.session.action in {Action.NONE, Action.CLOSE}
        for line in driver.answer().split(b"\r\n")[:-1]:
            assert line[:3].isdigit()
            assert line[3:4] in {b" ", b"-"}


@given(CONTENT, st.lists(st.integers(0, 400), max_size=6), st.lists(st.booleans(), min_size=7, max_size=7))
def test_taking_pieces_while_content_arrives_changes_nothing(
    content: bytes, places: list[int], takes: list[bool]
) -> None:
    stream = content + b"\r\n.\r\nbehind"
    reader = ContentReader(max_bytes=2_000, drain_bytes=100_000)
    taken: list[bytes] = []
    for piece, take in zip(split(stream, places), takes, strict=False):
        if reader.feed(piece) is not None:
            break
        if take:
            taken += reader.take()
            assert reader.held_bytes == 0
    body, problem, _ = read_plainly(stream, 2_000)
    assert reader.problem is problem
    if problem is Problem.NONE:
        assert b"".join(taken) + reader.content() == body
        assert reader.held_bytes == len(reader.content())


@settings(max_examples=300)
@given(CONTENT, st.lists(st.integers(0, 400), max_size=6))
def test_the_content_reader_agrees_with_the_plain_reading_of_the_rules(content: bytes, places: list[int]) -> None:
    stream = content + b"\r\n.\r\nbehind"
    reader = ContentReader(max_bytes=2_000, drain_bytes=100_000)
    behind: bytes | None = None
    for piece in split(stream, places):
        behind = reader.feed(piece) if behind is None else behind + piece
    body, problem, expected_behind = read_plainly(stream, 2_000)
    assert behind == expected_behind
    assert reader.problem is problem
    if problem is Problem.NONE:
        assert reader.content() == body


def read_plainly(stream: bytes, max_bytes: int) -> tuple[bytes, Problem, bytes]:
    """The rules as a reader of the RFC would write them down, without regard to speed."""
    framed = b"\r\n" + stream
    raw, _, behind = framed.partition(b"\r\n.\r\n")
    raw = (raw + b"\r\n")[2:]
    lines = raw.split(b"\r\n")[:-1]
    body = b"".join(line.removeprefix(b".") + b"\r\n" for line in lines)
    if b"\r" in b"".join(lines) or b"\n" in b"".join(lines) or any(line.endswith(b"\r") for line in lines):
        problem = Problem.STRAY
    elif b"\0" in raw:
        problem = Problem.NUL
    elif len(body) > max_bytes:
        problem = Problem.TOO_BIG
    elif any(len(line.removeprefix(b".")) > 998 for line in lines):
        problem = Problem.LONG_LINE
    else:
        problem = Problem.NONE
    return body, problem, behind
