"""The listening sockets of a node: one for each listener and worker, all on the same port, held by the supervisor.

The kernel spreads new connections over the sockets of a port (SO_REUSEPORT), and a connection waits in the queue of the
socket it fell to. Because the supervisor holds every socket beside the worker that serves it, a worker that ends resets
nobody: its queue waits for the next process, and no other socket notices. `turn_away` empties the queue of a socket
that nobody will serve any more. Errors are PortTakenError, which says what to do.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Sequence

from dataplane.settings import ListenerSettings

PORT_WAIT_S = 3.0
_BACKLOG = 1024


class PortTakenError(Exception):
    """A port cannot be listened on; the text says what to do."""


def bind_listeners(listeners: Sequence[ListenerSettings], worker_count: int) -> list[list[socket.socket]]:
    """For each worker a socket for each listener, listening on the same ports. PortTakenError, and nothing bound.

    With SO_REUSEPORT a second node of the same user would share a port in silence, so each port is first bound without.
    A port may be held for a moment by a node that was just killed: worth a wait of a few seconds.
    """
    by_worker: list[list[socket.socket]] = [[] for _ in range(worker_count)]
    for listener in listeners:
        try:
            for sockets, bound in zip(by_worker, _bind_shared(listener, worker_count), strict=True):
                sockets.append(bound)
        except OSError as error:
            for bound in (bound for sockets in by_worker for bound in sockets):
                bound.close()
            raise PortTakenError(
                f"cannot listen on {listener.address} port {listener.port}: {error.strerror}: stop what uses it, or "
                "change `listeners`"
            ) from error
    return by_worker


def turn_away(bound: socket.socket, reply: bytes) -> int:
    """Answer everybody who waits in the queue of a socket and close it; how many there were.

    Who connects between the last look and the closing is reset: no more than an instant's worth, beside silence for
    ever.
    """
    with bound:
        return answer_waiting(bound, reply)


def answer_waiting(bound: socket.socket, reply: bytes) -> int:
    """Answer everybody who waits in the queue of a socket that nobody serves now; how many there were.

    An empty `reply` (where TLS comes first) only closes the connection.
    """
    count = 0
    with contextlib.suppress(OSError):
        bound.setblocking(False)
        while True:
            connection, _ = bound.accept()
            count += 1
            with connection, contextlib.suppress(OSError):
                connection.setblocking(False)
                connection.send(reply)
    return count


def _bind_shared(listener: ListenerSettings, count: int) -> list[socket.socket]:
    if listener.port:
        _probe(listener.address, listener.port)
    bound: list[socket.socket] = []
    port = listener.port
    try:
        for _ in range(count):
            bound.append(_socket_for(listener.address))
            bound[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            bound[-1].bind((listener.address, port))
            bound[-1].listen(_BACKLOG)
            port = bound[-1].getsockname()[1]
    except OSError:
        for one in bound:
            one.close()
        raise
    return bound


def _socket_for(address: str) -> socket.socket:
    made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    # Connections of the node before us that are still closing must not keep us out.
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if ":" in address:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    return made


def _probe(address: str, port: int) -> None:
    give_up_at = time.monotonic() + PORT_WAIT_S
    while True:
        with _socket_for(address) as probe:
            try:
                probe.bind((address, port))
                probe.listen(1)
            except OSError:
                if time.monotonic() >= give_up_at:
                    raise
            else:
                return
        time.sleep(0.1)
