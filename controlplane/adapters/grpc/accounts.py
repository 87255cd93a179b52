"""AccountService over gRPC: messages to values and back; see the proto for what each method promises."""

from __future__ import annotations

from typing import Any

from google.protobuf.empty_pb2 import Empty

from controlplane.adapters.grpc import convert
from controlplane.adapters.grpc.context import caller
from controlplane.domain import names
from controlplane.domain.errors import invalid
from controlplane.domain.resources import ACCOUNT_FIELDS, Account, Durability, RetryPolicy, UncertainPolicy
from controlplane.services.accounts import AccountsService
from postroad.control.v1 import account_pb2 as pb
from postroad.control.v1 import account_service_pb2 as service_pb
from postroad.control.v1 import account_service_pb2_grpc as service_grpc

_DURABILITIES = frozenset(durability.value for durability in Durability)
_UNCERTAIN_POLICIES = frozenset(policy.value for policy in UncertainPolicy)


class AccountHandlers(service_grpc.AccountServiceServicer):
    """See the module."""

    def __init__(self, accounts: AccountsService) -> None:
        self._accounts = accounts

    async def CreateAccount(self, request: service_pb.CreateAccountRequest, context: Any) -> pb.Account:
        """As the proto says."""
        mutation = convert.mutation("CreateAccount", request, write_account, validate_only=request.validate_only)
        value = read_account(request.account, request.account_id)
        return convert.answer(await self._accounts.create(caller(), mutation, value), pb.Account, write_account)

    async def GetAccount(self, request: service_pb.GetAccountRequest, context: Any) -> pb.Account:
        """As the proto says."""
        return write_account(await self._accounts.get(caller(), _id(request.name)))

    async def ListAccounts(
        self, request: service_pb.ListAccountsRequest, context: Any
    ) -> service_pb.ListAccountsResponse:
        """As the proto says."""
        found, more = await self._accounts.list_page(caller(), request.page_size, request.page_token)
        return service_pb.ListAccountsResponse(
            accounts=[write_account(account) for account in found], next_page_token=more
        )

    async def UpdateAccount(self, request: service_pb.UpdateAccountRequest, context: Any) -> pb.Account:
        """As the proto says."""
        mutation = convert.mutation("UpdateAccount", request, write_account, validate_only=request.validate_only)
        sent = read_account(request.account, _id(request.account.name, "account.name"))
        patch = convert.patch_of(request.account, request, ACCOUNT_FIELDS)
        return convert.answer(await self._accounts.update(caller(), mutation, sent, patch), pb.Account, write_account)

    async def DeleteAccount(self, request: service_pb.DeleteAccountRequest, context: Any) -> Empty:
        """As the proto says."""
        mutation = convert.mutation("DeleteAccount", request, convert.write_empty)
        await self._accounts.delete(
            caller(), mutation, _id(request.name), request.etag, allow_missing=request.allow_missing
        )
        return Empty()

    async def SuspendAccount(self, request: service_pb.SuspendAccountRequest, context: Any) -> pb.Account:
        """As the proto says."""
        mutation = convert.mutation("SuspendAccount", request, write_account)
        result = await self._accounts.suspend(caller(), mutation, _id(request.name), request.reason)
        return convert.answer(result, pb.Account, write_account)

    async def ResumeAccount(self, request: service_pb.ResumeAccountRequest, context: Any) -> pb.Account:
        """As the proto says."""
        mutation = convert.mutation("ResumeAccount", request, write_account)
        result = await self._accounts.resume(caller(), mutation, _id(request.name))
        return convert.answer(result, pb.Account, write_account)


def _id(name: str, field: str = "name") -> str:
    return names.parse_name(name, names.ACCOUNT, field)[0]


def read_account(message: pb.Account, account: str) -> Account:
    """Return the value of what a caller sent."""
    policy = message.retry_policy
    if int(message.durability) not in _DURABILITIES:
        raise invalid("account.durability", "is not known")
    if int(message.uncertain_policy) not in _UNCERTAIN_POLICIES:
        raise invalid("account.uncertain_policy", "is not known")
    pool = message.node_pool
    return Account(
        account=account,
        display_name=message.display_name,
        sender_domains=tuple(message.sender_domains),
        networks=tuple(message.networks),
        durability=Durability(message.durability),
        node_pool=names.parse_name(pool, names.NODE_POOL, "account.node_pool")[0] if pool else "",
        retry_policy=RetryPolicy(
            base_s=convert.from_duration(policy, "base"),
            factor=policy.factor or None,
            cap_s=convert.from_duration(policy, "cap"),
            lifetime_s=convert.from_duration(policy, "lifetime"),
        ),
        delivery_weight=message.delivery_weight or 1,
        uncertain_policy=UncertainPolicy(message.uncertain_policy),
    )


def write_account(account: Account) -> pb.Account:
    """Return the message of an account."""
    policy = account.retry_policy
    message = pb.Account(
        name=names.format_name(names.ACCOUNT, account.account),
        display_name=account.display_name,
        state=pb.Account.State.ValueType(account.state),
        suspend_reason=account.suspend_reason,
        sender_domains=account.sender_domains,
        networks=account.networks,
        durability=pb.Account.Durability.ValueType(account.durability),
        node_pool=names.format_name(names.NODE_POOL, account.node_pool),
        delivery_weight=account.delivery_weight,
        uncertain_policy=pb.Account.UncertainPolicy.ValueType(account.uncertain_policy),
    )
    if policy != RetryPolicy():
        message.retry_policy.CopyFrom(
            pb.RetryPolicy(
                base=convert.to_duration(policy.base_s),
                factor=policy.factor or 0,
                cap=convert.to_duration(policy.cap_s),
                lifetime=convert.to_duration(policy.lifetime_s),
            )
        )
    convert.write_meta(message, account.meta)
    return message
