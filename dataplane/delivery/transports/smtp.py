"""Opens sessions with SMTP relays: resolve, connect, TLS by policy, AUTH; the client machine says the words.

`SmtpTransport.open` tries the provider's endpoints in order and each one's addresses, those that failed within the
last minute at the end, and returns a connection that is READY. ConnectionFailedError tells the last failure when none
is left; refused credentials end it at once: another address would refuse them too and count them against the account.

    policy              certificate            without STARTTLS or with a failed handshake
    NONE                -                      clear
    OPPORTUNISTIC       any                    clear, on a new connection
    REQUIRED            any                    no delivery
    REQUIRED_VERIFIED   verified for the host  no delivery

Only addresses that the resolver let pass are dialled, and only as often as limits allow: LimitedError when those alone
are in the way. TLS is 1.2 or newer. Cancellation closes what was open.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator

from dataplane.core.client import Client, Signal
from dataplane.core.config import Endpoint, SmtpProvider, TlsPolicy
from dataplane.core.normalize import safe_text
from dataplane.core.transaction import Login, Verdict, VerdictKind
from dataplane.delivery.connection import Connection, ConnectionFailedError
from dataplane.delivery.deadlines import Deadlines
from dataplane.delivery.limits import DeliveryLimits, LimitedError
from dataplane.ports import Clock, ConfigView, Resolver

HANDSHAKE_TIMEOUT_S = 30.0
OPEN_TIMEOUT_S = 600.0
RECENT_FAILURE_S = 60.0
MAX_ADDRESSES = 8

_CONTEXT_LIMIT = 256
_FAILURE_LIMIT = 4_096
_AUTH_CODES = frozenset({530, 534, 535, 538})


class TlsContexts:
    """Client contexts, one for each set of trusted certificates; the system's where `ca_pem` is empty."""

    def __init__(self) -> None:
        self._contexts: dict[tuple[str, bool], ssl.SSLContext] = {}

    def get(self, ca_pem: str, *, verified: bool) -> ssl.SSLContext:
        """Return the context. ssl.SSLError (an OSError) for certificates that cannot be read."""
        key = (ca_pem if verified else "", verified)
        context = self._contexts.get(key)
        if context is None:
            context = _make_context(*key)
            if len(self._contexts) >= _CONTEXT_LIMIT:
                del self._contexts[next(iter(self._contexts))]
            self._contexts[key] = context
        return context


