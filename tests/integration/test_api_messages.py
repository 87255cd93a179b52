from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Self

import asyncpg
import grpc
import pytest
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from controlplane.adapters.postgres import messages as repository
from dataplane.core.ids import format_message_id, new_message_id
from postroad.control.v1 import account_service_pb2
from postroad.control.v1 import message_pb2 as pb
from postroad.control.v1 import message_service_pb2 as service
from postroad.control.v1 import message_service_pb2_grpc as service_grpc
from support.api import ApiError, ApiStack, Client, running_api, take_apart
from support.databases import Database

SPOOL = "22222222-2222-4222-8222-222222222222"
NOW = datetime.now(UTC).replace(microsecond=0)
SENT, DEFERRED, QUEUED = pb.RECIPIENT_STATE_SENT, pb.RECIPIENT_STATE_DEFERRED, pb.RECIPIENT_STATE_QUEUED


@pytest.fixture
async def stack(migrated_database: Database) -> AsyncIterator[ApiStack]:
    async with running_api(migrated_database) as running:
        await running.as_superuser("SELECT postroad.ensure_partitions(current_date - 1, 3)")
        yield running


@pytest.fixture
async def client(stack: ApiStack) -> Client:
    return await stack.make_account("acme")


def message_id(age_s: float = 0, number: int = 0) -> str:
    time_ms = int((NOW - timedelta(seconds=age_s)).timestamp() * 1000)
    return format_message_id(new_message_id(time_ms, bytes(8) + number.to_bytes(2, "big")))


async def add_message(
    stack: ApiStack, one: str, *states: int, account: str = "acme", addresses: tuple[str, ...] = ()
) -> None:
    time = datetime.fromtimestamp(int(one.replace("-", "")[:12], 16) / 1000, UTC)
    await stack.as_superuser(
        "INSERT INTO postroad.messages (message_id, account, accept_time, sender, size_bytes, header_message_id,"
        " subject, credential, client_address, client_helo, client_tls, session, node, spool)"
        " VALUES ($1, $2, $3, 'a@acme.example', 100, '', 'Hi', '', '192.0.2.1', 'x', '', 's', 'edge-1', $4)",
        *(one, account, time, SPOOL),
    )
    for index, state in enumerate(states):
        address = addresses[index] if addresses else f"r{index}@example.com"
        await stack.as_superuser(
            "INSERT INTO postroad.recipients (message_id, recipient_index, account, address, state, attempts,"
            " update_time) VALUES ($1, $2, $3, $4, $5, 1, $6)",
            *(one, index, account, address, state, time),
        )


async def add_event(stack: ApiStack, one: str, kind: int, account: str = "acme") -> None:
    await stack.as_superuser(
        "INSERT INTO postroad.delivery_events (message_id, account, recipient_index, type, event_time, node, spool,"
        " reply_code) VALUES ($1, $2, 0, $3, $4, 'edge-1', $5, 250)",
        *(one, account, kind, NOW + timedelta(seconds=kind), SPOOL),
    )


def name_of(one: str, account: str = "acme") -> str:
    return f"accounts/{account}/messages/{one}"


async def list_ids(client: Client, **query: Any) -> list[str]:
    request = service.ListMessagesRequest(parent="accounts/acme", **query)
    return [message.name.rsplit("/", 1)[1] for message in (await client.message("ListMessages", request)).messages]


async def test_a_message_has_its_recipients_its_timeline_and_a_derived_state(stack: ApiStack, client: Client) -> None:
    one = message_id()
    await add_message(stack, one, SENT, DEFERRED)
    await add_event(stack, one, pb.DELIVERY_EVENT_TYPE_SENT)
    message = await client.message("GetMessage", service.GetMessageRequest(name=name_of(one)))
    assert (message.name, message.node, message.spool) == (name_of(one), "nodes/edge-1", SPOOL)
    assert message.state == DEFERRED
    assert [recipient.address for recipient in message.recipients] == ["r0@example.com", "r1@example.com"]
    assert [event.type for event in message.events] == [
        pb.DELIVERY_EVENT_TYPE_ACCEPTED,
        pb.DELIVERY_EVENT_TYPE_SENT,
    ]
    assert not message.events[0].HasField("recipient_index")
    assert message.events[1].recipient == "r0@example.com"


