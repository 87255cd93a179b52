"""`postroad nodes …` and `postroad pools …`: the data plane."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from postroad.cli.drains import add_drain
from postroad.cli.output import Column, enum_text, short, time_text
from postroad.cli.resources import Kind, Name, add_standard, add_verb, call, changed, create, show, update
from postroad.cli.session import session_of
from postroad.control.v1 import node_service_pb2
from postroad.control.v1.node_pb2 import Node, NodePool


def _state(node: Node) -> str:
    """The state, and where nothing worse holds, that the node is drained."""
    is_drained = node.drain_operation and node.state == Node.STATE_ENROLLED
    return "drained" if is_drained else enum_text(node, "state")


NODE = Kind(
    noun="Node",
    collection="nodes",
    service="nodes",
    module=node_service_pb2,
    in_account=False,
    texts=lambda one: {"state": _state(one)},
    columns=(
        Column("NODE", lambda one: short(one.name)),
        Column("POOL", lambda one: short(one.node_pool)),
        Column("STATE", _state),
        Column("CONNECTED", lambda one: "yes" if one.connected else "no"),
        Column("CONFIG", lambda one: enum_text(one, "config_status")),
        Column("WAITING", lambda one: str(sum(spool.waiting_count for spool in one.spools))),
        Column("VERSION", lambda one: one.software_version),
        Column("LAST SEEN", lambda one: time_text(one.last_seen_time)),
    ),
)


def _limit(limits: Any, field: str) -> str:
    return str(getattr(limits, field)) if limits.HasField(field) else "default"


def _of_the_node(value: int | str) -> str:
    return str(value or "the node's")


POOL = Kind(
    noun="NodePool",
    collection="nodePools",
    service="nodes",
    module=node_service_pb2,
    in_account=False,
    columns=(
        Column("POOL", lambda one: short(one.name)),
        Column("MESSAGES/H/ACCOUNT", lambda one: _limit(one.submission_limits, "account_messages_per_hour")),
        Column("MESSAGES/H/CREDENTIAL", lambda one: _limit(one.submission_limits, "credential_messages_per_hour")),
        Column("CONNECTIONS/MIN/ADDRESS", lambda one: _limit(one.submission_limits, "address_connections_per_minute")),
        Column("MAX BYTES", lambda one: str(one.max_message_bytes)),
        Column("MAX RECIPIENTS", lambda one: str(one.max_recipients)),
        Column("CONNECTIONS/WORKER", lambda one: _of_the_node(one.max_connections)),
        Column("CONNECTIONS/ADDRESS", lambda one: _of_the_node(one.max_connections_per_address)),
        Column("LOG LEVEL", lambda one: _of_the_node(one.log_level)),
    ),
)

nodes_app = typer.Typer(no_args_is_help=True, help="Nodes: the machines that accept and deliver. Operators only.")
add_standard(nodes_app, NODE)
add_verb(nodes_app, NODE, "Revoke", "Refuse the node's certificate from now on and close its stream.")
add_drain(nodes_app)
pools_app = typer.Typer(
    no_args_is_help=True, help="Node pools: nodes that serve the same accounts with the same settings. Operators only."
)
add_standard(pools_app, POOL)

Id = Annotated[str, typer.Argument(help="Lower-case letters, digits and '-'")]
DisplayName = Annotated[str | None, typer.Option("--display-name", help="For people")]
Pool = Annotated[str | None, typer.Option("--pool", help="Node pool")]
PerAccount = Annotated[int | None, typer.Option("--account-messages", min=0, help="An hour and account; 0: no limit")]
PerCredential = Annotated[
    int | None, typer.Option("--credential-messages", min=0, help="An hour and credential; 0: no limit")
]
PerAddress = Annotated[
    int | None, typer.Option("--address-connections", min=0, help="A minute and client address; 0: no limit")
]
MaxBytes = Annotated[int | None, typer.Option("--max-bytes", help="Largest message")]
MaxRecipients = Annotated[int | None, typer.Option("--max-recipients", help="Recipients a message")]
MaxConnections = Annotated[
    int | None, typer.Option("--max-connections", min=0, help="Held by a worker; 0: as the node's settings say")
]
MaxPerAddress = Annotated[
    int | None,
    typer.Option("--max-connections-per-address", min=0, help="Held by a node; 0: as the node's settings say"),
]


class LogLevel(StrEnum):
    """What nodes log from."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"
    NODE = "node"


