"""What the operating system still has of what was written to a connection, and how it is kept from sending that.

Linux says how many octets of a TCP connection it has taken and has not sent even once (SIOCOUTQNSD, linux/sockios.h).
Elsewhere nothing is known, and what the kernel has taken counts as sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import struct
import sys

_SIOCOUTQNSD = 0x894B
_RESET_ON_CLOSE, _IN_ORDER = struct.pack("ii", 1, 0), struct.pack("ii", 0, 0)


def unsent_bytes(transport: asyncio.Transport) -> int:
    """Octets that the kernel has taken and has never sent; 0 where it does not say, and of a transport that closes."""
    if transport.is_closing() or not sys.platform.startswith("linux"):
        return 0
    try:
        answer = fcntl.ioctl(_descriptor(transport), _SIOCOUTQNSD, bytes(4))
    except OSError:
        return 0
    return int.from_bytes(answer, sys.byteorder)


def cut_off(transport: asyncio.Transport) -> None:
    """Let the kernel take nothing more, and throw away what it has not sent when the transport is aborted.

    Without this an aborted transport closes in the loop's next turn, may write until then, and leaves to the kernel
    what that has.
    """
    if transport.is_closing():
        return
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(_descriptor(transport))) as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        own.shutdown(socket.SHUT_WR)


def reset_on_close(transport: asyncio.Transport, *, wanted: bool) -> None:
    """Let the end of the connection, whoever brings it, throw away what the kernel has not sent; or take that back."""
    if transport.is_closing():
        return
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(_descriptor(transport))) as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE if wanted else _IN_ORDER)


def _descriptor(transport: asyncio.Transport) -> int:
    descriptor: int = transport.get_extra_info("socket").fileno()
    return descriptor
