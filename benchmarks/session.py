"""What the SMTP session machine costs by itself: microseconds of one message, no sockets, no spool.

Run by `python -m benchmarks.session [--size 4096] [--messages 20000]`. One recipient, a kept session, MAIL, RCPT and
DATA in one group, content in one piece; the policy lets everything pass. The least of five rounds is the figure.
"""

from __future__ import annotations

import argparse
import time

from dataplane.core import replies
from dataplane.core.address import Mailbox
from dataplane.core.replies import Reply
from dataplane.core.session import Session
from dataplane.core.session_contract import Limits, MailParameters

_LINE = b"The quick brown fox jumps over the lazy dog, and the dog lets it.\r\n"
_ROUNDS = 5


class _Everyone:
    """A policy that lets everything pass."""

    def authenticate(self, username: str, secret: str) -> Reply | None:
        return None

    def mail(self, sender: Mailbox | None, parameters: MailParameters) -> Reply | None:
        return None

    def recipient(self, address: Mailbox) -> Reply | None:
        return None

    def latest_release_ms(self) -> int:
        return 0

    def reset(self) -> None:
        return

    def forget(self) -> None:
        return

    def failed(self, error: Exception) -> str:
        raise error


def measure(size_bytes: int, messages: int) -> float:
    """Return microseconds a message."""
    session = Session(_Everyone(), Limits(), "bench", tls_available=False, tls_active=False, authorized=True)
    session.receive(b"EHLO bench\r\n")
    content = (b"Subject: x\r\n\r\n" + _LINE * (size_bytes // len(_LINE) + 1))[: size_bytes - 2] + b"\r\n.\r\n"
    group = b"MAIL FROM:<app@example.com> BODY=8BITMIME\r\nRCPT TO:<someone@example.net>\r\nDATA\r\n"
    reply = replies.queued("0190f5d2-0000-7000-8000-000000000000")
    begin = time.process_time()
    for _ in range(messages):
        session.receive(group)
        session.permit(None)
        session.take_output()
        session.receive(content)
        assert session.take_content()
        session.committed(reply)
        session.take_output()
    return (time.process_time() - begin) / messages * 1e6


def main() -> None:
    """Print the figure."""
    parser = argparse.ArgumentParser(description="cost of the SMTP session machine")
    parser.add_argument("--size", type=int, default=4_096, help="octets of a message")
    parser.add_argument("--messages", type=int, default=20_000, help="messages of a round")
    arguments = parser.parse_args()
    best = min(measure(arguments.size, arguments.messages) for _ in range(_ROUNDS))
    print(f"{best:.1f} us a message of {arguments.size} octets")


if __name__ == "__main__":
    main()
