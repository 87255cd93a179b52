"""The config stream's session against a model node, through pipes that break: everybody ends at the target.

The node refuses certain contents. Edits, deletions, denials, broken connections, heartbeats and answers
come in any order.
"""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from controlplane.ports_fleet import Bundle, ConfigStatus, DenialSet, PoolConfig, digest_of
from controlplane.stream.session import (
    BASE_MISMATCH,
    Ack,
    Action,
    Close,
    Delta,
    Denials,
    Directive,
    Hello,
    Nack,
    Output,
    Session,
    Snapshot,
)

# Room for one bundle of the machine and not for two: what changed together travels in steps.
STEP_BYTES = 150
NAMES = ["accounts/a", "accounts/b", "accounts/c", "pools/default/settings"]


@dataclass
class ModelNode:
    """What an agent does, without its disk: holds bundles by hash and denials by version."""

    held: dict[str, bytes] = field(default_factory=dict)
    pool: str = ""
    denials_version: int = 0
    # Refusals that reached the control plane and whose bundle has not moved on since.
    reported: set[tuple[str, bytes]] = field(default_factory=set)

    def hello(self) -> Hello:
        return Hello(*("edge-1", "boot", "1.0", list(self.held.items()), self.denials_version, ()), node_pool=self.pool)

    def answer(self, output: Output) -> Ack | Nack | None:
        match output:
            case Denials(nonce, denials):
                assert denials.version > self.denials_version, "denials go forward only"
                self.denials_version = denials.version
                return Ack(nonce, denials.version)
            case Snapshot(nonce, pool, bundles, _):
                self.pool = pool
                return self._apply(nonce, bundles, dict(self.held), whole=True)
            case Delta(nonce, base, upserts, removed, _):
                assert self.pool, "what changed is of no use without a pool"
                if base != digest_of(self.held):
                    return Nack(nonce, BASE_MISMATCH, "", (), digest_of(self.held), self.denials_version)
                kept = {name: h for name, h in self.held.items() if name not in removed}
                return self._apply(nonce, upserts, kept, whole=False)
        return None

    def _apply(self, nonce: str, bundles: tuple[Bundle, ...], before: dict[str, bytes], *, whole: bool) -> Ack | Nack:
        errors = [(one.name, one.hash, "bad") for one in bundles if is_bad(one)]
        for one in bundles:
            assert (one.name, one.hash) not in self.reported, "refused content came again"
        after = {} if whole else dict(before)
        for one in bundles:
            if not is_bad(one):
                after[one.name] = one.hash
            elif one.name in before:
                after[one.name] = before[one.name]
        self.held = after
        if errors:
            return Nack(nonce, "BUNDLE_REFUSED", "", errors, digest_of(after), self.denials_version)
        return Ack(nonce, self.denials_version)


def is_bad(bundle: Bundle) -> bool:
    return bundle.content.startswith(b"bad")


class StreamMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.current: dict[str, Bundle] = {}
        self.revisions: dict[str, int] = {}
        self.denials = DenialSet(1, ())
        self.node = ModelNode()
        self.recorded: dict[str, bytes] = {}
        self.to_node: deque[Output] = deque()
        self.to_server: deque[Ack | Nack] = deque()
        self.unanswered = 0
        self.session = Session("edge-1", delta_bytes=STEP_BYTES)
        self.edit("pools/default/settings", b"one")
        self.connect(fresh_disk=True)

    # --- the world -----------------------------------------------------------------------------------------------

    def target(self) -> PoolConfig:
        digest = digest_of({name: one.hash for name, one in self.current.items()})
        return PoolConfig("default", dict(self.current), (), digest)

    @rule(name=st.sampled_from(NAMES), text=st.sampled_from([b"one", b"two", b"bad"]))
    def edit(self, name: str, text: bytes) -> None:
        revision = self.revisions[name] = self.revisions.get(name, 0) + 1
        content = text + name.encode()
        self.current[name] = Bundle(name, 1, revision, hashlib.sha256(content).digest(), content)
        self._publish()

    @rule(name=st.sampled_from(NAMES[:3]))
    def delete(self, name: str) -> None:
        if self.current.pop(name, None) is not None:
            self.revisions[name] += 1
            self._publish()

    @rule()
    def deny(self) -> None:
        self.denials = DenialSet(self.denials.version + 1, ())
        self.session.denials_changed(self.denials)

    @rule(fresh_disk=st.booleans())
    def connect(self, fresh_disk: bool) -> None:  # noqa: FBT001 - drawn by Hypothesis
        """A new stream takes over; what was on its way is lost."""
        self.to_node.clear()
        self.to_server.clear()
        self.unanswered = 0
        if fresh_disk:
            self.node = ModelNode(reported=self.node.reported)
        self.repaired: set[bytes] = set()  # once a stream and target
        self.is_damaged = False  # since this stream began: its Hello tells of what was damaged before
        self.session = Session("edge-1", delta_bytes=STEP_BYTES)
        self.session.config_changed(self.target())
        self.session.denials_changed(self.denials)
        self.session.receive_hello(self.node.hello(), self.recorded)

    # --- the pipe ------------------------------------------------------------------------------------------------

    @rule()
    def pull(self) -> None:
        output = self.session.next_output()
        assert not isinstance(output, Close), output
        if isinstance(output, Directive):
            assert output.action is Action.RECONNECT
            self.connect(fresh_disk=False)
        elif output is not None:
            if isinstance(output, Snapshot):
                kept = {one.name for one in output.bundles}
                assert self.node.held.keys() & self.current.keys() <= kept, "a whole set forgets nothing that exists"
            if isinstance(output, Delta):
                assert len(output.upserts) <= 1, "a delta is no larger than it may be"
            self.unanswered += isinstance(output, (Snapshot, Delta))
            assert self.unanswered <= 1, "one unanswered response at most"
            self.to_node.append(output)

    @precondition(lambda self: self.to_node)
    @rule()
    def node_reads(self) -> None:
        answer = self.node.answer(self.to_node.popleft())
        if answer is not None:
            self.to_server.append(answer)

    @precondition(lambda self: self.to_server)
    @rule()
    def server_reads(self) -> None:
        answer = self.to_server.popleft()
        if answer.nonce.startswith("c"):
            self.unanswered -= 1
        if isinstance(answer, Ack):
            self.session.receive_ack(answer)
        else:
            self.session.receive_nack(answer)
            current = {(one.name, one.hash) for one in self.current.values()}
            self.node.reported |= {(name, hash_) for name, hash_, _ in answer.bundle_errors} & current
        self.recorded = dict(self.session.report().refused)

    @precondition(lambda self: not self.to_node and not self.to_server)
    @rule()
    def heartbeat(self) -> None:
        if self.is_damaged and "accounts/a" not in self.node.held and not self.unanswered:
            # The one repair of this stream and target is spent on it.
            self.repaired.add(self.target().digest)
        self.session.receive_status(digest_of(self.node.held), self.node.denials_version)

    @precondition(lambda self: not self.to_node and not self.to_server)
    @rule()
    def disk_changes_under_the_node(self) -> None:
        """A node that holds something else than it said is noticed by its heartbeat and repaired."""
        self.exchange(20)
        was_repaired = self.target().digest in self.repaired
        damaged = self.node.held.pop("accounts/a", None)
        self.is_damaged = self.is_damaged or damaged is not None
        self.heartbeat()
        self.exchange(20)
        if damaged is not None and not was_repaired and not self.recorded:
            assert "accounts/a" in self.node.held

    @rule(turns=st.integers(1, 12))
    def exchange(self, turns: int) -> None:
        for _ in range(turns):
            self.pull()
            if self.to_node:
                self.node_reads()
            elif self.to_server:
                self.server_reads()

    def _publish(self) -> None:
        self.node.reported &= {(one.name, one.hash) for one in self.current.values()}
        self.session.config_changed(self.target())

    # --- what must hold -------------------------------------------------------------------------------------------

    @invariant()
    def a_session_at_rest_says_what_the_node_holds(self) -> None:
        if self.session.report().status is not ConfigStatus.SYNCED:
            return
        assert self.node.denials_version == self.denials.version

    def teardown(self) -> None:
        """With the faults over, one more connection brings the node to the target."""
        self.connect(fresh_disk=False)
        self.exchange(100)
        wanted = {name: one.hash for name, one in self.current.items() if not is_bad(one)}
        assert {name: h for name, h in self.node.held.items() if name in wanted} == wanted
        assert self.node.held.keys() <= self.current.keys()
        assert self.node.denials_version == self.denials.version
        bad = any(is_bad(one) for one in self.current.values())
        assert self.session.report().status is (ConfigStatus.ERROR if bad else ConfigStatus.SYNCED)


StreamMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
test_faults_never_keep_a_node_from_the_target = StreamMachine.TestCase


def test_a_node_that_refused_the_settings_of_its_pool_is_sent_what_it_lacks() -> None:
    machine = StreamMachine()
    machine.edit("accounts/a", b"one")
    machine.edit("accounts/b", b"one")
    machine.edit("pools/default/settings", b"bad")
    machine.exchange(20)
    machine.edit("accounts/b", b"bad")
    machine.exchange(20)
    del machine.node.held["accounts/a"]
    # A whole set could not say that it shall keep its former accounts/b.
    machine.teardown()
