"""Sending by API on a real PostgreSQL: what is taken, what is refused with which words, and what is stored of it."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2

from postroad.control.v1 import account_service_pb2, limit_service_pb2, node_service_pb2
from postroad.control.v1 import message_pb2 as pb
from postroad.control.v1 import message_service_pb2 as service
from postroad.control.v1 import message_service_pb2_grpc as service_grpc
from postroad.control.v1 import outgoing_message_pb2 as outgoing
from postroad.control.v1.limit_pb2 import Limit
from support.api import ApiError
from support.databases import Database
from support.sending import PARENT, RAW, Sending, composed, raw, running_sending


@pytest.fixture
async def sending(migrated_database: Database) -> AsyncIterator[Sending]:
    async with running_sending(migrated_database) as running:
        yield running


def request(message: outgoing.OutgoingMessage, **more: Any) -> service.SendMessageRequest:
    return service.SendMessageRequest(message=message, **more)


async def refused(sending: Sending, message: outgoing.OutgoingMessage, **more: Any) -> ApiError:
    return await sending.client.refused(sending.send(message, **more))


async def content_of(sending: Sending, name: str) -> bytes:
    rows = await sending.stack.as_superuser(
        "SELECT data FROM postroad.queue_contents WHERE message_id = $1 ORDER BY chunk", name.rpartition("/")[2]
    )
    return b"".join(row["data"] for row in rows)


# --- what is stored --------------------------------------------------------------------------------------------------


async def test_a_raw_message_is_stored_octet_for_octet_below_the_headers_that_are_added(sending: Sending) -> None:
    answer = await sending.send(raw("a@example.net"))
    content = await content_of(sending, answer.message)
    added, found, rest = content.partition(b"From: app@acme.example\r\n")
    assert found + rest == RAW
    lines = added.decode().split("\r\n")
    identifier = answer.message.rpartition("/")[2]
    assert lines[0] == "Received: from unknown ([127.0.0.1])"
    assert lines[1] == f"\tby cp.example with GRPC id {identifier}"
    assert lines[2] == "\tfor <a@example.net>;"
    assert [line.partition(":")[0] for line in lines[4:]] == ["Date", "Message-ID", ""]
    assert f"Message-ID: <{identifier}@cp.example>" in lines


async def first_answer(sending: Sending, name: str) -> service.WatchEventsResponse:
    """What a watch of the message says at once."""
    stub: Any = service_grpc.MessageServiceStub(sending.client.channel)
    request = service.WatchEventsRequest(parent="accounts/acme", message=name)
    call = stub.WatchEvents(request, metadata=sending.client.metadata, timeout=20)
    answer: service.WatchEventsResponse = await call.read()
    call.cancel()
    return answer


async def test_what_was_noted_of_a_message_with_many_recipients_makes_no_answer_large(sending: Sending) -> None:
    many = [f"r{number}@example.net" for number in range(1_000)]
    notes = {f"k{number}": "\N{GRINNING FACE}" * 340 for number in range(3)}
    sent = await sending.send(raw(*many, metadata=notes))
    await sending.stack.as_superuser(
        "INSERT INTO postroad.delivery_events (message_id, account, recipient_index, type, event_time, node, spool,"
        " reply_text) SELECT $1, 'acme', n % 1000, 3, now(), 'edge-1', $2, repeat('x', 512)"
        " FROM generate_series(1, 6000) AS s (n)",
        *(sent.message.rpartition("/")[2], "22222222-2222-4222-8222-222222222222"),
    )
    message: pb.Message = await sending.client.message("GetMessage", service.GetMessageRequest(name=sent.message))
    assert (dict(message.metadata), len(message.events)) == (notes, 5_000)
    assert message.events[-1].type == pb.DELIVERY_EVENT_TYPE_DEFERRED
    assert message.ByteSize() < 8 << 20
    answer = await first_answer(sending, sent.message)
    assert dict(answer.events[-1].metadata) == notes
    assert answer.ByteSize() < 2 << 20


async def test_a_sent_message_waits_in_the_replicated_queue_and_is_in_the_ledger(sending: Sending) -> None:
    answer = await sending.send(
        raw("a@example.net", "b@example.net", tags=["welcome", "eu"], metadata={"order": "47"}, priority=3)
    )
    message: pb.Message = await sending.client.message("GetMessage", service.GetMessageRequest(name=answer.message))
    assert (message.sender, message.subject, message.priority) == ("app@acme.example", "raw", 3)
    assert ([*message.tags], dict(message.metadata)) == (["welcome", "eu"], {"order": "47"})
    assert message.credential.startswith("accounts/acme/apiKeys/")
    assert (message.node, message.client_address) == ("", "127.0.0.1")
    assert [(one.address, one.state) for one in message.recipients] == [
        ("a@example.net", pb.RECIPIENT_STATE_QUEUED),
        ("b@example.net", pb.RECIPIENT_STATE_QUEUED),
    ]
    (event,) = message.events
    assert (event.type, [*event.tags]) == (pb.DELIVERY_EVENT_TYPE_ACCEPTED, [])
    (event,) = (await first_answer(sending, answer.message)).events
    assert (event.type, [*event.tags], dict(event.metadata)) == (
        pb.DELIVERY_EVENT_TYPE_ACCEPTED,
        ["welcome", "eu"],
        {"order": "47"},
    )
    (row,) = await sending.stack.as_superuser("SELECT *, due_time <= now() AS is_due FROM postroad.replicated_queue")
    assert (row["account"], row["priority"], row["epoch"], row["is_due"]) == ("acme", 3, None, True)
    envelope = json.loads(row["envelope"])
    assert envelope["recipients"] == {"0": "a@example.net", "1": "b@example.net"}
    assert (envelope["account"], envelope["priority"]) == ("accounts/acme", 3)
    assert sending.heard.results == ["accepted"]


async def test_a_message_of_parts_goes_to_everybody_who_is_named_once_and_shows_no_bcc(sending: Sending) -> None:
    message = composed(
        cc=[outgoing.EmailAddress(address="cc@example.net")],
        bcc=[outgoing.EmailAddress(address="hidden@example.net"), outgoing.EmailAddress(address="cc@EXAMPLE.net")],
        html="<p>Hi.</p>",
    )
    answer = await sending.send(message)
    content = await content_of(sending, answer.message)
    assert answer.recipient_count == 3
    assert b"hidden" not in content
    assert b"From: App <app@acme.example>\r\nTo: someone@example.net\r\nCc: cc@example.net\r\n" in content
    assert b"multipart/alternative" in content


async def test_a_message_for_later_is_scheduled(sending: Sending) -> None:
    time = Timestamp()
    time.FromDatetime(datetime.now(UTC).replace(microsecond=0) + timedelta(hours=2))
    answer = await sending.send(raw(send_time=time))
    message: pb.Message = await sending.client.message("GetMessage", service.GetMessageRequest(name=answer.message))
    assert (message.state, message.send_time) == (pb.RECIPIENT_STATE_SCHEDULED, time)
    assert message.recipients[0].next_attempt_time == time
    (row,) = await sending.stack.as_superuser("SELECT due_time FROM postroad.replicated_queue")
    assert row["due_time"] == time.ToDatetime(tzinfo=UTC)


async def test_a_time_that_is_past_is_now_and_one_too_far_ahead_is_refused(sending: Sending) -> None:
    past, far = Timestamp(), Timestamp()
    past.FromDatetime(datetime.now(UTC) - timedelta(hours=2))
    far.FromDatetime(datetime.now(UTC) + timedelta(days=31))
    answer = await sending.send(raw(send_time=past))
    message: pb.Message = await sending.client.message("GetMessage", service.GetMessageRequest(name=answer.message))
    assert message.state == pb.RECIPIENT_STATE_QUEUED
    assert not message.HasField("send_time")
    assert (await refused(sending, raw(send_time=far))).fields == ["message.send_time"]


async def test_a_large_content_is_stored_in_chunks_and_whole(sending: Sending) -> None:
    body = b"From: app@acme.example\r\n\r\n" + b"x" * 76 + b"\r\n"
    content = body + (b"y" * 76 + b"\r\n") * 20_000
    answer = await sending.send(raw(content=content))
    assert (await content_of(sending, answer.message)).endswith(content)
    assert await sending.count("queue_contents") > 1


async def test_the_books_of_the_queue_count_every_recipient(sending: Sending) -> None:
    await asyncio.gather(*(sending.send(raw("a@example.net", "b@example.net")) for _ in range(20)))
    (row,) = await sending.stack.as_superuser(
        "SELECT sum(accepted)::integer AS accepted, count(DISTINCT spool) AS rows FROM postroad.queue_entries"
    )
    assert row["accepted"] == await sending.count("queue_recipients") == 40
    # One row alone would let each wait for the commit of the one before.
    assert row["rows"] > 1


async def test_nothing_is_stored_of_a_rehearsal(sending: Sending) -> None:
    answer = await sending.send(raw("a@example.net", "b@example.net"), validate_only=True)
    assert (answer.message, answer.recipient_count) == ("", 2)
    assert (await refused(sending, raw("x"), validate_only=True)).fields == ["message.recipients[0]"]
    assert await sending.count("messages") == 0
    assert sending.budget.asked == []


async def test_messages_are_listed_by_tag(sending: Sending) -> None:
    await sending.send(raw(tags=["a"]))
    wanted = await sending.send(raw(tags=["a", "b"]))
    listed = await sending.client.message("ListMessages", service.ListMessagesRequest(parent=PARENT, tag="b"))
    assert [one.name for one in listed.messages] == [wanted.message]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (raw("nobody"), "message.recipients[0]"),
        (raw("a@example.net", "b@[192.0.2.1]"), "message.recipients[1]"),
        (raw(sender="app"), "message.sender"),
        (raw(sender=""), "message.sender"),
        (outgoing.OutgoingMessage(sender="app@acme.example", recipients=["a@b.example"]), "message"),
        (outgoing.OutgoingMessage(), "message"),
        (raw(content=b"From: app@acme.example\n\nHi.\n"), "message.raw"),
        (raw(content=b"From: app@acme.example\r\n\r\nHi\0\r\n"), "message.raw"),
        (raw(content=b"From: app@acme.example\r\n\r\n" + b"x" * 999 + b"\r\n"), "message.raw"),
        (raw(content=b"From: a@acme.example\r\nFrom: b@acme.example\r\n\r\nHi\r\n"), "message.raw"),
        (raw(content=b"Idempotency-Key: k\r\n" + RAW), "message.raw"),
        (raw(tags=["a\nb"]), "message.tags[0]"),
        (raw(tags=[str(number) for number in range(21)]), "message.tags"),
        (raw(metadata={"a": "b\r\n"}), "message.metadata.a"),
        (
            raw(tags=["t" * 60], metadata={f"k{number}": "\N{GRINNING FACE}" * 500 for number in range(3)}),
            "message.metadata",
        ),
        (raw(priority=10), "message.priority"),
        (composed(subject="a\r\nBcc: x@y.example"), "message.content.subject"),
        (
            composed(headers=[outgoing.HeaderField(name="X-A", value="a\nBcc: x@y.example")]),
            "message.content.headers[0].value",
        ),
        (composed(headers=[outgoing.HeaderField(name="X A", value="a")]), "message.content.headers[0].name"),
        (composed(headers=[outgoing.HeaderField(name="Bcc", value="a@b.c")]), "message.content.headers[0].name"),
        (
            composed(to=[outgoing.EmailAddress(address="a@b.example", display_name="A\r\nX: y")]),
            "message.content.to[1].display_name",
        ),
        (
            composed(attachments=[outgoing.Attachment(file_name="a\r\nb", data=b"x")]),
            "message.content.attachments[0].file_name",
        ),
    ],
)
async def test_what_is_wrong_with_a_message_is_told_with_the_field(
    sending: Sending, message: outgoing.OutgoingMessage, field: str
) -> None:
    error = await refused(sending, message)
    assert (error.code, error.reason, error.fields) == (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID", [field])
    assert await sending.count("messages") == 0


async def test_domains_that_are_not_the_accounts_are_refused(sending: Sending) -> None:
    for message in (
        raw(sender="app@other.example"),
        raw(content=b"From: app@other.example\r\n\r\nHi.\r\n"),
        raw(content=b"From: app@acme.example\r\nSender: x@other.example\r\n\r\nHi.\r\n"),
    ):
        error = await refused(sending, message)
        assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "SENDER_NOT_OWNED")
        assert error.details["PreconditionFailure"].violations[0].subject == "other.example"


async def test_the_null_sender_may_send(sending: Sending) -> None:
    answer = await sending.send(raw(sender="<>"))
    message: pb.Message = await sending.client.message("GetMessage", service.GetMessageRequest(name=answer.message))
    assert message.sender == ""


async def test_a_recipient_that_no_rule_takes_is_refused(migrated_database: Database) -> None:
    async with running_sending(migrated_database) as sending:
        client = await sending.stack.make_account("narrow")
        error = await client.refused(
            client.message(
                "SendMessage",
                service.SendMessageRequest(
                    parent="accounts/narrow",
                    message=raw(sender="a@narrow.example", content=b"From: a@narrow.example\r\n\r\nHi\r\n"),
                ),
            )
        )
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_ROUTE")
    assert error.details["PreconditionFailure"].violations[0].subject == "someone@example.net"


async def test_a_suspended_account_cannot_send_and_a_resumed_one_can(sending: Sending) -> None:
    operator = sending.stack.operator
    await operator.account("SuspendAccount", account_service_pb2.SuspendAccountRequest(name=PARENT))
    error = await refused(sending, raw())
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ACCOUNT_SUSPENDED")
    await operator.account("ResumeAccount", account_service_pb2.ResumeAccountRequest(name=PARENT))
    await sending.send(raw())


async def test_a_change_of_the_account_counts_at_once(sending: Sending) -> None:
    await sending.send(raw())
    account = await sending.stack.operator.account("GetAccount", account_service_pb2.GetAccountRequest(name=PARENT))
    account.sender_domains[:] = ["new.example"]
    await sending.stack.operator.account("UpdateAccount", account_service_pb2.UpdateAccountRequest(account=account))
    assert (await refused(sending, raw())).reason == "SENDER_NOT_OWNED"


async def test_an_account_that_was_made_anew_since_it_was_read_is_sent_nothing(sending: Sending) -> None:
    """Bundle and account are of different ones, as when both are deleted and made anew between two statements."""
    await sending.stack.as_superuser("UPDATE postroad.accounts SET uid = gen_random_uuid() WHERE account = 'acme'")
    error = await refused(sending, raw())
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "RESOURCE_NOT_FOUND")
    assert [one.key for one in sending.budget.given_back] == ["account:message"]
    for table in ("messages", "replicated_queue", "queue_recipients", "queue_contents", "queue_entries"):
        assert await sending.count(table) == 0


async def test_keys_without_the_scope_and_of_other_accounts_are_refused_before_anything_else(sending: Sending) -> None:
    reader = await sending.stack.make_key("acme", "messages.read")
    other = await sending.stack.make_account("other")
    wrong = service.SendMessageRequest(parent=PARENT, message=raw("nobody"))
    assert (await reader.refused(reader.message("SendMessage", wrong))).reason == "SCOPE_MISSING"
    assert (await other.refused(other.message("SendMessage", wrong))).reason == "OTHER_ACCOUNT"
    missing = service.SendMessageRequest(parent="accounts/missing", message=raw())
    assert (await other.refused(other.message("SendMessage", missing))).reason == "OTHER_ACCOUNT"
    operator = sending.stack.operator
    error = await operator.refused(operator.message("SendMessage", missing))
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "RESOURCE_NOT_FOUND")


# --- request ids -----------------------------------------------------------------------------------------------------


async def test_the_same_request_twice_is_one_message(sending: Sending) -> None:
    request_id = str(uuid.uuid4())
    first = await sending.send(composed(), request_id=request_id)
    again = await sending.send(composed(), request_id=request_id.upper())
    assert (again.message, again.repeated_request, first.repeated_request) == (first.message, True, False)
    assert await sending.count("messages") == 1
    assert sending.heard.results == ["accepted", "repeated"]
    assert [one.key for one in sending.budget.given_back] == ["account:message"]


async def test_other_content_under_the_same_request_id_is_refused(sending: Sending) -> None:
    request_id = str(uuid.uuid4())
    await sending.send(raw(), request_id=request_id)
    for other in (raw("other@example.net"), raw(tags=["x"]), composed()):
        error = await refused(sending, other, request_id=request_id)
        assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_ID_REUSED")
        assert error.fields == ["request_id"]
    assert await sending.count("messages") == 1


async def test_a_request_id_is_the_accounts_own(sending: Sending) -> None:
    request_id = str(uuid.uuid4())
    await sending.send(raw(), request_id=request_id)
    operator = sending.stack.operator
    again = await operator.message(
        "SendMessage", service.SendMessageRequest(parent=PARENT, message=raw(), request_id=request_id)
    )
    assert again.repeated_request
    error = await refused(sending, raw(), request_id="order-47")
    assert (error.reason, error.fields) == ("REQUEST_ID_INVALID", ["request_id"])


async def test_a_request_id_is_free_again_after_a_day(sending: Sending) -> None:
    request_id = str(uuid.uuid4())
    await sending.send(raw(), request_id=request_id)
    await sending.stack.as_superuser(
        "UPDATE postroad.submission_keys SET accept_time = accept_time - interval '24 hours 1 second'"
    )
    again = await sending.send(composed(), request_id=request_id)
    assert not again.repeated_request
    assert (await sending.send(composed(), request_id=request_id)).message == again.message


async def test_the_same_request_many_times_at_once_is_one_message(sending: Sending) -> None:
    request_id = str(uuid.uuid4())
    answers = await asyncio.gather(*(sending.send(raw(), request_id=request_id) for _ in range(10)))
    assert len({answer.message for answer in answers}) == 1
    assert sum(not answer.repeated_request for answer in answers) == 1
    assert await sending.count("messages") == await sending.count("replicated_queue") == 1
    taken = sum(len(groups) for groups in sending.budget.asked)
    assert len(sending.budget.given_back) == taken - 1


# --- batches ---------------------------------------------------------------------------------------------------------


async def test_what_is_wrong_with_some_of_a_batch_keeps_none_of_the_others(sending: Sending) -> None:
    requests = [request(raw(f"r{number}@example.net")) for number in range(500)]
    for number in (3, 250, 499):
        requests[number] = request(raw("nobody"))
    requests[7] = request(raw(sender="app@other.example"))
    requests[8] = request(raw(), request_id="no uuid")
    results = await sending.batch(*requests)
    errors = {number: one.error for number, one in enumerate(results) if one.WhichOneof("outcome") == "error"}
    assert sorted(errors) == [3, 7, 8, 250, 499]
    assert (errors[3].code, errors[7].code) == (
        grpc.StatusCode.INVALID_ARGUMENT.value[0],
        grpc.StatusCode.FAILED_PRECONDITION.value[0],
    )
    assert "requests[250].message.recipients[0]" in errors[250].message
    info = error_details_pb2.ErrorInfo()
    assert errors[7].details[0].Unpack(info)
    assert info.reason == "SENDER_NOT_OWNED"
    names = [one.sent.message for one in results if one.WhichOneof("outcome") == "sent"]
    assert len(set(names)) == 495 == await sending.count("messages") == await sending.count("replicated_queue")
    transactions = await sending.stack.as_superuser("SELECT DISTINCT change_xid::text FROM postroad.messages")
    assert len(transactions) == 1
    assert len(sending.budget.asked) == 1


async def test_a_request_id_that_is_there_twice_in_a_batch_is_one_message(sending: Sending) -> None:
    one, other = str(uuid.uuid4()), str(uuid.uuid4())
    first, same, different, new = await sending.batch(
        request(raw(), request_id=one),
        request(raw(), request_id=one),
        request(composed(), request_id=one),
        request(raw(), request_id=other),
    )
    assert same.sent.message == first.sent.message
    assert (first.sent.repeated_request, same.sent.repeated_request) == (False, True)
    assert "requests[2].request_id" in different.error.message
    assert new.sent.message != first.sent.message
    again = await sending.batch(request(raw(), request_id=one), request(raw(), request_id=other))
    assert [answer.sent.repeated_request for answer in again] == [True, True]
    assert await sending.count("messages") == 2


@pytest.mark.parametrize("count", [0, 501])
async def test_a_batch_of_none_or_too_many_is_refused_as_a_whole(sending: Sending, count: int) -> None:
    batch = service.BatchSendMessagesRequest(parent=PARENT, requests=[request(raw())] * count)
    error = await sending.client.refused(sending.client.message("BatchSendMessages", batch))
    assert error.fields == ["requests"]


async def test_a_message_of_a_batch_belongs_to_its_parent(sending: Sending) -> None:
    good, bad = await sending.batch(request(raw(), parent=PARENT), request(raw(), parent="accounts/other"))
    assert good.sent.message
    assert "requests[1].parent" in bad.error.message


async def test_a_rehearsed_batch_stores_nothing(sending: Sending) -> None:
    results = await sending.batch(request(raw()), request(raw("x")), validate_only=True)
    assert [one.WhichOneof("outcome") for one in results] == ["sent", "error"]
    assert await sending.count("messages") == 0


# --- limits ----------------------------------------------------------------------------------------------------------


async def add_limit(sending: Sending, unit: Any, amount: int, period_s: int = 3_600) -> None:
    limit = Limit(scope=Limit.SCOPE_ACCOUNT, unit=unit, amount=amount, burst=amount)
    limit.period.FromSeconds(period_s)
    await sending.stack.operator.limit(
        "CreateLimit", limit_service_pb2.CreateLimitRequest(parent=PARENT, limit_id="own", limit=limit)
    )


async def test_a_limit_refuses_what_it_does_not_hold_and_says_how_long_to_wait(sending: Sending) -> None:
    await add_limit(sending, Limit.UNIT_MESSAGE, 3)
    results = await sending.batch(*[request(raw()) for _ in range(5)])
    assert [one.WhichOneof("outcome") for one in results] == ["sent"] * 3 + ["error"] * 2
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in results[3].error.details)
    assert 1_000 < retry.retry_delay.seconds <= 1_200
    error = await refused(sending, raw())
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "LIMIT_EXHAUSTED")
    assert await sending.count("messages") == 3
    assert sending.heard.results.count("limited") == 3


async def test_a_limit_does_not_refuse_what_was_sent_before(sending: Sending) -> None:
    await add_limit(sending, Limit.UNIT_MESSAGE, 1)
    request_id = str(uuid.uuid4())
    first = await sending.send(raw(), request_id=request_id)
    assert (await refused(sending, raw())).reason == "LIMIT_EXHAUSTED"
    again = await sending.send(raw(), request_id=request_id)
    assert (again.message, again.repeated_request) == (first.message, True)


async def test_recipients_and_octets_are_counted_as_they_are(sending: Sending) -> None:
    await add_limit(sending, Limit.UNIT_RECIPIENT, 10)
    await sending.send(raw(*[f"r{number}@example.net" for number in range(10)]))
    assert (await refused(sending, raw())).reason == "LIMIT_EXHAUSTED"
    costs = {take.key: take.cost for take in sending.budget.asked[0][0]}
    assert costs["account:recipient"] == 10


async def test_the_pools_bounds_hold_here_too(sending: Sending) -> None:
    operator = sending.stack.operator
    pool = await operator.node("GetNodePool", node_service_pb2.GetNodePoolRequest(name="nodePools/default"))
    pool.max_recipients, pool.max_message_bytes = 2, 2_000
    await operator.node("UpdateNodePool", node_service_pb2.UpdateNodePoolRequest(node_pool=pool))
    many = raw("a@example.net", "b@example.net", "c@example.net")
    assert (await refused(sending, many)).fields == ["message.recipients"]
    large = raw(content=RAW + b"x" * 70 + b"\r\n" + (b"y" * 70 + b"\r\n") * 40)
    assert (await refused(sending, large)).fields == ["message.raw"]


# --- the call --------------------------------------------------------------------------------------------------------


async def test_a_request_may_be_larger_than_those_of_other_methods(sending: Sending) -> None:
    content = b"From: app@acme.example\r\n\r\n" + (b"y" * 76 + b"\r\n") * 100_000
    answer = await sending.send(raw(content=content))
    assert answer.message
    other = service.ListMessagesRequest(parent=PARENT, recipient="x" * 5_000_000)
    error = await sending.client.refused(sending.client.message("ListMessages", other))
    assert "is larger than 4 MiB" in error.text
