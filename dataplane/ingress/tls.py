"""TLS of the listeners: one context, made by RFC 9325, that a new certificate replaces while sessions go on.

Contract. `server_context` reads a chain and a key in PEM and returns a context for TLS 1.2 and 1.3: forward secrecy
and AEAD only, no renegotiation, no compression, session tickets on. OSError or ssl.SSLError when the files cannot be
used; what is in use then stays. `TlsHolder.context` is read at each handshake, so setting it is the reload.
"""

from __future__ import annotations

import ssl
from pathlib import Path

# RFC 9325, section 4.2, with ChaCha20 for clients without AES in hardware; TLS 1.3 has suites of its own.
_TLS12_SUITES = "ECDHE+AESGCM:ECDHE+CHACHA20"


class TlsHolder:
    """The context for the next handshake."""

    __slots__ = ("context",)

    def __init__(self, context: ssl.SSLContext) -> None:
        self.context = context


def server_context(certificate_file: Path, key_file: Path) -> ssl.SSLContext:
    """Return a context that serves this certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_TLS12_SUITES)
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    # One ticket is enough for a client that comes back; each costs a key derivation in the handshake.
    context.num_tickets = 1
    context.load_cert_chain(certificate_file, key_file)
    return context
