"""Both real ends of the configuration stream in a pipe that breaks: the node ends at the target, and an Ack is true.

The node's workers swap late, die and come back, its disk fills up, it refuses certain contents; the control plane
edits, deletes and denies meanwhile.
"""

from __future__ import annotations

import hashlib
from collections import deque

from google.rpc.error_details_pb2 import ErrorInfo
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from controlplane.adapters.grpc.stream_codec import hello_of
from controlplane.ports_fleet import Bundle, DenialSet, PoolConfig, digest_of
from controlplane.stream import session as control
from dataplane.agent import stream_machine as node
from dataplane.agent.applied import WorkerTable
from dataplane.agent.held import EMPTY
from postroad.config.v1 import bundle_pb2 as pb
from postroad.config.v1 import denials_pb2
from postroad.node.v1 import config_stream_service_pb2 as wire

NAMES = ["accounts/a", "accounts/b", "accounts/c", "pools/default/settings"]
WORKERS = 2


def to_wire(output: control.Output) -> wire.StreamConfigResponse:
    match output:
        case control.Snapshot():
            whole = wire.Snapshot(nonce=output.nonce, complete=True, bundle_count=len(output.bundles))
            whole.bundles.extend(_bundle(one) for one in output.bundles)
            return wire.StreamConfigResponse(snapshot=whole)
        case control.Delta():
            delta = wire.Delta(nonce=output.nonce, base_digest=output.base_digest, removed=output.removed)
            delta.upserts.extend(_bundle(one) for one in output.upserts)
            return wire.StreamConfigResponse(delta=delta)
        case control.Denials():
            set_ = denials_pb2.DenialSet(version=output.denials.version)
            return wire.StreamConfigResponse(denials=wire.Denials(nonce=output.nonce, denials=set_))
        case control.Directive():
            return wire.StreamConfigResponse(directive=wire.Directive(action=wire.Directive.ACTION_RECONNECT))
        case _:
            return wire.StreamConfigResponse(progress=wire.Progress())


def _bundle(one: Bundle) -> pb.Bundle:
    return pb.Bundle(
        name=one.name, kind=pb.BUNDLE_KIND_ACCOUNT, revision=one.revision, hash=one.hash, content=one.content
    )


def _reason(nack: wire.Nack) -> str:
    info = ErrorInfo()
    nack.error_detail.details[0].Unpack(info)
    return info.reason


