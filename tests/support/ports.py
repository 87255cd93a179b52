"""Ports for servers of tests, which no other test is given while a server is away for its restart.

Any free port, as the product takes it for `--port NAME=0`, may be one that another test's server had a moment ago and
wants again. So each process of a run takes from a share of its own of the product's range, one after the other.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterable, Iterator

from postroad.localstack.ports import is_free

_RANGE = range(10_000, 32_000)
_SHARES = 8


def own_ports(names: Iterable[str]) -> dict[str, int]:
    """A port for each name: free, and not given out before by this process."""
    return {name: next(port for port in _PORTS if is_free(port)) for name in names}


def _share() -> Iterator[int]:
    size = len(_RANGE) // _SHARES
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    first = _RANGE.start + int(worker) % _SHARES * size
    # Two runs at a time begin at different places.
    begin = random.SystemRandom().randrange(size)
    return (first + (begin + number) % size for number in itertools.count())


_PORTS = _share()
