"""What every node of a pool shall hold, immutable and shared by all streams.

Contract. `merge` takes a listing of changes and says which bundles must be loaded; `install` makes the new
`PoolConfig` once they are here. Unchanged bundles keep their object and their bytes, and a pool without
news keeps its `PoolConfig`, so that `is` tells. A bundle that was edited again between listing and loading
arrives in its newer state, which the next listing finds in place; one that was deleted in between is left
as it was until that listing. Revisions may go back: a PostgreSQL that failed over has lost edits, and gives
their numbers to others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from controlplane.ports_fleet import Bundle, BundleVersion, PoolConfig, PoolKey, digest_of


class ConfigCache:
    """The configuration of each pool."""

    def __init__(self) -> None:
        self._pools: dict[str, PoolConfig] = {}

    def get(self, pool: str) -> PoolConfig:
        """The pool's configuration; one that nobody edited yet is empty."""
        return self._pools.get(pool) or PoolConfig(pool, {}, (), digest_of({}))

    def missing_in(self, pools: Mapping[str, Mapping[str, BundleVersion | None]]) -> dict[str, dict[str, None]]:
        """Bundles that are held and that a listing of everything does not know, by pool."""
        return {
            pool: missing
            for pool, config in self._pools.items()
            if (missing := dict.fromkeys(config.bundles.keys() - pools.get(pool, {}).keys()))
        }

    def merge(self, pool: str, changes: Mapping[str, BundleVersion | None]) -> list[str]:
        """Names of bundles in `changes` that must be loaded."""
        held = self.get(pool).bundles
        return [
            name
            for name, version in changes.items()
            if version is not None
            and (name not in held or (held[name].revision, held[name].hash) != (version.revision, version.hash))
        ]

    def install(
        self,
        pool: str,
        changes: Mapping[str, BundleVersion | None],
        loaded: Iterable[Bundle],
        keys: tuple[PoolKey, ...],
    ) -> PoolConfig:
        """The pool's configuration from now on."""
        current = self.get(pool)
        bundles = dict(current.bundles)
        for name, version in changes.items():
            if version is None:
                bundles.pop(name, None)
        for bundle in loaded:
            bundles[bundle.name] = bundle
        if pool in self._pools and bundles == current.bundles and keys == current.pool_keys:
            return current
        digest = digest_of({name: bundle.hash for name, bundle in bundles.items()})
        config = PoolConfig(pool, bundles, keys, digest)
        self._pools[pool] = config
        return config
