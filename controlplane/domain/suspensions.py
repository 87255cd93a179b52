"""Suspensions as callers see them: what is stopped, and which nodes have confirmed it. Plain values."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import NamedTuple


class SubjectKind(Enum):
    """What can be suspended."""

    ACCOUNT = "account"
    CREDENTIAL = "credential"
    PROVIDER = "provider"
    DESTINATION = "destination"


class Subject(NamedTuple):
    """One thing that can be suspended: full name, owner (None for what is not an account's) and id."""

    kind: SubjectKind
    resource: str
    account: str | None
    item: str


class Receipt(NamedTuple):
    """The version of the denials that a node has in force, and when that was heard of (None: never).

    `told_since`: from which version on the node is told of what is asked about; None: its software does not know how to
    stop it.
    """

    node: str
    node_pool: str
    connected: bool
    denials_version: int
    acknowledge_time: datetime | None
    told_since: int | None


@dataclass(frozen=True, slots=True)
class Suspension:
    """Whether something is denied since `denials_version`, or allowed since at the latest then."""

    name: str
    in_force: bool
    denials_version: int
    receipts: tuple[Receipt, ...]

    def confirmed_by(self, receipt: Receipt) -> bool:
        """Whether this node has it. Where nothing is to be stopped it is enough that the node has heard so."""
        if not self.in_force:
            return receipt.denials_version >= self.denials_version
        told_since = receipt.told_since
        return told_since is not None and receipt.denials_version >= max(self.denials_version, told_since)

    @property
    def confirmed(self) -> bool:
        """Whether every node has it."""
        return all(self.confirmed_by(receipt) for receipt in self.receipts)