async def test_a_message_names_the_one_that_had_its_key_before(stack: ApiStack, client: Client) -> None:
    first, second = message_id(20), message_id(10)
    for one in (first, second):
        await add_message(stack, one, SENT)
    await stack.as_superuser("UPDATE postroad.messages SET duplicate_of = $2 WHERE message_id = $1", second, first)
    found = [
        await client.message("GetMessage", service.GetMessageRequest(name=name_of(one))) for one in (first, second)
    ]
    assert [message.duplicate_of for message in found] == ["", name_of(first)]


async def test_a_message_shows_when_it_goes_out_and_its_priority(stack: ApiStack, client: Client) -> None:
    held, plain = message_id(), message_id(10)
    scheduled = pb.RECIPIENT_STATE_SCHEDULED
    await add_message(stack, held, scheduled, scheduled)
    await add_message(stack, plain, SENT)
    send_time = NOW + timedelta(hours=1)
    await stack.as_superuser(
        "UPDATE postroad.messages SET send_time = $2, priority = -9 WHERE message_id = $1", held, send_time
    )
    message = await client.message("GetMessage", service.GetMessageRequest(name=name_of(held)))
    assert message.send_time.ToDatetime(UTC) == send_time
    assert (message.state, message.priority) == (scheduled, -9)
    message = await client.message("GetMessage", service.GetMessageRequest(name=name_of(plain)))
    assert (message.HasField("send_time"), message.priority) == (False, 0)
    assert await list_ids(client, state=scheduled) == [held]


async def test_messages_are_listed_newest_first_in_pages(stack: ApiStack, client: Client) -> None:
    ids = [message_id(age_s) for age_s in (0, 10, 20, 86_400)]
    for one in ids:
        await add_message(stack, one, SENT)
    found: list[pb.Message] = []
    token = ""
    for _ in range(2):
        request = service.ListMessagesRequest(parent="accounts/acme", page_size=2, page_token=token)
        page = await client.message("ListMessages", request)
        found += page.messages
        token = page.next_page_token
    assert ([message.name.rsplit("/", 1)[1] for message in found], token) == (ids, "")
    assert [len(message.recipients) for message in found] == [1] * len(ids)


async def test_a_page_ends_early_where_its_recipients_are_too_many(
    stack: ApiStack, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repository, "MAX_PAGE_RECIPIENTS", 3)
    ids = [message_id(age_s) for age_s in (0, 10, 20, 30)]
    for one, count in zip(ids, (2, 1, 5, 1), strict=True):
        await add_message(stack, one, *[SENT] * count)
    sizes, found, token = [], [], ""
    for _ in range(3):
        request = service.ListMessagesRequest(parent="accounts/acme", page_token=token)
        page = await client.message("ListMessages", request)
        sizes.append([len(message.recipients) for message in page.messages])
        found += [message.name.rsplit("/", 1)[1] for message in page.messages]
        token = page.next_page_token
    assert (sizes, found, token) == ([[2, 1], [5], [1]], ids, "")


