"""A message that is made of parts: what readers see of it, and that nothing in a part can become a header field."""

from __future__ import annotations

import email
from email.policy import default

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.domain.composing import compose
from controlplane.domain.errors import InvalidArgumentError
from controlplane.domain.outgoing import Attachment, Content, ShownAddress
from dataplane.core.datastream import Problem, content_problem
from dataplane.core.headers import scan

AUTHOR = ShownAddress("app@acme.example", "App")
TO = (ShownAddress("someone@example.net"),)


def made(**parts: object) -> bytes:
    return compose(Content(author=AUTHOR, to=TO, **parts), "message.content", "secret")  # type: ignore[arg-type]  # parts


def read(content: bytes) -> email.message.EmailMessage:
    return email.message_from_bytes(content, policy=default)


def test_text_alone_is_one_part() -> None:
    assert made(subject="Hello", text="Hi.\n") == (
        b"From: App <app@acme.example>\r\nTo: someone@example.net\r\nSubject: Hello\r\nMIME-Version: 1.0\r\n"
        b'Content-Type: text/plain; charset="utf-8"\r\nContent-Transfer-Encoding: 7bit\r\n\r\nHi.\r\n'
    )


@pytest.mark.parametrize(
    ("parts", "shape"),
    [
        ({}, ["text/plain"]),
        ({"html": "<p>"}, ["text/html"]),
        ({"text": "a", "html": "<p>"}, ["multipart/alternative", "text/plain", "text/html"]),
        (
            {"html": "<p>", "attachments": (Attachment("a", "image/png", b"x", "a@b.example"),)},
            ["multipart/related", "text/html", "image/png"],
        ),
        (
            {
                "text": "a",
                "html": "<p>",
                "attachments": (
                    Attachment("f.pdf", "application/pdf", b"x"),
                    Attachment("", "", b"x", "a@b.example"),
                ),
            },
            [
                "multipart/mixed",
                "multipart/alternative",
                "text/plain",
                "multipart/related",
                "text/html",
                "application/octet-stream",
                "application/pdf",
            ],
        ),
    ],
)
def test_parts_have_the_shape_that_readers_expect(parts: dict[str, object], shape: list[str]) -> None:
    message = read(made(**parts))
    assert [part.get_content_type() for part in message.walk()] == shape
    assert [part.defects for part in message.walk() if part.defects] == []


def test_the_same_parts_give_the_same_octets() -> None:
    parts = {"text": "a", "html": "<p>", "attachments": (Attachment("a.txt", "text/plain", b"x"),)}
    assert made(**parts) == made(**parts)


def test_a_long_word_in_a_field_of_the_callers_own_is_not_cut() -> None:
    url = "<https://acme.example/" + "u" * 300 + ">"
    content = made(headers=(("List-Unsubscribe", f"{url}, <mailto:off@acme.example>"),))
    assert f"List-Unsubscribe: {url},\r\n <mailto:off@acme.example>\r\n".encode() in content


def test_names_and_files_in_other_scripts_come_back_as_they_were() -> None:
    content = compose(
        Content(
            author=ShownAddress("app@acme.example", "Jürgen „x“, y"),
            to=(ShownAddress("a@example.net", "李"),),
            subject="Привет " * 30,
            text="Ünïcödé\n" * 50,
            attachments=(Attachment("Rechnung März.pdf", "application/pdf", bytes(range(256))),),
        ),
        "message.content",
        "secret",
    )
    message = read(content)
    assert content.isascii()
    assert message["From"].addresses[0].display_name == "Jürgen „x“, y"
    assert message["To"].addresses[0].display_name == "李"
    assert message["Subject"].strip() == ("Привет " * 30).strip()
    body = message.get_body(("plain",))
    assert body is not None
    # Canonical line ends, as MIME wants them under base64.
    assert body.get_content() == "Ünïcödé\r\n" * 50
    (file,) = message.iter_attachments()
    assert (file.get_filename(), file.get_content()) == ("Rechnung März.pdf", bytes(range(256)))


def test_an_address_beyond_ascii_makes_a_header_of_utf8() -> None:
    content = compose(Content(author=AUTHOR, to=(ShownAddress("jörg@bücher.example"),)), "message.content", "secret")
    assert "To: jörg@xn--bcher-kva.example\r\n".encode() in content


@pytest.mark.parametrize(
    "name", ["Bcc", "from", "Content-Type", "Received", "Resent-To", "Idempotency-Key", "A b", "", "a:"]
)
def test_fields_that_are_not_the_callers_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        made(headers=((name, "x"),))
    assert refusal.value.violations[0].field == "message.content.headers[0].name"


@pytest.mark.parametrize(
    "content_type", ["text", "multipart/mixed", "message/rfc822", "text/plain; a=b", "a/b\r\nX: y"]
)
def test_what_is_no_type_of_a_file_is_refused(content_type: str) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        made(attachments=(Attachment("a", content_type, b"x"),))
    assert refusal.value.violations[0].field == "message.content.attachments[0].content_type"


ANY_TEXT = st.text(st.characters(codec="utf-8"), max_size=60)
FIELDS = ["from", "to", "subject", "x-own", "mime-version", "content-type", "content-transfer-encoding"]


@given(name=ANY_TEXT, subject=ANY_TEXT, value=ANY_TEXT, text=ANY_TEXT)
def test_no_part_ends_a_field_or_begins_another(name: str, subject: str, value: str, text: str) -> None:
    content = Content(
        author=AUTHOR,
        to=(ShownAddress("a@example.net", name),),
        subject=subject,
        headers=(("X-Own", value),),
        text=text,
    )
    try:
        made_of = compose(content, "message.content", "secret")
    except InvalidArgumentError:
        return
    assert content_problem(made_of, 1_000_000) is Problem.NONE
    header = made_of.partition(b"\r\n\r\n")[0]
    names = [
        line.partition(b":")[0].decode().lower() for line in header.split(b"\r\n") if line[:1] not in (b" ", b"\t")
    ]
    assert names == [one for one in FIELDS if one != "subject" or subject]
    scanned = scan(made_of)
    assert (scanned.problem, scanned.author_domains) == (None, ("acme.example",))
