"""One node's configuration stream as a sans-IO machine: what came in, what shall hold, and what to send next.

Inputs are the node's messages (`receive_*`) and news (`config_changed`, `denials_changed`, …), which
replace what was there: one latest-wins slot and no queue. `next_output` is pulled until it returns None;
`report` is what to record. The machine never raises on what a node says: it answers with `Close`.

    state    lane       left by
    hello    -          Hello → ready; anything else → closed
    ready    config     idle → unanswered (Snapshot or Delta) → idle by Ack or Nack of its nonce
             denials    idle → unanswered (Denials) → idle by Ack or Nack of its nonce; not held up by the config lane
    closed   -          Close is the last output; the node connects again

What the node holds (`held`) is known from Hello and from each answer, and unknown (None) when an answer's
digest is not the one expected. Content that was refused is kept in `refused` and not sent again until the
bundle has another revision; the other bundles go on. Where that cannot be expressed (a node whose holdings
are unknown), the node is asked to say Hello again. Changes that are too much for one Delta go in several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum, auto
from typing import NamedTuple

from controlplane.ports_fleet import (
    Bundle,
    ConfigReport,
    ConfigStatus,
    Denial,
    DenialSet,
    DenialSubject,
    PoolConfig,
    PoolKey,
    SpoolCommand,
    SpoolStatus,
    digest_of,
)

BASE_MISMATCH = "BASE_MISMATCH"
# Features of a node.
COMMAND_FILTER = "command-filter"
DESTINATION_DENIALS = "destination-denials"

_ERROR_TEXT_LIMIT = 1_000
# What one Delta carries, and at least one bundle: messages have a limit, and a node that was away may lack more.
DELTA_BYTES = 4 * 1024 * 1024
_BUNDLE_OVERHEAD_BYTES = 100
# What a node must know to be told of denials of a subject. One that does not know a subject would refuse the whole set.
_FEATURES_OF_SUBJECTS = {DenialSubject.DESTINATION: DESTINATION_DENIALS}


# --- what the node says ---------------------------------------------------------------------------------------------


class Hello(NamedTuple):
    """Who the node is and what it holds."""

    node: str
    boot_id: str
    software_version: str
    bundles: Sequence[tuple[str, bytes]]
    denials_version: int
    spools: tuple[SpoolStatus, ...]
    features: frozenset[str] = frozenset()
    told_to_drain: bool = False
    node_pool: str = ""


class Ack(NamedTuple):
    """In use."""

    nonce: str
    denials_version: int


class Nack(NamedTuple):
    """Refused; `bundle_errors` are name, hash and why; `reason` is the ErrorInfo's, `text` for people."""

    nonce: str
    reason: str
    text: str
    bundle_errors: Sequence[tuple[str, bytes, str]]
    digest: bytes
    denials_version: int


# --- what to send ---------------------------------------------------------------------------------------------------


class Snapshot(NamedTuple):
    """All bundles."""

    nonce: str
    pool: str
    bundles: tuple[Bundle, ...]
    pool_keys: tuple[PoolKey, ...]


class Delta(NamedTuple):
    """Changes against what the node holds."""

    nonce: str
    base_digest: bytes
    upserts: tuple[Bundle, ...]
    removed: tuple[str, ...]
    pool_keys: tuple[PoolKey, ...]


class Denials(NamedTuple):
    """What must stop now."""

    nonce: str
    denials: DenialSet


class Progress(NamedTuple):
    """Nothing changed."""


class Action(IntEnum):
    """What a Directive asks for; the numbers are those of postroad.node.v1."""

    DRAIN = 1
    RESUME = 2
    RECONNECT = 3
    REFUSE_SPOOL = 5
    ACCEPT_SPOOL = 6


_OPPOSITES = ((Action.DRAIN, Action.RESUME), (Action.REFUSE_SPOOL, Action.ACCEPT_SPOOL))


class Directive(NamedTuple):
    """Something for the node to do; `spool` for the spools' actions only."""

    action: Action
    spool: str = ""


class CloseCode(Enum):
    """How a stream ends, in words of gRPC."""

    OK = auto()
    ABORTED = auto()
    FAILED_PRECONDITION = auto()
    INVALID_ARGUMENT = auto()
    PERMISSION_DENIED = auto()
    UNAUTHENTICATED = auto()


class Close(NamedTuple):
    """The stream ends; the last output."""

    code: CloseCode
    text: str


Output = Snapshot | Delta | Denials | SpoolCommand | Progress | Directive | Close


