"""The configuration in use by a worker, from memory only. Fills `ports.ConfigView`.

`load` and `load_denials` read the last-known-good files and put what they hold in use in one step; they block, and are
called in a thread once the loop runs: the file is opened part by part, so that the loop is never kept for longer than a
part takes. When a file cannot be read StoreError is raised and what is in use stays. Denials never go back to a lower
version.

What is kept is the bundles by name; an account is decoded and compiled when it is first asked for, and kept while it is
among the `cached_accounts` that were used last and its bundle is the same. The answers to a look-up and its cost do not
depend on how many accounts there are.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from dataplane.adapters.bundle_codec import (
    CodecError,
    decode_account,
    decode_denials,
    decode_networks,
    decode_settings,
    decode_shared_providers,
)
from dataplane.adapters.lkg import LastKnownGoodFiles, StoredConfig
from dataplane.adapters.sealing import KeyRing, SealError
from dataplane.agent.ports import StoreError
from dataplane.core.config import Denials, NodeSettings, SealedValue, SmtpProvider, seal_context
from dataplane.core.policy import CompiledAccount, NetworkTable, compile_account, compile_networks
from dataplane.ports import Clock
from postroad.config.v1 import bundle_pb2 as pb

CACHED_ACCOUNTS = 1_000


@dataclass(frozen=True, slots=True)
class _Generation:
    """One configuration, whole; replaced in one step."""

    digest: str
    bundles: dict[str, pb.Bundle]
    keys: KeyRing
    networks: NetworkTable
    shared_providers: dict[str, SmtpProvider]
    settings: NodeSettings


_NOTHING = _Generation("", {}, KeyRing({}), NetworkTable(()), {}, NodeSettings())


class MappedConfigView:
    """See the module."""

    def __init__(
        self,
        files: LastKnownGoodFiles,
        clock: Clock,
        config_max_age_s: float,
        cached_accounts: int = CACHED_ACCOUNTS,
    ) -> None:
        self._files = files
        self._clock = clock
        self._max_age_ms = int(config_max_age_s * 1000)
        self._cached_accounts = cached_accounts
        self._current = _NOTHING
        self._compiled: OrderedDict[str, tuple[bytes, CompiledAccount]] = OrderedDict()
        self._denials = Denials()
        self._contact_ms = 0

    # --- what is in use --------------------------------------------------------------------------------------

    @property
    def settings(self) -> NodeSettings:
        """As ConfigView."""
        return self._current.settings

    @property
    def denials(self) -> Denials:
        """As ConfigView."""
        return self._denials

    @property
    def loaded(self) -> bool:
        """As ConfigView."""
        return bool(self._current.bundles)

    @property
    def stale(self) -> bool:
        """As ConfigView; a node that never had a configuration is stale too."""
        return self._clock.wall_ms() - self._contact_ms > self._max_age_ms

    @property
    def digest(self) -> str:
        """Digest (hex) of the configuration in use, empty for none."""
        return self._current.digest

    @property
    def contact_ms(self) -> int:
        """When the configuration was last called current, in milliseconds since 1970; 0 for never."""
        return self._contact_ms

    @property
    def bundle_count(self) -> int:
        """Bundles in use."""
        return len(self._current.bundles)

    def account(self, name: str) -> CompiledAccount | None:
        """As ConfigView. CodecError for a bundle that cannot be read, which the agent would have refused."""
        bundle = self._current.bundles.get(name)
        if bundle is None or bundle.kind != pb.BUNDLE_KIND_ACCOUNT:
            return None
        known = self._compiled.get(name)
        if known is not None and known[0] == bundle.hash and known[1].account.revision == bundle.revision:
            self._compiled.move_to_end(name)
            return known[1]
        compiled = compile_account(decode_account(bundle))
        self._compiled[name] = (bundle.hash, compiled)
        self._compiled.move_to_end(name)
        if len(self._compiled) > self._cached_accounts:
            self._compiled.popitem(last=False)
        return compiled

    def account_of_network(self, address: str) -> str | None:
        """As ConfigView."""
        return self._current.networks.lookup(address)

    def provider(self, name: str) -> SmtpProvider | None:
        """As ConfigView."""
        parts = name.split("/")
        if len(parts) == 4 and parts[0] == "accounts":
            compiled = self.account(f"accounts/{parts[1]}")
            return compiled.account.providers.get(name) if compiled is not None else None
        return self._current.shared_providers.get(name)

    def unseal(self, value: SealedValue, account: str, resource: str, field: str) -> bytes:
        """As ConfigView."""
        return self._current.keys.unseal(value, seal_context(account, resource, field))

    # --- putting in use --------------------------------------------------------------------------------------

    def load(self) -> str:
        """Put the configuration on disk in use; returns its digest. StoreError."""
        stored = self._files.load()
        if not stored.write_ms:
            return self.digest
        generation = _generation(stored)
        if not self._contact_ms:
            self._contact_ms = stored.write_ms
        self._current = generation
        return generation.digest

    def load_denials(self) -> int:
        """Put the denials on disk in force; returns the version now in force. StoreError."""
        try:
            denials = decode_denials(self._files.read_denials())
        except CodecError as error:
            raise StoreError(f"the denials cannot be read: {error}") from error
        if denials.version > self._denials.version:
            self._denials = denials
        return self._denials.version

    def load_contact(self) -> None:
        """Take over when the configuration was last called current. StoreError."""
        self.note_contact(self._files.read_contact())

    def note_contact(self, wall_ms: int) -> None:
        """The configuration was current at this time."""
        self._contact_ms = max(self._contact_ms, wall_ms)


def _generation(stored: StoredConfig) -> _Generation:
    networks: list[tuple[str, str]] = []
    shared_providers: dict[str, SmtpProvider] = {}
    settings = NodeSettings()
    try:
        for bundle in stored.bundles.values():
            if bundle.kind == pb.BUNDLE_KIND_NETWORKS:
                networks.extend(decode_networks(bundle))
            elif bundle.kind == pb.BUNDLE_KIND_SHARED_PROVIDERS:
                shared_providers.update(decode_shared_providers(bundle))
            elif bundle.kind == pb.BUNDLE_KIND_NODE_SETTINGS:
                settings = decode_settings(bundle)
        keys = KeyRing({key_id: key.key for key_id, key in stored.pool_keys.items()})
        table = compile_networks(networks)
    except (CodecError, SealError, ValueError) as error:
        raise StoreError(f"the configuration on disk cannot be used: {error}") from error
    return _Generation(stored.digest.hex(), stored.bundles, keys, table, shared_providers, settings)
