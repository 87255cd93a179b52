"""`postroad messages cancel|hold|release|retry|reroute|bounce`: commands on mail that waits.

Each takes ids, and asks for one Operation a message, or describes mail by options, which is one Operation. It waits
until the spools have answered, showing how far they are, and ends with status 1 when nothing was changed, 4 when one
has not answered in time: it will, as soon as it is there.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

import typer
from google.longrunning.operations_pb2 import Operation, WaitOperationRequest
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2

from postroad.cli.output import short
from postroad.cli.problems import FAILED, UNREACHABLE, CommandError
from postroad.cli.resources import Yes, confirm
from postroad.cli.session import Session, session_of
from postroad.cli.times import SPAN, seconds_of, span
from postroad.control.v1.message_pb2 import RecipientState
from postroad.control.v1.message_service_pb2 import (
    BounceMessageRequest,
    CancelMessageRequest,
    CommandMessagesRequest,
    CommandMetadata,
    CommandResult,
    CommandVerb,
    HoldMessageRequest,
    MessageFilter,
    ReleaseMessageRequest,
    RerouteMessageRequest,
    RetryMessageRequest,
    SpoolProgress,
)
from postroad.control.v1.provider_service_pb2 import GetProviderRequest
from postroad.sdk import PermissionDeniedError

_WAIT_S = 20
_LOOK_S = 1.0
_EVERY_ACCOUNT = "accounts/-"
_QUEUE_SPOOL = "00000000-0000-0000-0000-000000000001"


class WaitingState(StrEnum):
    """States in which mail waits."""

    SCHEDULED = "scheduled"
    QUEUED = "queued"
    DEFERRED = "deferred"
    HELD = "held"


Names = Annotated[list[str] | None, typer.Argument(help="Ids from the 250, or full resource names", show_default=False)]
Wait = Annotated[int, typer.Option("--wait", min=0, help="Seconds to wait for the nodes' answers")]
AccountWide = Annotated[bool, typer.Option("--account-wide", help="All mail of the account that waits")]
FleetWide = Annotated[bool, typer.Option("--every-account", help="Mail of every account; operators only")]
WaitsFor = Annotated[str, typer.Option("--provider", help="Mail that waits for this provider")]
RecipientDomain = Annotated[str, typer.Option("--recipient-domain", help="Mail to addresses of this domain")]
OlderThan = Annotated[
    str | None,
    typer.Option("--older-than", parser=span, metavar=SPAN, help="Mail accepted so long ago: 90s, 15m, 2h, 3d"),
]
States = Annotated[list[WaitingState] | None, typer.Option("--state", help="Mail in this state; repeatable")]


@dataclass(frozen=True, slots=True)
class _Verb:
    """A command: its name in the API, its request for one message, and what people read."""

    number: CommandVerb.ValueType
    method: str
    request: Any
    done: str


_CANCEL = _Verb(CommandVerb.COMMAND_VERB_CANCEL, "CancelMessage", CancelMessageRequest, "Cancelled")
_HOLD = _Verb(CommandVerb.COMMAND_VERB_HOLD, "HoldMessage", HoldMessageRequest, "Held")
_RELEASE = _Verb(CommandVerb.COMMAND_VERB_RELEASE, "ReleaseMessage", ReleaseMessageRequest, "Released")
_RETRY = _Verb(CommandVerb.COMMAND_VERB_RETRY, "RetryMessage", RetryMessageRequest, "Retried")
_BOUNCE = _Verb(CommandVerb.COMMAND_VERB_BOUNCE, "BounceMessage", BounceMessageRequest, "Failed")
_REROUTE = _Verb(CommandVerb.COMMAND_VERB_REROUTE, "RerouteMessage", RerouteMessageRequest, "Rerouted")


@dataclass(frozen=True, slots=True)
class _Choice:
    """Which mail the line names."""

    names: list[str]
    account_wide: bool
    every_account: bool
    provider: str
    recipient_domain: str
    older_than: str | None
    states: list[WaitingState]

    @property
    def has_filter(self) -> bool:
        """Whether mail is described and not named."""
        return bool(
            self.account_wide
            or self.every_account
            or self.provider
            or self.recipient_domain
            or self.older_than
            or self.states
        )

    def check(self) -> None:
        """Refuse a line that names no mail, or names and describes it."""
        if self.has_filter and self.names:
            raise typer.BadParameter("give ids or describe the mail, not both")
        if not self.has_filter and not self.names:
            raise typer.BadParameter("give ids, or describe the mail: --account-wide, --provider, --state, …")

    def request(self, session: Session, verb: _Verb, target: str) -> CommandMessagesRequest:
        """The call for what is described."""
        wanted = MessageFilter(recipient_domain=self.recipient_domain)
        if self.provider:
            wanted.provider = session.name("providers", self.provider)
        if self.older_than:
            wanted.min_age.CopyFrom(Duration(seconds=seconds_of(self.older_than)))
        wanted.states.extend(RecipientState.Value(f"RECIPIENT_STATE_{state.upper()}") for state in self.states)
        parent = _EVERY_ACCOUNT if self.every_account else session.account
        return CommandMessagesRequest(parent=parent, verb=verb.number, filter=wanted, provider=target)

    def text(self, session: Session) -> str:
        """What is described, for the question."""
        parts = ["of every account" if self.every_account else f"of {session.account}"]
        parts += [f"for {self.provider}"] if self.provider else []
        parts += [f"to {self.recipient_domain}"] if self.recipient_domain else []
        parts += [f"older than {self.older_than}"] if self.older_than else []
        parts += [f"that is {' or '.join(self.states)}"] if self.states else []
        return " ".join(["all waiting mail", *parts])


def add_commands(app: typer.Typer) -> None:
    """Give `app` the commands on waiting mail."""
    for verb, name, text in (
        (_CANCEL, "cancel", "Withdraw recipients that still wait."),
        (_HOLD, "hold", "Stop recipients that still wait, until they are released."),
        (_RELEASE, "release", "Let held recipients go on, at once."),
        (_RETRY, "retry", "Try recipients that wait for a later time now."),
        (_BOUNCE, "bounce", "Give up recipients that still wait: they end as failed."),
    ):
        app.command(name, help=f"{text} {_HELP}")(_plain(verb))
    app.command("reroute", help=f"Send recipients that still wait by another provider. {_HELP}")(_reroute)


_HELP = (
    "For messages by id, or for all that the options describe, which asks first unless --yes or JSON is wanted. "
    "Status 1 when nothing was changed."
)


def _plain(verb: _Verb) -> Any:
    def command(
        context: typer.Context,
        names: Names = None,
        *,
        account_wide: AccountWide = False,
        every_account: FleetWide = False,
        provider: WaitsFor = "",
        recipient_domain: RecipientDomain = "",
        older_than: OlderThan = None,
        states: States = None,
        wait_s: Wait = _WAIT_S,
        yes: Yes = False,
    ) -> None:
        choice = _Choice(names or [], account_wide, every_account, provider, recipient_domain, older_than, states or [])
        _run(session_of(context), verb, choice, "", wait_s, yes=yes)

    return command


def _reroute(
    context: typer.Context,
    names: Names = None,
    *,
    target: Annotated[str, typer.Option("--to", help="The provider it goes by from now on")],
    account_wide: AccountWide = False,
    every_account: FleetWide = False,
    provider: WaitsFor = "",
    recipient_domain: RecipientDomain = "",
    older_than: OlderThan = None,
    states: States = None,
    wait_s: Wait = _WAIT_S,
    yes: Yes = False,
) -> None:
    choice = _Choice(names or [], account_wide, every_account, provider, recipient_domain, older_than, states or [])
    session = session_of(context)
    _run(session, _REROUTE, choice, session.name("providers", target), wait_s, yes=yes)


def _run(session: Session, verb: _Verb, choice: _Choice, target: str, wait_s: int, *, yes: bool) -> None:
    choice.check()
    if choice.has_filter:
        request = choice.request(session, verb, target)
        word = CommandVerb.Name(verb.number).removeprefix("COMMAND_VERB_").capitalize()
        confirm(session, f"{word} {choice.text(session)}?", yes=yes)
        operations = [session.client.messages.CommandMessages(request)]
    else:
        fields = {"provider": target} if target else {}
        operations = [
            getattr(session.client.messages, verb.method)(verb.request(name=session.name("messages", name), **fields))
            for name in choice.names
        ]
    ends_s = time.monotonic() + wait_s
    changed = _report(session, verb, [_wait(session, operation, ends_s) for operation in operations])
    if not changed:
        if choice.provider:
            _check_provider(session, session.name("providers", choice.provider))
        raise typer.Exit(FAILED)


def _check_provider(session: Session, name: str) -> None:
    """NotFoundError when there is no such provider: looked at last, for mail may wait for one that was deleted."""
    with contextlib.suppress(PermissionDeniedError):  # a key that may not read providers
        session.client.providers.GetProvider(GetProviderRequest(name=name))


def _wait(session: Session, operation: Operation, ends_s: float) -> Operation:
    """The operation when it is done, or when the time is over; says how far it is whenever that changed."""
    said = ""
    while not operation.done and (left_s := ends_s - time.monotonic()) > 0:
        timeout = Duration()
        timeout.FromMilliseconds(int(1_000 * min(left_s, _LOOK_S)))
        operation = session.client.operations.WaitOperation(
            WaitOperationRequest(name=operation.name, timeout=timeout), timeout=left_s + 10
        )
        if not operation.done and (text := progress_text(operation)) != said:
            session.printer.say(text)
            said = text
    return operation


def progress_text(operation: Operation) -> str:
    """How far an operation is, and whom it waits for."""
    metadata = CommandMetadata()
    operation.metadata.Unpack(metadata)
    nodes = sorted({_holder(one) for one in metadata.pending_spools})
    done = f"{metadata.done_spool_count} of {metadata.spool_count} spools done"
    counts = f"{metadata.changed_count} changed, {metadata.too_late_count} too late"
    return f"{done}, {counts}; waiting for {', '.join(nodes)}"


def _holder(spool: SpoolProgress) -> str:
    return "the replicated queue" if spool.spool == _QUEUE_SPOOL else short(spool.node) or spool.spool


def _report(session: Session, verb: _Verb, operations: list[Operation]) -> int:
    """Say what became of the operations; returns how many recipients were changed."""
    changed = too_late = 0
    errors = []
    notes = []
    for operation in operations:
        if operation.HasField("error"):
            errors.append(f"{code_pb2.Code.Name(operation.error.code)}: {operation.error.message}")
            continue
        counts: Any = CommandResult() if operation.done else CommandMetadata()
        (operation.response if operation.done else operation.metadata).Unpack(counts)
        if operation.done:
            notes += [f"{_holder(one)}: {one.error}" for one in counts.spools if one.error]
        changed += counts.changed_count
        too_late += counts.too_late_count
    pending = [operation for operation in operations if not operation.done]
    if session.printer.is_json:
        names = [operation.name for operation in operations]
        session.printer.json({"changedCount": changed, "tooLateCount": too_late, "operations": names})
    for note in notes:
        session.printer.say(note)
    session.printer.say(f"{verb.done} {changed}, too late for {too_late}")
    if errors:
        raise CommandError("; ".join(errors))
    if pending:
        raise CommandError(
            f"not every node has answered yet: {progress_text(pending[0])} ({', '.join(one.name for one in pending)})",
            "It will be done when they have answered: look again with `postroad messages get`. A node whose disk is "
            "lost never does: `postroad spool give-up` ends what waited there",
            UNREACHABLE,
        )
    return changed