def _make_context(ca_pem: str, verified: bool) -> ssl.SSLContext:  # noqa: FBT001 - the parts of a cache key
    context = ssl.create_default_context(cadata=ca_pem or None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not verified:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class SmtpTransport:
    """Dials for the pools. `hostname` is what EHLO says; `config` opens passwords."""

    def __init__(
        self,
        resolver: Resolver,
        config: ConfigView,
        hostname: str,
        clock: Clock,
        deadlines: Deadlines,
        connect_timeout_s: float,
        limits: DeliveryLimits | None = None,
    ) -> None:
        self.connect_timeout_s = connect_timeout_s
        self._resolver = resolver
        self._config = config
        self._hostname = hostname
        self._clock = clock
        self._deadlines = deadlines
        self._limits = limits
        self._contexts = TlsContexts()
        self._failed_until_s: dict[str, float] = {}

    async def open(self, provider: SmtpProvider) -> Connection:
        """Return a connection that is READY, or raise ConnectionFailedError or LimitedError."""
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                return await self._open(provider)
        except TimeoutError:
            raise ConnectionFailedError(_failure("no session within the time allowed")) from None

    async def _open(self, provider: SmtpProvider) -> Connection:
        login = self._login(provider)
        places, failure = await self._places(provider)
        limited: LimitedError | None = None
        for endpoint, address in self._order(places):
            try:
                connection = await self._open_within_limits(provider, endpoint, address, login)
            except LimitedError as error:
                limited = limited or error
            except ConnectionFailedError as error:
                failure = error
                if error.verdict.code in _AUTH_CODES:
                    break
                self._remember_failure(_remote_host(endpoint, address))
            else:
                self._failed_until_s.pop(_remote_host(endpoint, address), None)
                return connection
        raise failure or limited or ConnectionFailedError(_failure("no address"))

    def _login(self, provider: SmtpProvider) -> Login | None:
        if not provider.username or provider.password is None:
            return None
        try:
            secret = self._config.unseal(provider.password, provider.account, provider.name, "password")
            return Login(provider.username, secret.decode("utf-8"))
        except (KeyError, ValueError):
            # Neither the secret nor why it does not open belongs into an event.
            raise ConnectionFailedError(_failure("the provider's password cannot be opened here")) from None

    async def _places(self, provider: SmtpProvider) -> tuple[list[tuple[Endpoint, str]], ConnectionFailedError | None]:
        places: list[tuple[Endpoint, str]] = []
        failure: ConnectionFailedError | None = None
        for endpoint in provider.endpoints:
            try:
                addresses = await self._resolver.addresses(endpoint.host)
            except (LookupError, PermissionError, OSError) as error:
                failure = ConnectionFailedError(_failure(f"{endpoint.host}: {_reason(error)}"), endpoint.host)
            else:
                places += [(endpoint, address) for address in addresses]
        return places[:MAX_ADDRESSES], failure

    def _order(self, places: list[tuple[Endpoint, str]]) -> Iterator[tuple[Endpoint, str]]:
        now_s = self._clock.monotonic()
        failed = self._failed_until_s
        yield from sorted(places, key=lambda place: failed.get(_remote_host(*place), 0.0) > now_s)

    def _remember_failure(self, remote_host: str) -> None:
        if len(self._failed_until_s) >= _FAILURE_LIMIT:
            self._failed_until_s.clear()
        self._failed_until_s[remote_host] = self._clock.monotonic() + RECENT_FAILURE_S

    async def _open_within_limits(
        self, provider: SmtpProvider, endpoint: Endpoint, address: str, login: Login | None
    ) -> Connection:
        lease = await self._limits.connect(provider, endpoint.host) if self._limits is not None else None
        try:
            connection = await self._open_at(provider, endpoint, address, login)
        except BaseException:
            if lease is not None:
                lease.release()
            raise
        connection.host = endpoint.host
        connection.lease = lease
        return connection

    async def _open_at(
        self, provider: SmtpProvider, endpoint: Endpoint, address: str, login: Login | None
    ) -> Connection:
        attempt = _Dial(self, provider, endpoint, address)
        try:
            return await attempt.run(provider.tls_policy, login)
        except _HandshakeFailedError as error:
            if provider.tls_policy is not TlsPolicy.OPPORTUNISTIC or endpoint.implicit_tls:
                raise ConnectionFailedError(error.verdict, error.remote_host) from None
            return await attempt.run(TlsPolicy.NONE, login)

    def new_connection(self, client: Client, remote_host: str) -> Connection:
        """Return a connection that is not connected yet."""
        return Connection(client, remote_host, self._clock, self._deadlines)

    def new_client(self, policy: TlsPolicy, login: Login | None, *, tls_active: bool, tls_verified: bool) -> Client:
        """Return a machine for a new session."""
        return Client(self._hostname, policy, login, tls_active=tls_active, tls_verified=tls_verified)

    def context(self, provider: SmtpProvider) -> ssl.SSLContext:
        """Return the TLS context that the provider's policy wants."""
        return self._contexts.get(provider.ca_pem, verified=provider.tls_policy is TlsPolicy.REQUIRED_VERIFIED)


class _HandshakeFailedError(ConnectionFailedError):
    """TLS could not be agreed on."""


class _Clear(asyncio.Protocol):
    """Of a connection that is to begin with TLS, until it does."""

    def __init__(self) -> None:
        self.has_spoken = False

    def data_received(self, data: bytes) -> None:
        """Nothing may come before the handshake."""
        self.has_spoken = True


class _Dial:
    """One endpoint at one address."""

    def __init__(self, transport: SmtpTransport, provider: SmtpProvider, endpoint: Endpoint, address: str) -> None:
        self._transport = transport
        self._provider = provider
        self._endpoint = endpoint
        self._address = address
        self._remote_host = _remote_host(endpoint, address)
        self._verified = provider.tls_policy is TlsPolicy.REQUIRED_VERIFIED

    async def run(self, policy: TlsPolicy, login: Login | None) -> Connection:
        implicit = self._endpoint.implicit_tls
        client = self._transport.new_client(
            policy, login, tls_active=implicit, tls_verified=implicit and self._verified
        )
        connection = self._transport.new_connection(client, self._remote_host)
        try:
            await self._connect(connection)
            if await connection.opening is Signal.START_TLS:
                await self._start_tls(connection)
                await connection.opening
        except BaseException:
            connection.abort("given up")
            raise
        return connection

    async def _connect(self, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        implicit = self._endpoint.implicit_tls
        clear = _Clear()
        try:
            async with asyncio.timeout(self._transport.connect_timeout_s + (HANDSHAKE_TIMEOUT_S if implicit else 0)):
                transport, _ = await loop.create_connection(
                    lambda: clear if implicit else connection, self._address, self._endpoint.port
                )
                if implicit:
                    await self._begin_with_tls(clear, transport, connection)
        except OSError as error:
            kind = "TLS" if isinstance(error, ssl.SSLError) else "connect"
            raise ConnectionFailedError(_failure(f"{kind}: {_reason(error)}"), self._remote_host) from None

    async def _begin_with_tls(self, clear: _Clear, wire: asyncio.Transport, connection: Connection) -> None:
        """Upgrade at once: this way, and not in one call with the dial, the transport below TLS is known."""
        transport = None
        try:
            if not clear.has_spoken:
                transport = await asyncio.get_running_loop().start_tls(
                    wire,
                    connection,
                    self._transport.context(self._provider),
                    server_hostname=self._endpoint.host,
                    ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S,
                )
        finally:
            if transport is None:
                wire.abort()
        if transport is None:
            reason = "the next hop speaks in clear" if clear.has_spoken else "connection lost"
            raise ConnectionFailedError(_failure(f"TLS: {reason}"), self._remote_host)
        connection.opened_under_tls(wire, transport, _tls_version(transport))

    async def _start_tls(self, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        clear = connection.wait_for_tls()
        try:
            transport = await loop.start_tls(
                clear,
                connection,
                self._transport.context(self._provider),
                server_hostname=self._endpoint.host,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S,
            )
        except OSError as error:
            raise _HandshakeFailedError(_failure(f"TLS: {_reason(error)}"), self._remote_host) from None
        if transport is None or connection.opening.done():
            raise _HandshakeFailedError(_failure("TLS: connection lost"), self._remote_host)
        connection.tls_started(transport, _tls_version(transport), verified=self._verified)


def _remote_host(endpoint: Endpoint, address: str) -> str:
    return f"{endpoint.host}[{address}]:{endpoint.port}"


def _tls_version(transport: asyncio.BaseTransport) -> str:
    tls = transport.get_extra_info("ssl_object")
    return (tls.version() or "") if tls is not None else ""


def _failure(text: str) -> Verdict:
    return Verdict(VerdictKind.TEMPORARY, 0, "4.4.1", safe_text(text.encode("utf-8", "replace")))


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError):
        return error.reason or "handshake failed"
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
