"""How many connections the workers of a node hold for an address, together: counts in memory that they share.

Contract. The supervisor makes the memory, each worker writes to a part of it that is its own and reads all parts, so
that no two write to one place and nobody waits. A worker that died takes its counts along: the supervisor clears its
part. Two workers that admit at the same moment may each not see the other yet: a cap can be exceeded by one connection
for each worker beside the first. Addresses are counted in two rows of 32,768 places each, chosen by keyed hashes, and
the lesser place counts: an address is taken for fuller than it is only when others fall to both of its places, and
nobody outside can find out which those are.

    layout   salt (16 bytes), then for each worker two rows of counts of 32 bits
    bytes    256 KiB a worker, of which the system keeps what was touched
"""

from __future__ import annotations

import mmap
import os
from hashlib import blake2b
from typing import Self

_SALT_BYTES = 16
_ROW = 32_768
_PART = 2 * _ROW
_COUNT_BYTES = 4


class AddressCounts:
    """One process's view; `worker` is whose part it writes, -1 for the supervisor's, which only clears."""

    __slots__ = ("_counts", "_own", "_parts", "_salt")

    def __init__(self, descriptor: int, worker: int) -> None:
        memory = memoryview(mmap.mmap(descriptor, 0))
        self._salt = bytes(memory[:_SALT_BYTES])
        self._counts = memory[_SALT_BYTES:].cast("I")
        self._parts = range(0, len(self._counts), _PART)
        self._own = worker * _PART

    @classmethod
    def create(cls, descriptor: int, worker_count: int) -> Self:
        """Lay out an empty file for so many workers."""
        os.ftruncate(descriptor, _SALT_BYTES + worker_count * _PART * _COUNT_BYTES)
        os.pwrite(descriptor, os.urandom(_SALT_BYTES), 0)
        return cls(descriptor, -1)

    def count(self, key: str) -> int:
        """Connections that all workers hold under this key."""
        first, second = self._places(key)
        counts = self._counts
        return min(
            sum([counts[part + first] for part in self._parts]), sum([counts[part + second] for part in self._parts])
        )

    def add(self, key: str) -> None:
        """This worker holds one more."""
        for place in self._places(key):
            self._counts[self._own + place] += 1

    def remove(self, key: str) -> None:
        """This worker holds one less."""
        for place in self._places(key):
            self._counts[self._own + place] -= 1

    def clear(self, worker: int) -> None:
        """A worker is gone, and all its connections with it."""
        part = worker * _PART
        self._counts[part : part + _PART] = memoryview(bytes(_PART * _COUNT_BYTES)).cast("I")

    def _places(self, key: str) -> tuple[int, int]:
        digest = int.from_bytes(blake2b(key.encode(), digest_size=4, key=self._salt).digest(), "big")
        return digest % _ROW, _ROW + (digest >> 16) % _ROW
