"""Carries out what the control plane asks of a spool: commands on waiting mail, their results in the ledger.

What a verb does to a recipient is `core.commands`. What is changed of a message, and the record that says so, is one
transaction: all of it or nothing, so that a crash leaves nothing in between. The engine begins no attempt of a message
while it is changed; an attempt that was on its way makes the change void, and the message is looked at again.

    by message    one message after the other; the last one's record carries the result
    by filter     the spool's recipients in order of message id, in slices; each record counts what it changed, and one
                  after each batch says how far the walk came and what was too late so far; the last one is the result

Counts only add up, and a walk that is begun anew goes on behind what was told: asked for again after a crash, a command
counts nothing twice, and changes nothing twice but a retry whose attempt has failed since. What is gone, or is not the
account's, counts as too late where it was named. A command that ended in this run of the worker answers the same again.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol

from dataplane.core.commands import (
    CONCERNED,
    EVENTS,
    EVERY_ACCOUNT,
    NO_MESSAGE,
    Filter,
    Other,
    Outcome,
    decide,
)
from dataplane.core.envelope import RecipientRow
from dataplane.core.ids import MessageId, first_message_id, format_message_id
from dataplane.core.ledger import AttemptEvent, CommandResult, LedgerRecord, RecipientUpdate
from dataplane.core.queue import State, Verb
from dataplane.failpoints import failpoint
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

MAX_REMEMBERED = 1_000
SLICE_ROWS = 256  # recipients of a turn of the walk: half a millisecond
BATCH_MESSAGES = 32  # changed at once, with a commit or two
TURN_MESSAGES = 4  # begun before the sessions have their turn: each is read, decided and encoded
STRAINED_S = 0.1
_AFTER_ALL_INDEXES = 1 << 30
_BOUNCED_TEXT = "given up by a command"


class Delivery(Protocol):
    """What this module needs of an engine."""

    def lock(self, message_id: MessageId) -> bool:
        """Begin no attempt of the message before `unlock`; whether the record of its acceptance is on its way."""
        ...

    def unlock(self, message_ids: Iterable[MessageId], queue_keys: Iterable[str]) -> None:
        """These are done; rows under these keys may have come, gone or become due."""
        ...

    def due_now_ms(self) -> int:
        """Now, by the clock that due times follow."""
        ...


class Tools(NamedTuple):
    """What commands are carried out with; engines by their spool's name."""

    engines: Mapping[str, Delivery]
    encode: RecordEncoder
    clock: Clock
    log: EventLog


class CommandRunner:
    """Runs commands for the spools of one worker; those by message are not held up by one with a filter."""

    def __init__(self, spools: Mapping[str, Spool], tools: Tools) -> None:
        self._spools = spools
        self._tools = tools
        self._results: OrderedDict[str, CommandResult] = OrderedDict()
        # Two commands must not change one message at once, and neither must a command and a hand-over.
        self.turn = asyncio.Lock()

    async def run(self, command: RunCommand) -> None:
        """Do it and write its result. SpoolError leaves it undone, or partly done, to be asked for again.

        Cancellation does the same.
        """
        spool = self._spools.get(command.spool)
        if spool is None:
            return
        known = self._results.get(command.command)
        if known is not None:
            await spool.write_record(_result_record(self._tools.encode, command, known))
            return
        result = await self._carry_out(spool, command)
        self._results[command.command] = result
        while len(self._results) > MAX_REMEMBERED:
            self._results.popitem(last=False)
        self._tools.log.info(
            "command.done",
            command=command.command,
            account=command.account,
            verb=Verb(command.verb).name.lower() if command.verb in tuple(Verb) else str(command.verb),
            changed=result.changed_count,
            too_late=result.too_late_count,
            error=result.error,
        )

    async def _carry_out(self, spool: Spool, command: RunCommand) -> CommandResult:
        try:
            verb = Verb(command.verb)
        except ValueError:
            text = f"verb {command.verb} is not known to this version"
            result = CommandResult(command.command, 0, 0, text)
            await spool.write_record(_result_record(self._tools.encode, command, result))
            return result
        run = _Run(spool, self._tools, command, verb)
        if command.filter is not None:
            return await self._walk(spool, run, command.filter)
        *former, last = command.message_ids or (NO_MESSAGE,)
        for message_id in former:
            await self._change_batch(run, [MessageId(message_id)])
        return await self._change_last(run, MessageId(last))

    async def _change_batch(self, run: _Run, message_ids: list[MessageId]) -> None:
        async with self.turn:
            await run.change_all(message_ids)

    async def _change_last(self, run: _Run, message_id: MessageId) -> CommandResult:
        async with self.turn:
            return await run.change_last(message_id)

    async def _walk(self, spool: Spool, run: _Run, wanted: Filter) -> CommandResult:
        concerned, account = CONCERNED[run.verb], run.command.account
        before = first_message_id(wanted.before_ms)
        position = (wanted.after, _AFTER_ALL_INDEXES)
        found: dict[MessageId, None] = {}
        done = NO_MESSAGE
        while rows := await spool.walk(position, before, SLICE_ROWS):
            position = (rows[-1].message_id, rows[-1].index)
            for message_id, _, state, queue_key in rows:
                if state in concerned and message_id != done and wanted.wants(account, state, queue_key):
                    found[message_id] = None
            if len(found) >= BATCH_MESSAGES:
                # The last one may have more recipients than were walked, and is changed as a whole.
                done = await self._change_found(run, found)
            await asyncio.sleep(0)
        await self._change_found(run, found)
        return await run.end()

    async def _change_found(self, run: _Run, found: dict[MessageId, None]) -> MessageId:
        """Change these messages in batches; returns the last one."""
        message_ids = list(found)
        found.clear()
        for start in range(0, len(message_ids), BATCH_MESSAGES):
            batch = message_ids[start : start + BATCH_MESSAGES]
            await self._change_batch(run, batch)
            await run.tell(batch[-1])
        return message_ids[-1] if message_ids else NO_MESSAGE


