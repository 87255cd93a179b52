"""A message in memory, and an attempt: some of its recipients on their way to the targets of one decision.

Values only; who acts is the engine, which an attempt calls back as the pool's `Job`. A message's content stays in
memory until `open_count`, the number of its attempts under way, is zero again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from dataplane.core.config import Target
from dataplane.core.envelope import Envelope, RecipientRow
from dataplane.core.transaction import Transaction, Verdict
from dataplane.delivery.connection import Connection


@dataclass(slots=True)
class Message:
    """A message that delivery holds. `addresses` are all its recipients in order while it is not `reported`.

    `canonical` says that this process has seen that the content's line ends are right. `held_bytes` is what the message
    takes of the window while it is held: content, envelope and recipients (`envelope.message_bytes`).
    """

    envelope: Envelope
    content: bytes
    addresses: tuple[str, ...]
    reported: bool
    open_count: int = 0
    canonical: bool = False
    held_bytes: int = 0


class Owner(Protocol):
    """What an attempt reports to."""

    def prepare(self, attempt: Attempt, connection: Connection) -> Transaction | None:
        """See `connections.Job`."""
        ...

    def done(self, attempt: Attempt, connection: Connection, verdicts: tuple[Verdict, ...]) -> None:
        """See `connections.Job`."""
        ...

    def offer(self, attempt: Attempt) -> None:
        """Find a target from `attempt.place` on."""
        ...


@dataclass(slots=True, eq=False)
class Attempt:
    """Recipients (`sending`, all with the same attempt number) and where they may go.

    `account`, `weight`, `cost` and `priority` say whose turn it is (core/fair). `read_back_for` is the next hop whose
    place it takes, empty for mail just accepted. `place` is the target tried now. `probed` says that a target was
    dialled for this attempt, `waits` that a target is only unusable for now. Seconds are monotonic.
    """

    owner: Owner
    message: Message
    rows: tuple[RecipientRow, ...]
    rule: str
    targets: tuple[Target, ...]
    bundle_revision: int
    queue_key: str
    read_back_for: str
    account: str
    weight: int
    cost: int
    queued_ms: int
    begun_s: float
    priority: int = 0
    place: int = 0
    probed: bool = False
    waits: bool = False
    restarted: bool = False
    provider: str = ""
    remote_host: str = ""
    failure: Verdict | None = None
    sending_s: float = 0.0
    connecting_ms: int = 0

    @property
    def recipient_count(self) -> int:
        """See `connections.Job`."""
        return len(self.rows)

    @property
    def size_bytes(self) -> int:
        """See `connections.Job`."""
        return len(self.message.content)

    def prepare(self, connection: Connection) -> Transaction | None:
        """See `connections.Job`."""
        return self.owner.prepare(self, connection)

    def done(self, connection: Connection, verdicts: tuple[Verdict, ...]) -> None:
        """See `connections.Job`."""
        self.owner.done(self, connection, verdicts)

    def unreachable(self, failure: Verdict, remote_host: str, *, probed: bool) -> None:
        """See `connections.Job`: go on to the next target."""
        self.failure = failure
        self.remote_host = remote_host
        if probed:
            self.probed = True
        else:
            self.waits = True
        self.place += 1
        self.owner.offer(self)

    def rerouted(self) -> None:
        """See `connections.Job`: look at the targets anew."""
        self.place = 0
        self.owner.offer(self)
