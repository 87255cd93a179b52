"""The SDK against the real control plane: errors as classes, in calls and streams, with and without asyncio."""

from __future__ import annotations

import grpc
import pytest

from postroad.control.v1.account_pb2 import Account
from postroad.control.v1.account_service_pb2 import (
    CreateAccountRequest,
    DeleteAccountRequest,
    GetAccountRequest,
    UpdateAccountRequest,
)
from postroad.control.v1.message_service_pb2 import GetMessageRequest, WatchEventsRequest
from postroad.sdk import (
    AlreadyExistsError,
    AsyncClient,
    Client,
    DeadlineError,
    EtagMismatchError,
    InvalidArgumentError,
    NotFoundError,
    PostroadError,
    UnauthenticatedError,
    UnavailableError,
    connect,
    connect_async,
    follow,
)
from support.local_stack import LocalStack

pytestmark = pytest.mark.timeout(180)

_NO_MESSAGE = "accounts/demo/messages/01a1f8b6-c723-742f-bae0-6864fc456caf"


def _server(stack: LocalStack) -> tuple[str, str]:
    key = (stack.folder / ".postroad" / "keys" / "operator.key").read_text(encoding="ascii").strip()
    return f"127.0.0.1:{stack.ready['ports']['grpc']}", key


def test_errors_arrive_with_class_reason_and_details(stack: LocalStack) -> None:
    with stack.client() as client:
        with pytest.raises(NotFoundError) as not_found:
            client.accounts.GetAccount(GetAccountRequest(name="accounts/nobody"))
        with pytest.raises(AlreadyExistsError) as exists:
            client.accounts.CreateAccount(CreateAccountRequest(account_id="demo", account=Account()))
        wrong = CreateAccountRequest(account_id="wrong", account=Account(sender_domains=["not a domain"]))
        with pytest.raises(InvalidArgumentError) as invalid:
            client.accounts.CreateAccount(wrong)
    assert not_found.value.reason == "RESOURCE_NOT_FOUND"
    assert exists.value.code is grpc.StatusCode.ALREADY_EXISTS
    assert invalid.value.details.violations[0].field == "account.sender_domains[0]"


def test_a_request_id_is_filled_in_and_a_repeated_request_is_carried_out_once(stack: LocalStack) -> None:
    with stack.client() as client:
        request = CreateAccountRequest(account_id="once", account=Account(display_name="Once"))
        first = client.accounts.CreateAccount(request)
        assert request.request_id
        assert client.accounts.CreateAccount(request).uid == first.uid


def test_an_edit_of_what_somebody_else_changed_meanwhile_is_refused(stack: LocalStack) -> None:
    with stack.client() as client:
        first = client.accounts.CreateAccount(CreateAccountRequest(account_id="edited", account=Account()))
        changed = Account(name=first.name, etag=first.etag, display_name="New")
        client.accounts.UpdateAccount(UpdateAccountRequest(account=changed))
        with pytest.raises(EtagMismatchError):
            client.accounts.DeleteAccount(DeleteAccountRequest(name=first.name, etag=first.etag))


def test_a_wrong_key_is_unauthenticated(stack: LocalStack) -> None:
    server, key = _server(stack)
    wrong = key[:-3] + ("xxx" if not key.endswith("xxx") else "yyy")
    with connect(server, wrong, stack.folder / ".postroad" / "pki" / "ca.pem") as client:
        with pytest.raises(UnauthenticatedError) as caught:
            client.accounts.GetAccount(GetAccountRequest(name="accounts/demo"))
        assert key not in str(caught.value)


def test_a_server_with_another_ca_gets_no_key(stack: LocalStack) -> None:
    server, key = _server(stack)
    with connect(server, key) as client, pytest.raises(UnavailableError):
        client.accounts.GetAccount(GetAccountRequest(name="accounts/demo"), timeout=20)


def test_an_error_in_a_stream_arrives_as_a_class_too(stack: LocalStack) -> None:
    with stack.client() as client, pytest.raises(PostroadError) as caught:
        list(client.messages.WatchEvents(WatchEventsRequest(parent="accounts/demo", position="nonsense"), timeout=20))
    assert caught.value.reason


def test_following_a_message_that_never_comes_ends_in_time(stack: LocalStack) -> None:
    with stack.client() as client, pytest.raises(DeadlineError):
        list(follow(client, _NO_MESSAGE, 1.0))


async def test_the_asynchronous_client_behaves_alike(stack: LocalStack) -> None:
    server, key = _server(stack)
    async with connect_async(server, key, stack.folder / ".postroad" / "pki" / "ca.pem") as client:
        assert isinstance(client, AsyncClient)
        assert await client.is_serving()
        account = await client.accounts.GetAccount(GetAccountRequest(name="accounts/demo"))
        assert account.sender_domains
        with pytest.raises(NotFoundError):
            await client.messages.GetMessage(GetMessageRequest(name=_NO_MESSAGE))
        stream = client.messages.WatchEvents(
            WatchEventsRequest(parent="accounts/demo", position="nonsense"), timeout=20
        )
        with pytest.raises(PostroadError):
            async for _ in stream:
                pass


def test_a_client_says_whether_the_server_serves(stack: LocalStack) -> None:
    with stack.client() as client:
        assert isinstance(client, Client)
        assert client.is_serving()
