"""The inbox's folder: what is stored is what comes out, and what was never acknowledged does not count."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from postroad.inbox import Inbox, InboxError

_ID = "0196b6a8-3a5b-7c11-9f00-0123456789ab"
_CONTENT = (
    b"Received: from app ([127.0.0.1])\r\n\tby node-1 with ESMTPSA id " + _ID.encode() + b";\r\n"
    b"\tFri, 20 Nov 2026 10:00:00 +0000\r\n"
    b"Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\r\n from here\r\n\r\nbody\r\n.\r\n\xff\x00\r\n"
)


def _add(inbox: Inbox, content: bytes = _CONTENT) -> int:
    mail = inbox.add(
        content, sender="app@example.com", recipients=["a@example.net"], receive_time="2026-11-20T10:00:00.000+00:00"
    )
    return mail.number


def test_content_comes_out_byte_for_byte(tmp_path: Path) -> None:
    _add(Inbox(tmp_path))
    inbox = Inbox(tmp_path)
    (mail,) = inbox.mails()
    assert inbox.content(mail) == _CONTENT
    assert (mail.number, mail.sender, mail.recipients, mail.size_bytes) == (
        1,
        "app@example.com",
        ("a@example.net",),
        len(_CONTENT),
    )


def test_subject_is_decoded_and_the_message_id_is_read_from_received(tmp_path: Path) -> None:
    _add(Inbox(tmp_path))
    (mail,) = Inbox(tmp_path).mails()
    assert mail.subject == "Grüße from here"
    assert mail.message == _ID


@pytest.mark.parametrize(
    "content",
    [b"", b"\r\n", b"no header at all", b"Subject: =?unknown-charset?b?!!!?=\r\n\r\n", b"Subject: \xff\xfe\r\n\r\nx"],
)
def test_any_content_is_kept(tmp_path: Path, content: bytes) -> None:
    _add(Inbox(tmp_path), content)
    inbox = Inbox(tmp_path)
    assert [inbox.content(mail) for mail in inbox.mails()] == [content]


def test_mail_is_found_by_number_id_and_resource_name(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path)
    _add(inbox, b"Subject: other\r\n\r\n")
    _add(inbox)
    assert [mail.number for mail in inbox.find("2")] == [2]
    assert [mail.number for mail in inbox.find(_ID.upper())] == [2]
    assert [mail.number for mail in inbox.find(f"accounts/demo/messages/{_ID}")] == [2]


@pytest.mark.parametrize("name", ["3", "0196b6a8-3a5b-7c11-9f00-000000000000", "²"])
def test_what_is_not_there_is_said_so(tmp_path: Path, name: str) -> None:
    _add(Inbox(tmp_path))
    with pytest.raises(InboxError):
        Inbox(tmp_path).find(name)


def test_content_without_envelope_was_never_acknowledged_and_its_number_is_given_again(tmp_path: Path) -> None:
    _add(Inbox(tmp_path))
    (tmp_path / "000002.eml").write_bytes(b"half")
    inbox = Inbox(tmp_path)
    assert [mail.number for mail in inbox.mails()] == [1]
    assert _add(inbox) == 2
    assert inbox.content(inbox.mails()[1]) == _CONTENT


def test_many_threads_get_numbers_of_their_own(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda _: _add(inbox), range(64)))
    assert sorted(numbers) == list(range(1, 65))
    assert inbox.count() == 64


def test_the_last_ones_can_be_asked_for(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path)
    for _ in range(3):
        _add(inbox)
    assert [mail.number for mail in inbox.mails(last=2)] == [2, 3]
    assert inbox.mails(last=0) == []


def test_a_folder_that_does_not_exist_is_an_empty_inbox(tmp_path: Path) -> None:
    assert Inbox(tmp_path / "none").mails() == []
