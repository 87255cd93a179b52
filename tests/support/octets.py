"""Sessions that are given their octets one way or another, without a socket, and contents that are worth cutting up."""

from __future__ import annotations

import asyncio
from typing import cast

from hypothesis import strategies as st

from dataplane.ingress.protocol import SmtpProtocol
from support.ingress import Node

OPENING = b"EHLO c\r\nMAIL FROM:<app@example.com>\r\nRCPT TO:<b@example.net>\r\nDATA\r\n"
LINES = st.sampled_from(
    [b"", b".", b"..", b".x", b"x", b"x" * 70, b"\xc3\xa9", b"x" * 500, b"." * 40, b"MAIL FROM:<>", b"x" * 998]
)


class Transport:
    """What a session says, and whether it reads."""

    def __init__(self) -> None:
        self.said = b""
        self.paused = False

    def write(self, data: bytes) -> None:
        self.said += data

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def is_closing(self) -> bool:
        return False

    def get_extra_info(self, name: str) -> object:
        return None


def open_session(node: Node) -> tuple[SmtpProtocol, Transport]:
    service, transport = node.ingress.service, Transport()
    submitter = service.submission.submitter("127.0.0.1")
    session = SmtpProtocol(service, submitter, service.limits, tls_available=False, tls_active=False)
    node.admission.admit("127.0.0.1", counted=True)
    session.connection_made(cast("asyncio.Transport", transport))
    return session, transport
