"""Ledger records as bytes: `encode_record` is the RecordEncoder of `dataplane.ports`.

Contract. A record becomes a serialised postroad.node.v1.LedgerRecord. It never fails on content: whatever a remote
server or a submitter said, the outcome must be stored, so that text which is no Unicode (lone surrogates) is
repaired with question marks on a second, slower way. One acceptance with one recipient and one event costs about 7 µs.
`encode_statement` does the same for what a spool says of those that wait in it, as a LedgerStatement.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dataplane.core.envelope import Envelope
from dataplane.core.idempotency import SubmissionKey
from dataplane.core.ledger import AttemptEvent, CommandResult, LedgerRecord, RecipientUpdate
from dataplane.core.waiting import Waiting, WaitingStatement
from postroad.node.v1 import ledger_pb2 as pb
from postroad.node.v1 import ledger_service_pb2 as service_pb


def encode_record(record: LedgerRecord) -> bytes:
    """Return the bytes of the record."""
    try:
        return _message(record).SerializeToString()
    except UnicodeEncodeError:
        return _message(_repaired(record)).SerializeToString()


def encode_statement(statement: WaitingStatement) -> bytes:
    """Return the bytes of a statement."""
    return service_pb.LedgerStatement(
        spool=statement.spool,
        number=statement.number,
        error=statement.error,
        totals=[
            service_pb.WaitingTotal(account=account, bucket=bucket, count=total.count, digest=total.digest.to_bytes(16))
            for account, bucket, total in statement.totals
        ],
        recipients=map(_waiting, statement.recipients),
        without_deadline=map(_waiting, statement.without_deadline),
        quarantined=statement.quarantined,
    ).SerializeToString()


def _waiting(named: tuple[str, Waiting]) -> service_pb.WaitingRecipient:
    account, recipient = named
    return service_pb.WaitingRecipient(message_id=recipient.message_id, index=recipient.index, account=account)


def _message(record: LedgerRecord) -> pb.LedgerRecord:
    message = pb.LedgerRecord(message_id=record.message_id, account=record.account)
    if record.accepted is not None:
        message.accepted.CopyFrom(_accepted(record.accepted, record.recipients_accepted))
    for update in record.updates:
        _add_update(message, update)
    for event in record.events:
        _add_event(message, event)
    if record.epoch:
        message.epoch = record.epoch
    if record.command_result is not None:
        message.command_result.CopyFrom(_command_result(record.command_result))
    return message


def _command_result(result: CommandResult) -> pb.CommandResult:
    return pb.CommandResult(
        command=result.command,
        changed_count=result.changed_count,
        too_late_count=result.too_late_count,
        error=result.error,
        partial=result.partial,
        position=result.position,
    )


def _accepted(envelope: Envelope, recipients: tuple[str, ...]) -> pb.AcceptedMessage:
    accepted = pb.AcceptedMessage(
        accept_time_ms=envelope.accepted_ms,
        sender=envelope.sender,
        size_bytes=envelope.size_bytes,
        header_message_id=envelope.header_message_id,
        subject=envelope.subject,
        credential=envelope.credential,
        client_address=envelope.client_address,
        client_helo=envelope.client_helo,
        client_tls=envelope.client_tls,
        session=envelope.session,
        recipients=recipients,
        send_time_ms=envelope.send_time_ms,
        priority=envelope.priority,
    )
    key = envelope.submission_key
    if key is not None:
        accepted.submission_key_hash, accepted.submission_key_checked = key.key_hash, key.checked
        accepted.submission_content_hash = key.content_hash
    return accepted


def _add_update(message: pb.LedgerRecord, update: RecipientUpdate) -> None:
    # Made in place: a copy of each would cost as much again.
    index, state, attempt, next_attempt_ms, update_ms = update
    message.recipients.add(
        index=index,
        state=state,  # The numbers of both enums are the same, and a test says so.
        attempts=attempt,
        next_attempt_ms=next_attempt_ms,
        update_ms=update_ms,
    )


def _add_event(message: pb.LedgerRecord, event: AttemptEvent) -> None:
    message.events.add(
        indexes=event.indexes,
        type=event.type,  # As in _add_update.
        time_ms=event.time_ms,
        attempt=event.attempt,
        bundle_revision=event.bundle_revision,
        rule=event.rule,
        provider=event.provider,
        remote_host=event.remote_host,
        tls=event.tls,
        reply_code=event.reply_code,
        enhanced_code=event.enhanced_code,
        reply_text=event.reply_text,
        queued_ms=event.queued_ms,
        waiting_ms=event.waiting_ms,
        connecting_ms=event.connecting_ms,
        transferring_ms=event.transferring_ms,
    )


def _repaired(record: LedgerRecord) -> LedgerRecord:
    """Return the record with every text made Unicode."""
    repaired: LedgerRecord = _repair(record)
    return repaired


def _repair(value: Any) -> Any:
    match value:
        case str():
            return value.encode("utf-8", "replace").decode("utf-8")
        case RecipientUpdate() | SubmissionKey():
            return value
        case tuple():
            return tuple([_repair(item) for item in value])
        case Envelope() | AttemptEvent() | CommandResult() | LedgerRecord():
            fields = {each.name: _repair(getattr(value, each.name)) for each in dataclasses.fields(value)}
            return dataclasses.replace(value, **fields)
        case _:
            return value
