"""Ledger records as bytes: everything arrives, and nothing in them can make an outcome unstorable."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from dataplane.adapters.ledger_codec import encode_record
from dataplane.core.envelope import Envelope
from dataplane.core.idempotency import SubmissionKey
from dataplane.core.ids import MessageId
from dataplane.core.ledger import AttemptEvent, CommandResult, LedgerRecord, RecipientUpdate
from dataplane.core.queue import EventType, State
from postroad.node.v1 import ledger_pb2 as pb

MESSAGE_ID = MessageId(bytes(range(16)))
ENVELOPE = Envelope(
    message_id=MESSAGE_ID,
    account="accounts/demo",
    account_uid="uid",
    credential="accounts/demo/smtpCredentials/app",
    sender="app@example.com",
    size_bytes=4_096,
    accepted_ms=1_795_171_046_000,
    session="session",
    client_address="192.0.2.7",
    client_helo="client.example",
    client_tls="TLSv1.3",
    header_message_id="<1@example.com>",
    subject="Hello",
    smtputf8=False,
    body_8bit=False,
)
EVENT = AttemptEvent(
    indexes=(0, 2),
    type=EventType.SENT,
    time_ms=1,
    attempt=2,
    bundle_revision=3,
    rule="rule",
    provider="provider",
    remote_host="host[192.0.2.9]:25",
    tls="TLSv1.2",
    reply_code=250,
    enhanced_code="2.0.0",
    reply_text="ok",
    queued_ms=4,
    waiting_ms=5,
    connecting_ms=6,
    transferring_ms=7,
)
RECORD = LedgerRecord(
    message_id=MESSAGE_ID,
    account="accounts/demo",
    accepted=ENVELOPE,
    recipients_accepted=("a@b.c", "d@e.f"),
    updates=(RecipientUpdate(1, State.DEFERRED, 2, 3, 4),),
    events=(EVENT,),
    command_result=CommandResult("command", 1, 2, "error"),
)


def test_every_field_arrives() -> None:
    assert pb.LedgerRecord.FromString(encode_record(RECORD)) == pb.LedgerRecord(
        message_id=MESSAGE_ID,
        account="accounts/demo",
        accepted=pb.AcceptedMessage(
            accept_time_ms=1_795_171_046_000,
            sender="app@example.com",
            size_bytes=4_096,
            header_message_id="<1@example.com>",
            subject="Hello",
            credential="accounts/demo/smtpCredentials/app",
            client_address="192.0.2.7",
            client_helo="client.example",
            client_tls="TLSv1.3",
            session="session",
            recipients=["a@b.c", "d@e.f"],
        ),
        recipients=[
            pb.RecipientUpdate(index=1, state=pb.RECIPIENT_STATE_DEFERRED, attempts=2, next_attempt_ms=3, update_ms=4)
        ],
        events=[
            pb.AttemptEvent(
                indexes=[0, 2],
                type=pb.EVENT_TYPE_SENT,
                time_ms=1,
                attempt=2,
                bundle_revision=3,
                rule="rule",
                provider="provider",
                remote_host="host[192.0.2.9]:25",
                tls="TLSv1.2",
                reply_code=250,
                enhanced_code="2.0.0",
                reply_text="ok",
                queued_ms=4,
                waiting_ms=5,
                connecting_ms=6,
                transferring_ms=7,
            )
        ],
        command_result=pb.CommandResult(command="command", changed_count=1, too_late_count=2, error="error"),
    )


def test_what_is_not_there_is_not_there() -> None:
    read = pb.LedgerRecord.FromString(encode_record(LedgerRecord(MESSAGE_ID, "accounts/demo")))
    assert not read.HasField("accepted")
    assert not read.HasField("command_result")
    assert (len(read.recipients), len(read.events)) == (0, 0)


def test_the_numbers_of_states_and_events_are_those_of_the_contract() -> None:
    states = {f"RECIPIENT_STATE_{state.name}": int(state) for state in State}
    events = {f"EVENT_TYPE_{event.name}": int(event) for event in EventType}
    assert {**states, "RECIPIENT_STATE_UNSPECIFIED": 0} == dict(pb.RecipientState.items())
    assert {**events, "EVENT_TYPE_UNSPECIFIED": 0} == dict(pb.EventType.items())


def test_an_outcome_with_text_that_is_no_unicode_is_stored_all_the_same() -> None:
    spoilt = replace(
        RECORD,
        accepted=replace(ENVELOPE, client_helo="a\udcffb"),
        recipients_accepted=("x\ud800@y.z",),
        events=(replace(EVENT, reply_text="no\udc80"),),
        command_result=CommandResult("c", 0, 0, "\udc80"),
    )
    read = pb.LedgerRecord.FromString(encode_record(spoilt))
    assert read.accepted.client_helo == "a?b"
    assert read.accepted.recipients == ["x?@y.z"]
    assert read.events[0].reply_text == "no?"
    assert read.command_result.error == "?"
    assert read.recipients[0].state == pb.RECIPIENT_STATE_DEFERRED


@given(st.text(st.characters(), max_size=50))
def test_no_text_makes_an_outcome_unstorable(text: str) -> None:
    record = replace(RECORD, events=(replace(EVENT, reply_text=text, enhanced_code=text),))
    pb.LedgerRecord.FromString(encode_record(record))


def test_a_submission_key_travels_and_mail_without_one_says_nothing_of_it() -> None:
    plain = pb.LedgerRecord.FromString(encode_record(RECORD)).accepted
    assert (plain.submission_key_hash, plain.submission_key_checked) == (b"", False)
    key = SubmissionKey(b"k" * 32, b"c" * 32, checked=True)
    for subject in ("Hello", "\udcff"):
        record = replace(RECORD, accepted=replace(ENVELOPE, submission_key=key, subject=subject))
        found = pb.LedgerRecord.FromString(encode_record(record)).accepted
        assert (found.submission_key_hash, found.submission_key_checked) == (b"k" * 32, True)
