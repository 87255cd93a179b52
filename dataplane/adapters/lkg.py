r"""Last-known-good on disk: what lets a node start and serve without the control plane. Fills
`agent.ports.ConfigStore`.

    last-known-good/config    every bundle in use and the pool keys, sealed
    last-known-good/denials   the denials in force, sealed
    last-known-good/contact   when the configuration was last called current, sealed

Written by the agent, read by agent and workers. `config` is a line `PRLKG1\n`, 16 random bytes that tell this writing
from all others, and sealed parts of about 256 KiB, each behind its length: parts of one
postroad.config.v1.LastKnownGood with the bundles in order of name, bound to the writing, to their place and to being
the last or not. So a reader holds nothing large at once, and a file that is torn, shortened, mixed or changed does not
open. StoreError says what is wrong and names neither keys nor content.
"""

from __future__ import annotations

import hashlib
import secrets
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from dataplane.adapters.sealing import SealError, SealKey
from dataplane.agent.held import EMPTY, HeldConfig
from dataplane.agent.ports import StoreError
from dataplane.files import Reserve, no_room, write_durably
from dataplane.ports import Clock
from postroad.config.v1.bundle_pb2 import Bundle, PoolKey
from postroad.config.v1.denials_pb2 import DenialSet
from postroad.config.v1.last_known_good_pb2 import LastKnownGood

FOLDER = Path("last-known-good")
RESERVE = "reserve"
RESERVE_BYTES = 4 * 1024 * 1024
PART_BYTES = 256 * 1024

_MAGIC = b"PRLKG1\n"
_WRITING_BYTES = 16
_LENGTH = struct.Struct(">I")
# One bundle may be larger than a part; the bound only keeps a damaged length from asking for all memory.
_MAX_SEALED_BYTES = 1024 * 1024 * 1024


def open_files(
    data_dir: Path, key_file: Path | None, key_text: str | None, node: str, clock: Clock
) -> LastKnownGoodFiles:
    """The files of a node's data directory under its seal key: `key_text`, else the file, by default
    `identity/seal.key`.

    StoreError when there is no usable key.
    """
    file = data_dir / "identity" / "seal.key" if key_file is None else key_file
    try:
        seal_key = SealKey.from_file(file) if key_text is None else SealKey.from_text(key_text)
    except (OSError, SealError) as error:
        raise StoreError(f"the seal key cannot be used: {error}") from error
    return LastKnownGoodFiles(data_dir / FOLDER, seal_key, node, clock)


@dataclass(frozen=True, slots=True)
class StoredConfig:
    """What the file holds. `digest` is that of postroad.node.v1; `write_ms` is when it was written, 0 for never."""

    node_pool: str
    bundles: dict[str, Bundle]
    pool_keys: dict[str, PoolKey]
    digest: bytes
    write_ms: int


