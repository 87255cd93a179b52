"""What is kept of a message beside its content: the envelope, its recipients and what rules may look at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from dataplane.core.idempotency import SubmissionKey
from dataplane.core.ids import MessageId
from dataplane.core.queue import State

MESSAGE_BYTES = 1_536
"""What a message takes in memory beside content and recipients: its envelope, its attempts and who refers to them."""

RECIPIENT_BYTES = 400
"""What a recipient takes beside the letters of its address: about 60 in a transaction, 200 to 400 in delivery."""

COMMITTING_BYTES = 500
"""What a recipient takes beyond that while it is committed: its row, and what the spool writes for it."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """An accepted message without content and recipients; immutable from the 250 on.

    `sender` is empty for the null sender; domains are lower case. `size_bytes` counts the content as delivered. Times
    are milliseconds since 1970 by the node's wall clock. `headers` holds the unfolded values of the few fields that
    routing rules may look at, by lower-case name. `submission_key` is None for a message that came without one.
    `send_time_ms` is until when the submitter had it held, 0 if not. `epoch` is the lease under which REPLICATED mail
    is held here, 0 for LOCAL mail.
    """

    message_id: MessageId
    account: str
    account_uid: str
    credential: str
    sender: str
    size_bytes: int
    accepted_ms: int
    session: str
    client_address: str
    client_helo: str
    client_tls: str
    header_message_id: str
    subject: str
    smtputf8: bool
    body_8bit: bool
    headers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    submission_key: SubmissionKey | None = None
    send_time_ms: int = 0
    priority: int = 0
    epoch: int = 0

    @property
    def released_ms(self) -> int:
        """From when its lifetime counts."""
        return self.send_time_ms or self.accepted_ms


def envelope_fields(envelope: Envelope, addresses: Mapping[str, str]) -> dict[str, object]:
    """Return the envelope as spools and the replicated queue keep it, as JSON; addresses are by index.

    Stored bytes outlive code: a field is never given another meaning, and one that most messages do not need is left
    out where it says nothing.
    """
    fields: dict[str, object] = {
        "account": envelope.account,
        "sender": envelope.sender,
        "recipients": addresses,
        "account_uid": envelope.account_uid,
        "credential": envelope.credential,
        "size_bytes": envelope.size_bytes,
        "accepted_ms": envelope.accepted_ms,
        "session": envelope.session,
        "client": [envelope.client_address, envelope.client_helo, envelope.client_tls],
        "header_message_id": envelope.header_message_id,
        "subject": envelope.subject,
        "smtputf8": envelope.smtputf8,
        "body_8bit": envelope.body_8bit,
        "headers": envelope.headers,
    }
    key = envelope.submission_key
    if key is not None:
        fields["submission_key"] = [key.key_hash.hex(), key.content_hash.hex(), key.checked]
    if envelope.send_time_ms:
        fields["send_time_ms"] = envelope.send_time_ms
    if envelope.priority:
        fields["priority"] = envelope.priority
    if envelope.epoch:
        fields["epoch"] = envelope.epoch
    return fields


class RecipientRow(NamedTuple):
    """One recipient as the spool keeps it.

    `attempt` counts attempts begun and is the fencing token; `due_ms` is when the recipient may be sent, in
    milliseconds since 1970; a higher `priority` goes first; `queue_key` groups recipients that wait for the same
    thing: account and provider, or account and recipient domain, and have the same priority; it also says who is bound
    to a provider.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls on a row
    address: str
    state: State
    attempt: int
    due_ms: int
    priority: int
    queue_key: str


def recipient_bytes(address: str) -> int:
    """Return what a recipient takes in memory, at most: one letter beyond ASCII makes all of its address wide."""
    return RECIPIENT_BYTES + (len(address) if address.isascii() else 4 * len(address))


def message_bytes(content_bytes: int, addresses: Iterable[str]) -> int:
    """Return what a message with a content of this size takes in memory while delivery holds it."""
    return MESSAGE_BYTES + content_bytes + sum(map(recipient_bytes, addresses))


def under_key(rows: Sequence[RecipientRow], queue_key: str) -> tuple[RecipientRow, ...]:
    """Return the rows as they wait under this key."""
    return tuple([row if row.queue_key == queue_key else row._replace(queue_key=queue_key) for row in rows])


def make_queue_key(account: str, next_hop: str, priority: int = 0, *, pinned: bool = False) -> str:
    """Return the key under which recipients of `account` wait for `next_hop`: a provider name or a domain.

    Account, next hop, a priority that is not 0, and whether a command bound them to the provider, whatever the rules
    choose; with a tab between. Each priority waits under a key of its own, so that what goes first is found without
    reading what goes later.
    """
    key = f"{account}\t{next_hop}\t{priority}" if priority else f"{account}\t{next_hop}"
    return key + _PINNED if pinned else key


@lru_cache(maxsize=1024)
def split_queue_key(queue_key: str) -> tuple[str, str]:
    """Return account and next hop of a key."""
    account, _, rest = queue_key.partition("\t")
    return account, rest.partition("\t")[0]


def queue_priority(queue_key: str) -> int:
    """Return the priority of what waits under a key."""
    parts = queue_key.removesuffix(_PINNED).split("\t", 2)
    return int(parts[2]) if len(parts) > 2 else 0


def is_pinned(queue_key: str) -> bool:
    """Whether recipients under this key are bound to a provider."""
    return queue_key.endswith(_PINNED)


def pinned_provider(queue_key: str) -> str:
    """Return the provider that recipients under this key are bound to, empty where the rules choose."""
    return split_queue_key(queue_key)[1] if is_pinned(queue_key) else ""


_PINNED = "\tpinned"
