"""`python -m postroad.inbox --dir FOLDER`: the inbox as a process.

Prints one JSON line when it listens, `{"event": "inbox.ready", "port": …}`, and one for each mail it stored. Ends
on SIGTERM or SIGINT with status 0; a port that cannot be had is one line on standard error and status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

from postroad.inbox.server import serve
from postroad.inbox.store import Inbox, ReceivedMail


def main(arguments: list[str] | None = None) -> int:
    """Run until told to stop; the exit status."""
    parser = argparse.ArgumentParser(prog="postroad.inbox", description="A local SMTP server that keeps all mail.")
    parser.add_argument("--dir", type=Path, required=True, help="folder for the mail")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=2526, help="port to listen on; 0 for any free one")
    options = parser.parse_args(arguments)
    try:
        asyncio.run(_run(Inbox(options.dir), options.host, options.port))
    except OSError as error:
        sys.stderr.write(f"inbox: cannot listen on {options.host}:{options.port}: {error.strerror}\n")
        return 1
    return 0


async def _run(inbox: Inbox, host: str, port: int) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await serve(
        inbox,
        host,
        port,
        stop=stop,
        on_ready=lambda real_port: _say(event="inbox.ready", port=real_port),
        on_received=_say_received,
    )


def _say_received(mail: ReceivedMail) -> None:
    _say(
        event="inbox.received",
        number=mail.number,
        message=mail.message,
        sender=mail.sender,
        recipients=len(mail.recipients),
        size_bytes=mail.size_bytes,
    )


def _say(**fields: Any) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