Level = Annotated[LogLevel | None, typer.Option("--log-level", help="`node`: as the node's settings say")]


@nodes_app.command("create")
def create_node(
    context: typer.Context,
    node_id: Id,
    pool: Pool = None,
    display_name: DisplayName = None,
) -> None:
    """Create a node and show its enrolment token, once; good for 15 minutes."""
    session = session_of(context)
    node = Node(display_name=display_name or "", node_pool=session.name("nodePools", pool, "") if pool else "")
    show(session, NODE, create(session, NODE, node_id, node))


@nodes_app.command("update")
def update_node(context: typer.Context, name: Name, display_name: DisplayName = None, pool: Pool = None) -> None:
    """Change what is given."""
    session = session_of(context)

    def change(node: Node) -> list[str]:
        return changed(node, display_name=display_name, node_pool=session.name("nodePools", pool, "") if pool else None)

    show(session, NODE, update(session, NODE, NODE.name(session, name), change))


@nodes_app.command("undrain")
def undrain(context: typer.Context, name: Name) -> None:
    """Let a node that was drained take mail again."""
    session = session_of(context)
    show(session, NODE, call(session, NODE, "UndrainNode", name=NODE.name(session, name)))


@nodes_app.command("reset-enrollment")
def reset_enrollment(context: typer.Context, name: Name) -> None:
    """Show a new one-time enrolment token, once; an older one is void."""
    session = session_of(context)
    show(session, NODE, call(session, NODE, "ResetNodeEnrollment", name=NODE.name(session, name)))


@pools_app.command("create")
def create_pool(
    context: typer.Context,
    pool_id: Id,
    *,
    account_messages: PerAccount = None,
    credential_messages: PerCredential = None,
    address_connections: PerAddress = None,
    max_bytes: MaxBytes = None,
    max_recipients: MaxRecipients = None,
    max_connections: MaxConnections = None,
    max_connections_per_address: MaxPerAddress = None,
    log_level: Level = None,
    display_name: DisplayName = None,
) -> None:
    """Create a pool; limits that are not given take the defaults."""
    session = session_of(context)
    pool = NodePool()
    changed(pool.submission_limits, **_limits(account_messages, credential_messages, address_connections))
    changed(
        pool,
        max_message_bytes=max_bytes,
        max_recipients=max_recipients,
        max_connections=max_connections,
        max_connections_per_address=max_connections_per_address,
        log_level=_level(log_level),
        display_name=display_name,
    )
    show(session, POOL, create(session, POOL, pool_id, pool))


@pools_app.command("update")
def update_pool(
    context: typer.Context,
    name: Name,
    *,
    account_messages: PerAccount = None,
    credential_messages: PerCredential = None,
    address_connections: PerAddress = None,
    max_bytes: MaxBytes = None,
    max_recipients: MaxRecipients = None,
    max_connections: MaxConnections = None,
    max_connections_per_address: MaxPerAddress = None,
    log_level: Level = None,
    display_name: DisplayName = None,
) -> None:
    """Change what is given; nodes take it over without ending a session."""
    session = session_of(context)

    def change(pool: NodePool) -> list[str]:
        limits = changed(pool.submission_limits, **_limits(account_messages, credential_messages, address_connections))
        own = changed(
            pool,
            max_message_bytes=max_bytes,
            max_recipients=max_recipients,
            max_connections=max_connections,
            max_connections_per_address=max_connections_per_address,
            log_level=_level(log_level),
            display_name=display_name,
        )
        return own + [f"submission_limits.{path}" for path in limits]

    show(session, POOL, update(session, POOL, POOL.name(session, name), change))


def _limits(account: int | None, credential: int | None, address: int | None) -> dict[str, int | None]:
    return {
        "account_messages_per_hour": account,
        "credential_messages_per_hour": credential,
        "address_connections_per_minute": address,
    }


def _level(level: LogLevel | None) -> str | None:
    return "" if level is LogLevel.NODE else level
