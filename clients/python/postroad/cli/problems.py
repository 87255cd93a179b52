"""How the command line ends when something went wrong: one text for people, one status for programs.

    status   meaning
    0        done; for `send`: every message was sent
    1        refused, failed, or not what was hoped for (a message bounced)
    2        the command line itself is wrong
    3        no server or key is configured, or a local file cannot be used
    4        the server cannot be reached, or did not answer in time
    5        the key is unknown or may not do this
    6        there is no such thing, or what was named beside it is not there
    130      interrupted by Ctrl-C

With `--output json` the error is one JSON object on standard error, in the form of google.rpc.Status.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import grpc

from postroad.cli.connection import ConnectionSettingsError
from postroad.cli.output import Printer
from postroad.inbox import InboxError
from postroad.localstack import LocalStackError
from postroad.sdk import (
    DeadlineError,
    NotFoundError,
    PermissionDeniedError,
    PostroadError,
    UnauthenticatedError,
    UnavailableError,
)

FAILED, NOT_CONFIGURED, UNREACHABLE, NOT_ALLOWED, NOT_THERE = 1, 3, 4, 5, 6


class CommandError(Exception):
    """A command cannot go on; `advice` says what to do, `status` how the program ends."""

    def __init__(self, problem: str, advice: str = "", status: int = FAILED) -> None:
        super().__init__(problem)
        self.advice = advice
        self.status = status


# What to do next, by the reason in ErrorInfo; a reason without a line here explains itself.
ADVICE: Mapping[str, str] = {
    "API_KEY_MISSING": "Give a key: --api-key, $POSTROAD_API_KEY, or start `postroad up` here",
    "API_KEY_INVALID": "Check the key; it may be revoked or expired: `postroad api-keys list` with another key",
    "SCOPE_MISSING": "Use a key with that scope: `postroad api-keys create … --scope …`",
    "OTHER_ACCOUNT": "Use a key of that account, or an operator's",
    "OPERATOR_ONLY": "Use an operator's key",
    "FIELD_OPERATOR_ONLY": "Ask an operator to change this field",
    "ETAG_MISMATCH": "Somebody changed it meanwhile: look at it again, then repeat the command",
    "CONCURRENT_EDIT": "Somebody changed it meanwhile: look at it again, then repeat the command",
    "RESOURCE_ALREADY_EXISTS": "Choose another id, or use `update`",
    "SENDER_DOMAIN_TAKEN": "A domain belongs to one account: remove it there first",
    "NETWORK_TAKEN": "A network belongs to one account: remove it there first",
    "NODE_POOL_MISSING": "Create the pool first: `postroad pools create …`",
    "NODE_POOL_IN_USE": "Move its nodes and accounts to another pool first",
    "NODE_IN_USE": "Let its spools run empty (`postroad nodes drain`) and stop it, or `postroad nodes revoke` it; a "
    "spool whose disk is lost is ended by `postroad spool give-up`",
    "NODE_REVOKED": "Choose another node, or enrol it again: `postroad nodes reset-enrollment …`",
    "SPOOL_IN_USE": "Stop the node and wait until 90 s passed, or `postroad nodes revoke` it; `spool attach` has "
    "`--force`",
    "NODE_ALONE": "Connect another node of its pool, or undrain one: `postroad nodes list`",
    "SPOOL_POOL_DIFFERS": "Choose a node of the same pool: others do not have its accounts",
    "PROVIDER_MISSING": "Create the provider first: `postroad providers create …`",
    "PROVIDER_IN_USE": "Remove it from the routing rules first: `postroad rules list`",
    "PROVIDER_SUSPENDED": "Resume it first: `postroad providers resume …`",
    "LIMIT_TAKEN": "Update the limit that is there: `postroad limits list`",
    "LIMIT_SUBJECT_MISSING": "Check the name; it must exist before it is limited",
    "REQUESTS_EXHAUSTED": "Wait as long as it says; `api.requests_per_minute` in controlplane.yaml sets the limit",
    "LAST_OPERATOR_KEY": "Create another operator's key first: `postroad api-keys create … --operator`",
    "KEY_REVOKED": "Create a new one",
    "DATABASE_UNAVAILABLE": "Try again in a moment; `postroad status` shows what is running",
    "DRAINING": "Try again in a moment",
}

# What a request named beside its own resource is not there.
_MISSING = frozenset({"LIMIT_SUBJECT_MISSING", "NODE_POOL_MISSING", "PROVIDER_MISSING"})

_UNREACHABLE = "Is it running? `postroad up` starts everything on this machine; `postroad status` looks"


def status_of(error: Exception) -> int:
    """The exit status for an error."""
    if isinstance(error, CommandError):
        return error.status
    if isinstance(error, ConnectionSettingsError | LocalStackError):
        return NOT_CONFIGURED
    if isinstance(error, UnavailableError | DeadlineError):
        return UNREACHABLE
    if isinstance(error, UnauthenticatedError | PermissionDeniedError):
        return NOT_ALLOWED
    if isinstance(error, NotFoundError | InboxError):
        return NOT_THERE
    if isinstance(error, PostroadError) and error.reason in _MISSING:
        return NOT_THERE
    return FAILED


def report(error: Exception, printer: Printer) -> int:
    """Say what went wrong and what to do, on standard error; returns the exit status."""
    problem, advice = _texts(error)
    if printer.is_json:
        printer.errors.print(
            json.dumps(_as_status(error, problem) | {"advice": advice}), soft_wrap=True, markup=False, highlight=False
        )
        return status_of(error)
    printer.remark(f"Error: {problem}", "bold red")
    if isinstance(error, PostroadError):
        for violation in error.details.violations:
            printer.remark(f"  {violation.field}: {violation.description}")
        if error.reason:
            printer.remark(f"  reason: {error.reason}")
        if error.details.request_id:
            printer.remark(f"  request: {error.details.request_id}")
    if advice:
        printer.remark(advice)
    return status_of(error)


def _texts(error: Exception) -> tuple[str, str]:
    if isinstance(error, PostroadError):
        advice = ADVICE.get(error.reason, "")
        if not advice and error.code is grpc.StatusCode.UNAVAILABLE:
            advice = _UNREACHABLE
        advice = "\n".join(text for text in (advice, *getattr(error, "__notes__", ())) if text)
        # One line is enough where the fields are listed below it.
        message = "the request is not valid" if error.details.violations else error.message
        return message, advice
    if isinstance(error, LocalStackError):
        return error.problem, error.advice
    if isinstance(error, InboxError):
        return str(error), "`postroad inbox list` shows what there is"
    return str(error), str(getattr(error, "advice", ""))


def _as_status(error: Exception, problem: str) -> dict[str, object]:
    if not isinstance(error, PostroadError):
        return {"code": None, "message": problem}
    return {
        "code": int(error.code.value[0]),
        "status": error.code.name,
        "message": error.message,
        "reason": error.reason,
        "metadata": dict(error.details.metadata),
        "violations": [{"field": one.field, "description": one.description} for one in error.details.violations],
        "requestId": error.details.request_id,
    }
