"""Ports of 127.0.0.1: which ones the local stack uses, is one free, and which one is.

Whether a port is free is true only at the moment it is said; whoever binds later must still handle a port that was
taken meanwhile.

A port of the stack comes from `--port`, else `$POSTROAD_PORT_<NAME>`, else `--port-base`, else what the folder used
before, else the default. 0 means a free one, which the folder then keeps, so that addresses outlive a restart.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Mapping, Sequence

from postroad.localstack.errors import LocalStackError

LOOPBACK = "127.0.0.1"

DEFAULT_PORTS: Mapping[str, int] = {
    "smtp": 2587,
    "smtps": 2465,
    "plain": 2525,
    "inbox": 2526,
    "grpc": 7443,
    "nodes": 7444,
    "http": 7480,
    "node-http": 7481,
    "postgres": 7432,
    "valkey": 7379,
}
# Below the range that kernels take for outgoing connections: a port chosen here is still free when its server binds.
_FREE_RANGE = range(10_000, 32_000)
_FREE_ATTEMPTS = 1_000


def is_free(port: int) -> bool:
    """Whether nobody listens on `port`; a port in TIME_WAIT counts as free, as it does for the servers."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # SO_REUSEADDR only: with SO_REUSEPORT the probe would share a port with a program that allows that.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


def port_taken(port: int, name: str) -> LocalStackError:
    """The error for a port of DEFAULT_PORTS that another program has; made here, raised by who wanted it."""
    return LocalStackError(
        f"port {port} on {LOOPBACK}, wanted for {name}, is taken",
        f"Stop the program that listens there, or choose another port (0: any free): `postroad up --port {name}=0`, "
        f'`make up ARGS="--port {name}=0"`, or --port-base NUMBER for all in a row',
    )


def free_port() -> int:
    """A port that the kernel says is free."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def wished_ports(options: Sequence[str], base: int | None, environment: Mapping[str, str]) -> dict[str, int]:
    """The ports that the user asked for, 0 for any free one; LocalStackError for a name or number that is none."""
    wishes = {name: base + offset for offset, name in enumerate(DEFAULT_PORTS)} if base is not None else {}
    for name in DEFAULT_PORTS:
        variable = f"POSTROAD_PORT_{name.upper().replace('-', '_')}"
        if environment.get(variable):
            wishes[name] = _number(environment[variable], f"${variable}")
    for option in options:
        name, separator, number = option.partition("=")
        if not separator or name not in DEFAULT_PORTS:
            raise LocalStackError(f"--port {option} is no NAME=NUMBER", f"Names: {', '.join(DEFAULT_PORTS)}")
        wishes[name] = _number(number, f"--port {name}")
    return wishes


def settle_ports(wishes: Mapping[str, int], remembered: Mapping[str, int]) -> dict[str, int]:
    """The port of each server: wish, memory or default, 0 replaced by a free one, all different."""
    wanted = {
        name: remembered.get(name, 0) if wishes.get(name) == 0 else wishes.get(name, remembered.get(name, default))
        for name, default in DEFAULT_PORTS.items()
    }
    taken = {port for port in wanted.values() if port}
    ports = {}
    for name, port in wanted.items():
        ports[name] = port or _unused(taken)
        taken.add(ports[name])
    if len(set(ports.values())) < len(ports):
        twice = sorted({str(port) for port in ports.values() if list(ports.values()).count(port) > 1})
        raise LocalStackError(f"port {', '.join(twice)} is wanted by two servers", "Choose others with --port")
    return ports


def _number(text: str, source: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) <= 65_535):
        raise LocalStackError(f"{source}: {text!r} is no port", "A port is a number from 0 to 65535")
    return int(text)


def _unused(taken: set[int]) -> int:
    chooser = random.SystemRandom()
    for _ in range(_FREE_ATTEMPTS):
        port = chooser.choice(_FREE_RANGE)
        if port not in taken and is_free(port):
            return port
    raise LocalStackError("no free port was found on 127.0.0.1", "End programs that listen, or name ports with --port")
