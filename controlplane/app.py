"""Puts the control plane together and runs it: the composition root of `serve`, and the door to the other commands.

Contract. `serve(settings)` returns the exit status when it was told to stop (SIGTERM, SIGINT) or when something that
must live for ever ended. One line of JSON on standard output, `controlplane.ready` with the real ports, says that it
serves. It never migrates: it does not serve a database that its code does not fit. While PostgreSQL is away at the
start it waits, alive and not ready; later an outage turns readiness off and calls UNAVAILABLE, and ends by itself.

    start    HTTP probes → schema → pools → feed, signal, leader → public port → nodes' port → SERVING
    stop     NOT_SERVING, nodes told to come back elsewhere, watches and ledger streams end → ports → the rest backwards
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
import grpc.aio
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from controlplane.adapters import administration
from controlplane.adapters.grpc.api import Api, ApiParts, build_api
from controlplane.adapters.grpc.enrollment import EnrollmentServicer, signer
from controlplane.adapters.grpc.node_config import NodeConfigServicer
from controlplane.adapters.grpc.node_ledger import NodeLedgerServicer
from controlplane.adapters.grpc.node_queue import NodeQueueServicer
from controlplane.adapters.grpc.transport import API_OPTIONS, NODE_OPTIONS, TlsFiles, server_credentials
from controlplane.adapters.http.probes import Readiness, add_probes
from controlplane.adapters.http.server import HttpServer, tls_context
from controlplane.adapters.http.transcoding import add_json_api
from controlplane.adapters.pki import CertificateAuthority, PkiError, load_authority, read_certificate
from controlplane.adapters.postgres.books import PostgresBooks
from controlplane.adapters.postgres.database import PostgresDatabase, open_api_pool
from controlplane.adapters.postgres.feed import ChangeFeed
from controlplane.adapters.postgres.fleet import PostgresFleet
from controlplane.adapters.postgres.fleet_database import CONNECTION_ERRORS, FleetDatabase, open_pool
from controlplane.adapters.postgres.handovers import PostgresHandovers
from controlplane.adapters.postgres.leader import PostgresJobs, PostgresLeadership
from controlplane.adapters.postgres.ledger import PostgresLedger
from controlplane.adapters.postgres.migrate import load_migrations, schema_problems
from controlplane.adapters.postgres.outbox import PostgresOutbox
from controlplane.adapters.postgres.queue import PostgresQueue
from controlplane.adapters.postgres.signal import PostgresLedgerSignal
from controlplane.adapters.redis.functions import RedisFunctions
from controlplane.adapters.redis.limits import RedisLiveLimits
from controlplane.adapters.redis.messages import RedisMessageBudget
from controlplane.adapters.redis.requests import RedisRequestBudget
from controlplane.adapters.sealing import Keyring, KeyringError, KeyringSealer
from controlplane.domain.books import Comparison
from controlplane.domain.hosts import HostPolicy
from controlplane.jobs.books import book_jobs
from controlplane.jobs.housekeeping import housekeeping_jobs
from controlplane.jobs.leader import Leader
from controlplane.ports import LiveLimits, RequestBudget
from controlplane.ports_fleet import Duplicate
from controlplane.ports_sending import MessageBudget
from controlplane.services.auditing import Auditor
from controlplane.services.compile import POOL_KEY_PLACE
from controlplane.services.enrollment import EnrollmentService
from controlplane.services.handovers import Handovers
from controlplane.services.ingest import IngestService
from controlplane.services.limit_states import NoLiveLimits
from controlplane.services.queue import QueueService
from controlplane.services.sending_budget import LocalMessageBudget
from controlplane.services.throttle import LocalRequestBudget
from controlplane.settings import Settings, host_name
from controlplane.stream.fleet import FleetService
from controlplane.stream.hub import Hub
from controlplane.telemetry import Metrics, SendingReports, configure_logging, get_logger
from postroad.node.v1 import enrollment_service_pb2_grpc, ledger_service_pb2_grpc, queue_service_pb2_grpc

AdministrationError = administration.AdministrationError
commands = administration

_SAMPLE_S = 1.0
_DATABASE_RETRY_S = 1.0
_POOL_CLOSE_S = 2.0
_DRAIN_S = 2.0
_FEED_LATE_S = 15.0
_BOOKS_TIMEOUT_S = 60.0
_MEMORY_LIMIT = 0.92
_GARBAGE_OBJECTS = 50_000


class StartError(Exception):
    """The control plane cannot start; the text says what to mend."""


class Ports(NamedTuple):
    """Where it serves."""

    grpc: int
    nodes: int
    http: int


def serve(settings: Settings) -> int:
    """Run until told to stop; returns the exit status. StartError before anything was served."""
    configure_logging(settings.log_level)
    _calm_collector()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(settings))


def _calm_collector() -> None:
    """Look for cycles seldom: the default walks each batch of records several times while it is stored."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GARBAGE_OBJECTS, 20, 20)