class _Run:
    """One command in one spool: what was changed, what was too late, and how much of that the ledger was told."""

    def __init__(self, spool: Spool, tools: Tools, command: RunCommand, verb: Verb) -> None:
        self.command = command
        self._spool = spool
        self._tools = tools
        self._engine = tools.engines[command.spool]
        self.verb = verb
        self._changed_count = 0
        self._too_late_count = 0
        self._untold_late_count = 0
        self._keys: set[str] = set()

    async def change_all(self, message_ids: list[MessageId]) -> None:
        """Change these messages; done is committed."""
        try:
            async with asyncio.TaskGroup() as group:
                for place, message_id in enumerate(message_ids):
                    if place % TURN_MESSAGES == TURN_MESSAGES - 1:
                        await asyncio.sleep(0)
                    group.create_task(self._change(message_id, self._partial))
        except BaseExceptionGroup as errors:
            raise _first_of(errors) from errors
        finally:
            self._unlock(message_ids)
        failpoint("commands.batch")

    async def change_last(self, message_id: MessageId) -> CommandResult:
        """Change a message, and write the result with it, so that a command for one message is all or nothing."""
        try:
            if not await self._change(message_id, self._final):
                await self._write(self._final(0))
        finally:
            self._unlock([message_id])
        return self._result(self._changed_count, self._too_late_count)

    async def tell(self, position: MessageId) -> None:
        """Say how far a walk came, and what was too late up to there."""
        await self._write(self._result(0, self._untold_late_count, partial=True, position=position))
        self._untold_late_count = 0
        while self._spool.strained:  # noqa: ASYNC110 - the disk tells nobody that it caught up
            await asyncio.sleep(STRAINED_S)

    async def end(self) -> CommandResult:
        """Write the result of a walk."""
        await self._write(self._final(0))
        return self._result(self._changed_count, self._too_late_count)

    def _partial(self, changed_count: int) -> CommandResult:
        return self._result(changed_count, 0, partial=True)

    def _final(self, changed_count: int) -> CommandResult:
        return self._result(changed_count, self._untold_late_count)

    def _result(
        self, changed_count: int, too_late_count: int, *, partial: bool = False, position: MessageId = NO_MESSAGE
    ) -> CommandResult:
        return CommandResult(self.command.command, changed_count, too_late_count, partial=partial, position=position)

    async def _write(self, result: CommandResult) -> None:
        await self._spool.write_record(_result_record(self._tools.encode, self.command, result))

    def _unlock(self, message_ids: list[MessageId]) -> None:
        self._engine.unlock(message_ids, self._keys)
        self._keys.clear()

    # --- a message

    async def _change(self, message_id: MessageId, result: Callable[[int], CommandResult]) -> bool:
        """Change what may be changed, with its record and the result in it; whether there was anything."""
        told = self._engine.lock(message_id)
        while True:
            stored = await self._read(message_id)
            if stored is None:
                self._note_late(1 if self.command.filter is None else 0)
                return False
            outcomes, late_count = self._outcomes(stored)
            if not outcomes:
                self._note_late(late_count)
                return False
            # What is too late here must be known to a result that ends the command.
            self._untold_late_count += late_count
            settlement = self._settlement(stored, outcomes, result(len(outcomes)), told=told or stored.reported)
            self._untold_late_count -= late_count
            if await self._spool.settle(settlement):
                self._note_late(late_count)
                self._changed_count += len(outcomes)
                self._keys.update(outcome.row.queue_key for _, outcome in outcomes)
                return True
            # An attempt began before the message was locked; none can begin now.

    def _note_late(self, count: int) -> None:
        self._too_late_count += count
        self._untold_late_count += count

    async def _read(self, message_id: MessageId) -> StoredMessage | None:
        """The message, unless it is gone, unreadable or another account's, which is answered like one that is gone."""
        if not message_id:
            return None
        try:
            stored = await self._spool.describe(message_id)
        except SpoolError as error:
            self._tools.log.warning("command.unreadable", message=format_message_id(message_id), error=str(error))
            return None
        if stored is None or self.command.account not in (stored.envelope.account, EVERY_ACCOUNT):
            return None
        self._keys.update(row.queue_key for row in stored.recipients)
        return stored

    def _outcomes(self, stored: StoredMessage) -> tuple[list[tuple[RecipientRow, Outcome]], int]:
        """What becomes of which recipients, and how many it is too late for."""
        due_ms, late_count = self._engine.due_now_ms(), 0
        found: list[tuple[RecipientRow, Outcome]] = []
        for row in stored.recipients:
            if not self._is_meant(row):
                continue
            outcome = decide(self.verb, row, self.command.provider, due_ms)
            if isinstance(outcome, Outcome):
                found.append((row, outcome))
            else:
                late_count += outcome is Other.TOO_LATE
        return found, late_count

    def _is_meant(self, row: RecipientRow) -> bool:
        wanted = self.command.filter
        return wanted is None or (
            wanted.wants(self.command.account, row.state, row.queue_key) and wanted.wants_address(row.address)
        )

    def _settlement(
        self,
        stored: StoredMessage,
        outcomes: list[tuple[RecipientRow, Outcome]],
        result: CommandResult,
        *,
        told: bool,
    ) -> Settlement:
        now_ms = self._tools.clock.wall_ms()
        envelope, event = stored.envelope, EVENTS[self.verb]
        changes = [
            RecipientChange(row.index, row.attempt, new.state, new.attempt, new.due_ms, new.queue_key)
            for row, (new, _) in outcomes
        ]
        updates = [
            RecipientUpdate(new.index, new.state, attempts, now_ms if new.state is State.QUEUED else 0, now_ms)
            for row, (new, attempts) in outcomes
            if new.state is not row.state or new.due_ms != row.due_ms
        ]
        is_bounce = self.verb is Verb.BOUNCE
        record = LedgerRecord(
            message_id=envelope.message_id,
            account=envelope.account,
            accepted=None if told else envelope,
            recipients_accepted=() if told else tuple(row.address for row in stored.recipients),
            updates=tuple(updates),
            events=(
                AttemptEvent(
                    tuple(row.index for row, _ in outcomes),
                    event,
                    now_ms,
                    0,
                    provider=self.command.provider,
                    enhanced_code="5.7.0" if is_bounce else "",
                    reply_text=_BOUNCED_TEXT if is_bounce else "",
                ),
            ),
            command_result=result,
        )
        return Settlement(envelope.message_id, changes, self._tools.encode(record), reported=True, whole=True)


def _result_record(encode: RecordEncoder, command: RunCommand, result: CommandResult) -> bytes:
    return encode(LedgerRecord(NO_MESSAGE, command.account, command_result=result))


def _first_of(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """A failure as who called knows it: the others failed with the same commit, or were cancelled by it."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
