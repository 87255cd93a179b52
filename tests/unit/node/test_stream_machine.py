"""The node's side of the configuration stream: what it takes, refuses, acknowledges, and when."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from dataplane.agent import stream_machine as sm
from dataplane.agent.applied import WorkerTable
from dataplane.agent.held import EMPTY, HeldConfig, digest_of
from postroad.config.v1.bundle_pb2 import Bundle, PoolKey
from postroad.config.v1.denials_pb2 import Denial, DenialSet
from postroad.node.v1.config_stream_service_pb2 import (
    Command,
    Delta,
    Denials,
    Directive,
    Progress,
    Snapshot,
    StreamConfigRequest,
    StreamConfigResponse,
)

FACTS = sm.NodeFacts("nodes/n1", "boot", "0.1")


def bundle(name: str, content: bytes = b"x", revision: int = 1) -> Bundle:
    return Bundle(name=name, revision=revision, hash=hashlib.sha256(content).digest(), content=content)


def held(*bundles: Bundle, keys: Sequence[str] = ()) -> HeldConfig:
    return HeldConfig("nodePools/default", {b.name: b for b in bundles}, {k: PoolKey(key_id=k) for k in keys})


def snapshot(nonce: str, *bundles: Bundle, count: int | None = None, keys: Sequence[str] = ()) -> StreamConfigResponse:
    return StreamConfigResponse(
        snapshot=Snapshot(
            nonce=nonce,
            complete=True,
            bundle_count=len(bundles) if count is None else count,
            bundles=bundles,
            pool_keys=[PoolKey(key_id=key) for key in keys],
            node_pool="nodePools/default",
        )
    )


def denials(nonce: str, version: int) -> StreamConfigResponse:
    return StreamConfigResponse(
        denials=Denials(nonce=nonce, denials=DenialSet(version=version, denials=[Denial(account="accounts/a")]))
    )


class Node:
    """A machine with the disk and workers played: `work` does what the driver would."""

    def __init__(self, config: HeldConfig = EMPTY, denials_version: int = 0, workers: int = 1) -> None:
        self.table = WorkerTable(workers)
        self.machine = sm.StreamMachine(FACTS, config, DenialSet(version=denials_version), self.table)
        for index in range(workers):
            self.table.connected(index, config.digest.hex(), denials_version)
        self.machine.workers_changed()
        self.refuse: dict[str, str] = {}
        self.disk_error = ""
        self.sent: list[StreamConfigRequest] = []
        self.actions: list[sm.Action] = []

    def receive(self, response: StreamConfigResponse) -> None:
        self.work(self.machine.receive(response))

    def work(self, actions: list[sm.Action]) -> None:
        for action in actions:
            self.actions.append(action)
            match action:
                case sm.Send():
                    self.sent.append(action.request)
                case sm.Check():
                    names = {b.name for b in action.proposal.changed}
                    errors = {name: why for name, why in self.refuse.items() if name in names}
                    self.work(self.machine.checked(errors))
                case sm.StoreConfig():
                    self.work(self.machine.config_stored(action.config, self.disk_error))
                case sm.StoreDenials():
                    self.work(self.machine.denials_stored(action.denials, self.disk_error))
                case _:
                    pass

    def worker_swaps(self, index: int = 0, error: str = "") -> None:
        digest = "other" if error else self.machine.config.digest.hex()
        self.table.config_applied(index, digest, error)
        self.work(self.machine.workers_changed())

    def worker_denies(self, index: int = 0) -> None:
        self.table.denials_applied(index, self.machine.denials.version, "")
        self.work(self.machine.workers_changed())


def reason(status: Status) -> str:
    info = ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "postroad"
    return info.reason


def test_hello_is_first_and_says_what_is_on_disk() -> None:
    node = Node(held(bundle("accounts/a", revision=7)), denials_version=3)
    node.work(node.machine.connected([]))
    hello = node.sent[0].hello
    assert (hello.node, hello.boot_id, hello.denials_version) == ("nodes/n1", "boot", 3)
    assert [(b.name, b.revision) for b in hello.bundles] == [("accounts/a", 7)]


def test_ack_leaves_only_after_every_worker_swapped() -> None:
    node = Node(workers=2)
    node.receive(snapshot("n", bundle("accounts/a")))
    node.worker_swaps(0)
    assert node.sent == []
    node.worker_swaps(1)
    assert [request.ack.nonce for request in node.sent] == ["n"]


def test_a_worker_of_which_nothing_is_known_holds_the_ack_until_it_is_known_to_be_gone() -> None:
    node = Node(workers=2)
    node.table.lost(1)
    node.receive(snapshot("n", bundle("accounts/a")))
    node.worker_swaps(0)
    assert node.sent == []
    node.table.absent(1)
    node.work(node.machine.workers_changed())
    assert node.sent[0].ack.nonce == "n"


def test_absence_that_was_seen_before_the_write_does_not_count_after_it() -> None:
    node = Node(workers=2)
    node.table.lost(1)
    node.table.absent(1)
    node.receive(snapshot("n", bundle("accounts/a")))
    node.worker_swaps(0)
    assert node.sent == []


def test_nack_names_the_bad_bundle_and_the_good_ones_are_in_use() -> None:
    old_bad = bundle("accounts/bad", b"old")
    node = Node(held(old_bad))
    node.refuse = {"accounts/bad": "no such enum"}
    node.receive(snapshot("n", bundle("accounts/bad", b"new", 2), bundle("accounts/good")))
    node.worker_swaps()
    nack = node.sent[0].nack
    assert [(error.name, error.status.message) for error in nack.bundle_errors] == [("accounts/bad", "no such enum")]
    assert reason(nack.error_detail) == "BUNDLE_REFUSED"
    assert nack.bundle_errors[0].hash == hashlib.sha256(b"new").digest()
    expected = {"accounts/bad": old_bad, "accounts/good": bundle("accounts/good")}
    assert nack.digest == digest_of(expected) == node.machine.config.digest


def test_a_refused_bundle_that_was_never_held_is_left_out() -> None:
    node = Node()
    node.refuse = {"accounts/bad": "why"}
    node.receive(snapshot("n", bundle("accounts/bad"), bundle("accounts/good")))
    assert set(node.machine.config.bundles) == {"accounts/good"}


def test_a_bundle_kept_in_place_keeps_its_key_too() -> None:
    node = Node(held(bundle("accounts/bad", b"old"), keys=["k1"]))
    node.refuse = {"accounts/bad": "why"}
    node.receive(snapshot("n", bundle("accounts/bad", b"new"), keys=["k2"]))
    assert set(node.machine.config.pool_keys) == {"k1", "k2"}


def test_names_sent_twice_are_refused_whole() -> None:
    node = Node(held(bundle("accounts/a")))
    node.receive(snapshot("n", bundle("accounts/b"), bundle("accounts/b", b"y")))
    assert reason(node.sent[0].nack.error_detail) == "BUNDLE_REFUSED"
    assert set(node.machine.config.bundles) == {"accounts/a"}


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_snapshot_of_another_count_is_refused(count: int) -> None:
    node = Node(held(bundle("accounts/a")))
    node.receive(snapshot("n", bundle("accounts/b"), bundle("accounts/c"), count=count))
    assert reason(node.sent[0].nack.error_detail) == "INCOMPLETE_SNAPSHOT"
    assert set(node.machine.config.bundles) == {"accounts/a"}


def test_an_empty_snapshot_never_means_delete_all() -> None:
    node = Node(held(bundle("accounts/a")))
    node.receive(snapshot("n"))
    assert reason(node.sent[0].nack.error_detail) == "INCOMPLETE_SNAPSHOT"
    assert set(node.machine.config.bundles) == {"accounts/a"}


def chunks(nonce: str, bundles: Sequence[Bundle]) -> list[StreamConfigResponse]:
    return [
        StreamConfigResponse(
            snapshot=Snapshot(
                nonce=nonce,
                chunk=number,
                complete=number == len(bundles) - 1,
                bundle_count=len(bundles) if number == len(bundles) - 1 else 0,
                bundles=[one],
            )
        )
        for number, one in enumerate(bundles)
    ]


def test_a_snapshot_in_chunks_is_applied_when_whole() -> None:
    node = Node()
    *first, last = chunks("n", [bundle(f"accounts/{i}") for i in range(3)])
    for chunk in first:
        node.receive(chunk)
    assert node.actions == []
    node.receive(last)
    assert len(node.machine.config.bundles) == 3


def test_a_missing_chunk_refuses_the_snapshot() -> None:
    node = Node(held(bundle("accounts/a")))
    first, _, last = chunks("n", [bundle(f"accounts/{i}") for i in range(3)])
    node.receive(first)
    node.receive(last)
    assert reason(node.sent[0].nack.error_detail) == "INCOMPLETE_SNAPSHOT"
    assert set(node.machine.config.bundles) == {"accounts/a"}


def test_chunks_of_a_stream_that_ended_are_forgotten() -> None:
    node = Node()
    first, last = chunks("n", [bundle("accounts/a"), bundle("accounts/b")])
    node.receive(first)
    node.machine.disconnected()
    node.receive(last)
    assert reason(node.sent[0].nack.error_detail) == "INCOMPLETE_SNAPSHOT"


def test_a_delta_changes_what_it_names_only() -> None:
    start = held(bundle("accounts/a"), bundle("accounts/b"), bundle("accounts/c"))
    node = Node(start)
    delta = Delta(nonce="n", base_digest=start.digest, upserts=[bundle("accounts/a", b"2")], removed=["accounts/b"])
    node.receive(StreamConfigResponse(delta=delta))
    node.worker_swaps()
    assert node.sent[0].ack.nonce == "n"
    assert {n: b.content for n, b in node.machine.config.bundles.items()} == {"accounts/a": b"2", "accounts/c": b"x"}


def test_a_delta_from_another_base_is_refused() -> None:
    node = Node(held(bundle("accounts/a")))
    node.receive(StreamConfigResponse(delta=Delta(nonce="n", base_digest=b"?" * 32, removed=["accounts/a"])))
    assert reason(node.sent[0].nack.error_detail) == "BASE_MISMATCH"
    assert node.sent[0].nack.digest == node.machine.config.digest


def test_only_bundles_that_are_new_are_checked() -> None:
    same = bundle("accounts/a")
    node = Node(held(same))
    node.receive(snapshot("n", bundle("accounts/a"), bundle("accounts/b")))
    (check,) = [action for action in node.actions if isinstance(action, sm.Check)]
    assert [b.name for b in check.proposal.changed] == ["accounts/b"]
    assert node.machine.config.bundles["accounts/a"] is same


def test_a_full_disk_refuses_and_keeps_what_was() -> None:
    node = Node(held(bundle("accounts/a")))
    node.disk_error = "no space"
    node.receive(snapshot("n", bundle("accounts/b")))
    assert reason(node.sent[0].nack.error_detail) == "STORAGE_FAILED"
    assert set(node.machine.config.bundles) == {"accounts/a"}


def test_a_worker_that_cannot_swap_is_reported_instead_of_an_ack() -> None:
    node = Node()
    node.receive(snapshot("n", bundle("accounts/a")))
    node.worker_swaps(error="cannot read")
    nack = node.sent[0].nack
    assert reason(nack.error_detail) == "STORAGE_FAILED"
    assert "worker 0: cannot read" in nack.error_detail.message


def test_a_response_before_the_last_was_answered_ends_the_stream() -> None:
    node = Node()
    node.receive(snapshot("n1", bundle("accounts/a")))
    node.receive(snapshot("n2", bundle("accounts/b")))
    assert isinstance(node.actions[-1], sm.Reconnect)
    assert node.actions[-1].error


def test_denials_are_acked_when_in_force_everywhere_and_never_wait_for_configuration() -> None:
    node = Node(workers=2)
    node.receive(snapshot("config", bundle("accounts/a")))
    node.receive(denials("d", 5))
    node.worker_denies(0)
    assert node.sent == []
    node.worker_denies(1)
    assert [(r.ack.nonce, r.ack.denials_version) for r in node.sent] == [("d", 5)]


def test_denials_never_go_backwards() -> None:
    node = Node(denials_version=7)
    node.receive(denials("d", 6))
    assert not any(isinstance(action, sm.StoreDenials) for action in node.actions)
    assert node.machine.denials.version == 7
    assert (node.sent[0].ack.nonce, node.sent[0].ack.denials_version) == ("d", 7)


def test_hello_does_not_claim_denials_that_a_worker_has_not_in_force() -> None:
    node = Node(denials_version=1)
    node.receive(denials("d", 2))
    node.machine.disconnected()
    node.work(node.machine.connected([]))
    assert node.machine.denials.version == 2
    assert node.sent[0].hello.denials_version == 1


def test_a_denial_of_an_unknown_subject_refuses_the_set() -> None:
    node = Node()
    response = Denials(nonce="d", denials=DenialSet(version=2, denials=[Denial()]))
    node.receive(StreamConfigResponse(denials=response))
    assert reason(node.sent[0].nack.error_detail) == "DENIALS_REFUSED"
    assert node.machine.denials.version == 0


def test_denials_that_cannot_be_written_are_refused() -> None:
    node = Node()
    node.disk_error = "read-only"
    node.receive(denials("d", 2))
    assert reason(node.sent[0].nack.error_detail) == "STORAGE_FAILED"
    assert node.machine.denials.version == 0


def test_what_a_full_disk_did_not_take_is_stored_when_there_is_room_though_nobody_sends_it_again() -> None:
    node = Node()
    node.disk_error = "no space"
    node.receive(snapshot("n", bundle("accounts/a")))
    node.receive(denials("d", 2))
    node.work(node.machine.store_again())
    assert [r.WhichOneof("message") for r in node.sent] == ["nack", "nack"]
    node.disk_error = ""
    node.work(node.machine.store_again())
    node.worker_swaps()
    node.worker_denies()
    assert set(node.machine.config.bundles) == {"accounts/a"}
    assert (node.machine.denials.version, node.machine.denials_in_force) == (2, 2)
    assert len(node.sent) == 2
    assert node.machine.store_again() == []


def test_what_was_not_stored_never_replaces_what_came_later() -> None:
    node = Node()
    node.disk_error = "no space"
    node.receive(snapshot("n1", bundle("accounts/a")))
    node.receive(denials("d1", 2))
    node.disk_error = ""
    node.receive(snapshot("n2", bundle("accounts/b")))
    node.receive(denials("d2", 3))
    node.worker_swaps()
    node.worker_denies()
    assert node.machine.store_again() == []
    assert set(node.machine.config.bundles) == {"accounts/b"}
    assert node.machine.denials.version == 3


def test_storing_again_waits_for_what_is_under_way() -> None:
    node = Node()
    node.disk_error = "no space"
    node.receive(denials("d1", 2))
    assert node.machine.receive(denials("d2", 3))
    assert node.machine.store_again() == []


def test_a_nonce_dies_with_its_stream() -> None:
    node = Node()
    node.receive(snapshot("n", bundle("accounts/a")))
    node.receive(denials("d", 2))
    node.machine.disconnected()
    node.worker_swaps()
    node.worker_denies()
    assert node.sent == []


def test_work_under_way_when_the_stream_ends_still_counts_but_is_not_answered() -> None:
    node = Node()
    (check,) = node.machine.receive(snapshot("n", bundle("accounts/a")))
    assert isinstance(check, sm.Check)
    node.machine.disconnected()
    node.work(node.machine.checked({}))
    assert set(node.machine.config.bundles) == {"accounts/a"}
    node.worker_swaps()
    assert node.sent == []


def test_directives() -> None:
    node = Node(held(bundle("accounts/a")))
    reconnect = Directive(action=Directive.ACTION_RECONNECT)
    reconnect.after.seconds = 2
    reconnect.jitter.nanos = 500_000_000
    assert node.machine.receive(StreamConfigResponse(directive=reconnect)) == [sm.Reconnect(2.0, 0.5)]
    for action, refused in ((Directive.ACTION_REFUSE_SPOOL, True), (Directive.ACTION_ACCEPT_SPOOL, False)):
        directive = StreamConfigResponse(directive=Directive(action=action, spool="s"))
        assert node.machine.receive(directive) == [sm.Verdict("s", refused)]
    resync = StreamConfigResponse(directive=Directive(action=Directive.ACTION_RESYNC))
    assert node.machine.receive(resync) == [sm.Reconnect()]
    node.work(node.machine.connected([]))
    assert not node.sent[-1].hello.bundles
    node.work(node.machine.connected([]))
    assert node.sent[-1].hello.bundles


def test_progress_is_contact_and_commands_pass_through() -> None:
    node = Node()
    assert node.machine.receive(StreamConfigResponse(progress=Progress())) == [sm.Contact()]
    command = Command(command="c", spool="s")
    assert node.machine.receive(StreamConfigResponse(command=command)) == [sm.RunCommand(command)]
    assert node.machine.receive(StreamConfigResponse()) == []