class Pair(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.revisions: dict[str, int] = {}
        self.current: dict[str, Bundle] = {}
        self.denials = DenialSet(0, ())
        self.refused: dict[str, bytes] = {}
        self.table = WorkerTable(WORKERS)
        self.machine = node.StreamMachine(
            node.NodeFacts("nodes/edge-1", "boot", "1.0"), EMPTY, denials_pb2.DenialSet(), self.table
        )
        self.disk_full = False
        # What each worker has in use; None for a process that is gone.
        self.workers: list[tuple[str, int] | None] = [("", 0)] * WORKERS
        self.linked = [False] * WORKERS
        self.to_node: deque[wire.StreamConfigResponse] = deque()
        self.to_server: deque[wire.StreamConfigRequest] = deque()
        self.work: deque[node.Action] = deque()
        self.edit("pools/default/settings", b"one")
        for index in range(WORKERS):
            self.worker_connects(index)
        self.connect()

    # --- control plane -------------------------------------------------------------------------------------------

    def target(self) -> PoolConfig:
        digest = digest_of({name: one.hash for name, one in self.current.items()})
        return PoolConfig("default", dict(self.current), (), digest)

    @rule(name=st.sampled_from(NAMES), text=st.sampled_from([b"one", b"two", b"bad"]))
    def edit(self, name: str, text: bytes) -> None:
        revision = self.revisions[name] = self.revisions.get(name, 0) + 1
        content = text + name.encode()
        self.current[name] = Bundle(name, 1, revision, hashlib.sha256(content).digest(), content)
        self.publish()

    @rule(name=st.sampled_from(NAMES[:3]))
    def delete(self, name: str) -> None:
        if self.current.pop(name, None) is not None:
            self.revisions[name] += 1
            self.publish()

    def publish(self) -> None:
        if hasattr(self, "session"):
            self.session.config_changed(self.target())

    @rule()
    def deny(self) -> None:
        self.denials = DenialSet(self.denials.version + 1, ())
        self.session.denials_changed(self.denials)

    # --- the pipe ------------------------------------------------------------------------------------------------

    @rule()
    def connect(self) -> None:
        """The stream breaks, and comes back once the node has done what was under way."""
        self.to_node.clear()
        self.to_server.clear()
        self.machine.disconnected()
        self.finish_work()
        self.session = control.Session("nodes/edge-1")
        self.session.config_changed(self.target())
        self.session.denials_changed(self.denials)
        self.act(self.machine.connected([]))

    @rule()
    def control_sends(self) -> None:
        output = self.session.next_output()
        assert not isinstance(output, control.Close), output
        if isinstance(output, control.Directive):
            self.connect()
        elif output is not None:
            self.to_node.append(to_wire(output))

    @precondition(lambda self: self.to_node)
    @rule()
    def node_reads(self) -> None:
        self.act(self.machine.receive(self.to_node.popleft()))

    @precondition(lambda self: self.to_server)
    @rule()
    def control_reads(self) -> None:
        message = self.to_server.popleft()
        match message.WhichOneof("message"):
            case "hello":
                self.session.receive_hello(hello_of(message.hello), self.refused)
            case "ack":
                self.session.receive_ack(control.Ack(message.ack.nonce, message.ack.denials_version))
            case "nack":
                nack = message.nack
                errors = [(one.name, one.hash, one.status.message) for one in nack.bundle_errors]
                self.session.receive_nack(
                    control.Nack(nack.nonce, _reason(nack), "", errors, nack.digest, nack.denials_version)
                )
        self.refused = dict(self.session.report().refused)

    @rule(turns=st.integers(1, 4))
    def exchange(self, turns: int) -> None:
        """Without faults in between; what the workers do is left to other rules."""
        for _ in range(turns):
            self.control_sends()
            while self.to_node:
                self.node_reads()
            self.finish_work()
            while self.to_server:
                self.control_reads()

    # --- node ----------------------------------------------------------------------------------------------------

    def act(self, actions: list[node.Action]) -> None:
        for action in actions:
            match action:
                case node.Send():
                    self.check_promise(action.request)
                    self.to_server.append(action.request)
                case node.Check() | node.StoreConfig() | node.StoreDenials():
                    self.work.append(action)
                case node.TellConfig() | node.TellDenials():
                    self.look_for_absent()
                case node.Reconnect():
                    raise AssertionError(f"the control plane broke the rules: {action.error}")
                case _:
                    pass

    def check_promise(self, request: wire.StreamConfigRequest) -> None:
        """What an Ack says must be so in every process that lives."""
        if request.WhichOneof("message") == "ack":
            living = [worker for worker in self.workers if worker is not None]
            assert all(version >= request.ack.denials_version for _, version in living)
            if request.ack.nonce.startswith("c"):
                assert all(digest == self.machine.config.digest.hex() for digest, _ in living)

    @precondition(lambda self: self.work)
    @rule()
    def do_work(self) -> None:
        action = self.work.popleft()
        error = "no space" if self.disk_full else ""
        match action:
            case node.Check():
                bad = [one.name for one in action.proposal.changed if one.content.startswith(b"bad")]
                self.act(self.machine.checked(dict.fromkeys(bad, "bad")))
            case node.StoreConfig():
                self.act(self.machine.config_stored(action.config, error))
            case node.StoreDenials():
                self.act(self.machine.denials_stored(action.denials, error))

    def finish_work(self) -> None:
        while self.work:
            self.do_work()

    @rule(full=st.booleans())
    def disk(self, full: bool) -> None:  # noqa: FBT001 - drawn by Hypothesis
        self.disk_full = full

    @rule(index=st.integers(0, WORKERS - 1))
    def worker_swaps(self, index: int) -> None:
        if self.workers[index] is not None:
            self.workers[index] = (self.machine.config.digest.hex(), self.machine.denials.version)
            if self.linked[index]:
                self.table.config_applied(index, self.machine.config.digest.hex(), "")
                self.table.denials_applied(index, self.machine.denials.version, "")
                self.act(self.machine.workers_changed())

    @rule(index=st.integers(0, WORKERS - 1))
    def worker_link_breaks(self, index: int) -> None:
        self.linked[index] = False
        self.table.lost(index)

    @rule(index=st.integers(0, WORKERS - 1))
    def worker_dies(self, index: int) -> None:
        self.workers[index] = None
        self.worker_link_breaks(index)

    @rule(index=st.integers(0, WORKERS - 1))
    def worker_starts(self, index: int) -> None:
        """A new process reads the files first, and says so some time later."""
        if self.workers[index] is None:
            self.workers[index] = (self.machine.config.digest.hex(), self.machine.denials.version)

    @rule(index=st.integers(0, WORKERS - 1))
    def worker_connects(self, index: int) -> None:
        self.worker_starts(index)
        worker = self.workers[index]
        assert worker is not None
        self.linked[index] = True
        self.table.connected(index, *worker)
        self.act(self.machine.workers_changed())

    @rule()
    def look_for_absent(self) -> None:
        for index in self.table.unknown:
            if self.workers[index] is None:
                self.table.absent(index)
        self.act(self.machine.workers_changed())

    # --- the end -------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """With the faults over, one more connection brings everybody to the target."""
        self.disk_full = False
        self.refused = {}
        self.connect()
        for index in range(WORKERS):
            self.worker_connects(index)
        for _ in range(60):
            self.control_sends()
            while self.to_node:
                self.node_reads()
            self.finish_work()
            for index in range(WORKERS):
                self.worker_swaps(index)
            while self.to_server:
                self.control_reads()
        wanted = {name: one.hash for name, one in self.current.items() if not one.content.startswith(b"bad")}
        held = {name: one.hash for name, one in self.machine.config.bundles.items()}
        assert {name: held.get(name) for name in wanted} == wanted
        assert held.keys() <= self.current.keys()
        assert self.machine.denials_in_force == self.denials.version


Pair.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
test_node_and_control_plane_agree_whatever_breaks = Pair.TestCase
