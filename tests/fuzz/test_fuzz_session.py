"""A seeded, short run of the session fuzzer: words of the protocol, shuffled, cut, doubled and damaged."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import ModuleType

import pytest

from dataplane.core.datastream import ContentReader, Problem

WORDS = [
    b"EHLO c\r\n", b"HELO c\r\n", b"MAIL FROM:<a@example.com>\r\n", b"MAIL FROM:<>", b" SIZE=100", b" BODY=8BITMIME",
    b" SMTPUTF8", b" AUTH=<>", b"RCPT TO:<b@example.net>\r\n", b"DATA\r\n", b"RSET\r\n", b"NOOP\r\n", b"STARTTLS\r\n",
    b"AUTH PLAIN AGFwcABzZWNyZXQ=\r\n", b"AUTH LOGIN\r\n", b"YXBw\r\n", b"c2VjcmV0\r\n", b"*\r\n", b"QUIT\r\n",
    b"BDAT 9 LAST\r\n", b"VRFY x\r\n", b"\r\n.\r\n", b".\r\n", b"\r\n", b"\n", b"\r", b"\0", b".", b"..", b"\xff",
    b"Subject: x\r\n\r\n", b"x" * 1_000, b"y" * 3_000, b"\r\n.\n", b"\n.\r\n", b"\xc3\xbc", b"<", b">", b'"', b"@",
]  # fmt: skip
OPENING = b"EHLO c\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.net>\r\nDATA\r\n"


@pytest.fixture(scope="module")
def target() -> ModuleType:
    path = Path(__file__).with_name("session_target.py")
    spec = importlib.util.spec_from_file_location("session_target", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_input(dice: random.Random) -> bytes:
    words = dice.choices(WORDS, k=dice.randint(1, 40))
    stream = bytearray((OPENING if dice.random() < 0.5 else b"") + b"".join(words))
    for _ in range(dice.choice((0, 0, 1, 3))):
        stream[dice.randrange(len(stream))] = dice.randrange(256)
    return dice.randbytes(2) + bytes(stream)


@pytest.mark.parametrize("seed", range(4))
def test_a_short_run_finds_nothing(target: ModuleType, seed: int) -> None:
    dice = random.Random(seed)
    for _ in range(150):
        target.run_one(make_input(dice))


@pytest.mark.nightly
def test_a_long_run_finds_nothing(target: ModuleType) -> None:
    dice = random.Random()
    for _ in range(20_000):
        data = make_input(dice)
        try:
            target.run_one(data)
        except Exception as error:
            raise AssertionError(f"found by {data!r}") from error


def test_the_target_notices_a_broken_machine(target: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def note_nothing(reader: ContentReader, problem: Problem) -> None:
        del reader, problem

    monkeypatch.setattr(ContentReader, "_note", note_nothing)
    with pytest.raises(AssertionError):
        target.run_one(b"\x04\x00" + OPENING + b"a\nb\r\n.\r\n")
