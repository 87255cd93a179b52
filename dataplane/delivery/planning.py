"""What is to become of a message's recipients now: refused, held back, or grouped by the rule that routes them.

Pure: the configuration of this moment goes in, a plan comes out. It is made anew at each attempt, and its bundle
revision and rule are recorded with the outcome.

    there is no configuration (yet)                                   all held until there is one
    the account is unknown here, or another one of the same name      all refused, 5.7.1
    account denied, or credential since before it submitted this      all held until denials change
    a recipient's destination is denied                               it waits until denials change
    no rule matches a recipient                                       refused, 5.4.4
    a command bound a recipient to a provider that is there           grouped by provider and attempt number
    otherwise                                                         grouped by rule and attempt number

No group is larger than MAX_RECIPIENTS: every server takes that many (RFC 5321, section 4.5.3.1.8).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from dataplane.core.config import Denials, RetryPolicy, Target
from dataplane.core.envelope import (
    Envelope,
    RecipientRow,
    is_pinned,
    make_queue_key,
    split_queue_key,
    under_key,
)
from dataplane.core.policy import Denied, denied, destination_denied
from dataplane.core.routing import MessageRouter
from dataplane.core.transaction import Verdict, VerdictKind
from dataplane.ports import ConfigView

NO_ACCOUNT = Verdict(VerdictKind.REFUSED, 0, "5.7.1", "the account does not exist any more")
NO_ROUTE = Verdict(VerdictKind.REFUSED, 0, "5.4.4", "no routing rule matches")

MAX_RECIPIENTS = 100

_DEFAULT_RETRY = RetryPolicy()


class Held(Enum):
    """How far a hold reaches: to everything that waits in the same queue, or to this message."""

    EVERYTHING = 1
    MESSAGE = 2
    SUSPENDED = 3  # this message, until somebody resumes its credential; its lifetime does not end it


class Group(NamedTuple):
    """Recipients that share rule and attempt number; `rule` is empty for those bound to a provider.

    `queue_key` is where they wait if they must.
    """

    rule: str
    targets: tuple[Target, ...]
    queue_key: str
    rows: tuple[RecipientRow, ...]


class Plan(NamedTuple):
    """`held` says what is held back beside these recipients; then no recipient is in `refused`, `groups` or `waiting`.

    `waiting` are those whose destination is denied.
    """

    held: Held | None
    refused: list[tuple[RecipientRow, Verdict]]
    groups: list[Group]
    bundle_revision: int
    retry_policy: RetryPolicy
    weight: int = 1
    waiting: Sequence[RecipientRow] = ()


def make_plan(config: ConfigView, envelope: Envelope, rows: Sequence[RecipientRow], now_ms: int) -> Plan:
    """Return the plan for these recipients by the configuration of this moment; `now_ms` is wall clock."""
    if not config.loaded:
        return Plan(Held.EVERYTHING, [], [], 0, _DEFAULT_RETRY)
    compiled = config.account(envelope.account)
    if compiled is None or compiled.account.uid != envelope.account_uid:
        return Plan(None, [(row, NO_ACCOUNT) for row in rows], [], 0, _DEFAULT_RETRY)
    account = compiled.account
    stopped = denied(config.denials, envelope.account, envelope.credential, now_ms, accepted_ms=envelope.accepted_ms)
    if stopped is not None:
        held = Held.EVERYTHING
        if stopped is Denied.CREDENTIAL:
            # What falls away by itself is a revocation: nobody lifts it.
            held = Held.MESSAGE if config.denials.credentials[envelope.credential] else Held.SUSPENDED
        return Plan(held, [], [], account.revision, account.retry_policy)
    router = MessageRouter(compiled.rules, envelope.sender, envelope.size_bytes, envelope.headers, envelope.message_id)
    waiting: list[RecipientRow] = []
    if config.denials.destinations:
        waiting, rows = part_denied(config.denials, envelope.account, rows, now_ms)
    refused: list[tuple[RecipientRow, Verdict]] = []
    groups: dict[tuple[str, str, int], tuple[tuple[Target, ...], list[RecipientRow]]] = {}
    for row in rows:
        pin = _pin(config, envelope.account, row.queue_key) if is_pinned(row.queue_key) else None
        if pin is not None:
            groups.setdefault(("", pin.provider, row.attempt), ((pin,), []))[1].append(row)
            continue
        decision = router.route(row.address)
        if decision is None:
            refused.append((row, NO_ROUTE))
        else:
            groups.setdefault((decision.rule, "", row.attempt), (decision.targets, []))[1].append(row)
    return Plan(
        None,
        refused,
        [
            _group(envelope, rule, targets, found[start : start + MAX_RECIPIENTS], pinned=bool(pinned))
            for (rule, pinned, _), (targets, found) in groups.items()
            for start in range(0, len(found), MAX_RECIPIENTS)
        ],
        account.revision,
        account.retry_policy,
        account.delivery_weight,
        waiting,
    )


def part_denied(
    denials: Denials, account: str, rows: Sequence[RecipientRow], now_ms: int
) -> tuple[list[RecipientRow], list[RecipientRow]]:
    """Part recipients in those whose destination is denied now and those whose is not."""
    waiting: list[RecipientRow] = []
    others: list[RecipientRow] = []
    for row in rows:
        (waiting if destination_denied(denials, account, row.address, now_ms) else others).append(row)
    return waiting, others


def _pin(config: ConfigView, account: str, queue_key: str) -> Target | None:
    """The provider that recipients under this key are bound to, unless it is gone or not the account's."""
    name = split_queue_key(queue_key)[1]
    provider = config.provider(name)
    return Target(name) if provider is not None and provider.account in ("", account) else None


def _group(
    envelope: Envelope, rule: str, targets: tuple[Target, ...], rows: list[RecipientRow], *, pinned: bool
) -> Group:
    next_hop = targets[0].provider if targets else ""
    queue_key = make_queue_key(envelope.account, next_hop, envelope.priority, pinned=pinned)
    return Group(rule, targets, queue_key, under_key(rows, queue_key))