class LastKnownGoodFiles:
    """The files of one node, in `folder`; see the module."""

    def __init__(self, folder: Path, seal_key: SealKey, node: str, clock: Clock) -> None:
        self._folder = folder
        self._seal_key = seal_key
        self._node = node
        self._clock = clock
        self._reserve = Reserve(folder / RESERVE, RESERVE_BYTES)

    # --- configuration ---------------------------------------------------------------------------------------

    def load(self) -> StoredConfig:
        """Everything in the configuration file; nothing at all when there is none. StoreError."""
        bundles: dict[str, Bundle] = {}
        pool_keys: dict[str, PoolKey] = {}
        digest = hashlib.sha256()
        node_pool, write_ms, last_name = "", 0, ""
        for part in self._parts():
            if part.node:
                node_pool = part.node_pool
                write_ms = part.write_time.seconds * 1000 + part.write_time.nanos // 1_000_000
                if part.node != self._node:
                    raise StoreError(f"{self._folder / 'config'} was written by {part.node}, this is {self._node}")
            for bundle in part.bundles:
                if bundle.name <= last_name:
                    raise StoreError(f"{self._folder / 'config'} is not in order")
                last_name = bundle.name
                bundles[bundle.name] = bundle
                digest.update(bundle.name.encode() + b"\0" + bundle.hash)
            for key in part.pool_keys:
                pool_keys[key.key_id] = key
        return StoredConfig(node_pool, bundles, pool_keys, digest.digest(), write_ms)

    def read_config(self) -> HeldConfig:
        """As ConfigStore."""
        stored = self.load()
        return HeldConfig(stored.node_pool, stored.bundles, stored.pool_keys) if stored.write_ms else EMPTY

    def write_config(self, config: HeldConfig) -> None:
        """As ConfigStore."""
        self._write("config", self._sealed_parts(self._split(config)))

    def _split(self, config: HeldConfig) -> Iterator[LastKnownGood]:
        now_ms = self._clock.wall_ms()
        part = LastKnownGood(
            node=self._node,
            node_pool=config.node_pool,
            write_time=Timestamp(seconds=now_ms // 1000, nanos=now_ms % 1000 * 1_000_000),
            pool_keys=[config.pool_keys[key_id] for key_id in sorted(config.pool_keys)],
        )
        size_bytes = part.ByteSize()
        for name in sorted(config.bundles):
            bundle = config.bundles[name]
            if size_bytes >= PART_BYTES:
                yield part
                part, size_bytes = LastKnownGood(), 0
            part.bundles.append(bundle)
            size_bytes += len(bundle.content)
        yield part

    def _sealed_parts(self, parts: Iterable[LastKnownGood]) -> Iterator[bytes]:
        writing = secrets.token_bytes(_WRITING_BYTES)
        yield _MAGIC + writing
        number, held_back = 0, b""
        for part in parts:
            if number:
                yield self._framed(held_back, writing, number - 1, is_last=False)
            held_back = part.SerializeToString()
            number += 1
        yield self._framed(held_back, writing, number - 1, is_last=True)

    def _framed(self, content: bytes, writing: bytes, number: int, *, is_last: bool) -> bytes:
        sealed = self._seal_key.seal(content, _purpose(writing, number, is_last=is_last))
        return _LENGTH.pack(len(sealed)) + sealed

    def _parts(self) -> Iterator[LastKnownGood]:
        path = self._folder / "config"
        try:
            with path.open("rb") as file:
                head = file.read(len(_MAGIC) + _WRITING_BYTES)
                if not head.startswith(_MAGIC) or len(head) != len(_MAGIC) + _WRITING_BYTES:
                    raise StoreError(f"{path} is no last-known-good file")
                writing, number, is_last = head[len(_MAGIC) :], 0, False
                sealed = _read_framed(file.read(_LENGTH.size), file.read)
                while not is_last:
                    # The last part is the one behind which nothing follows; its seal says that it was meant so.
                    length = file.read(_LENGTH.size)
                    is_last = not length
                    content = self._seal_key.unseal(sealed, _purpose(writing, number, is_last=is_last))
                    yield LastKnownGood.FromString(content)
                    sealed = b"" if is_last else _read_framed(length, file.read)
                    number += 1
        except FileNotFoundError:
            return
        except (OSError, SealError, DecodeError, EOFError) as error:
            raise StoreError(f"{path}: {error}") from error

    # --- denials and contact -----------------------------------------------------------------------------------

    def read_denials(self) -> DenialSet:
        """As ConfigStore."""
        content = self._read("denials")
        try:
            return DenialSet() if content is None else DenialSet.FromString(content)
        except DecodeError as error:
            raise StoreError(f"{self._folder / 'denials'}: {error}") from error

    def write_denials(self, denials: DenialSet) -> None:
        """As ConfigStore."""
        self._write("denials", [self._seal_key.seal(denials.SerializeToString(), self._small_purpose("denials"))])

    def read_contact(self) -> int:
        """When the configuration was last called current, in milliseconds since 1970; 0 for never. StoreError."""
        content = self._read("contact")
        return 0 if content is None else int.from_bytes(content, "big")

    def write_contact(self, wall_ms: int) -> None:
        """As ConfigStore."""
        self._write("contact", [self._seal_key.seal(wall_ms.to_bytes(8, "big"), self._small_purpose("contact"))])

    def _small_purpose(self, name: str) -> str:
        return f"{name} of {self._node}"

    def _read(self, name: str) -> bytes | None:
        path = self._folder / name
        try:
            return self._seal_key.unseal(path.read_bytes(), self._small_purpose(name))
        except FileNotFoundError:
            return None
        except (OSError, SealError) as error:
            raise StoreError(f"{path}: {error}") from error

    def _write(self, name: str, parts: Iterable[bytes]) -> None:
        path = self._folder / name
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                write_durably(path, parts)
            except OSError as error:
                # What can be written twice is: denials must come into force on a full disk too.
                if not (no_room(error) and self._reserve.give_up() and isinstance(parts, list)):
                    raise
                write_durably(path, parts)
        except OSError as error:
            raise StoreError(f"{path} cannot be written: {error.strerror}") from error
        self._reserve.hold()


def _purpose(writing: bytes, number: int, *, is_last: bool) -> str:
    return f"last-known-good {writing.hex()} {number} {'last' if is_last else 'more'}"


def _read_framed(length: bytes, read: Callable[[int], bytes]) -> bytes:
    if len(length) != _LENGTH.size or (size := _LENGTH.unpack(length)[0]) > _MAX_SEALED_BYTES:
        raise EOFError("the file is not whole")
    sealed = read(size)
    if len(sealed) != size:
        raise EOFError("the file is not whole")
    return sealed