async def test_lists_are_narrowed_by_state_recipient_and_time(stack: ApiStack, client: Client) -> None:
    new, middle, old = message_id(0), message_id(60), message_id(3_600)
    await add_message(stack, new, SENT, addresses=("a@example.com",))
    await add_message(stack, middle, SENT, DEFERRED, addresses=("b@example.com", "c@example.com"))
    await add_message(stack, old, DEFERRED, addresses=("b@example.com",))
    assert await list_ids(client, state=DEFERRED) == [middle, old]
    assert await list_ids(client, state=SENT) == [new, middle]
    assert await list_ids(client, recipient="b@EXAMPLE.com") == [middle, old]
    assert await list_ids(client, recipient="b@example.com", state=DEFERRED) == [old]

    def ago(seconds: int) -> Timestamp:
        stamp = Timestamp()
        stamp.FromDatetime(NOW - timedelta(seconds=seconds))
        return stamp

    assert await list_ids(client, start_time=ago(60)) == [new, middle]
    assert await list_ids(client, end_time=ago(60)) == [old]
    assert await list_ids(client, start_time=ago(4_000), end_time=ago(0)) == [middle, old]
    backwards = service.ListMessagesRequest(parent="accounts/acme", start_time=ago(0), end_time=ago(60))
    assert (await client.refused(client.message("ListMessages", backwards))).fields == ["end_time"]


async def test_mail_of_a_former_account_is_not_shown_to_the_new_one(stack: ApiStack) -> None:
    client = await stack.make_account("acme")
    one = message_id()
    await add_message(stack, one, SENT)
    account = await client.account("GetAccount", account_service_pb2.GetAccountRequest(name="accounts/acme"))
    delete = account_service_pb2.DeleteAccountRequest(name=account.name, etag=account.etag)
    await stack.operator.account("DeleteAccount", delete)
    successor = await stack.make_account("acme")
    assert await list_ids(successor) == []
    error = await successor.refused(successor.message("GetMessage", service.GetMessageRequest(name=name_of(one))))
    assert error.code is grpc.StatusCode.NOT_FOUND


class Watch:
    """A watch and what it said; it ends with the block."""

    def __init__(self, client: Client, **fields: str) -> None:
        stub: Any = service_grpc.MessageServiceStub(client.channel)
        request = service.WatchEventsRequest(parent="accounts/acme", **fields)
        self.call = stub.WatchEvents(request, metadata=client.metadata, timeout=20)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.call.cancel()

    async def next(self) -> list[pb.DeliveryEvent]:
        """The events of the next answer that has some: the first may have none."""
        while not (answer := await self.answer()).events:
            pass
        return list(answer.events)

    async def answer(self) -> service.WatchEventsResponse:
        answer: service.WatchEventsResponse = await self.call.read()
        return answer


async def until_waiting(stack: ApiStack, waits: int) -> None:
    for _ in range(400):
        if stack.signal.waits >= waits:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the watch never waited")


@asynccontextmanager
async def open_transaction(stack: ApiStack) -> AsyncIterator[asyncpg.Connection]:
    """A transaction with a number of its own; committed when the block ends."""
    connection = await asyncpg.connect(stack.database.dsn())
    try:
        async with connection.transaction():
            await connection.execute("SELECT pg_current_xact_id()")
            yield connection
    finally:
        await connection.close()


async def test_a_watch_begins_now_and_shows_what_the_ledger_learns(stack: ApiStack, client: Client) -> None:
    before, one = message_id(60), message_id()
    await add_message(stack, before, SENT)
    async with Watch(client) as watch:
        await until_waiting(stack, 1)
        await add_message(stack, one, SENT)
        await add_event(stack, one, pb.DELIVERY_EVENT_TYPE_SENT)
        stack.signal.ring()
        events = await watch.next()
    # The first page may have come before the second event.
    assert {(event.message, event.type) for event in events} <= {
        (name_of(one), pb.DELIVERY_EVENT_TYPE_ACCEPTED),
        (name_of(one), pb.DELIVERY_EVENT_TYPE_SENT),
    }
    assert events[0].type == pb.DELIVERY_EVENT_TYPE_ACCEPTED


