"""What becomes of a message that is sent by API: refused as an SMTP submission would be, or ready to be stored.

Contract. `accept` is pure: it takes the message, the account's configuration of this moment and a `Stamp`, and returns
what is stored and counted. It asks the same functions of `dataplane.core` that a node asks at MAIL, RCPT and the end of
DATA, so that both doors let the same mail in. Everything that is wrong is an error of the domain that names the field.

    what is wrong                                     error
    an address, notes, a time, a content, its size    InvalidArgumentError
    the account is suspended                          FailedPreconditionError, ACCOUNT_SUSPENDED
    a domain of sender, From or Sender                FailedPreconditionError, SENDER_NOT_OWNED
    no rule matches a recipient                       FailedPreconditionError, NO_ROUTE

The content gets `Received` on top, `Date` and `Message-ID` where they are missing, and a line end where its last line
has none; every other octet of a raw one stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from controlplane.domain.composing import compose
from controlplane.domain.errors import FailedPreconditionError, Reason, invalid
from controlplane.domain.outgoing import Addressed, Outgoing, check_notes, envelope_of, send_time_ms
from controlplane.domain.sending_limits import SendingLimits
from dataplane.core.config import NodeSettings
from dataplane.core.datastream import MAX_LINE_OCTETS, Problem, content_problem
from dataplane.core.envelope import Envelope
from dataplane.core.headers import HeaderScan, Receipt, format_date, prepare, received_line, scan
from dataplane.core.idempotency import SubmissionKey, hash_key
from dataplane.core.ids import MessageId, format_message_id
from dataplane.core.policy import CompiledAccount
from dataplane.core.routing import MessageRouter, may_match


class SendingAccount(NamedTuple):
    """An account as its nodes know it, the settings and limits of its node pool, and whether it is suspended."""

    compiled: CompiledAccount
    settings: NodeSettings
    limits: SendingLimits
    is_suspended: bool


class Origin(NamedTuple):
    """Where a call came from: address of the peer, keyword for `Received`, TLS version or empty."""

    address: str
    protocol: str
    tls: str = ""


class Stamp(NamedTuple):
    """What is new with a message: its id and time, and who takes it from whom. `secret` is random, for boundaries."""

    message_id: MessageId
    now_ms: int
    hostname: str
    credential: str
    session: str
    origin: Origin
    secret: str


@dataclass(frozen=True, slots=True)
class Accepted:
    """A message that may be stored.

    `next_hops` are the providers that its recipients wait for, empty where no rule matches. `charged_bytes` are counted
    by limits; `key` is None without a request id.
    """

    envelope: Envelope
    recipients: tuple[str, ...]
    next_hops: tuple[str, ...]
    content: bytes
    charged_bytes: int
    tags: tuple[str, ...]
    metadata: Mapping[str, str]
    key: SubmissionKey | None


_PROBLEMS = {
    Problem.STRAY: "must have CR LF at the end of each line, and neither CR nor LF elsewhere",
    Problem.NUL: "must not hold the octet NUL",
    Problem.LONG_LINE: f"must have at most {MAX_LINE_OCTETS} octets in a line",
}


def accept(outgoing: Outgoing, account: SendingAccount, stamp: Stamp) -> Accepted:
    """Return the message as it is stored; see the module for the errors."""
    if account.is_suspended:
        name = account.compiled.account.name
        raise FailedPreconditionError(Reason.ACCOUNT_SUSPENDED, "the account is suspended", subject=name)
    if outgoing.raw is None and outgoing.content is None:
        raise invalid(outgoing.where, "must have raw or content")
    check_notes(outgoing)
    held_until_ms = send_time_ms(outgoing, stamp.now_ms)
    addressed = envelope_of(outgoing, account.settings.max_recipients)
    _check_addresses(addressed, account.compiled)
    content, path = _content(outgoing, stamp)
    _check_content(content, path, account.settings.max_message_bytes)
    scanned = scan(content)
    _check_header(scanned, path, account.compiled)
    stored, header_message_id = _complete(content, scanned, addressed, outgoing, stamp)
    envelope = Envelope(
        message_id=stamp.message_id,
        account=account.compiled.account.name,
        account_uid=account.compiled.account.uid,
        credential=stamp.credential,
        sender=addressed.sender,
        size_bytes=len(stored),
        accepted_ms=stamp.now_ms,
        session=stamp.session,
        client_address=stamp.origin.address,
        client_helo="",
        client_tls=stamp.origin.tls,
        header_message_id=header_message_id,
        subject=scanned.subject,
        smtputf8=_is_international(addressed, content, scanned),
        body_8bit=not content.isascii(),
        headers=scanned.rule_values,
        send_time_ms=held_until_ms,
        priority=outgoing.priority,
    )
    next_hops = _next_hops(envelope, addressed, account.compiled)
    key = None
    if outgoing.request_id:
        key_hash = hash_key(account.compiled.account.uid, outgoing.request_id.encode())
        key = SubmissionKey(key_hash, outgoing.fingerprint, checked=True)
    return Accepted(
        envelope, addressed.recipients, next_hops, stored, len(content), outgoing.tags, dict(outgoing.metadata), key
    )


def _check_addresses(addressed: Addressed, compiled: CompiledAccount) -> None:
    if addressed.sender and not compiled.owns_sender_domain(addressed.sender_domain):
        raise _not_owned(f"the account may not send as {addressed.sender_domain}", addressed.sender_domain)
    for recipient in addressed.recipients:
        if not may_match(compiled.rules, addressed.sender, recipient):
            raise _no_route(recipient)


def _content(outgoing: Outgoing, stamp: Stamp) -> tuple[bytes, str]:
    """Return the content before anything is added, and the path of what it was made of."""
    if outgoing.raw is not None:
        raw = outgoing.raw
        return raw if raw.endswith(b"\r\n") or not raw else raw + b"\r\n", outgoing.path("raw")
    assert outgoing.content is not None  # noqa: S101 - one of the two is there
    path = outgoing.path("content")
    return compose(outgoing.content, path, f"{format_message_id(stamp.message_id)}-{stamp.secret}"), path


def _check_content(content: bytes, path: str, max_bytes: int) -> None:
    problem = content_problem(content, max_bytes)
    if problem is Problem.TOO_BIG:
        raise invalid(path, f"makes a message of {len(content)} bytes; at most {max_bytes} are taken")
    if problem is not Problem.NONE:
        raise invalid(path, _PROBLEMS[problem])


def _check_header(scanned: HeaderScan, path: str, compiled: CompiledAccount) -> None:
    if scanned.problem is not None:
        raise invalid(path, scanned.problem.text)
    if scanned.idempotency_key:
        raise invalid(path, "must not have a field Idempotency-Key: use request_id")
    for domain in scanned.author_domains:
        if not compiled.owns_sender_domain(domain):
            raise _not_owned(f"From and Sender may not name {domain}", domain)


def _complete(
    content: bytes, scanned: HeaderScan, addressed: Addressed, outgoing: Outgoing, stamp: Stamp
) -> tuple[bytes, str]:
    identifier, date = format_message_id(stamp.message_id), format_date(stamp.now_ms)
    receipt = Receipt(
        helo="",
        client_address=stamp.origin.address,
        hostname=stamp.hostname,
        protocol=stamp.origin.protocol,
        message_id=identifier,
        date=date,
        recipient=addressed.recipients[0] if len(addressed.recipients) == 1 else "",
        tls=stamp.origin.tls,
        priority=outgoing.priority,
    )
    made_up = f"<{identifier}@{stamp.hostname}>"
    stored = prepare(content, scanned, received_line(receipt), date, made_up)
    return stored, scanned.message_id if scanned.has_message_id else made_up


def _is_international(addressed: Addressed, content: bytes, scanned: HeaderScan) -> bool:
    """Whether addresses or header hold more than ASCII (RFC 6531)."""
    addresses = addressed.sender + "".join(addressed.recipients)
    return not (addresses.isascii() and content[: scanned.header_bytes].isascii())


def _next_hops(envelope: Envelope, addressed: Addressed, compiled: CompiledAccount) -> tuple[str, ...]:
    """Return where each recipient goes first; some one must have a rule, as at the end of DATA."""
    router = MessageRouter(compiled.rules, envelope.sender, envelope.size_bytes, envelope.headers, envelope.message_id)
    decisions = [router.route(recipient) for recipient in addressed.recipients]
    if not any(decisions):
        raise _no_route(addressed.recipients[0])
    return tuple(one.targets[0].provider if one is not None and one.targets else "" for one in decisions)


def _not_owned(text: str, domain: str) -> FailedPreconditionError:
    return FailedPreconditionError(Reason.SENDER_NOT_OWNED, text, subject=domain)


def _no_route(recipient: str) -> FailedPreconditionError:
    return FailedPreconditionError(Reason.NO_ROUTE, f"no routing rule takes mail to {recipient}", subject=recipient)
