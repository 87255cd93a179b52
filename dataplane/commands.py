"""Carries out what the control plane asks of a spool: one command, one result in the ledger.

VERB_CANCEL withdraws recipients that wait, in two steps, because the scheduler may claim the same rows: first each is
held under a new attempt number, so that a claim that was on its way changes nothing any more, then all that were caught
are cancelled, and the record that says so is in the same transaction. A crash between the steps leaves them held, and
the command, which is sent until its result is in the ledger, finds them so. What is being sent, is terminal, or is not
the account's counts as too late. The same command asked twice in one run of the worker answers the same.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

from dataplane.core.envelope import RecipientRow
from dataplane.core.ids import MessageId, format_message_id
from dataplane.core.ledger import AttemptEvent, CommandResult, LedgerRecord, RecipientUpdate
from dataplane.core.queue import WAITING, EventType, State, check_move
from dataplane.link import RunCommand
from dataplane.ports import (
    Clock,
    EventLog,
    RecipientChange,
    RecordEncoder,
    Settlement,
    Spool,
    SpoolError,
    StoredMessage,
)

VERB_CANCEL = 1
MAX_REMEMBERED = 1_000
_NO_MESSAGE = MessageId(b"")


class CommandRunner:
    """Runs commands for the spools of one worker, one at a time. `wake` is told the keys whose rows changed."""

    def __init__(
        self,
        spools: Mapping[str, Spool],
        encode: RecordEncoder,
        clock: Clock,
        log: EventLog,
        wake: Callable[[str, str], None],
    ) -> None:
        self._spools = spools
        self._encode = encode
        self._clock = clock
        self._log = log
        self._wake = wake
        self._results: OrderedDict[str, CommandResult] = OrderedDict()

    async def run(self, command: RunCommand) -> None:
        """Do it and write its result. SpoolError leaves it undone, or partly done, to be asked for again.

        Cancellation does the same.
        """
        spool = self._spools.get(command.spool)
        if spool is None:
            return
        known = self._results.get(command.command)
        if known is not None:
            await self._write_result(spool, command, known)
            return
        if command.verb == VERB_CANCEL:
            result = await self._cancel(spool, command)
        else:
            result = CommandResult(command.command, 0, 0, f"verb {command.verb} is not known to this version")
            await self._write_result(spool, command, result)
        self._results[command.command] = result
        while len(self._results) > MAX_REMEMBERED:
            self._results.popitem(last=False)
        self._log.info(
            "command.done",
            command=command.command,
            account=command.account,
            changed=result.changed_count,
            too_late=result.too_late_count,
            error=result.error,
        )

    async def _write_result(self, spool: Spool, command: RunCommand, result: CommandResult) -> None:
        record = LedgerRecord(_NO_MESSAGE, command.account, command_result=result)
        await spool.write_record(self._encode(record))

    async def _cancel(self, spool: Spool, command: RunCommand) -> CommandResult:
        changed, too_late = 0, 0
        *former, last = [MessageId(raw) for raw in command.message_ids] or [_NO_MESSAGE]
        for message_id in former:
            caught, late, settlement = await self._catch(spool, command, message_id)
            changed, too_late = changed + len(caught), too_late + late
            if settlement is not None:
                await spool.settle(self._cancelled(settlement, caught, None))
                self._wake_keys(command.spool, caught)
        caught, late, settlement = await self._catch(spool, command, last)
        result = CommandResult(command.command, changed + len(caught), too_late + late)
        if settlement is None:
            await self._write_result(spool, command, result)
        else:
            # With the last message's own transaction, so that a command for one message is all or nothing.
            await spool.settle(self._cancelled(settlement, caught, result))
            self._wake_keys(command.spool, caught)
        return result

    async def _catch(
        self, spool: Spool, command: RunCommand, message_id: MessageId
    ) -> tuple[list[RecipientRow], int, StoredMessage | None]:
        """Hold the waiting recipients; returns those caught, how many were too late, and the message if any was."""
        if not message_id:
            return [], 0, None
        try:
            stored = await spool.load(message_id)
        except SpoolError as error:
            self._log.warning("command.unreadable", message=format_message_id(message_id), error=str(error))
            stored = None
        # Another account's message is answered like one that is gone: nothing is told about it.
        if stored is None or stored.envelope.account != command.account:
            return [], 1, None
        caught = [
            row._replace(state=State.HELD, attempt=row.attempt + 1)
            for row in stored.recipients
            if row.state in WAITING and await self._hold(spool, message_id, row)
        ]
        return caught, len(stored.recipients) - len(caught), stored if caught else None

    async def _hold(self, spool: Spool, message_id: MessageId, row: RecipientRow) -> bool:
        if row.state is not State.HELD:
            check_move(row.state, State.HELD)
        change = RecipientChange(row.index, row.attempt, State.HELD, row.attempt + 1, row.due_ms, row.queue_key)
        return await spool.settle(Settlement(message_id, (change,), None, reported=False)) == 1

    def _cancelled(self, stored: StoredMessage, caught: list[RecipientRow], result: CommandResult | None) -> Settlement:
        now_ms = self._clock.wall_ms()
        for row in caught:
            check_move(row.state, State.CANCELLED)
        changes = [
            RecipientChange(row.index, row.attempt, State.CANCELLED, row.attempt, 0, row.queue_key) for row in caught
        ]
        # The number that held it was never an attempt.
        updates = [RecipientUpdate(row.index, State.CANCELLED, row.attempt - 1, 0, now_ms) for row in caught]
        envelope = stored.envelope
        record = LedgerRecord(
            message_id=envelope.message_id,
            account=envelope.account,
            accepted=None if stored.reported else envelope,
            recipients_accepted=() if stored.reported else tuple(row.address for row in stored.recipients),
            updates=tuple(updates),
            events=(AttemptEvent(tuple(row.index for row in caught), EventType.CANCELLED, now_ms, 0),),
            command_result=result,
        )
        return Settlement(envelope.message_id, changes, self._encode(record), reported=True)

    def _wake_keys(self, spool: str, rows: list[RecipientRow]) -> None:
        for key in {row.queue_key for row in rows}:
            self._wake(spool, key)
