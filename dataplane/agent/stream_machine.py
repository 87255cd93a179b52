"""The node's side of `ConfigStreamService.StreamConfig` without I/O: messages and facts in, actions out.

Two lanes that never wait for each other, each with at most one unanswered response:

    configuration   idle -> collecting (chunks of a Snapshot) -> checking -> storing -> awaiting workers ->
    answered denials         idle -> storing -> awaiting workers -> answered

What is refused is answered by a Nack that names it and what the node now holds; the good rest of a response
goes on through the lane first. Ack leaves only when every worker has it in use. Facts about work that belongs
to a stream that has ended still count for what the node holds, but nothing is answered: a nonce dies with its
stream. A response that comes while its lane is busy breaks the sender's rules and ends the stream. Denials
never go back to a lower version.

What the disk did not take is refused, too, and the control plane does not send it again: `store_again`, called every
few seconds, tries until it is stored or something newer came, so that a denial is in force as soon as there is room.
The control plane hears of it by the next status report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from google.protobuf.any_pb2 import Any
from google.rpc.code_pb2 import FAILED_PRECONDITION, INVALID_ARGUMENT, UNAVAILABLE
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from dataplane.agent.applied import WorkerTable
from dataplane.agent.held import (
    HeldConfig,
    Proposal,
    RefusedResponseError,
    propose_delta,
    propose_snapshot,
)
from postroad.config.v1.bundle_pb2 import Bundle, PoolKey
from postroad.config.v1.denials_pb2 import DenialSet
from postroad.node.v1.config_stream_service_pb2 import (
    Ack,
    BundleVersion,
    Command,
    Delta,
    Denials,
    Directive,
    Hello,
    Nack,
    Snapshot,
    SpoolStatus,
    StreamConfigRequest,
    StreamConfigResponse,
)

# A snapshot above it is refused: the node's memory is bounded by what its operator gave it, not by the
# sender.
MAX_SNAPSHOT_BYTES = 1024 * 1024 * 1024


FEATURES = ("command-filter", "destination-denials")
"""What this node understands beyond the first release, for Hello."""


@dataclass(frozen=True, slots=True)
class Send:
    """Send this to the control plane."""

    request: StreamConfigRequest


@dataclass(frozen=True, slots=True)
class Check:
    """Decode and validate the changed bundles, then call `checked`."""

    proposal: Proposal


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """Write last-known-good, then call `config_stored`."""

    config: HeldConfig


@dataclass(frozen=True, slots=True)
class StoreDenials:
    """Write the denials, then call `denials_stored`."""

    denials: DenialSet


@dataclass(frozen=True, slots=True)
class TellConfig:
    """Tell every worker that the configuration on disk is new."""


@dataclass(frozen=True, slots=True)
class TellDenials:
    """Tell every worker that the denials on disk are new."""


@dataclass(frozen=True, slots=True)
class Contact:
    """The configuration was current just now."""


@dataclass(frozen=True, slots=True)
class RunCommand:
    """Hand a command to the worker that has the spool."""

    command: Command


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a spool is refused."""

    spool: str
    refused: bool


@dataclass(frozen=True, slots=True)
class Reconnect:
    """Close the stream and come back, at the earliest after `after_s`, spread over `jitter_s`.

    `error` is empty when the control plane asked for it.
    """

    after_s: float = 0.0
    jitter_s: float = 0.0
    error: str = ""


@dataclass(frozen=True, slots=True)
class Drain:
    """Tell every worker whether to take no mail and to hand over what waits."""

    wanted: bool


Action: TypeAlias = (
    Send
    | Check
    | StoreConfig
    | StoreDenials
    | TellConfig
    | TellDenials
    | Contact
    | RunCommand
    | Verdict
    | Drain
    | Reconnect
)


@dataclass(slots=True)
class _Chunks:
    nonce: str
    node_pool: str = ""
    size_bytes: int = 0
    next_chunk: int = 0
    bundles: list[Bundle] = field(default_factory=list)
    pool_keys: list[PoolKey] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _ConfigAnswer:
    """What is owed for a Snapshot or Delta; without nonce when its stream has ended."""

    nonce: str
    proposal: Proposal
    errors: Mapping[str, str] = field(default_factory=dict)
    awaits_workers: bool = False


