"""Taking the key out of a message changes nothing else of it, wherever it stands and however the octets are cut."""

from __future__ import annotations

import asyncio
import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.adapters.spool_ram import RamSpool
from dataplane.core.headers import MAX_KEY_CHARS, scan, without_key
from dataplane.core.idempotency import SubmissionHash, hash_key
from support.ingress import ACCOUNT, Clock, make_node, until
from support.octets import LINES, OPENING, open_session

# Less than any of these messages has.
SPILL_BYTES = 100

_KEYS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=MAX_KEY_CHARS)
_NAMES = st.sampled_from([b"Idempotency-Key", b"idempotency-key", b"IDEMPOTENCY-KEY", b"iDempotency-keY"])
_BEFORE = st.sampled_from([b"", b" ", b"\t \t", b"\r\n ", b"\r\n\t", b" \r\n  "])
_BEHIND = st.sampled_from([b"", b" ", b"\t", b"  \t"])
_FIELDS = st.lists(
    st.sampled_from(
        [
            b"Subject: large\r\n",
            b"Subject:\r\n folded\r\n\tand again\r\n",
            b"X-Idempotency-Key: not this one\r\n",
            b"Idempotency-Keys: nor this\r\n",
            b"X: \r\n idempotency-key: nor what is folded\r\n",
            b"To: b@example.net\r\n",
            b"Date: today\r\n",
        ]
    ),
    max_size=4,
    unique=True,
)
_BODIES = st.sampled_from([b"", b"\r\n", b"\r\nbody\r\n", b"\r\nIdempotency-Key: of the body\r\n\r\n", b"\r\n\r\n"])


@given(_NAMES, _BEFORE, _KEYS, _BEHIND, _FIELDS, _FIELDS, _BODIES)
def test_the_field_goes_and_every_other_octet_stays(
    name: bytes, before: bytes, key: str, behind: bytes, above: list[bytes], below: list[bytes], body: bytes
) -> None:
    field = name + b":" + before + key.encode() + behind + b"\r\n"
    content = b"".join(above) + field + b"".join(below) + body
    found = scan(content)
    assert (found.idempotency_key, found.problem) == (key.encode(), None)
    assert without_key(content, found) == b"".join((*above, *below)) + body


@given(st.binary(max_size=300), _KEYS)
def test_whatever_else_the_content_is_what_is_taken_out_is_one_field(noise: bytes, key: str) -> None:
    content = b"From: a@b.example\r\nIdempotency-Key: " + key.encode() + b"\r\n" + noise
    found = scan(content)
    if found.idempotency_key and found.problem is None:
        left = without_key(content, found)
        assert left == b"From: a@b.example\r\n" + noise
        assert not scan(left).idempotency_key


async def store(fields: list[bytes], at: int, lines: list[bytes], places: list[int], spill_bytes: int) -> None:
    """Send a message in pieces; what is stored is what was sent without its key, and hashed as such."""
    node = make_node(spool=RamSpool(Clock()), spill_bytes=spill_bytes)
    session, transport = open_session(node)
    session.data_received(OPENING)
    await until(lambda: b"354 " in transport.said)
    fields = [b"From: app@example.com\r\n", b"Message-ID: <1@example.com>\r\n", *fields]
    body = b"\r\n" + b"".join(line + b"\r\n" for line in lines)
    key = b"Idempotency-Key:\r\n order-1\r\n"
    at %= len(fields) + 1
    sent = b"".join((*fields[:at], key, *fields[at:])) + body
    plain = b"".join(fields) + body
    stuffed = sent.replace(b"\r\n.", b"\r\n..") + b".\r\n"
    marks = sorted({place % len(stuffed) for place in places} | {0, len(stuffed)})
    for start, end in itertools.pairwise(marks):
        await until(lambda: not transport.paused)
        session.data_received(stuffed[start:end])
    await until(lambda: b"queued as" in transport.said)
    envelope = node.delivery.waiting[0][0] if node.delivery.waiting else node.delivery.delivered[0][0]
    stored = await node.spool.load(envelope.message_id)
    assert stored is not None
    assert stored.content.endswith(plain)
    added = stored.content[: -len(plain)]
    assert added.startswith(b"Received: from c ")
    assert added.count(b"\r\n") == (4 if b"Date: today\r\n" in fields else 5)
    assert len(stored.content) == envelope.size_bytes
    hashed = SubmissionHash("app@example.com", ["b@example.net"])
    hashed.add(plain)
    assert envelope.submission_key is not None
    assert envelope.submission_key.content_hash == hashed.digest()
    assert envelope.submission_key.key_hash == hash_key(ACCOUNT.uid, b"order-1")
    assert node.counters.content_bytes == 0
    session.connection_lost(None)


@settings(max_examples=150, deadline=None)
@given(
    _FIELDS,
    st.integers(0, 6),
    st.lists(LINES, max_size=40),
    st.lists(st.integers(0, 20_000), max_size=12),
    st.booleans(),
)
def test_any_splitting_stores_and_hashes_the_same_octets(
    fields: list[bytes],
    at: int,
    lines: list[bytes],
    places: list[int],
    spills: bool,  # noqa: FBT001 - drawn, not called
) -> None:
    asyncio.run(store(fields, at, lines, places, SPILL_BYTES if spills else 1_000_000))


@settings(max_examples=15, deadline=None)
@given(_FIELDS, st.integers(0, 6), st.lists(LINES, min_size=20, max_size=40))
def test_octet_by_octet_stores_and_hashes_the_same_octets(fields: list[bytes], at: int, lines: list[bytes]) -> None:
    asyncio.run(store(fields, at, lines, list(range(20_000)), SPILL_BYTES))


_ADDRESSES = st.text(st.characters(min_codepoint=33, codec="utf-8"), min_size=1, max_size=4)
_SUBMISSIONS = st.tuples(
    st.one_of(st.just(""), _ADDRESSES), st.lists(_ADDRESSES, min_size=1, max_size=3), st.binary(max_size=4)
)


@given(_SUBMISSIONS, _SUBMISSIONS, st.integers(0, 4))
def test_submissions_have_one_hash_when_all_of_them_is_the_same(
    one: tuple[str, list[str], bytes], other: tuple[str, list[str], bytes], cut: int
) -> None:
    first, second = SubmissionHash(*one[:2]), SubmissionHash(*other[:2])
    first.add(one[2][:cut], one[2][cut:])
    second.add(other[2])
    assert (first.digest() == second.digest()) is (one == other)


@given(st.tuples(_ADDRESSES, _KEYS), st.tuples(_ADDRESSES, _KEYS))
def test_a_key_belongs_to_its_account(one: tuple[str, str], other: tuple[str, str]) -> None:
    hashes = [hash_key(uid, key.encode()) for uid, key in (one, other)]
    assert (hashes[0] == hashes[1]) is (one == other)
