"""`postroad accounts …`: tenants."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from postroad.cli.output import Column, enum_text, short, time_text
from postroad.cli.resources import Kind, Name, add_standard, changed, create, show, update
from postroad.cli.session import session_of
from postroad.cli.suspensions import add_suspension
from postroad.control.v1 import account_service_pb2
from postroad.control.v1.account_pb2 import Account

ACCOUNT = Kind(
    noun="Account",
    collection="accounts",
    service="accounts",
    module=account_service_pb2,
    in_account=False,
    columns=(
        Column("ACCOUNT", lambda one: short(one.name)),
        Column("STATE", lambda one: enum_text(one, "state")),
        Column("SENDER DOMAINS", lambda one: ", ".join(one.sender_domains)),
        Column("NETWORKS", lambda one: ", ".join(one.networks)),
        Column("POOL", lambda one: short(one.node_pool)),
        Column("CREATED", lambda one: time_text(one.create_time)),
    ),
)


class Durability(StrEnum):
    """As postroad.control.v1.Account.Durability."""

    LOCAL = "local"
    REPLICATED = "replicated"

    @property
    def value_sent(self) -> Account.Durability.ValueType:
        """The number that travels."""
        return Account.Durability.Value(f"DURABILITY_{self.name}")


class Uncertain(StrEnum):
    """As postroad.control.v1.Account.UncertainPolicy."""

    RETRY = "retry"
    HOLD = "hold"

    @property
    def value_sent(self) -> Account.UncertainPolicy.ValueType:
        """The number that travels."""
        return Account.UncertainPolicy.Value(f"UNCERTAIN_POLICY_{self.name}")


app = typer.Typer(
    no_args_is_help=True, help="Accounts: the tenants that own credentials, providers, rules and messages."
)
add_standard(app, ACCOUNT)
add_suspension(app, ACCOUNT, "Stop submission and delivery at once; waiting mail stays queued.", "Lift a suspension.")

SenderDomains = Annotated[
    list[str] | None,
    typer.Option("--sender-domain", help="`example.com`, or `*.example.com` for all below it; repeatable"),
]
Networks = Annotated[
    list[str] | None, typer.Option("--network", help="May submit without AUTH from here, in CIDR form; repeatable")
]
DisplayName = Annotated[str | None, typer.Option("--display-name", help="For people")]
Weight = Annotated[
    int | None,
    typer.Option("--delivery-weight", min=1, max=100, help="Turns of delivery beside other accounts; operators only"),
]
Durable = Annotated[
    Durability | None,
    typer.Option(help="Where mail is stored before its 250: on the node's disk, or in PostgreSQL too; operators only"),
]
WhenUncertain = Annotated[
    Uncertain | None,
    typer.Option(help="What becomes of replicated mail of which nobody knows whether it arrived"),
]
Pool = Annotated[str | None, typer.Option("--pool", help="Node pool that serves the account")]


@app.command("create")
def create_account(
    context: typer.Context,
    *,
    account_id: Annotated[str, typer.Argument(help="Lower-case letters, digits and '-'")],
    sender_domain: SenderDomains = None,
    network: Networks = None,
    display_name: DisplayName = None,
    pool: Pool = None,
    delivery_weight: Weight = None,
    durability: Durable = None,
    uncertain_policy: WhenUncertain = None,
) -> None:
    """Create an account."""
    session = session_of(context)
    account = Account(display_name=display_name or "", sender_domains=sender_domain or [], networks=network or [])
    account.delivery_weight = delivery_weight or 0
    if durability:
        account.durability = durability.value_sent
    if uncertain_policy:
        account.uncertain_policy = uncertain_policy.value_sent
    if pool:
        account.node_pool = session.name("nodePools", pool, "")
    show(session, ACCOUNT, create(session, ACCOUNT, account_id, account))


@app.command("update")
def update_account(
    context: typer.Context,
    *,
    name: Name,
    sender_domain: SenderDomains = None,
    network: Networks = None,
    display_name: DisplayName = None,
    pool: Pool = None,
    delivery_weight: Weight = None,
    durability: Durable = None,
    uncertain_policy: WhenUncertain = None,
    no_sender_domains: Annotated[bool, typer.Option("--no-sender-domains", help="Remove all")] = False,
    no_networks: Annotated[bool, typer.Option("--no-networks", help="Remove all")] = False,
) -> None:
    """Change what is given; lists are replaced whole."""
    session = session_of(context)

    def change(account: Account) -> list[str]:
        return changed(
            account,
            display_name=display_name,
            sender_domains=[] if no_sender_domains else sender_domain or None,
            networks=[] if no_networks else network or None,
            node_pool=session.name("nodePools", pool, "") if pool else None,
            delivery_weight=delivery_weight,
            durability=durability.value_sent if durability else None,
            uncertain_policy=uncertain_policy.value_sent if uncertain_policy else None,
        )

    show(session, ACCOUNT, update(session, ACCOUNT, ACCOUNT.name(session, name), change))
