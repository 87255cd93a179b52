"""Which ports the local stack uses."""

from __future__ import annotations

import socket

import pytest

from postroad.localstack import LocalStackError
from postroad.localstack.ports import DEFAULT_PORTS, is_free, port_taken, settle_ports, wished_ports


def test_defaults_are_those_of_the_documentation() -> None:
    assert settle_ports({}, {}) == DEFAULT_PORTS


def test_options_win_over_environment_and_environment_over_the_base() -> None:
    wishes = wished_ports(["smtp=1", "node-http=4"], 9000, {"POSTROAD_PORT_SMTP": "2", "POSTROAD_PORT_NODE_HTTP": "3"})
    assert wishes["smtp"] == 1
    assert wishes["node-http"] == 4
    assert wishes["smtps"] == 9001


@pytest.mark.parametrize("option", ["smtp", "smtp=", "smtp=x", "smtp=-1", "smtp=70000", "smpt=1", "smtp=²"])
def test_a_wrong_option_is_named(option: str) -> None:
    with pytest.raises(LocalStackError, match="--port"):
        wished_ports([option], None, {})


def test_zero_takes_a_free_port_once_and_keeps_it() -> None:
    wishes = dict.fromkeys(DEFAULT_PORTS, 0)
    first = settle_ports(wishes, {})
    assert len(set(first.values())) == len(DEFAULT_PORTS)
    assert all(is_free(port) for port in first.values())
    assert settle_ports(wishes, first) == first
    assert settle_ports({}, first) == first


def test_a_port_wanted_twice_is_an_error() -> None:
    with pytest.raises(LocalStackError, match="7443"):
        settle_ports({"smtp": 7443}, {})


def test_a_port_somebody_listens_on_is_not_free() -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert not is_free(listener.getsockname()[1])


@pytest.mark.parametrize("name", DEFAULT_PORTS)
def test_a_taken_port_is_told_with_an_option_that_moves_that_one(name: str) -> None:
    error = port_taken(DEFAULT_PORTS[name], name)
    assert f"--port {name}=0" in error.advice
    assert set(wished_ports([f"{name}=0"], None, {})) == {name}
