"""What the agent needs of its disk and of the codecs: adapters fill it, the composition root hands it over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from dataplane.agent.held import HeldConfig, Proposal
from postroad.config.v1.denials_pb2 import DenialSet


class StoreError(Exception):
    """Nothing was written, or what is there cannot be read; the text says why and is fit to be reported."""


class ConfigStore(Protocol):
    """Last-known-good on disk. Blocking: called in a thread. Each write is whole and durable, or changes nothing."""

    def read_config(self) -> HeldConfig:
        """What is held, empty when nothing was ever written. StoreError when it cannot be trusted."""
        ...

    def write_config(self, config: HeldConfig) -> None:
        """Replace the configuration. StoreError."""
        ...

    def read_denials(self) -> DenialSet:
        """The denials, version 0 when none were ever written. StoreError when they cannot be trusted."""
        ...

    def write_denials(self, denials: DenialSet) -> None:
        """Replace the denials. StoreError."""
        ...

    def write_contact(self, wall_ms: int) -> None:
        """Note when the configuration was last called current. StoreError."""
        ...


class CheckBundles(Protocol):
    """Decodes and validates the changed bundles of a proposal. Blocking: called in a thread."""

    def __call__(self, proposal: Proposal) -> Mapping[str, str]:
        """Why, by the name of each bundle that must be refused."""
        ...