@dataclass(frozen=True, slots=True)
class _DenialsAnswer:
    nonce: str
    awaits_workers: bool = False


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """Who the node is; `node` is `nodes/{node}`."""

    node: str
    boot_id: str
    software_version: str


class StreamMachine:
    """See the module. `config` and `denials` are what the node's disk held at the start.

    `told_to_drain` is forgotten with the process, and said again.
    """

    def __init__(self, facts: NodeFacts, config: HeldConfig, denials: DenialSet, workers: WorkerTable) -> None:
        self.config = config
        self.denials = denials
        self.workers = workers
        self.denials_in_force = 0
        self.refusal_count = 0
        self.told_to_drain = False
        self._facts = facts
        self._chunks: _Chunks | None = None
        self._config_answer: _ConfigAnswer | None = None
        self._denials_answer: _DenialsAnswer | None = None
        self._forget = False
        self._unstored_config: tuple[HeldConfig, Proposal] | None = None
        self._unstored_denials: DenialSet | None = None

    # --- the stream itself
    # -----------------------------------------------------------------------------------

    def connected(self, spools: Sequence[SpoolStatus]) -> list[Action]:
        """A stream was opened: Hello is the first message."""
        held, pool = ({}, "") if self._forget else (self.config.bundles, self.config.node_pool)
        self._forget = False
        hello = Hello(
            node=self._facts.node,
            boot_id=self._facts.boot_id,
            software_version=self._facts.software_version,
            bundles=[
                BundleVersion(name=bundle.name, revision=bundle.revision, hash=bundle.hash) for bundle in held.values()
            ],
            client_features=FEATURES,
            denials_version=self.denials_in_force,
            spools=spools,
            told_to_drain=self.told_to_drain,
            node_pool=pool,
        )
        return [Send(StreamConfigRequest(hello=hello))]

    def disconnected(self) -> None:
        """The stream ended; what is under way goes on, unanswered."""
        self._chunks = None
        if self._config_answer is not None:
            answer = self._config_answer
            self._config_answer = None if answer.awaits_workers else replace(answer, nonce="")
        if self._denials_answer is not None:
            denials_answer = self._denials_answer
            self._denials_answer = None if denials_answer.awaits_workers else replace(denials_answer, nonce="")

    def receive(self, response: StreamConfigResponse) -> list[Action]:
        """A message of the control plane."""
        match response.WhichOneof("message"):
            case "snapshot":
                return self._snapshot(response.snapshot)
            case "delta":
                return self._delta(response.delta)
            case "denials":
                return self._denials(response.denials)
            case "command":
                return [RunCommand(response.command)]
            case "progress":
                return [Contact()]
            case "directive":
                return self._directive(response.directive)
            case _:
                # A newer control plane may say what this release has no name for; it was told our features.
                return []

    # --- configuration
    # ---------------------------------------------------------------------------------------

    def _snapshot(self, snapshot: Snapshot) -> list[Action]:
        if self._config_answer is not None:
            return [Reconnect(error="a Snapshot came before the last response was answered")]
        if snapshot.chunk == 0:
            self._chunks = _Chunks(snapshot.nonce, snapshot.node_pool)
        chunks = self._chunks
        if chunks is None or chunks.nonce != snapshot.nonce or chunks.next_chunk != snapshot.chunk:
            self._chunks = None
            refusal = RefusedResponseError("INCOMPLETE_SNAPSHOT", f"chunk {snapshot.chunk} is out of turn")
            return [self._refuse_config(snapshot.nonce, refusal)]
        chunks.next_chunk += 1
        chunks.size_bytes += snapshot.ByteSize()
        if chunks.size_bytes > MAX_SNAPSHOT_BYTES:
            self._chunks = None
            refusal = RefusedResponseError("INCOMPLETE_SNAPSHOT", "the snapshot is larger than a node takes")
            return [self._refuse_config(snapshot.nonce, refusal)]
        chunks.bundles.extend(snapshot.bundles)
        chunks.pool_keys.extend(snapshot.pool_keys)
        if not snapshot.complete:
            return []
        self._chunks = None
        try:
            proposal = propose_snapshot(
                self.config, chunks.node_pool, chunks.bundles, chunks.pool_keys, snapshot.bundle_count
            )
        except RefusedResponseError as refusal:
            return [self._refuse_config(snapshot.nonce, refusal)]
        return self._begin(snapshot.nonce, proposal)

    def _delta(self, delta: Delta) -> list[Action]:
        if self._config_answer is not None:
            return [Reconnect(error="a Delta came before the last response was answered")]
        self._chunks = None
        try:
            proposal = propose_delta(self.config, delta.base_digest, delta.upserts, delta.removed, delta.pool_keys)
        except RefusedResponseError as refusal:
            return [self._refuse_config(delta.nonce, refusal)]
        return self._begin(delta.nonce, proposal)

    def _begin(self, nonce: str, proposal: Proposal) -> list[Action]:
        self._unstored_config = None
        self._config_answer = _ConfigAnswer(nonce, proposal)
        return [Check(proposal)]

    def checked(self, errors: Mapping[str, str]) -> list[Action]:
        """The proposal's changed bundles were checked; `errors` is why, by the name of each refused one."""
        answer = self._owed_config()
        self._config_answer = replace(answer, errors=dict(errors))
        return [StoreConfig(answer.proposal.settle(errors))]

    def config_stored(self, config: HeldConfig, error: str) -> list[Action]:
        """Last-known-good holds `config` now, or `error` says why not and everything stays as it was."""
        answer = self._owed_config()
        if error:
            self._config_answer = None
            self._unstored_config = (config, answer.proposal)
            refusal = RefusedResponseError("STORAGE_FAILED", error)
            return [self._refuse_config(answer.nonce, refusal)] if answer.nonce else []
        self.config = config
        self.workers.announced()
        self._config_answer = replace(answer, awaits_workers=True) if answer.nonce else None
        return [TellConfig(), *self.workers_changed()]

    def _owed_config(self) -> _ConfigAnswer:
        if self._config_answer is None or self._config_answer.awaits_workers:
            raise RuntimeError("no configuration is under way")
        return self._config_answer

    # --- denials
    # ---------------------------------------------------------------------------------------------

    def _denials(self, response: Denials) -> list[Action]:
        if self._denials_answer is not None:
            return [Reconnect(error="Denials came before the last ones were answered")]
        unknown = sum(1 for denial in response.denials.denials if denial.WhichOneof("subject") is None)
        if unknown:
            self.refusal_count += 1
            nack = Nack(
                nonce=response.nonce,
                error_detail=_status(
                    INVALID_ARGUMENT, "DENIALS_REFUSED", f"{unknown} denials name nothing that this node knows"
                ),
                digest=self.config.digest,
                denials_version=self.denials_in_force,
            )
            return [Send(StreamConfigRequest(nack=nack))]
        if response.denials.version <= self.denials.version:
            self._denials_answer = _DenialsAnswer(response.nonce, awaits_workers=True)
            return self.workers_changed()
        self._denials_answer = _DenialsAnswer(response.nonce)
        return [StoreDenials(response.denials)]

    def denials_stored(self, denials: DenialSet, error: str) -> list[Action]:
        """The denials are on disk, or `error` says why not and the former ones stay."""
        if self._denials_answer is None or self._denials_answer.awaits_workers:
            raise RuntimeError("no denials are under way")
        answer = self._denials_answer
        if error:
            self._denials_answer = None
            self._unstored_denials = denials
            return [self._refuse_denials(answer.nonce, error)] if answer.nonce else []
        self.denials = denials
        self.workers.announced()
        self._denials_answer = replace(answer, awaits_workers=True) if answer.nonce else None
        return [TellDenials(), *self.workers_changed()]

    # --- what the disk did not take
    # -------------------------------------------------------------------------------------------

    def store_again(self) -> list[Action]:
        """Try once more to store what was refused for want of a disk that takes it."""
        actions: list[Action] = []
        if self._unstored_denials is not None and self._denials_answer is None:
            denials, self._unstored_denials = self._unstored_denials, None
            if denials.version > self.denials.version:
                self._denials_answer = _DenialsAnswer("")
                actions.append(StoreDenials(denials))
        if self._unstored_config is not None and self._config_answer is None:
            (config, proposal), self._unstored_config = self._unstored_config, None
            self._config_answer = _ConfigAnswer("", proposal)
            actions.append(StoreConfig(config))
        return actions

    # --- workers
    # ---------------------------------------------------------------------------------------------

    def workers_changed(self) -> list[Action]:
        """The worker table changed: answer what is now in use everywhere, or what a worker could not take."""
        actions: list[Action] = []
        if self.workers.denials_in_force(self.denials.version):
            self.denials_in_force = self.denials.version
        if self._denials_answer is not None and self._denials_answer.awaits_workers:
            nonce = self._denials_answer.nonce
            if self.denials_in_force == self.denials.version:
                self._denials_answer = None
                ack = Ack(nonce=nonce, denials_version=self.denials_in_force)
                actions.append(Send(StreamConfigRequest(ack=ack)))
            elif errors := self.workers.denials_errors():
                self._denials_answer = None
                actions.append(self._refuse_denials(nonce, "; ".join(errors)))
        if self._config_answer is not None and self._config_answer.awaits_workers:
            actions += self._answer_config(self._config_answer)
        return actions

    def _answer_config(self, answer: _ConfigAnswer) -> list[Action]:
        if self.workers.config_in_use(self.config.digest.hex()):
            self._config_answer = None
            if answer.errors:
                return [self._refuse_bundles(answer)]
            ack = Ack(nonce=answer.nonce, denials_version=self.denials_in_force)
            return [Send(StreamConfigRequest(ack=ack)), Contact()]
        if errors := self.workers.config_errors():
            self._config_answer = None
            return [self._refuse_config(answer.nonce, RefusedResponseError("STORAGE_FAILED", "; ".join(errors)))]
        return []

    # --- directives
    # ------------------------------------------------------------------------------------------

    def _directive(self, directive: Directive) -> list[Action]:
        match directive.action:
            case Directive.ACTION_DRAIN | Directive.ACTION_RESUME:
                self.told_to_drain = directive.action == Directive.ACTION_DRAIN
                return [Drain(self.told_to_drain)]
            case Directive.ACTION_RECONNECT:
                after_s = directive.after.seconds + directive.after.nanos / 1e9
                jitter_s = directive.jitter.seconds + directive.jitter.nanos / 1e9
                return [Reconnect(after_s, jitter_s)]
            case Directive.ACTION_RESYNC:
                self._forget = True
                return [Reconnect()]
            case Directive.ACTION_REFUSE_SPOOL:
                return [Verdict(directive.spool, refused=True)]
            case Directive.ACTION_ACCEPT_SPOOL:
                return [Verdict(directive.spool, refused=False)]
            case _:
                return []

    # --- refusals
    # --------------------------------------------------------------------------------------------

    def _refuse_config(self, nonce: str, refusal: RefusedResponseError) -> Action:
        self.refusal_count += 1
        code = UNAVAILABLE if refusal.reason == "STORAGE_FAILED" else FAILED_PRECONDITION
        nack = Nack(
            nonce=nonce,
            error_detail=_status(code, refusal.reason, str(refusal)),
            digest=self.config.digest,
            denials_version=self.denials_in_force,
        )
        return Send(StreamConfigRequest(nack=nack))

    def _refuse_bundles(self, answer: _ConfigAnswer) -> Action:
        self.refusal_count += 1
        sent = {bundle.name: bundle.hash for bundle in answer.proposal.changed}
        nack = Nack(
            nonce=answer.nonce,
            error_detail=_status(
                INVALID_ARGUMENT, "BUNDLE_REFUSED", f"refused: {', '.join(sorted(answer.errors)[:10])}"
            ),
            bundle_errors=[
                Nack.BundleError(
                    name=name,
                    hash=sent[name],
                    status=_status(INVALID_ARGUMENT, "BUNDLE_REFUSED", answer.errors[name]),
                )
                for name in sorted(answer.errors)
            ],
            digest=self.config.digest,
            denials_version=self.denials_in_force,
        )
        return Send(StreamConfigRequest(nack=nack))

    def _refuse_denials(self, nonce: str, error: str) -> Action:
        self.refusal_count += 1
        nack = Nack(
            nonce=nonce,
            error_detail=_status(UNAVAILABLE, "STORAGE_FAILED", error),
            digest=self.config.digest,
            denials_version=self.denials_in_force,
        )
        return Send(StreamConfigRequest(nack=nack))


def _status(code: int, reason: str, message: str) -> Status:
    detail = Any()
    detail.Pack(ErrorInfo(reason=reason, domain="postroad"))
    return Status(code=code, message=message[:2_000], details=[detail])
