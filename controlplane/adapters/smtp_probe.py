"""Looks at a provider's first endpoint as a node would use it: connect, TLS by policy, AUTH, QUIT.

Contract. `SmtpProbe` implements `controlplane.ports.ProviderProbe` with aiosmtplib. The host is resolved once, every
address is checked against the deployment's policy, and the connection goes to a checked address; the certificate is
verified for the host's name. What the remote does wrong is a result, never an exception; no credential stands in it.
Cancelling closes the connection. The whole look takes at most 20 s.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
from typing import NamedTuple

import aiosmtplib

from controlplane.domain.hosts import HostPolicy
from controlplane.domain.resources import Provider
from controlplane.ports import ProbeResult
from dataplane.core.config import Endpoint, TlsPolicy

_TIMEOUT_S = 20.0
_DETAIL_LIMIT = 300
_UNPRINTABLE = re.compile(r"[^\x20-\x7e]+")


class _RefusedError(Exception):
    """The look ended early; the text is the result."""


class _Seen(NamedTuple):
    detail: str
    tls_version: str


class SmtpProbe:
    """See the module."""

    def __init__(self, hosts: HostPolicy, timeout_s: float = _TIMEOUT_S) -> None:
        self._hosts = hosts
        self._timeout_s = timeout_s

    async def probe(self, provider: Provider, password: str) -> ProbeResult:
        """As the port says."""
        endpoint = provider.smtp.endpoints[0]
        try:
            async with asyncio.timeout(self._timeout_s):
                address = await self._resolve(endpoint)
                connection = await _connect(address, endpoint.port)
                seen = await _look(provider, endpoint, connection, password)
        except TimeoutError:
            return ProbeResult(ok=False, detail=f"no answer within {self._timeout_s:g} s", tls_version="")
        except (_RefusedError, aiosmtplib.SMTPException, OSError) as error:
            return ProbeResult(ok=False, detail=_safe(str(error) or type(error).__name__), tls_version="")
        return ProbeResult(ok=True, detail=_safe(seen.detail), tls_version=seen.tls_version)

    async def _resolve(self, endpoint: Endpoint) -> str:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise _RefusedError(f"{endpoint.host} cannot be resolved: {error.strerror}") from error
        addresses = [str(one[4][0]) for one in found]
        refused = [address for address in addresses if not self._hosts.permits(address)]
        if refused or not addresses:
            # The address stays unsaid: the answer must not map somebody's inner network.
            raise _RefusedError(f"{endpoint.host} resolves to an address that is not allowed")
        return addresses[0]


async def _connect(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, (address, port))
    except BaseException:
        connection.close()
        raise
    return connection


async def _look(provider: Provider, endpoint: Endpoint, connection: socket.socket, password: str) -> _Seen:
    smtp = provider.smtp
    policy = smtp.tls_policy or TlsPolicy.OPPORTUNISTIC
    context = _context(policy, smtp.ca_pem)
    # The host's name goes along for the certificate; the connection is the checked one.
    client = aiosmtplib.SMTP(
        hostname=endpoint.host,
        sock=connection,
        use_tls=endpoint.implicit_tls,
        start_tls=False,
        tls_context=context if endpoint.implicit_tls else None,
        timeout=_TIMEOUT_S,
    )
    try:
        await client.connect()
        await client.ehlo()
        if not endpoint.implicit_tls:
            await _start_tls(client, policy, context, endpoint.host)
        if smtp.username:
            await client.login(smtp.username, password)
        banner = client.last_ehlo_response.message if client.last_ehlo_response else ""
        seen = _Seen(banner, _tls_version(client))
        with contextlib.suppress(aiosmtplib.SMTPException, OSError):
            await client.quit()
        return seen
    finally:
        client.close()


async def _start_tls(client: aiosmtplib.SMTP, policy: TlsPolicy, context: ssl.SSLContext, host: str) -> None:
    if policy is TlsPolicy.NONE:
        return
    if client.supports_extension("starttls"):
        await client.starttls(server_hostname=host, tls_context=context)
        await client.ehlo()
    elif policy is not TlsPolicy.OPPORTUNISTIC:
        raise _RefusedError("the server does not offer STARTTLS, and the TLS policy requires it")


def _context(policy: TlsPolicy, ca_pem: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=ca_pem or None)
    if policy is not TlsPolicy.REQUIRED_VERIFIED:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _tls_version(client: aiosmtplib.SMTP) -> str:
    transport = client.transport
    found = transport.get_extra_info("ssl_object") if transport is not None else None
    return str(found.version()) if found is not None else ""


def _safe(text: str) -> str:
    return _UNPRINTABLE.sub(" ", text)[:_DETAIL_LIMIT]
