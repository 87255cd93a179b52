"""`postroad rules …`: which mail goes through which providers."""

from __future__ import annotations

from typing import Annotated

import typer

from postroad.cli.output import Column, short
from postroad.cli.resources import Kind, Name, add_standard, changed, create, show, update
from postroad.cli.session import Session, session_of
from postroad.control.v1 import routing_rule_service_pb2
from postroad.control.v1.routing_rule_pb2 import RoutingRule


def _target(target: RoutingRule.Target) -> str:
    return f"{short(target.provider)}:{target.weight}" if target.weight else short(target.provider)


RULE = Kind(
    noun="RoutingRule",
    collection="routingRules",
    service="routing_rules",
    module=routing_rule_service_pb2,
    columns=(
        Column("RULE", lambda one: short(one.name)),
        Column("PRIORITY", lambda one: str(one.priority)),
        Column("SENDERS", lambda one: ", ".join(one.sender_patterns) or "any"),
        Column("RECIPIENTS", lambda one: ", ".join(one.recipient_patterns) or "any"),
        Column("TARGETS", lambda one: ", ".join(_target(target) for target in one.targets)),
        Column("STATE", lambda one: "disabled" if one.disabled else "in use"),
    ),
)

app = typer.Typer(
    no_args_is_help=True, help="Routing rules: looked at by priority, low first; the first that matches decides."
)
add_standard(app, RULE)

Priority = Annotated[int | None, typer.Option("--priority", min=0, help="Low first")]
Senders = Annotated[list[str] | None, typer.Option("--sender", help="a@b, @b, *.b or <>; repeatable")]
Recipients = Annotated[list[str] | None, typer.Option("--recipient", help="a@b, @b or *.b; repeatable")]
Headers = Annotated[list[str] | None, typer.Option("--header", help="NAME=GLOB; all must hold; repeatable")]
MinSize = Annotated[int | None, typer.Option("--min-size", min=0, help="Bytes, at least")]
MaxSize = Annotated[int | None, typer.Option("--max-size", min=0, help="Bytes, at most; 0 is no bound")]
Targets = Annotated[
    list[str] | None,
    typer.Option("--target", help="Provider, or PROVIDER:WEIGHT; tried in order; `providers/x` is a shared one"),
]
DisplayName = Annotated[str | None, typer.Option("--display-name", help="For people")]
Disabled = Annotated[bool | None, typer.Option("--disabled/--enabled", help="Keep the rule, but skip it")]


@app.command("create")
def create_rule(
    context: typer.Context,
    *,
    rule_id: Annotated[str, typer.Argument(help="Lower-case letters, digits and '-'")],
    target: Targets = None,
    priority: Priority = None,
    sender: Senders = None,
    recipient: Recipients = None,
    header: Headers = None,
    min_size: MinSize = None,
    max_size: MaxSize = None,
    display_name: DisplayName = None,
    disabled: Disabled = None,
) -> None:
    """Create a rule. Conditions that are not given hold for all mail."""
    session = session_of(context)
    if not target:
        raise typer.BadParameter("give --target at least once")
    rule = RoutingRule()
    _change(
        session,
        rule,
        targets=target,
        priority=priority,
        senders=sender,
        recipients=recipient,
        headers=header,
        min_size=min_size,
        max_size=max_size,
        display_name=display_name,
        disabled=disabled,
    )
    show(session, RULE, create(session, RULE, rule_id, rule))


@app.command("update")
def update_rule(
    context: typer.Context,
    *,
    name: Name,
    target: Targets = None,
    priority: Priority = None,
    sender: Senders = None,
    recipient: Recipients = None,
    header: Headers = None,
    min_size: MinSize = None,
    max_size: MaxSize = None,
    display_name: DisplayName = None,
    disabled: Disabled = None,
    any_sender: Annotated[bool, typer.Option("--any-sender", help="Drop the sender patterns")] = False,
    any_recipient: Annotated[bool, typer.Option("--any-recipient", help="Drop the recipient patterns")] = False,
) -> None:
    """Change what is given; lists are replaced whole."""
    session = session_of(context)
    senders = [] if any_sender else sender
    recipients = [] if any_recipient else recipient

    def change(rule: RoutingRule) -> list[str]:
        return _change(
            session,
            rule,
            targets=target,
            priority=priority,
            senders=senders,
            recipients=recipients,
            headers=header,
            min_size=min_size,
            max_size=max_size,
            display_name=display_name,
            disabled=disabled,
        )

    show(session, RULE, update(session, RULE, RULE.name(session, name), change))


def _change(
    session: Session,
    rule: RoutingRule,
    *,
    targets: list[str] | None,
    priority: int | None,
    senders: list[str] | None,
    recipients: list[str] | None,
    headers: list[str] | None,
    min_size: int | None,
    max_size: int | None,
    display_name: str | None,
    disabled: bool | None,
) -> list[str]:
    """Write what is given into the rule; returns the paths that changed."""
    return changed(
        rule,
        targets=[_parse_target(session, text) for text in targets] if targets else None,
        priority=priority,
        sender_patterns=senders,
        recipient_patterns=recipients,
        headers=[_parse_header(text) for text in headers] if headers else None,
        min_size_bytes=min_size,
        max_size_bytes=max_size,
        display_name=display_name,
        disabled=disabled,
    )


def _parse_target(session: Session, text: str) -> RoutingRule.Target:
    provider, separator, weight = text.partition(":")
    if separator and not weight.isdecimal():
        raise typer.BadParameter(f"{text} is no PROVIDER:WEIGHT")
    return RoutingRule.Target(provider=session.name("providers", provider), weight=int(weight or 0))


def _parse_header(text: str) -> RoutingRule.HeaderCondition:
    name, separator, pattern = text.partition("=")
    if not separator:
        raise typer.BadParameter(f"{text} is no NAME=GLOB")
    return RoutingRule.HeaderCondition(name=name, pattern=pattern)
