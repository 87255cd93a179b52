"""The configuration that a node holds, and what a Snapshot or Delta would make of it.

Pure: bundles in, a `Proposal` out; with the verdicts on its changed bundles, `Proposal.settle` gives the next
`HeldConfig`. A refused bundle leaves the one that is held in place, and the others of the same response go
in. Nothing is forgotten unless a complete Snapshot lacks it or a Delta names it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from postroad.config.v1.bundle_pb2 import Bundle, PoolKey


def digest_of(bundles: Mapping[str, Bundle]) -> bytes:
    """SHA-256 over name, NUL and hash of every bundle in order of name, as postroad.node.v1 says."""
    digest = hashlib.sha256()
    for name in sorted(bundles):
        digest.update(name.encode() + b"\0" + bundles[name].hash)
    return digest.digest()


@dataclass(frozen=True, slots=True)
class HeldConfig:
    """Bundles by name and pool keys by id; the mappings are never changed after they were handed over."""

    node_pool: str
    bundles: Mapping[str, Bundle]
    pool_keys: Mapping[str, PoolKey]
    digest: bytes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", digest_of(self.bundles))


EMPTY = HeldConfig("", {}, {})


class RefusedResponseError(Exception):
    """A response that cannot be taken at all; `reason` is the ErrorInfo reason of the Nack."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Proposal:
    """What the node would hold, and the bundles in it that it has not held before: `changed` is to be
    checked.
    """

    held: HeldConfig
    node_pool: str
    bundles: Mapping[str, Bundle]
    pool_keys: Mapping[str, PoolKey]
    changed: Sequence[Bundle]

    def settle(self, refused: Iterable[str]) -> HeldConfig:
        """The configuration to hold when the bundles named in `refused` are not taken."""
        bundles = dict(self.bundles)
        pool_keys = dict(self.pool_keys)
        for name in refused:
            # What stays in place may be sealed under a key that the new set no longer names.
            pool_keys = {**self.held.pool_keys, **pool_keys}
            if name in self.held.bundles:
                bundles[name] = self.held.bundles[name]
            else:
                del bundles[name]
        return HeldConfig(self.node_pool, bundles, pool_keys)


def propose_snapshot(
    held: HeldConfig, node_pool: str, bundles: Sequence[Bundle], pool_keys: Sequence[PoolKey], count: int
) -> Proposal:
    """What a complete Snapshot asks for. RefusedResponseError when it is not whole, or empty where mail
    depends on it.
    """
    if len(bundles) != count:
        raise RefusedResponseError("INCOMPLETE_SNAPSHOT", f"{len(bundles)} bundles came, {count} were announced")
    if not bundles and held.bundles:
        raise RefusedResponseError("INCOMPLETE_SNAPSHOT", "an empty snapshot would forget every bundle")
    by_name = _by_name(held, bundles)
    return Proposal(held, node_pool, by_name, _by_id(pool_keys), _changed(held, by_name))


def propose_delta(
    held: HeldConfig,
    base_digest: bytes,
    upserts: Sequence[Bundle],
    removed: Sequence[str],
    pool_keys: Sequence[PoolKey],
) -> Proposal:
    """What a Delta asks for. RefusedResponseError when it starts from something else or contradicts itself."""
    if base_digest != held.digest:
        raise RefusedResponseError("BASE_MISMATCH", "the node holds something else than the delta starts from")
    by_name = _by_name(held, upserts)
    if not by_name.keys().isdisjoint(removed):
        raise RefusedResponseError("BUNDLE_REFUSED", "a bundle is both sent and removed")
    gone = frozenset(removed)
    kept = {name: bundle for name, bundle in held.bundles.items() if name not in gone}
    keys = {**held.pool_keys, **_by_id(pool_keys)}
    return Proposal(held, held.node_pool, kept | by_name, keys, _changed(held, by_name))


def _by_name(held: HeldConfig, bundles: Sequence[Bundle]) -> dict[str, Bundle]:
    """Bundles by name, the held object where it is the same one: its content was checked, and memory is kept
    once.
    """
    by_name: dict[str, Bundle] = {}
    for bundle in bundles:
        if bundle.name in by_name:
            raise RefusedResponseError("BUNDLE_REFUSED", f"sent twice: {bundle.name}")
        known = held.bundles.get(bundle.name)
        by_name[bundle.name] = known if known is not None and _same(known, bundle) else bundle
    return by_name


def _same(known: Bundle, sent: Bundle) -> bool:
    return known.hash == sent.hash and known.revision == sent.revision and known.kind == sent.kind


def _by_id(pool_keys: Sequence[PoolKey]) -> dict[str, PoolKey]:
    return {key.key_id: key for key in pool_keys}


def _changed(held: HeldConfig, by_name: Mapping[str, Bundle]) -> list[Bundle]:
    return [bundle for name, bundle in by_name.items() if held.bundles.get(name) is not bundle]
