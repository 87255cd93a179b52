"""The options of servers and channels: gRPC passes over a name that it does not know without a word."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from controlplane.adapters.grpc.transport import API_OPTIONS, NODE_OPTIONS
from dataplane.agent.channel import eager_options
from postroad.sdk.channel import options

_ALL = sorted({name for table in (API_OPTIONS, NODE_OPTIONS, eager_options(), options()) for name, _ in table})


@pytest.fixture(scope="module")
def library() -> bytes:
    found = find_spec("grpc._cython.cygrpc")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).read_bytes()


@pytest.mark.parametrize("name", _ALL)
def test_every_option_is_one_that_the_library_knows(library: bytes, name: str) -> None:
    assert name.encode() + b"\0" in library


def test_servers_tolerate_the_pings_of_channels_that_say_nothing() -> None:
    for server, channel in ((API_OPTIONS, options()), (NODE_OPTIONS, eager_options())):
        least = dict(server)["grpc.http2.min_ping_interval_without_data_ms"]
        assert dict(channel)["grpc.keepalive_time_ms"] > least