@dataclass(slots=True)
class _Unanswered:
    """A config response on its way: what the node will hold when it takes all of it."""

    nonce: str
    base: Mapping[str, bytes] | None
    result: dict[str, bytes]
    bundles: tuple[Bundle, ...]
    snapshot_pool: str  # empty for a Delta


@dataclass(slots=True)
class Session:
    """One stream; see the module."""

    node: str
    refused: dict[str, bytes] = field(default_factory=dict)
    delta_bytes: int = DELTA_BYTES

    _ready: bool = False
    _closed: bool = False
    _close: Close | None = None
    _target: PoolConfig | None = None
    _held: dict[str, bytes] | None = None
    _pool: str = ""  # what the node was told that it belongs to
    _dirty: bool = False
    _unanswered: _Unanswered | None = None
    _refused_set: bytes | None = None
    _error: str = ""
    _denials: DenialSet | None = None
    _denials_held: int = 0
    _denials_refused: int = 0
    _denials_unanswered: tuple[str, int] | None = None
    _denials_error: str = ""
    _directives: dict[Directive, None] = field(default_factory=dict)
    _repaired: bytes | None = None
    _commands: dict[str, SpoolCommand] = field(default_factory=dict)
    _commands_sent: set[str] = field(default_factory=set)
    _features: frozenset[str] = frozenset()
    _incarnations: dict[str, int] = field(default_factory=dict)
    _progress_due: bool = False
    _nonce_count: int = 0

    # --- news ---------------------------------------------------------------------------------------------------

    def config_changed(self, target: PoolConfig) -> None:
        """What the node shall hold from now on."""
        self._target = target
        self._dirty = True
        for name, refused_hash in list(self.refused.items()):
            bundle = target.bundles.get(name)
            if bundle is None or bundle.hash != refused_hash:
                del self.refused[name]

    def denials_changed(self, denials: DenialSet) -> None:
        """What must stop; an older set than the present one is passed over."""
        if self._denials is None or denials.version > self._denials.version:
            self._denials = denials

    def commands_changed(self, commands: Sequence[SpoolCommand]) -> None:
        """Every command that waits for its result, in place of those before."""
        self._commands = {command.command: command for command in commands}
        self._commands_sent &= self._commands.keys()

    def opened_anew(self, spools: Sequence[SpoolStatus]) -> set[str]:
        """Which spools were opened anew since this was asked last: who had begun their commands is gone."""
        anew = {one.spool for one in spools if one.incarnation > self._incarnations.get(one.spool, one.incarnation)}
        self._incarnations.update({one.spool: one.incarnation for one in spools})
        return anew

    def repeat_commands(self, spools: set[str]) -> None:
        """Send the commands of these spools once more."""
        self._commands_sent -= {command.command for command in self._commands.values() if command.spool in spools}

    def direct(self, directive: Directive) -> None:
        """Something for the node to do; the same one twice is sent once."""
        for pair in _OPPOSITES:
            if directive.action in pair:
                for action in pair:
                    self._directives.pop(Directive(action, directive.spool), None)
        self._directives[directive] = None

    def tick(self) -> None:
        """A minute went by: say so when nothing changed, and repeat commands without result."""
        self._progress_due = True
        self._commands_sent.clear()

    def close(self, code: CloseCode, text: str) -> None:
        """End the stream after what must be said; the first reason counts."""
        if self._close is None:
            self._close = Close(code, text)

    # --- what the node says -------------------------------------------------------------------------------------

    def receive_hello(self, hello: Hello, refused: Mapping[str, bytes]) -> None:
        """First message of the stream; `refused` is what the same software refused on an earlier one."""
        if self._ready:
            self.close(CloseCode.FAILED_PRECONDITION, "Hello is the first message only")
            return
        if hello.node != self.node:
            self.close(CloseCode.PERMISSION_DENIED, "Hello names another node than the certificate")
            return
        if len(dict(hello.bundles)) != len(hello.bundles):
            self.close(CloseCode.INVALID_ARGUMENT, "Hello names a bundle twice")
            return
        self.refused = dict(refused)
        self._held = dict(hello.bundles)
        self._pool = hello.node_pool
        self._denials_held = hello.denials_version
        self._features = hello.features
        self.opened_anew(hello.spools)
        self._ready = self._dirty = self._progress_due = True
        if self._target is not None:
            self.config_changed(self._target)

    def receive_ack(self, ack: Ack) -> None:
        """All of a response is in use; an unknown nonce is passed over."""
        if self._answers_denials(ack.nonce):
            self._denials_held = ack.denials_version
            self._denials_error = ""
        elif (sent := self._take_unanswered(ack.nonce)) is not None:
            self._held = sent.result
            self._pool = sent.snapshot_pool or self._pool
            self._refused_set = None

    def receive_nack(self, nack: Nack) -> None:
        """A response was refused, in whole or in part; an unknown nonce is passed over."""
        if self._denials_unanswered is not None and nack.nonce == self._denials_unanswered[0]:
            self._denials_refused = self._denials_unanswered[1]
            self._denials_unanswered = None
            self._denials_held = nack.denials_version
            self._denials_error = nack.text[:_ERROR_TEXT_LIMIT]
        elif (sent := self._take_unanswered(nack.nonce)) is not None:
            self._note_refusal(sent, nack)

    def receive_status(self, digest: bytes, denials_version: int) -> None:
        """Heartbeat: a node that holds something else than we believe is repaired, once for each target."""
        if not self._must_be_ready() or self._unanswered is not None or self._target is None:
            return
        if digest and self._held is not None and digest != digest_of(self._held):
            if self._repaired == self._target.digest:
                return
            self._repaired = self._target.digest
            self._held = None
            self._dirty = True
        if self._denials_unanswered is None:
            self._denials_held = denials_version

    # --- what comes of it ---------------------------------------------------------------------------------------

    def next_output(self) -> Output | None:
        """What to send now; None until something changes. After Close there is nothing any more."""
        if self._closed:
            return None
        if self._directives and (self._ready or self._close is not None):
            directive = next(iter(self._directives))
            del self._directives[directive]
            return directive
        if self._close is not None:
            self._closed = True
            return self._close
        if not self._ready:
            return None
        return self._next_denials() or self._next_config() or self._next_command() or self._next_progress()

    def report(self) -> ConfigReport:
        """What to record of the node."""
        error = self._refusal() if self._refuses() else self._denials_error
        if not self._ready:
            status = ConfigStatus.NOT_SENT
        elif error:
            status = ConfigStatus.ERROR
        elif self._unanswered or self._dirty or self._target is None or self._denials_due() or self._denials_unanswered:
            status = ConfigStatus.STALE
        else:
            status = ConfigStatus.SYNCED
        return ConfigReport(status, error, self._denials_held, tuple(sorted(self.refused.items())))

    # --- the denials lane ---------------------------------------------------------------------------------------

    def _next_denials(self) -> Denials | None:
        if self._denials is None or self._denials_unanswered or not self._denials_due():
            return None
        nonce = self._new_nonce("d")
        self._denials_unanswered = (nonce, self._denials.version)
        return Denials(nonce, self._denials._replace(denials=tuple(filter(self._may_tell, self._denials.denials))))

    def _may_tell(self, denial: Denial) -> bool:
        feature = _FEATURES_OF_SUBJECTS.get(denial.subject)
        return feature is None or feature in self._features

    def _denials_due(self) -> bool:
        return self._denials is not None and self._denials.version > max(self._denials_held, self._denials_refused)

    def _answers_denials(self, nonce: str) -> bool:
        if self._denials_unanswered is None or self._denials_unanswered[0] != nonce:
            return False
        self._denials_unanswered = None
        return True

    # --- the config lane ----------------------------------------------------------------------------------------

    def _next_config(self) -> Snapshot | Delta | Directive | None:
        if not self._dirty or self._unanswered is not None or self._target is None:
            return None
        if not self._target.bundles:
            # Every pool has its settings: nothing at all is a fault of ours, and never means "delete everything".
            return None
        self._dirty = False
        if self._held is None and self.refused:
            # Only Hello says what the node holds: without that a refused bundle could not be left as it is.
            self.close(CloseCode.OK, "say Hello again")
            return Directive(Action.RECONNECT)
        goal = self._next_goal(self._target)
        if goal == self._held or (self._refused_set is not None and digest_of(goal) == self._refused_set):
            return None
        if self._held is not None and self._may_send_delta(self._target, self._held):
            return self._delta(self._target, self._held, goal)
        return self._snapshot(self._target, goal)

    def _goal(self, target: PoolConfig) -> dict[str, bytes]:
        """The target, with what the node has in place of what it refused."""
        goal = {name: bundle.hash for name, bundle in target.bundles.items()}
        for name in self.refused:
            if self._held is not None and name in self._held:
                goal[name] = self._held[name]
            else:
                goal.pop(name, None)
        return goal

    def _next_goal(self, target: PoolConfig) -> dict[str, bytes]:
        """The goal, or as much of the way there as one Delta carries."""
        goal, held = self._goal(target), self._held
        if held is None or not self._may_send_delta(target, held):
            return goal
        step = {name: held[name] for name in goal if name in held}
        room = self.delta_bytes
        for name in sorted(name for name in goal if goal[name] != held.get(name)):
            room -= len(target.bundles[name].content) + len(name) + _BUNDLE_OVERHEAD_BYTES
            if room < 0 and step != held:
                break
            step[name] = goal[name]
        return step

    def _may_send_delta(self, target: PoolConfig, held: Mapping[str, bytes]) -> bool:
        # Only a Snapshot tells a node that it changed pools; one of older software does not say which it has.
        return self._pool == target.pool or f"pools/{target.pool}/settings" in held

    def _delta(self, target: PoolConfig, held: dict[str, bytes], goal: dict[str, bytes]) -> Delta:
        upserts = tuple(target.bundles[name] for name in sorted(goal) if held.get(name) != goal[name])
        removed = tuple(sorted(held.keys() - goal.keys()))
        nonce = self._new_nonce("c")
        self._unanswered = _Unanswered(nonce, held, goal, upserts, snapshot_pool="")
        return Delta(nonce, digest_of(held), upserts, removed, target.pool_keys)

    def _snapshot(self, target: PoolConfig, goal: dict[str, bytes]) -> Snapshot | None:
        bundles = tuple(target.bundles[name] for name in sorted(goal))
        if any(bundle.hash != goal[bundle.name] for bundle in bundles):
            # A whole set cannot say "keep what you have": wait until the refused bundle moves on.
            return None
        nonce = self._new_nonce("c")
        self._unanswered = _Unanswered(nonce, self._held, goal, bundles, target.pool)
        return Snapshot(nonce, target.pool, bundles, target.pool_keys)

    def _take_unanswered(self, nonce: str) -> _Unanswered | None:
        if not self._must_be_ready() or self._unanswered is None or self._unanswered.nonce != nonce:
            return None
        sent, self._unanswered = self._unanswered, None
        self._dirty = True
        return sent

    def _note_refusal(self, sent: _Unanswered, nack: Nack) -> None:
        self._error = self._refusal_text(nack)
        if nack.reason == BASE_MISMATCH and not sent.snapshot_pool:
            self._held = None
            return
        by_name = {bundle.name: bundle for bundle in sent.bundles}
        refused_names = frozenset(name for name, _, _ in nack.bundle_errors if name in by_name)
        for name in refused_names:
            self._note_refused_bundle(by_name[name])
        if refused_names:
            held = _with_former(sent, refused_names)
            self._pool = sent.snapshot_pool or self._pool
        else:
            self._refused_set = digest_of(sent.result)
            held = None if sent.base is None else dict(sent.base)
        known = held is not None and (not nack.digest or nack.digest == digest_of(held))
        self._held = held if known else None

    def _note_refused_bundle(self, bundle: Bundle) -> None:
        current = None if self._target is None else self._target.bundles.get(bundle.name)
        if current is not None and current.hash == bundle.hash:
            self.refused[bundle.name] = bundle.hash

    def _refusal(self) -> str:
        # On a new stream only the names are known of what an earlier one was refused.
        return self._error or "; ".join(f"{name}: refused before" for name in sorted(self.refused))

    def _refusal_text(self, nack: Nack) -> str:
        parts = [f"{name}: {text}" for name, _, text in nack.bundle_errors] or [nack.text or nack.reason or "refused"]
        return "; ".join(parts)[:_ERROR_TEXT_LIMIT]

    def _refuses(self) -> bool:
        if self.refused:
            return True
        if self._refused_set is None or self._target is None:
            return False
        return digest_of(self._next_goal(self._target)) == self._refused_set

    # --- the rest -----------------------------------------------------------------------------------------------

    def _next_command(self) -> SpoolCommand | None:
        for command in self._commands.values():
            if command.filter is not None and COMMAND_FILTER not in self._features:
                continue
            if command.command not in self._commands_sent:
                self._commands_sent.add(command.command)
                return command
        return None

    def _next_progress(self) -> Progress | None:
        at_rest = self._unanswered is None and self._denials_unanswered is None and self._target is not None
        if not self._progress_due or not at_rest or self._denials is None:
            return None
        self._progress_due = False
        return Progress()

    def _must_be_ready(self) -> bool:
        if not self._ready:
            self.close(CloseCode.FAILED_PRECONDITION, "Hello must be the first message")
        return self._ready

    def _new_nonce(self, lane: str) -> str:
        self._nonce_count += 1
        return f"{lane}{self._nonce_count}"


def _with_former(sent: _Unanswered, names: frozenset[str]) -> dict[str, bytes] | None:
    """What the node holds after it took all but `names`; None when what it held before is unknown."""
    if sent.base is None:
        return None
    held = dict(sent.result)
    for name in names:
        if name in sent.base:
            held[name] = sent.base[name]
        else:
            held.pop(name, None)
    return held
