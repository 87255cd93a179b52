"""Who calls, and what they may do: scopes of keys, the scope that each method needs, whose resources are reached.

Contract. `METHOD_SCOPES` names every method of the API; one that is not in it is refused (deny by default). Checks come
before any look at the database, so that an answer never tells whether another account's resource exists.
`OPERATOR_FIELDS` are the fields of its own account that an account's key cannot change.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from controlplane.domain.errors import PermissionDeniedError, Reason

EVERY_ACCOUNT = "*"


class Scope(StrEnum):
    """What a key may do."""

    CONFIG_READ = "config.read"
    CONFIG_WRITE = "config.write"
    MESSAGES_READ = "messages.read"
    MESSAGES_WRITE = "messages.write"
    OPERATOR = "operator"


ACCOUNT_SCOPES = frozenset(Scope) - {Scope.OPERATOR}
OPERATOR_FIELDS = frozenset({"networks", "sender_domains", "durability", "node_pool", "delivery_weight"})

_CONTROL = "postroad.control.v1"
_NEEDED: dict[str, dict[Scope, tuple[str, ...]]] = {
    f"{_CONTROL}.AccountService": {
        Scope.OPERATOR: ("CreateAccount", "ListAccounts", "DeleteAccount", "SuspendAccount", "ResumeAccount"),
        Scope.CONFIG_READ: ("GetAccount",),
        Scope.CONFIG_WRITE: ("UpdateAccount",),
    },
    f"{_CONTROL}.CredentialService": {
        Scope.CONFIG_READ: ("GetApiKey", "ListApiKeys", "GetSmtpCredential", "ListSmtpCredentials"),
        Scope.CONFIG_WRITE: (
            *("CreateApiKey", "DeleteApiKey", "RotateApiKey", "RevokeApiKey"),
            *("CreateSmtpCredential", "DeleteSmtpCredential", "RotateSmtpCredential", "RevokeSmtpCredential"),
            *("SuspendSmtpCredential", "ResumeSmtpCredential"),
        ),
    },
    f"{_CONTROL}.DestinationService": {
        Scope.CONFIG_READ: ("GetDestination", "ListDestinations"),
        Scope.CONFIG_WRITE: ("SuspendDestination", "ResumeDestination"),
    },
    f"{_CONTROL}.SuspensionService": {Scope.CONFIG_READ: ("GetSuspension", "WaitSuspension")},
    f"{_CONTROL}.ProviderService": {
        Scope.CONFIG_READ: ("GetProvider", "ListProviders"),
        Scope.CONFIG_WRITE: (
            *("CreateProvider", "UpdateProvider", "DeleteProvider"),
            *("SuspendProvider", "ResumeProvider", "VerifyProvider"),
        ),
    },
    f"{_CONTROL}.RoutingRuleService": {
        Scope.CONFIG_READ: ("GetRoutingRule", "ListRoutingRules"),
        Scope.CONFIG_WRITE: ("CreateRoutingRule", "UpdateRoutingRule", "DeleteRoutingRule"),
    },
    f"{_CONTROL}.LimitService": {
        Scope.OPERATOR: ("CreateLimit", "UpdateLimit", "DeleteLimit"),
        Scope.CONFIG_READ: ("GetLimit", "ListLimits", "ListEffectiveLimits"),
    },
    f"{_CONTROL}.MessageService": {
        Scope.MESSAGES_READ: ("GetMessage", "ListMessages", "WatchEvents"),
        Scope.MESSAGES_WRITE: (
            *("SendMessage", "BatchSendMessages"),
            *("CancelMessage", "HoldMessage", "ReleaseMessage", "RetryMessage", "BounceMessage", "RerouteMessage"),
            "CommandMessages",
        ),
    },
    f"{_CONTROL}.BookService": {Scope.MESSAGES_READ: ("ListBooks", "ListBookFindings")},
    f"{_CONTROL}.NodeService": {
        Scope.OPERATOR: (
            *("CreateNode", "GetNode", "ListNodes", "UpdateNode", "DeleteNode"),
            *("ResetNodeEnrollment", "RevokeNode", "AcceptSpool", "AttachSpool", "GiveUpSpool"),
            *("DrainNode", "UndrainNode"),
            *("CreateNodePool", "GetNodePool", "ListNodePools", "UpdateNodePool", "DeleteNodePool"),
        ),
    },
    "google.longrunning.Operations": {Scope.MESSAGES_READ: ("GetOperation", "ListOperations", "WaitOperation")},
}

METHOD_SCOPES: dict[str, Scope] = {
    f"/{service}/{method}": scope
    for service, by_scope in _NEEDED.items()
    for scope, methods in by_scope.items()
    for method in methods
}


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated key: its resource name, its account (None for an operator's) and its scopes."""

    principal: str
    account: str | None
    scopes: frozenset[Scope]

    @property
    def is_operator(self) -> bool:
        """Whether every account is open to this caller."""
        return self.account is None and Scope.OPERATOR in self.scopes

    def require(self, scope: Scope) -> None:
        """Raise PermissionDeniedError unless the key has `scope`; operators have every one."""
        if not self.is_operator and scope not in self.scopes:
            raise PermissionDeniedError(Reason.SCOPE_MISSING, metadata={"scope": scope})

    def require_operator(self) -> None:
        """Raise PermissionDeniedError unless an operator calls."""
        if not self.is_operator:
            raise PermissionDeniedError(Reason.OPERATOR_ONLY, "only operators may do this")

    def require_account(self, account: str | None) -> None:
        """Raise PermissionDeniedError unless the caller may reach `account`; None is what only operators change."""
        if account is None:
            self.require_operator()
        elif not self.is_operator and account != self.account:
            raise PermissionDeniedError(Reason.OTHER_ACCOUNT, "the key belongs to another account")

    @property
    def visible_account(self) -> str:
        """What row-level security is told: an account, or `*` for operators."""
        return EVERY_ACCOUNT if self.is_operator else self.account or ""
