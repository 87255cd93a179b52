from __future__ import annotations

import pytest

from benchmarks.load import sink
from benchmarks.load.dialog import Access, Dialog, Envelope, Step

_CONTENT = b"Subject: x\r\n\r\ntext\r\n.\r\n"


def open_dialog(*, pipelining: bool = False, access: Access = Access()) -> Dialog:  # noqa: B008 - frozen
    return Dialog(Envelope("a@example.org", "b@example.net", pipelining), access)


def answer(dialog: Dialog, reply: bytes) -> tuple[Step, bytes]:
    dialog.output = b""
    step = dialog.receive(reply)
    return step, dialog.output


def ready_dialog(*, pipelining: bool = False) -> Dialog:
    dialog = open_dialog(pipelining=pipelining)
    assert answer(dialog, b"220 hi\r\n") == (Step.NOTHING, b"EHLO load.example.org\r\n")
    assert answer(dialog, b"250-hi\r\n250 PIPELINING\r\n")[0] is Step.READY
    return dialog


def test_commands_wait_for_their_replies() -> None:
    dialog = ready_dialog()
    dialog.begin(_CONTENT)
    assert dialog.output == b"MAIL FROM:<a@example.org>\r\n"
    assert answer(dialog, b"250 ok\r\n") == (Step.NOTHING, b"RCPT TO:<b@example.net>\r\n")
    assert answer(dialog, b"250 ok\r\n") == (Step.NOTHING, b"DATA\r\n")
    assert answer(dialog, b"354 go\r\n") == (Step.DOT, _CONTENT)
    assert answer(dialog, b"250 taken\r\n")[0] is Step.DONE
    assert dialog.code == 250


def test_with_pipelining_they_go_in_one_group() -> None:
    dialog = ready_dialog(pipelining=True)
    dialog.begin(_CONTENT)
    assert dialog.output == b"MAIL FROM:<a@example.org>\r\nRCPT TO:<b@example.net>\r\nDATA\r\n"
    assert answer(dialog, b"250 ok\r\n250 o")[0] is Step.NOTHING
    assert answer(dialog, b"k\r\n354 go\r\n") == (Step.DOT, _CONTENT)


@pytest.mark.parametrize("pipelining", [False, True])
def test_a_refused_sender_is_counted_by_its_code_and_the_session_goes_on(pipelining: bool) -> None:  # noqa: FBT001
    dialog = ready_dialog(pipelining=pipelining)
    dialog.begin(_CONTENT)
    replies = b"452 later\r\n503 no\r\n503 no\r\n" if pipelining else b"452 later\r\n"
    assert answer(dialog, replies) == (Step.NOTHING, b"RSET\r\n")
    assert answer(dialog, b"250 ok\r\n")[0] is Step.DONE
    assert dialog.code == 452


def test_a_refused_content_keeps_its_code() -> None:
    dialog = ready_dialog()
    dialog.begin(_CONTENT)
    for reply in (b"250 ok\r\n", b"250 ok\r\n", b"354 go\r\n"):
        answer(dialog, reply)
    assert answer(dialog, b"451 no\r\n")[0] is Step.DONE
    assert dialog.code == 451


def test_421_ends_the_session_with_its_code() -> None:
    dialog = open_dialog()
    assert answer(dialog, b"421 too many\r\n")[0] is Step.CLOSED
    assert dialog.code == 421


def test_tls_and_auth_come_before_the_first_message() -> None:
    dialog = open_dialog(access=Access(tls=True, username="u", password="p"))
    answer(dialog, b"220 hi\r\n")
    assert answer(dialog, b"250-hi\r\n250 STARTTLS\r\n") == (Step.NOTHING, b"STARTTLS\r\n")
    assert answer(dialog, b"220 go\r\n")[0] is Step.START_TLS
    dialog.tls_started()
    assert dialog.output == b"EHLO load.example.org\r\n"
    assert answer(dialog, b"250 AUTH PLAIN\r\n") == (Step.NOTHING, b"AUTH PLAIN AHUAcA==\r\n")
    assert answer(dialog, b"235 in\r\n")[0] is Step.READY


@pytest.mark.parametrize("length", [1, 2, 3, 7, 1_000])
def test_the_sink_takes_commands_and_content_in_pieces_of_any_length(length: int) -> None:
    taken: list[bytes] = []

    def take(content: bytes) -> bytes:
        taken.append(content)
        return b"250 taken\r\n"

    dialog = sink.Dialog(take)
    stream = b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<a@b>\r\nDATA\r\n" + _CONTENT + b"DATA\r\n.\r\nQUIT\r\n"
    replies = b"".join(dialog.receive(stream[at : at + length]) for at in range(0, len(stream), length))
    assert taken == [_CONTENT, b".\r\n"]
    assert [line[:3] for line in replies.splitlines() if line[3:4] == b" "] == [
        *(b"250", b"250", b"250", b"354", b"250"),
        *(b"354", b"250", b"221"),
    ]
    assert dialog.is_over
