"""The demo of the local stack, made through the public API like anybody's account.

Contract. `make_demo` may be called again after it was cut off anywhere: what exists is taken as it is, and a password
that is not kept is replaced by a new one. It returns the credential's user name and password. `point_inbox` brings
the provider to the inbox's port when that changed.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from google.protobuf.field_mask_pb2 import FieldMask

from postroad.control.v1.account_pb2 import Account
from postroad.control.v1.account_service_pb2 import CreateAccountRequest
from postroad.control.v1.credential_pb2 import SmtpCredential
from postroad.control.v1.credential_service_pb2 import (
    CreateSmtpCredentialRequest,
    DeleteSmtpCredentialRequest,
    GetSmtpCredentialRequest,
    RotateSmtpCredentialRequest,
)
from postroad.control.v1.node_service_pb2 import GetNodePoolRequest, UpdateNodePoolRequest
from postroad.control.v1.provider_pb2 import Provider, SmtpProvider
from postroad.control.v1.provider_service_pb2 import (
    CreateProviderRequest,
    GetProviderRequest,
    UpdateProviderRequest,
)
from postroad.control.v1.routing_rule_pb2 import RoutingRule
from postroad.control.v1.routing_rule_service_pb2 import CreateRoutingRuleRequest
from postroad.localstack.ports import LOOPBACK
from postroad.sdk import AlreadyExistsError, AsyncClient, NotFoundError

ACCOUNT = "accounts/demo"
CREDENTIAL = f"{ACCOUNT}/smtpCredentials/app"
PROVIDER = f"{ACCOUNT}/providers/inbox"
RULE = f"{ACCOUNT}/routingRules/default"
SENDER = "app@example.com"
_SENDER_DOMAINS = ("example.com", "*.example.com")
# High, so that rules made after it are looked at before it.
_RULE_PRIORITY = 1_000
# As many as the API takes: the cap of all connections of a worker is what holds.
_MOST_CONNECTIONS = 1_000_000


@dataclass(frozen=True, slots=True)
class DemoCredential:
    """What an application puts into its settings."""

    username: str
    password: str


async def make_demo(client: AsyncClient, inbox_port: int) -> DemoCredential:
    """The account with its provider, rule and credential; PostroadError when the API refuses."""
    account = Account(display_name="Demo", sender_domains=_SENDER_DOMAINS)
    with contextlib.suppress(AlreadyExistsError):
        await client.accounts.CreateAccount(CreateAccountRequest(account_id="demo", account=account))
    provider = Provider(display_name="The local inbox", smtp=_inbox(inbox_port))
    with contextlib.suppress(AlreadyExistsError):
        request = CreateProviderRequest(parent=ACCOUNT, provider_id="inbox", provider=provider)
        await client.providers.CreateProvider(request)
    rule = RoutingRule(
        display_name="All mail to the inbox",
        priority=_RULE_PRIORITY,
        targets=[RoutingRule.Target(provider=PROVIDER)],
    )
    with contextlib.suppress(AlreadyExistsError):
        await client.routing_rules.CreateRoutingRule(
            CreateRoutingRuleRequest(parent=ACCOUNT, routing_rule_id="default", routing_rule=rule)
        )
    await _lift_address_limits(client)
    return await _credential(client)


async def point_inbox(client: AsyncClient, inbox_port: int) -> None:
    """Let the demo's provider lead to `inbox_port`; nothing happens when the provider was deleted."""
    try:
        provider = await client.providers.GetProvider(GetProviderRequest(name=PROVIDER))
    except NotFoundError:
        return
    del provider.smtp.endpoints[:]
    provider.smtp.endpoints.extend(_inbox(inbox_port).endpoints)
    await client.providers.UpdateProvider(
        UpdateProviderRequest(provider=provider, update_mask=FieldMask(paths=["smtp.endpoints"]))
    )


async def _lift_address_limits(client: AsyncClient) -> None:
    """No limits of connections an address: on this machine all applications come from the same one."""
    pool = await client.nodes.GetNodePool(GetNodePoolRequest(name="nodePools/default"))
    pool.submission_limits.address_connections_per_minute = 0
    pool.max_connections_per_address = _MOST_CONNECTIONS
    mask = FieldMask(paths=["submission_limits.address_connections_per_minute", "max_connections_per_address"])
    await client.nodes.UpdateNodePool(UpdateNodePoolRequest(node_pool=pool, update_mask=mask))


async def _credential(client: AsyncClient) -> DemoCredential:
    try:
        made = await client.credentials.CreateSmtpCredential(
            CreateSmtpCredentialRequest(
                parent=ACCOUNT, smtp_credential_id="app", smtp_credential=SmtpCredential(display_name="Demo")
            )
        )
    except AlreadyExistsError:
        # Made by a start that was cut off before it could keep the password, or not the one that was kept any more.
        found = await client.credentials.GetSmtpCredential(GetSmtpCredentialRequest(name=CREDENTIAL))
        if found.HasField("revoke_time"):
            await client.credentials.DeleteSmtpCredential(DeleteSmtpCredentialRequest(name=CREDENTIAL, etag=found.etag))
            return await _credential(client)
        made = await client.credentials.RotateSmtpCredential(
            RotateSmtpCredentialRequest(name=CREDENTIAL, etag=found.etag)
        )
    return DemoCredential(made.username, made.secret)


def _inbox(port: int) -> SmtpProvider:
    return SmtpProvider(
        endpoints=[SmtpProvider.Endpoint(host=LOOPBACK, port=port)], tls_policy=SmtpProvider.TLS_POLICY_NONE
    )
