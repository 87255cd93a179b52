"""The config stream's messages as protobuf: what a node says as values, what it is sent as bytes.

Contract. Decoding raises `BadMessageError` for what breaks the protocol. Encoding shares: bundles of a snapshot and of
a delta are serialised once for all streams, in chunks of at most 4 MiB, and only the nonce is put before them for each
stream. That is sound since a serialised message is the concatenation of its fields in any order.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from uuid import UUID

from google.rpc import error_details_pb2, status_pb2

from controlplane.domain.openings import ID_BYTES, MAX_FORMER, Openings
from controlplane.ports_fleet import (
    Bundle,
    DenialSet,
    DenialSubject,
    NodeHealth,
    SpoolCommand,
    SpoolLosses,
    SpoolStatus,
)
from controlplane.stream import session
from controlplane.stream.session import Output
from postroad.config.v1 import bundle_pb2, denials_pb2
from postroad.node.v1 import config_stream_service_pb2 as pb
from postroad.node.v1.ledger_service_pb2 import LedgerOpen

CHUNK_BYTES = 4 * 1024 * 1024

_SNAPSHOT_TAG = bytes([pb.StreamConfigResponse.SNAPSHOT_FIELD_NUMBER << 3 | 2])
_DELTA_TAG = bytes([pb.StreamConfigResponse.DELTA_FIELD_NUMBER << 3 | 2])
_SHARED_BODIES = 4
_LOST_MESSAGES = 1_000


class BadMessageError(Exception):
    """The node broke the protocol; the text says how."""


def hello_of(message: pb.Hello) -> session.Hello:
    """What the node says it is and holds."""
    return session.Hello(
        message.node,
        message.boot_id[:100],
        message.software_version[:100],
        [(bundle.name, bundle.hash) for bundle in message.bundles],
        message.denials_version,
        spools_of(message.spools),
        frozenset(message.client_features),
        message.told_to_drain,
        message.node_pool.removeprefix("nodePools/"),
    )


def ack_of(message: pb.Ack) -> session.Ack:
    """In use."""
    return session.Ack(message.nonce, message.denials_version)


def nack_of(message: pb.Nack) -> session.Nack:
    """Refused."""
    return session.Nack(
        message.nonce,
        _reason_of(message.error_detail),
        message.error_detail.message,
        [(error.name, error.hash, error.status.message) for error in message.bundle_errors],
        message.digest,
        message.denials_version,
    )


def health_of(message: pb.StatusReport, now: datetime) -> NodeHealth:
    """How the node is, with its clock against ours."""
    skew_s = 0.0
    if message.HasField("node_time"):
        skew_s = message.node_time.ToDatetime(UTC).timestamp() - now.timestamp()
    oldest_age_s = message.oldest_age.ToTimedelta().total_seconds()
    drain = (message.told_to_drain, message.closed)
    return NodeHealth(message.digest, message.draining, message.queue_depth, oldest_age_s, skew_s, *drain)


def spools_of(messages: Iterable[pb.SpoolStatus]) -> tuple[SpoolStatus, ...]:
    """The spools of the node; BadMessageError for what is no UUID or comes twice."""
    spools = tuple(
        SpoolStatus(
            uuid_text(one.spool),
            one.incarnation,
            one.acknowledged,
            one.last_record,
            one.waiting_count,
            one.open,
            one.refused,
            _losses_of(one),
            openings_of(one),
        )
        for one in messages
    )
    if len({spool.spool for spool in spools}) != len(spools):
        raise BadMessageError("a spool is named twice")
    return spools


def _losses_of(message: pb.SpoolStatus) -> SpoolLosses:
    if len(message.lost_messages) > _LOST_MESSAGES:
        raise BadMessageError("too many lost messages are named")
    return SpoolLosses(tuple(map(uuid_text, message.lost_messages)), message.lost_count, message.unnamed_losses)


def openings_of(message: pb.SpoolStatus | LedgerOpen) -> Openings:
    """What a spool tells of its openings; BadMessageError for what is no id."""
    former = tuple((one.id, one.last_record) for one in message.former_openings)
    if len(former) > MAX_FORMER:
        raise BadMessageError("too many former openings are told")
    if len(message.opening_id) not in {0, ID_BYTES} or any(len(opening) != ID_BYTES for opening, _ in former):
        raise BadMessageError(f"the id of an opening has {ID_BYTES} bytes")
    return Openings(message.opening_id, former)


def uuid_text(text: str) -> str:
    """The usual form of a UUID; BadMessageError for anything else."""
    try:
        return str(UUID(text))
    except ValueError as error:
        raise BadMessageError("a spool or a message is no UUID") from error


class StreamEncoder:
    """Bytes of StreamConfigResponse; see the module."""

    def __init__(self, clock: Callable[[], datetime], reconnect_after_s: int = 1, jitter_s: int = 10) -> None:
        self._clock = clock
        self._reconnect_after_s = reconnect_after_s
        self._jitter_s = jitter_s
        self._bodies: OrderedDict[object, list[bytes]] = OrderedDict()

    def encode(self, output: Output) -> Iterator[bytes]:
        """The messages that say `output`, in order."""
        if isinstance(output, session.Snapshot):
            nonce = pb.Snapshot(nonce=output.nonce).SerializeToString()
            for body in self._snapshot_bodies(output):
                yield _embedded(_SNAPSHOT_TAG, nonce + body)
        elif isinstance(output, session.Delta):
            nonce = pb.Delta(nonce=output.nonce).SerializeToString()
            yield _embedded(_DELTA_TAG, nonce + self._delta_body(output))
        else:
            yield self._small(output).SerializeToString()

    def _small(self, output: Output) -> pb.StreamConfigResponse:
        match output:
            case session.Denials(nonce, denials):
                return pb.StreamConfigResponse(denials=pb.Denials(nonce=nonce, denials=_denial_set(denials)))
            case SpoolCommand(command, spool, verb, account, message_ids, provider, wanted):
                return pb.StreamConfigResponse(
                    command=pb.Command(
                        command=command,
                        spool=spool,
                        verb=pb.Command.Verb.ValueType(verb),
                        account=account,
                        message_ids=message_ids,
                        provider=provider,
                        filter=None if wanted is None else pb.Command.Filter(**wanted._asdict()),
                    )
                )
            case session.Progress():
                response = pb.StreamConfigResponse()
                response.progress.time.FromDatetime(self._clock())
                return response
            case session.Directive(action, spool):
                return self._directive(action, spool)
            case _:
                raise TypeError(type(output))

    def _directive(self, action: session.Action, spool: str) -> pb.StreamConfigResponse:
        response = pb.StreamConfigResponse(
            directive=pb.Directive(action=pb.Directive.Action.ValueType(action), spool=spool)
        )
        if action is session.Action.RECONNECT:
            response.directive.after.seconds = self._reconnect_after_s
            response.directive.jitter.seconds = self._jitter_s
        return response

    def _snapshot_bodies(self, output: session.Snapshot) -> list[bytes]:
        key = (output.pool, output.pool_keys, tuple(bundle.hash for bundle in output.bundles))
        return self._shared(key, lambda: list(_make_snapshot_bodies(output)))

    def _delta_body(self, output: session.Delta) -> bytes:
        changed = tuple((bundle.name, bundle.hash) for bundle in output.upserts)
        key = (output.base_digest, changed, output.removed, output.pool_keys)
        return self._shared(key, lambda: [_make_delta_body(output)])[0]

    def _shared(self, key: object, make: Callable[[], list[bytes]]) -> list[bytes]:
        bodies = self._bodies.get(key)
        if bodies is None:
            bodies = self._bodies[key] = make()
            if len(self._bodies) > _SHARED_BODIES:
                self._bodies.popitem(last=False)
        else:
            self._bodies.move_to_end(key)
        return bodies


def _make_snapshot_bodies(output: session.Snapshot) -> Iterator[bytes]:
    chunks = list(_chunks(output.bundles))
    for number, bundles in enumerate(chunks):
        chunk = pb.Snapshot(chunk=number, bundles=map(_bundle, bundles))
        if number == 0:
            chunk.node_pool = f"nodePools/{output.pool}"
            chunk.pool_keys.extend(bundle_pb2.PoolKey(key_id=one.key_id, key=one.key) for one in output.pool_keys)
        if number == len(chunks) - 1:
            chunk.complete = True
            chunk.bundle_count = len(output.bundles)
        yield chunk.SerializeToString()


def _make_delta_body(output: session.Delta) -> bytes:
    return pb.Delta(
        base_digest=output.base_digest,
        upserts=map(_bundle, output.upserts),
        removed=output.removed,
        pool_keys=[bundle_pb2.PoolKey(key_id=one.key_id, key=one.key) for one in output.pool_keys],
    ).SerializeToString()


def _chunks(bundles: Iterable[Bundle]) -> Iterator[list[Bundle]]:
    """Groups of at most CHUNK_BYTES, at least one; a larger bundle goes alone."""
    chunk: list[Bundle] = []
    size = 0
    for bundle in bundles:
        bundle_size = len(bundle.content) + len(bundle.name) + 100
        if chunk and size + bundle_size > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(bundle)
        size += bundle_size
    yield chunk


def _bundle(bundle: Bundle) -> bundle_pb2.Bundle:
    return bundle_pb2.Bundle(
        name=bundle.name,
        kind=bundle_pb2.BundleKind.ValueType(bundle.kind),
        revision=bundle.revision,
        hash=bundle.hash,
        content=bundle.content,
    )


def _denial_set(denials: DenialSet) -> denials_pb2.DenialSet:
    message = denials_pb2.DenialSet(version=denials.version)
    for denial in denials.denials:
        one = message.denials.add()
        match denial.subject:
            case DenialSubject.ACCOUNT:
                one.account = denial.name
            case DenialSubject.CREDENTIAL:
                one.credential = denial.name
            case DenialSubject.PROVIDER:
                one.provider = denial.name
            case DenialSubject.DESTINATION:
                one.destination = denial.name
        one.since_time.FromDatetime(denial.since_time)
        if denial.expire_time is not None:
            one.expire_time.FromDatetime(denial.expire_time)
    return message


def _reason_of(status: status_pb2.Status) -> str:
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return info.reason
    return ""


def _embedded(tag: bytes, message: bytes) -> bytes:
    """A response whose one field holds `message`, which is serialised already."""
    length = len(message)
    prefix = bytearray(tag)
    while length > 0x7F:
        prefix.append(length & 0x7F | 0x80)
        length >>= 7
    prefix.append(length)
    return bytes(prefix) + message