async def _serve(settings: Settings) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    failure: StartError | None = None
    try:
        async with running(settings, stop) as ports:
            if ports is not None:
                line = {"event": "controlplane.ready", **ports._asdict(), "pid": os.getpid()}
                sys.stdout.write(json.dumps(line) + "\n")
                sys.stdout.flush()
                await stop.wait()
    except* StartError as group:
        failure = next(_leaves(group))
    if failure is not None:
        # Not inside `except*`, which would wrap it again.
        raise failure from None
    return 0


def _leaves(group: BaseExceptionGroup[StartError]) -> Iterator[StartError]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


@asynccontextmanager
async def running(settings: Settings, stop: asyncio.Event) -> AsyncIterator[Ports | None]:
    """Serve inside the block; None when `stop` was set before it could. An ExceptionGroup when a part of it died."""
    plane = _ControlPlane(settings)
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        http_port = await plane.start_http(stack)
        ports = None
        if await plane.wait_for_schema(stop):
            background = plane.start_background(group)
            ports = Ports(*await plane.start_servers(), http_port)
            try:
                yield ports
            finally:
                await plane.stop_servers()
                for task in background:
                    task.cancel()
        else:
            yield None


class _ControlPlane:
    """The parts, in the order in which they start."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._log = get_logger("controlplane")
        self._metrics = Metrics()
        self._authority, self._keyring = _secrets(settings)
        self._tls = TlsFiles(
            settings.grpc.certificate_file or settings.pki_dir / administration.SERVER_CERTIFICATE,
            settings.grpc.key_file or settings.pki_dir / administration.SERVER_KEY,
        )
        self._nodes_tls = TlsFiles(
            settings.pki_dir / administration.SERVER_CERTIFICATE,
            settings.pki_dir / administration.SERVER_KEY,
            settings.pki_dir / "ca.pem",
        )
        self._health = health.aio.HealthServicer()
        self._readiness = Readiness(
            {
                "database": self._database_problem,
                "migrations": self._schema_problem,
                "pool": self._pool_problem,
                "certificate": self._certificate_problem,
                "memory": _memory_problem,
                "serving": self._serving_problem,
            }
        )
        self._serving = False
        self._schema_fits = False

    # --- start ----------------------------------------------------------------------------------------------------

    async def start_http(self, stack: AsyncExitStack) -> int:
        """Make the pools and everything on them, and serve probes at once."""
        database = self._settings.database
        self._api_pool = await open_api_pool(
            database.api_dsn.get_secret_value(),
            connections=database.api_connections,
            statement_timeout_s=database.statement_timeout_s,
        )
        stack.push_async_callback(_close_pool, self._api_pool)
        self._fleet_dsn = database.fleet_dsn.get_secret_value()
        self._fleet_pool = await open_pool(self._fleet_dsn, database.fleet_connections)
        stack.push_async_callback(_close_pool, self._fleet_pool)
        # Each with connections and a judgement of its own: a long look must not keep keys from being counted together.
        self._counters, self._buckets = self._open_redis(stack, "limits"), self._open_redis(stack, "requests")
        self._build()
        settings = self._settings.http
        tls = None
        if settings.certificate_file is not None and settings.key_file is not None:
            tls = tls_context(settings.certificate_file, settings.key_file)
        http = HttpServer(
            self._metrics.render,
            [
                lambda app: add_probes(app, self._readiness),
                lambda app: add_json_api(app, self._api.registry, self._metrics.request_ended),
            ],
        )
        try:
            port = await http.start(settings.host, settings.port, tls)
        except OSError as error:
            raise StartError(f"http.port {settings.host}:{settings.port}: {error.strerror}") from error
        stack.push_async_callback(http.stop)
        return port

    def _build(self) -> None:
        settings, metrics = self._settings, self._metrics
        api_database = PostgresDatabase(
            self._api_pool,
            acquire_timeout_s=settings.database.acquire_timeout_s,
            observe=metrics.query_ended,
        )
        self._fleet_database = FleetDatabase(
            self._fleet_pool,
            acquire_timeout_s=settings.database.acquire_timeout_s,
            transaction_timeout_s=settings.database.statement_timeout_s,
            observe=metrics.query_ended,
        )
        self._store = PostgresLedger(
            self._fleet_database,
            retention=timedelta(days=settings.retention.messages_days),
            report=self._note_reject,
            report_duplicate=self._note_duplicate,
        )
        self._signal = PostgresLedgerSignal(lambda: asyncpg.connect(self._fleet_dsn))
        self._api: Api = build_api(
            ApiParts(
                api_database,
                self._keyring,
                self._signal,
                HostPolicy(settings.allowed_private_networks),
                observe=metrics.call_ended,
                live=self._live_limits(),
                requests=self._request_budget(),
                outbox=PostgresOutbox(self._fleet_database, self._store),
                messages=self._message_budget(),
                sending=SendingReports(metrics.message_ended, get_logger("api")),
                hostname=settings.hostname or host_name(socket.gethostname()),
            )
        )
        # Who waits is counted in as much time as that takes; mail does not wait for it.
        self._books = PostgresBooks(
            FleetDatabase(
                self._fleet_pool,
                acquire_timeout_s=settings.database.acquire_timeout_s,
                transaction_timeout_s=_BOOKS_TIMEOUT_S,
                observe=metrics.query_ended,
            )
        )
        sealer = KeyringSealer(self._keyring)
        table, column = POOL_KEY_PLACE
        self._fleet_repository = PostgresFleet(
            self._fleet_database,
            lambda pool, key_id, sealed: sealer.unseal(sealed, "", table, f"{pool}/{key_id}", column),
        )
        self._hub = Hub(settings.nodes.max_streams)
        self._fleet = FleetService(
            self._fleet_repository, self._hub, _now, f"{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"
        )

        self._handovers = Handovers(
            PostgresHandovers(self._fleet_database),
            _now,
            ended=lambda node: self._log.info("node.drained", node=node),
            given=self._given,
            counted=self._metrics.handovers_counted,
            failed=lambda error: self._log.warning("handover.failed", error=f"{type(error).__name__}: {error}"),
        )

    def _open_redis(self, stack: AsyncExitStack, what: str) -> RedisFunctions | None:
        url = self._settings.redis.url
        if url is None:
            return None
        functions = RedisFunctions(url.get_secret_value(), on_change=lambda reason: self._note_redis(what, reason))
        stack.push_async_callback(functions.close)
        return functions

    def _live_limits(self) -> LiveLimits:
        return NoLiveLimits() if self._counters is None else RedisLiveLimits(self._counters)

    def _request_budget(self) -> RequestBudget | None:
        per_minute = self._settings.api.requests_per_minute
        if not per_minute:
            return None
        local = LocalRequestBudget(per_minute, time.monotonic)
        return local if self._buckets is None else RedisRequestBudget(self._buckets, per_minute, local)

    def _message_budget(self) -> MessageBudget:
        local = LocalMessageBudget(time.monotonic)
        return local if self._buckets is None else RedisMessageBudget(self._buckets, local)

    async def wait_for_schema(self, stop: asyncio.Event) -> bool:
        """Wait until the database answers; StartError when it and this code do not fit; False when told to stop."""
        said = False
        while not stop.is_set():
            try:
                problems = await self._schema_problems()
            except CONNECTION_ERRORS as error:
                if not said:
                    self._log.warning("database.unreachable", error=type(error).__name__)
                said = True
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_DATABASE_RETRY_S):
                        await stop.wait()
                continue
            if problems:
                raise StartError("; ".join(problems))
            self._schema_fits = True
            return True
        return False

    def _look_anew(self) -> None:
        self._fleet.look_anew()
        self._store.look_anew()

    def start_background(self, group: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        """What lives as long as the process; if one of these dies, so does the process."""
        feed = self._feed = ChangeFeed(
            self._fleet_dsn, self._fleet.scan, reconnected=self._look_anew, report=self._failed("feed.failed")
        )
        retention = timedelta(days=self._settings.retention.messages_days)
        jobs = housekeeping_jobs(PostgresJobs(self._fleet_database), retention=retention)
        jobs += book_jobs(
            self._books, retention=retention, sampled=self._metrics.books_sampled, concluded=self._compared
        )
        leader = Leader(
            PostgresLeadership(self._fleet_dsn),
            jobs,
            _now,
            report=self._job_failed,
            leading=self._leading,
        )
        work = {
            "feed": feed.run(),
            "signal": self._signal.run(),
            "leader": leader.run(),
            "handovers": self._handovers.run(),
            "sampler": self._sample(),
        }
        return [group.create_task(one, name=name) for name, one in work.items()]

    async def start_servers(self) -> tuple[int, int]:
        """Open both gRPC ports; returns them."""
        self._public = grpc.aio.server(interceptors=[self._api.interceptor], options=API_OPTIONS)
        self._api.registry.add_to_server(self._public)
        enrollment = EnrollmentService(self._fleet_repository, signer(self._authority), _now)
        enrollment_service_pb2_grpc.add_EnrollmentServiceServicer_to_server(
            EnrollmentServicer(enrollment, self._authority), self._public
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._public)
        names = [service.descriptor.full_name for service in self._api.registry.services]
        names += ["postroad.node.v1.EnrollmentService", health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, self._public)

        self._nodes = grpc.aio.server(options=NODE_OPTIONS)
        self._config = NodeConfigServicer(self._fleet, _now, self._note)
        store = self._store
        auditor = Auditor(
            self._books,
            _now,
            interval_s=self._settings.audit.interval_s,
            report=self._not_compared,
            concluded=self._compared,
        )
        self._ledger = NodeLedgerServicer(
            IngestService(store, _now, self._metrics.records_ingested),
            auditor,
            self._handovers,
            self._fleet,
            self._note,
        )
        self._nodes.add_generic_rpc_handlers((self._config.handler(),))
        ledger_service_pb2_grpc.add_LedgerServiceServicer_to_server(self._ledger, self._nodes)
        queue = QueueService(
            PostgresQueue(self._fleet_database, store, self._metrics.queue_changed), _now, time.monotonic
        )
        queue_service_pb2_grpc.add_QueueServiceServicer_to_server(NodeQueueServicer(queue, self._fleet), self._nodes)

        ports = (
            self._bind(self._public, "grpc", self._settings.grpc.host, self._settings.grpc.port, self._tls),
            self._bind(self._nodes, "nodes", self._settings.nodes.host, self._settings.nodes.port, self._nodes_tls),
        )
        await self._public.start()
        await self._nodes.start()
        self._serving = True
        self._readiness.forget()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        return ports

    def _bind(self, server: grpc.aio.Server, name: str, host: str, port: int, files: TlsFiles) -> int:
        address = f"[{host}]:{port}" if _is_ipv6(host) else f"{host}:{port}"
        try:
            return server.add_secure_port(address, server_credentials(files, self._certificate_unreadable))
        except OSError as error:
            raise StartError(f"{error.filename}: {error.strerror}; run `pki issue-server`?") from error
        except RuntimeError as error:
            raise StartError(f"{name}.port {address} cannot be bound: is it taken?") from error

    # --- stop -----------------------------------------------------------------------------------------------------

    async def stop_servers(self) -> None:
        """Say so, let what is under way end, then close both ports; within `stop_timeout_s`."""
        self._log.info("controlplane.stopping")
        self._serving = False
        self._readiness.forget()
        await self._health.enter_graceful_shutdown()
        # Streams never end by themselves: they are asked to, before their port is.
        self._hub.drain()
        self._ledger.drain()
        self._api.drain()
        self._signal.wake()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                await self._config.wait_idle()
        grace = max(self._settings.stop_timeout_s - 2 * _DRAIN_S, 0.1)
        await asyncio.gather(self._public.stop(grace), self._nodes.stop(grace))

    # --- what is reported -----------------------------------------------------------------------------------------

    async def _sample(self) -> None:
        pools = (self._api_pool, self._fleet_pool)
        while True:
            idle = sum(pool.get_idle_size() for pool in pools)
            self._metrics.pools_sampled(sum(pool.get_size() for pool in pools) - idle, idle)
            self._metrics.streams_sampled(len(self._hub))
            with contextlib.suppress(PkiError):
                ca_days = (self._authority.not_after - _now()) / timedelta(days=1)
                self._metrics.certificates_sampled({"server": self._certificate_days(), "ca": ca_days})
            due_s = time.monotonic() + _SAMPLE_S
            await asyncio.sleep(_SAMPLE_S)
            self._metrics.loop_sampled(max(0.0, time.monotonic() - due_s))

    def _note(self, event: str, **facts: Any) -> None:
        self._log.info(event, **facts)
        if event in {"config.acked", "config.nacked"}:
            self._metrics.config_answered(event.removeprefix("config.").removesuffix("ed"))

    def _note_redis(self, what: str, reason: str) -> None:
        if reason:
            self._log.warning("redis.away", what=what, reason=reason)
        else:
            self._log.info("redis.back", what=what)

    def _note_reject(self, spool: str, reason: str, detail: str) -> None:
        self._log.warning("ledger.rejected", spool=spool, reason=reason, detail=detail)

    def _given(self, node: str, spool: str, count: int) -> None:
        self._metrics.handed_over(count)
        self._log.info("handover.given", node=node, spool=spool, count=count)

    def _not_compared(self, spool: str, reason: str) -> None:
        self._log.warning("audit.not_compared", spool=spool, reason=reason)

    def _compared(self, comparison: Comparison) -> None:
        self._metrics.books_compared()
        if comparison.findings:
            self._log.warning(
                "audit.findings",
                spool=comparison.spool,
                node=comparison.node,
                as_of_record=comparison.as_of_record,
                count=len(comparison.findings),
                first=[
                    f"{one.kind.name} {one.account} {one.message_id or one.detail}" for one in comparison.findings[:5]
                ],
            )

    def _note_duplicate(self, duplicate: Duplicate) -> None:
        self._metrics.duplicate_found()
        self._log.warning(
            "ledger.duplicate",
            account=f"accounts/{duplicate.account}",
            message=duplicate.message_id,
            duplicate_of=duplicate.first_id,
            checked=duplicate.checked,
        )

    def _failed(self, event: str) -> Any:
        def report(what: str, error: Exception) -> None:
            self._log.warning(event, what=what, error=f"{type(error).__name__}: {error}")

        return report

    def _job_failed(self, job: str, error: Exception) -> None:
        self._metrics.job_failed(job)
        self._log.warning("job.failed", job=job, error=f"{type(error).__name__}: {error}")

    def _leading(self, now: bool) -> None:  # noqa: FBT001 - the observer's shape
        self._metrics.leading(now=now)
        self._log.info("leader.changed", leading=now)

    def _certificate_unreadable(self, text: str) -> None:
        self._log.error("certificate.unreadable", error=text)

    # --- readiness ------------------------------------------------------------------------------------------------

    async def _database_problem(self) -> str | None:
        async with self._fleet_database.transaction("ready") as connection:
            await connection.execute("SELECT 1")
        return None

    async def _pool_problem(self) -> str | None:
        async with asyncio.timeout(1.0), self._api_pool.acquire() as connection:
            await connection.execute("SELECT 1")
        return None

    async def _schema_problem(self) -> str | None:
        if self._schema_fits:
            return None
        return "; ".join(await self._schema_problems()) or None

    async def _schema_problems(self) -> list[str]:
        connection = await asyncpg.connect(self._fleet_dsn, timeout=5.0)
        try:
            return await schema_problems(connection, load_migrations())
        finally:
            await connection.close(timeout=2.0)

    async def _certificate_problem(self) -> str | None:
        return "the server certificate has ended" if self._certificate_days() <= 0 else None

    def _certificate_days(self) -> float:
        return (read_certificate(self._tls.certificate).not_valid_after_utc - _now()) / timedelta(days=1)

    async def _serving_problem(self) -> str | None:
        if not self._serving:
            return "not serving"
        # Nodes that are told nothing new are no reason to ask another replica, unless it lasts.
        late = self._feed.seconds_since_success() > _FEED_LATE_S
        return "changes do not reach nodes: see the log" if late else None


async def _memory_problem() -> str | None:
    """Whether the container's memory is nearly used up, where it has a limit."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = (folder / "memory.max").read_text("ascii"), (folder / "memory.current").read_text("ascii")
    except OSError:
        return None
    if limit.strip() == "max" or int(used) < int(limit) * _MEMORY_LIMIT:
        return None
    return "memory is nearly used up"


def _secrets(settings: Settings) -> tuple[CertificateAuthority, Keyring]:
    try:
        return load_authority(settings.pki_dir), Keyring.load(settings.keyring_dir)
    except (PkiError, KeyringError) as error:
        raise StartError(str(error)) from error


async def _close_pool(pool: asyncpg.Pool[Any]) -> None:
    try:
        async with asyncio.timeout(_POOL_CLOSE_S):
            await pool.close()
    except TimeoutError:
        pool.terminate()


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


def _now() -> datetime:
    return datetime.now(UTC)