async def test_a_watch_resumes_after_a_position(stack: ApiStack, client: Client) -> None:
    one = message_id()
    await add_message(stack, one, SENT)
    await add_event(stack, one, pb.DELIVERY_EVENT_TYPE_DEFERRED)
    await add_event(stack, one, pb.DELIVERY_EVENT_TYPE_SENT)
    async with Watch(client, message=name_of(one)) as first:
        events = await first.next()
    assert [event.type for event in events] == [
        pb.DELIVERY_EVENT_TYPE_ACCEPTED,
        pb.DELIVERY_EVENT_TYPE_DEFERRED,
        pb.DELIVERY_EVENT_TYPE_SENT,
    ]
    async with Watch(client, position=events[0].position) as second:
        assert await second.next() == events[1:]


async def test_a_watch_that_was_cut_off_before_anything_happened_resumes_where_it_began(
    stack: ApiStack, client: Client
) -> None:
    before, one = message_id(60), message_id()
    await add_message(stack, before, SENT)
    async with Watch(client) as first:
        begun = await first.answer()
    assert not begun.events
    await add_message(stack, one, SENT)
    async with Watch(client, position=begun.position) as second:
        assert [event.message for event in await second.next()] == [name_of(one)]


async def test_a_watch_begins_behind_the_last_event_however_many_numbers_no_commit_used(
    stack: ApiStack, client: Client
) -> None:
    # PostgreSQL gives such numbers again after a crash: a position that counted them would pass over what they bring.
    async with Watch(client) as watch:
        assert (await watch.answer()).position == "0-0"
    await add_message(stack, message_id(), SENT)
    for _ in range(3):
        await stack.as_superuser("SELECT pg_current_xact_id()")
    async with Watch(client) as watch:
        begun = await watch.answer()
    newest = await stack.as_superuser("SELECT change_xid::text || '-' || position FROM postroad.messages")
    assert (begun.position, list(begun.events)) == (newest[0][0], [])


async def test_a_position_that_the_ledger_has_not_reached_is_refused(stack: ApiStack, client: Client) -> None:
    ((ahead,),) = await stack.as_superuser("SELECT (pg_current_xact_id()::text::bigint + 1000)::text || '-1'")
    async with Watch(client, position=ahead) as watch:
        error = await end_of(watch)
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "POSITION_AHEAD")


async def test_a_watch_does_not_pass_an_open_transaction(stack: ApiStack, client: Client) -> None:
    early, late = message_id(1), message_id()
    async with Watch(client) as watch:
        await until_waiting(stack, 1)
        async with open_transaction(stack) as slow:
            await add_message(stack, late, SENT)
            waits = stack.signal.waits
            stack.signal.ring()
            await until_waiting(stack, waits + 1)
            await slow.execute(
                """
                INSERT INTO postroad.messages
                SELECT $1, account, accept_time, sender, size_bytes, header_message_id, subject, credential,
                    client_address, client_helo, client_tls, session, node, spool
                FROM postroad.messages WHERE message_id = $2
                """,
                *(early, late),
            )
        stack.signal.ring()
        assert [event.message for event in await watch.next()] == [name_of(early), name_of(late)]


async def test_watches_are_bounded_and_end_when_the_server_drains(migrated_database: Database) -> None:
    async with running_api(migrated_database, max_watchers=1) as stack:
        client = await stack.make_account("acme")
        async with Watch(client) as watch:
            await watch.answer()
            async with Watch(client) as one_too_many:
                error = await end_of(one_too_many)
            assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_WATCHERS")
            assert error.details["RetryInfo"].retry_delay.seconds > 0
            stack.api.drain()
            stack.signal.ring()
            assert (await end_of(watch)).reason == "DRAINING"


async def test_a_bad_position_is_refused(client: Client) -> None:
    async with Watch(client, position="yesterday") as watch:
        assert (await end_of(watch)).fields == ["position"]


async def end_of(watch: Watch) -> ApiError:
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await watch.next()
    return take_apart(ended.value)


