"""Text that PostgreSQL cannot hold, and lists longer than its columns count, are the caller's error and not ours."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest

from postroad.control.v1 import account_pb2, account_service_pb2, message_service_pb2, provider_pb2
from postroad.control.v1 import provider_service_pb2 as service
from support.api import ApiStack, running_api
from support.databases import Database

Smtp = provider_pb2.SmtpProvider


@pytest.fixture
async def stack(migrated_database: Database) -> AsyncIterator[ApiStack]:
    async with running_api(migrated_database) as running:
        yield running


@pytest.mark.parametrize("domains", [["a\0.example"], [f"d{n}.example" for n in range(40_000)], ["a.example"] * 2])
async def test_unfit_sender_domains_are_named_as_the_field_that_they_are(stack: ApiStack, domains: list[str]) -> None:
    request = account_service_pb2.CreateAccountRequest(
        account_id="acme", account=account_pb2.Account(sender_domains=domains)
    )
    error = await stack.operator.refused(stack.operator.account("CreateAccount", request))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.fields[0].startswith("account.sender_domains")


async def test_a_retry_policy_out_of_its_limits_is_named_by_its_path(stack: ApiStack) -> None:
    policy = account_pb2.RetryPolicy(factor=100.0)
    request = account_service_pb2.CreateAccountRequest(
        account_id="acme", account=account_pb2.Account(retry_policy=policy)
    )
    error = await stack.operator.refused(stack.operator.account("CreateAccount", request))
    assert (error.code, error.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["account.retry_policy"])


async def test_a_filter_that_no_text_can_equal_is_invalid(stack: ApiStack) -> None:
    client = await stack.make_account("acme")
    request = message_service_pb2.ListMessagesRequest(parent="accounts/acme", recipient="a\0b@example.com")
    error = await client.refused(client.message("ListMessages", request))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("password", ["se\0cret", "x" * 5_000])
async def test_a_password_that_no_login_could_carry_is_refused_unseen(stack: ApiStack, password: str) -> None:
    client = await stack.make_account("acme")
    smtp = Smtp(endpoints=[Smtp.Endpoint(host="relay.example.com")], username="u", password=password)
    request = service.CreateProviderRequest(
        parent="accounts/acme", provider_id="relay", provider=provider_pb2.Provider(smtp=smtp)
    )
    error = await client.refused(client.provider("CreateProvider", request))
    assert (error.code, error.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["provider.smtp.password"])
    assert password not in error.text
