"""The link between agent and workers: frames whole, in pieces, and hostile."""

from __future__ import annotations

import itertools
import struct
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane import link
from dataplane.core.commands import Filter
from dataplane.core.ids import MessageId

SPOOL = str(uuid.UUID(int=7))
STATE = link.SpoolState(
    SPOOL, 3, 10, 4, 12, 5, True, (SPOOL, SPOOL), 2, True, "0f" * 16, (("1e" * 16, 11), ("2d" * 16, 12))
)
MESSAGES: list[link.Message] = [
    link.WorkerHello(0, 42, "ab" * 32, 9, (STATE,)),
    link.ConfigChanged("cd" * 32),
    link.ConfigApplied("cd" * 32, ""),
    link.DenialsChanged(4),
    link.DenialsApplied(4, "unreadable"),
    link.ContactTime(1_790_000_000_000),
    link.LedgerPull(SPOOL, 11),
    link.LedgerPause(SPOOL),
    link.LedgerRecords(SPOOL, 3, 12, [b"", b"\x00\xff" * 300, b"x"]),
    link.LedgerCursor(SPOOL, 14),
    link.LedgerQuestion(SPOOL, 3, 41, "accounts/demo", (0, 4095)),
    link.LedgerStatement(b"\x00\xff statement"),
    link.QueueCall(5, link.QueueMethod.STORE_MESSAGES, 20_000, b"\x00\xff" * 300),
    link.QueueAnswer(5, 14, b"away"),
    link.LedgerInvitation(SPOOL),
    link.LedgerTake(SPOOL, 4, 17),
    link.LedgerHandover(b"\x00\xff part"),
    link.DrainNode(wanted=True),
    link.RunCommand("c1", SPOOL, 1, "accounts/demo", (b"\x01" * 16, b"\x02" * 16)),
    link.RunCommand(
        *("c2", SPOOL, 6, "accounts/-", (), "providers/new"),
        Filter(5_000, MessageId(b"\x03" * 16), "providers/old", "x.test", (2, 5)),
    ),
    link.SpoolVerdict(SPOOL, refused=True),
    link.StatusRequest(2),
    link.WorkerStatus(
        2,
        draining=False,
        waiting_count=1,
        oldest_accepted_ms=5,
        spools=(STATE,),
        samples=(link.Sample("smtp_connections_total", ("accepted",), 3),),
        closed=True,
    ),
]
STREAM = b"".join(map(link.encode, MESSAGES))


def test_every_message_survives_the_way() -> None:
    assert link.FrameDecoder().feed(STREAM) == MESSAGES


def test_every_kind_of_message_is_tried_here() -> None:
    assert {type(message) for message in MESSAGES} == set(link._TYPES)


def test_byte_by_byte_gives_the_same_messages() -> None:
    decoder = link.FrameDecoder()
    received = [message for byte in STREAM for message in decoder.feed(bytes((byte,)))]
    assert received == MESSAGES


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_any_cut_gives_the_same_messages(cuts: list[int]) -> None:
    decoder = link.FrameDecoder()
    edges = [0, *sorted(cuts), len(STREAM)]
    received = []
    for start, end in itertools.pairwise(edges):
        received += decoder.feed(STREAM[start:end])
    assert received == MESSAGES


@given(st.binary(max_size=400))
def test_garbage_is_messages_or_a_link_error_and_nothing_else(data: bytes) -> None:
    decoder = link.FrameDecoder()
    try:
        decoder.feed(data)
    except link.LinkError:
        return


@given(st.sampled_from(range(16)), st.binary(max_size=80))
def test_a_frame_with_a_garbled_payload_is_a_link_error_or_a_message(frame_type: int, payload: bytes) -> None:
    frame = struct.pack(">IB", len(payload) + 1, frame_type) + payload
    try:
        link.FrameDecoder().feed(frame)
    except link.LinkError:
        return


def test_a_frame_longer_than_the_bound_is_refused_before_it_is_read() -> None:
    with pytest.raises(link.LinkError, match="bytes"):
        link.FrameDecoder().feed(struct.pack(">I", link.MAX_FRAME_BYTES + 1))


def test_a_message_longer_than_the_bound_is_not_sent() -> None:
    with pytest.raises(link.LinkError, match="too long"):
        link.encode(link.LedgerRecords(SPOOL, 1, 1, [bytes(link.MAX_FRAME_BYTES)]))


def test_lengths_that_lie_about_the_records_are_refused() -> None:
    frame = bytearray(link.encode(link.LedgerRecords(SPOOL, 1, 1, [b"abc"])))
    frame[-4] += 1
    with pytest.raises(link.LinkError):
        link.FrameDecoder().feed(bytes(frame))