class Operations:
    """google.longrunning with a client's key."""

    def __init__(self, client: Client) -> None:
        self._stub = operations_pb2_grpc.OperationsStub(client.channel)  # type: ignore[no-untyped-call]  # Google's, untyped
        self._metadata = client.metadata

    async def get(self, name: str) -> Any:
        return await self._stub.GetOperation(
            operations_pb2.GetOperationRequest(name=name), metadata=self._metadata, timeout=20
        )

    async def wait(self, name: str, seconds: int) -> Any:
        request = operations_pb2.WaitOperationRequest(name=name, timeout=Duration(seconds=seconds))
        return await self._stub.WaitOperation(request, metadata=self._metadata, timeout=20)

    async def list_all(self) -> Any:
        request = operations_pb2.ListOperationsRequest(name="accounts/acme/operations")
        return (await self._stub.ListOperations(request, metadata=self._metadata, timeout=20)).operations


async def test_cancelling_is_an_operation_that_ends_with_the_nodes_result(stack: ApiStack, client: Client) -> None:
    one = message_id()
    await add_message(stack, one, QUEUED)
    request = service.CancelMessageRequest(name=name_of(one), request_id="11111111-1111-4111-8111-111111111111")
    operation = await client.message("CancelMessage", request)
    assert not operation.done
    assert await client.message("CancelMessage", request) == operation
    (command,) = await stack.as_superuser("SELECT * FROM postroad.commands")
    assert (str(command["spool"]), [str(each) for each in command["message_ids"]]) == (SPOOL, [one])
    metadata = service.CommandMetadata()
    assert operation.metadata.Unpack(metadata)
    assert (metadata.verb, metadata.message) == (service.COMMAND_VERB_CANCEL, name_of(one))
    operations = Operations(client)
    assert not (await operations.wait(operation.name, 0)).done
    waiting = asyncio.create_task(operations.wait(operation.name, 15))
    await until_waiting(stack, 1)
    await stack.as_superuser("UPDATE postroad.commands SET done_time = now(), changed_count = 1, too_late_count = 2")
    stack.signal.ring()
    result = service.CommandResult()
    assert (await waiting).response.Unpack(result)
    assert (result.changed_count, result.too_late_count) == (1, 2)
    assert [each.name for each in await operations.list_all()] == [operation.name]


async def test_one_account_cannot_take_every_wait_for_operations(migrated_database: Database) -> None:
    async with running_api(migrated_database, max_watchers=4) as stack:
        await stack.as_superuser("SELECT postroad.ensure_partitions(current_date - 1, 3)")
        waits = []
        for age_s, account in enumerate(("acme", "other")):
            client = await stack.make_account(account)
            one = message_id(age_s)
            await add_message(stack, one, QUEUED, account=account)
            request = service.CancelMessageRequest(name=name_of(one, account))
            operation = await client.message("CancelMessage", request)
            waits.append(asyncio.create_task(Operations(client).wait(operation.name, 15)))
            await until_waiting(stack, len(waits))
            error = await client.refused(Operations(client).wait(operation.name, 15))
            assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_WATCHERS")
        await stack.as_superuser("UPDATE postroad.commands SET done_time = now()")
        stack.signal.ring()
        assert [operation.done for operation in await asyncio.gather(*waits)] == [True, True]


async def test_a_command_that_failed_is_an_operation_with_an_error(stack: ApiStack, client: Client) -> None:
    one = message_id()
    await add_message(stack, one, QUEUED)
    operation = await client.message("CancelMessage", service.CancelMessageRequest(name=name_of(one)))
    await stack.as_superuser("UPDATE postroad.commands SET done_time = now(), error = 'the spool is gone'")
    ended = await Operations(client).get(operation.name)
    assert (ended.done, ended.error.message) == (True, "the spool is gone")


async def test_operations_can_be_neither_deleted_nor_cancelled(client: Client) -> None:
    stub = operations_pb2_grpc.OperationsStub(client.channel)  # type: ignore[no-untyped-call]  # Google's, untyped
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.CancelOperation(operations_pb2.CancelOperationRequest(), metadata=client.metadata)
    assert take_apart(refused.value).reason == "METHOD_UNKNOWN"
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
