"""What the limiter says to Redis: calls of `core/limiter_functions.lua` as octets, packed by hand.

Contract. Pure functions and one bounded cache. redis-py packs a word at a time, which costs more than everything else
that a message's limits do; here a bucket is packed once and kept, and a batch joins what is kept. The order of keys and
arguments is that of the library's header.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import NamedTuple

from redis.crc import key_slot

from dataplane.adapters.limiter_local import micro_take
from dataplane.core.limits import MAX_TOKENS, server_key
from dataplane.ports import Slot, Take

LONG_FILL_S = 300
"""A bucket that takes as long to fill is a long one: to find it full after it was lost would give away that much."""

_CACHED_BUCKETS = 20_000


def function_library() -> str:
    """Return the source of the functions."""
    return files("dataplane.core").joinpath("limiter_functions.lua").read_text(encoding="utf-8")


def redis_key(take: Take) -> str:
    """Return the key of the bucket."""
    return server_key(take.tag, take.key)


def slot_of_tag(tag: str) -> int:
    """Return the slot of a cluster where keys of this tag lie."""
    return key_slot(tag.encode())


class Known(NamedTuple):
    """A bucket as it is packed; sizes in micro-tokens."""

    name: str
    key: bytes
    sizes: bytes
    capacity: int
    rate_per_s: float
    is_long: bool


class Packer:
    """Packs calls and remembers buckets. A lot is what has one epoch: a tag of a cluster, or "" for all."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Known] = {}

    def known(self, take: Take) -> Known:
        """Return the bucket of a take."""
        known = self._known.get(take[:4])
        if known is None:
            if len(self._known) >= _CACHED_BUCKETS:
                self._known.clear()
            known = self._known[take[:4]] = _make_known(take)
        return known

    def take(self, lot: str, epoch: int, groups: Iterable[Sequence[Take]], long_ones: dict[str, Known]) -> bytes:
        """Pack a decision about groups; notes in `long_ones` which long buckets they draw from."""
        numbers: dict[bytes, bytes] = {}
        keys: list[bytes] = []
        sizes: list[bytes] = []
        rest: list[bytes] = []
        for takes in groups:
            rest.append(_number(len(takes)))
            for take in takes:
                known = self._known.get(take[:4]) or self.known(take)
                number = numbers.get(known.key)
                if number is None:
                    number = numbers[known.key] = _number(len(numbers) + 1)
                    keys.append(known.key)
                    sizes.append(known.sizes)
                    if known.is_long:
                        long_ones[known.name] = known
                rest += (number, _number(min(max(0, take.cost), MAX_TOKENS)))
        count = len(keys)
        asked = _number(epoch) if long_ones else _EMPTY
        head = _head(b"postroad_take_2", count + 1, 2 + 2 * count + len(rest))
        return b"".join((head, _epoch_key(lot), *keys, asked, _number(count), *sizes, *rest))

    def refund(self, takes: Sequence[Take]) -> bytes:
        """Pack a refund; a negative cost charges."""
        keys = [self.known(take).key for take in takes]
        words = [part for take in takes for part in (self.known(take).sizes, _number(take.cost))]
        return b"".join((_head(b"postroad_refund_2", len(keys), 3 * len(keys)), *keys, *words))


def pack_epoch(lot: str, epoch: int) -> bytes:
    """Pack the question whether the epoch is still this one."""
    head = _head(b"postroad_take_2", 1, 2)
    return b"".join((head, _epoch_key(lot), _number(epoch), _number(0)))


def pack_seed(levels: Sequence[tuple[Known, int]]) -> bytes:
    """Pack what buckets must not be above, in micro-tokens; below 0 for a debt."""
    words = [part for known, level in levels for part in (known.sizes, _number(level))]
    keys = [known.key for known, _ in levels]
    return b"".join((_head(b"postroad_seed_2", len(keys), 3 * len(keys)), *keys, *words))


def pack_peek(buckets: Sequence[Known]) -> bytes:
    """Pack a look at levels."""
    head = _head(b"postroad_peek_2", len(buckets), 2 * len(buckets))
    return b"".join((head, *(known.key for known in buckets), *(known.sizes for known in buckets)))


def pack_hold(groups: Iterable[Sequence[Slot]]) -> bytes:
    """Pack a wish for slots."""
    keys: list[bytes] = []
    words: list[bytes] = []
    for slots in groups:
        words.append(_number(len(slots)))
        for slot in slots:
            keys.append(_slot_key(slot))
            words += (_number(slot.capacity), _number(max(1, int(slot.ttl_s * 1000))), _text(slot.holder))
    return b"".join((_head(b"postroad_hold_1", len(keys), len(words)), *keys, *words))


def pack_release(slots: Sequence[Slot]) -> bytes:
    """Pack giving slots back."""
    head = _head(b"postroad_release_1", len(slots), len(slots))
    return b"".join((head, *map(_slot_key, slots), *(_text(slot.holder) for slot in slots)))


def pack_call(function: str, key: str, *arguments: str | int) -> bytes:
    """Pack the call of a function with one key."""
    words = (_number(each) if isinstance(each, int) else _text(each) for each in arguments)
    return b"".join((_head(function.encode(), 1, len(arguments)), _text(key), *words))


def pack_command(*words: str) -> bytes:
    """Pack any command."""
    return b"".join((b"*%d\r\n" % len(words), *map(_text, words)))


def make_known(name: str, capacity: int, rate_per_s: float) -> Known:
    """Pack a bucket by its key and its sizes in micro-tokens."""
    is_long = capacity > rate_per_s * LONG_FILL_S
    packed = _number(capacity) + _text(repr(float(rate_per_s)))
    return Known(name, _text(name), packed, capacity, rate_per_s, is_long)


def _make_known(take: Take) -> Known:
    sizes = micro_take(take)
    return make_known(redis_key(take), sizes.capacity, sizes.rate_per_s)


def _head(name: bytes, key_count: int, argument_count: int) -> bytes:
    total = 3 + key_count + argument_count
    return b"*%d\r\n$5\r\nFCALL\r\n$%d\r\n%b\r\n%b" % (total, len(name), name, _number(key_count))


def _epoch_key(lot: str) -> bytes:
    return _EPOCH_KEY if not lot else _text(server_key(lot, "epoch"))


def _slot_key(slot: Slot) -> bytes:
    return _text(server_key(slot.tag, slot.key))


def _text(text: str) -> bytes:
    data = text.encode()
    return b"$%d\r\n%b\r\n" % (len(data), data)


def _packed_number(number: int) -> bytes:
    data = b"%d" % number
    return b"$%d\r\n%b\r\n" % (len(data), data)


_SMALL = [_packed_number(number) for number in range(1_024)]
_EMPTY = b"$0\r\n\r\n"
_EPOCH_KEY = _text("postroad:{epoch}")


def _number(number: int) -> bytes:
    return _SMALL[number] if 0 <= number < len(_SMALL) else _packed_number(number)


PROBE = pack_command("FCALL", "postroad_take_2", "0", "", "0")
"""Whether the library is there; every server of a cluster answers it."""

CLUSTER_PROBE = pack_command("FCALL", "postroad_take_2", "2", server_key("a", ""), server_key("b", ""), "", "0")
"""Two keys of two slots, nothing decided: refused by a server of a cluster, and by nobody else."""
