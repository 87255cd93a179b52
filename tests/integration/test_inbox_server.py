"""The inbox over real sockets: 250 means stored, our own faults are 451, and nothing acknowledged is lost."""

from __future__ import annotations

import asyncio
import smtplib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from postroad.inbox import Inbox, ReceivedMail
from postroad.inbox.server import serve


@asynccontextmanager
async def _serving(inbox: Inbox) -> AsyncIterator[tuple[int, asyncio.Queue[ReceivedMail]]]:
    stop = asyncio.Event()
    ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    received: asyncio.Queue[ReceivedMail] = asyncio.Queue()
    task = asyncio.create_task(
        serve(inbox, "127.0.0.1", 0, stop=stop, on_ready=ready.set_result, on_received=received.put_nowait)
    )
    # Did it fail to start, that is the error to see, not a future that never comes.
    task.add_done_callback(lambda _: ready.cancel())
    try:
        yield await asyncio.wait_for(ready, 20), received
    finally:
        stop.set()
        await task


async def _talk(port: int, data: bytes, until: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        return await asyncio.wait_for(reader.readuntil(until), 20)
    finally:
        writer.close()
        await writer.wait_closed()


_ENVELOPE = (
    b"EHLO test\r\nMAIL FROM:<app@example.com>\r\nRCPT TO:<a@example.net>\r\nRCPT TO:<b@example.net>\r\nDATA\r\n"
)


async def test_content_is_stored_exactly_with_dots_unstuffed(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path)
    lines = b"Subject: x\r\n\r\n.leading dot\r\n..two\r\nlone \n and \r stay\r\n\x00\xff" + b"y" * 5_000 + b"\r\n"
    stuffed = lines.replace(b"\r\n.", b"\r\n..")
    async with _serving(inbox) as (port, _received):
        answer = await _talk(port, _ENVELOPE + stuffed + b".\r\n", b"stored as 1\r\n")
    (mail,) = inbox.mails()
    assert b"250 2.0.0 stored as 1" in answer
    assert inbox.content(mail) == lines
    assert mail.recipients == ("a@example.net", "b@example.net")
    assert mail.helo == "test"


async def test_pipelining_is_offered_and_two_messages_in_one_write_are_kept_apart(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path)
    second = _ENVELOPE.partition(b"\r\n")[2] + b"two\r\n.\r\nQUIT\r\n"
    async with _serving(inbox) as (port, _received):
        answer = await _talk(port, _ENVELOPE + b"one\r\n.\r\n" + second, b"221 Bye\r\n")
    assert b"250-PIPELINING" in answer
    assert b"250-8BITMIME" in answer
    assert b"250-SMTPUTF8" in answer
    assert [inbox.content(mail) for mail in inbox.mails()] == [b"one\r\n", b"two\r\n"]


async def test_smtplib_submits_international_addresses(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path)

    def submit(port: int) -> None:
        with smtplib.SMTP("127.0.0.1", port, timeout=20) as client:
            client.sendmail(
                "app@example.com", ["grüße@example.net"], "Subject: ö\r\n\r\n".encode(), ["SMTPUTF8", "BODY=8BITMIME"]
            )

    async with _serving(inbox) as (port, _received):
        await asyncio.to_thread(submit, port)
    (mail,) = inbox.mails()
    assert mail.recipients == ("grüße@example.net",)
    assert mail.subject == "ö"
    assert {"SMTPUTF8", "BODY=8BITMIME"} <= set(mail.options)


async def test_null_sender_is_taken(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path)
    async with _serving(inbox) as (port, _received):
        await _talk(port, _ENVELOPE.replace(b"app@example.com", b"") + b"x\r\n.\r\n", b"stored as 1\r\n")
    assert inbox.mails()[0].sender == ""


async def test_a_disk_that_refuses_is_451_and_the_server_goes_on(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path / "inbox")
    (tmp_path / "inbox").write_text("a file where the folder should be")
    async with _serving(inbox) as (port, _received):
        answer = await _talk(port, _ENVELOPE + b"x\r\n.\r\n", b"later\r\n")
        assert b"\r\n451 4.3.1 " in answer
        inbox.folder.unlink()
        await _talk(port, _ENVELOPE + b"x\r\n.\r\n", b"stored as 1\r\n")
    assert inbox.count() == 1


async def test_an_unforeseen_error_is_451_without_its_text(tmp_path: Path) -> None:
    class BrokenInbox(Inbox):
        def add(self, *_args: object, **_fields: object) -> ReceivedMail:
            raise RuntimeError("secret detail")

    async with _serving(BrokenInbox(tmp_path)) as (port, _received):
        answer = await _talk(port, _ENVELOPE + b"x\r\n.\r\n", b"later\r\n")
    assert b"\r\n451 4.3.0 " in answer
    assert b"secret" not in answer


async def test_a_client_that_leaves_after_the_dot_does_not_undo_the_storing(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path)
    async with _serving(inbox) as (port, received):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(_ENVELOPE)
        await asyncio.wait_for(reader.readuntil(b"354 "), 20)
        writer.write(b"x\r\n.\r\n")
        await writer.drain()
        writer.close()
        mail = await asyncio.wait_for(received.get(), 20)
    assert inbox.content(mail) == b"x\r\n"


async def test_too_much_content_is_refused_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("postroad.inbox.server.MAX_CONTENT_BYTES", 1_000)
    inbox = Inbox(tmp_path)
    async with _serving(inbox) as (port, _received):
        answer = await _talk(port, _ENVELOPE + b"x" * 998 + b"\r\nxx\r\n.\r\nNOOP\r\n", b"data\r\n250 OK\r\n")
    assert answer.count(b"\r\n552 ") == 1
    assert inbox.count() == 0
