"""A cluster of three Valkey servers without replicas, from the same binary as the single one.

Contract. `ValkeyCluster(folder).start()` returns when every server says that the cluster is well. One password for all.
`empty()` leaves no keys and no functions. Who moves a slot or pauses a server sets that right again.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import redis

from postroad.localstack import ValkeyServer
from postroad.localstack.ports import LOOPBACK, free_port

SIZE = 3
_SLOTS = 16_384
_PASSWORD = "cluster-of-the-tests"
_START_TIMEOUT_S = 60.0
_SETTINGS = {"cluster-enabled": "yes", "cluster-node-timeout": "2000", "cluster-require-full-coverage": "no"}


class ValkeyCluster:
    """See the module."""

    def __init__(self, folder: Path) -> None:
        self._bus_ports = [free_port() for _ in range(SIZE)]
        self.servers = [
            ValkeyServer(folder / f"node-{number}", settings={**_SETTINGS, "cluster-port": str(port)})
            for number, port in enumerate(self._bus_ports)
        ]

    def start(self) -> Self:
        """Start, meet, share out the slots."""
        for server in self.servers:
            server.start()
            with redis.Redis.from_url(server.url()) as client:
                client.config_set("requirepass", _PASSWORD)
        for number in range(SIZE):
            first, last = self.range_of(number)
            self.call(number, "CLUSTER", "ADDSLOTSRANGE", first, last)
            if number:
                self.call(0, "CLUSTER", "MEET", LOOPBACK, self.servers[number].port, self._bus_ports[number])
        self.wait_until_well()
        return self

    def range_of(self, number: int) -> tuple[int, int]:
        """First and last slot of a server."""
        return number * _SLOTS // SIZE, (number + 1) * _SLOTS // SIZE - 1

    def server_of(self, slot: int) -> int:
        """Which server keeps a slot."""
        return next(number for number in range(SIZE) if self.range_of(number)[0] <= slot <= self.range_of(number)[1])

    def url(self, number: int = 0) -> str:
        """The URL of one server."""
        return f"redis://:{_PASSWORD}@{LOOPBACK}:{self.servers[number].port}/0"

    def client(self, number: int) -> redis.Redis:
        """A client of one server."""
        return redis.Redis.from_url(self.url(number))

    def call(self, number: int, *words: str | bytes | int) -> Any:
        """Any command to one server."""
        with self.client(number) as client:
            return client.execute_command(*words)

    def node_id(self, number: int) -> str:
        """The cluster's name of a server."""
        return str(self.call(number, "CLUSTER", "MYID").decode())

    def empty(self) -> None:
        """Forget keys and functions."""
        for number in range(SIZE):
            with self.client(number) as client:
                client.flushall()
                client.function_flush("SYNC")

    def begin_move(self, slot: int, target: int) -> None:
        """Bring the keys of a slot to another server; the slot itself is on its way until `end_move`."""
        source = self.server_of(slot)
        self.call(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", self.node_id(source))
        self.call(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", self.node_id(target))
        keys = self.call(source, "CLUSTER", "GETKEYSINSLOT", slot, 1_000)
        where = (LOOPBACK, self.servers[target].port, "", 0, 5_000)
        if keys:
            self.call(source, "MIGRATE", *where, "AUTH", _PASSWORD, "KEYS", *keys)

    def end_move(self, slot: int, target: int) -> None:
        """Let a slot belong to a server, as everybody knows."""
        target_id = self.node_id(target)
        for number in (target, *(number for number in range(SIZE) if number != target)):
            self.call(number, "CLUSTER", "SETSLOT", slot, "NODE", target_id)

    def restore(self, slot: int) -> None:
        """Bring a slot back to where it was at the start, without its keys."""
        home = self.server_of(slot)
        for number in range(SIZE):
            self.call(number, "CLUSTER", "SETSLOT", slot, "STABLE")
        self.empty()
        owner = self._owner(home, slot)
        if owner != self.servers[home].port:
            number = [server.port for server in self.servers].index(owner)
            # Who imports a slot claims it by a newer epoch: without, gossip of the last owner could win.
            self.call(home, "CLUSTER", "SETSLOT", slot, "IMPORTING", self.node_id(number))
            self.end_move(slot, home)
        self._wait_until(lambda: all(self._owner(n, slot) == self.servers[home].port for n in range(SIZE)))

    def _owner(self, number: int, slot: int) -> int:
        """The port of who keeps a slot, as a server sees it."""
        ranges = self.call(number, "CLUSTER", "SLOTS")
        return next(int(owner[1]) for first, last, owner, *_ in ranges if first <= slot <= last)

    def pause(self, number: int, *, paused: bool) -> None:
        """SIGSTOP or SIGCONT."""
        pid = self.servers[number].pid
        if pid is not None:
            os.kill(pid, signal.SIGSTOP if paused else signal.SIGCONT)

    def destroy(self) -> None:
        """End all, and remove what they left."""
        for server in self.servers:
            server.destroy()

    def wait_until_well(self) -> None:
        """Return when all servers know of all slots."""
        self._wait_until(lambda: all(self._is_well(number) for number in range(SIZE)))

    def _wait_until(self, reached: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while not reached():
            if time.monotonic() > deadline_s:
                raise TimeoutError("the cluster does not come together")
            time.sleep(0.05)

    def _is_well(self, number: int) -> bool:
        info = self.call(number, "CLUSTER", "INFO")
        return b"cluster_slots_ok:16384" in info and b"cluster_state:ok" in info
