"""One load process that asks the control plane's API at a steady rate, and speaks of it as generator.py does.

Run by `python -m benchmarks.load.api` with a job whose port is the API's, `ca_file` its CA, `username` an account and
`password` an API key. Of ten requests nine read (account, messages, credentials, providers, nodes) and one renames
one of twenty providers that no rule names: each makes a new revision of the account's bundle on the node. `message`
latencies count from the moment a request was meant to be sent, `dot` from when it was, `kinds` as `message` by kind of
request; errors count by their reason. There is no ledger file.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from pathlib import Path

from google.protobuf.field_mask_pb2 import FieldMask

from benchmarks.load.generator import say
from benchmarks.load.job import Job, job_from_json
from benchmarks.load.latency import Timeline
from postroad.control.v1.account_service_pb2 import GetAccountRequest
from postroad.control.v1.credential_service_pb2 import ListSmtpCredentialsRequest
from postroad.control.v1.message_service_pb2 import ListMessagesRequest
from postroad.control.v1.node_service_pb2 import ListNodesRequest
from postroad.control.v1.provider_pb2 import Provider, SmtpProvider
from postroad.control.v1.provider_service_pb2 import (
    CreateProviderRequest,
    ListProvidersRequest,
    UpdateProviderRequest,
)
from postroad.sdk import AsyncClient, PostroadError, connect_async

_NS = 1_000_000_000
_PROVIDERS = 20


class ApiLoad:
    """Runs one job; see the module."""

    def __init__(self, job: Job, client: AsyncClient) -> None:
        self._job = job
        self._client = client
        self._account = f"accounts/{job.username}"
        self._providers: deque[Provider] = deque()
        self._begun = 0
        self._answered = 0
        self._last_ns = 0
        self._errors: Counter[str] = Counter()
        self._dot, self._message = Timeline(), Timeline()
        self._kinds: dict[str, Timeline] = {}
        reads = [
            self._get_account,
            self._list_messages,
            self._list_messages,
            self._list_credentials,
            self._list_providers,
            self._list_nodes,
            self._list_messages,
            self._get_account,
            self._list_messages,
        ]
        self._requests: list[Callable[[], Awaitable[object]]] = [*reads, self._rename_provider]

    async def prepare(self) -> None:
        """Make the providers that are renamed, where a run before this one has not."""
        smtp = SmtpProvider(endpoints=[SmtpProvider.Endpoint(host="127.0.0.1", port=9)])
        listed = await self._client.providers.ListProviders(ListProvidersRequest(parent=self._account, page_size=1_000))
        known = {provider.name: provider for provider in listed.providers}
        for number in range(_PROVIDERS):
            provider = known.get(f"{self._account}/providers/renamed-{number}")
            if provider is None:
                request = CreateProviderRequest(
                    parent=self._account, provider_id=f"renamed-{number}", provider=Provider(smtp=smtp)
                )
                provider = await self._client.providers.CreateProvider(request)
            self._providers.append(provider)

    async def run(self) -> None:
        """Ask on schedule until the seconds or the requests are over; every request is waited for."""
        begin, cpu_s = time.monotonic_ns(), time.process_time()
        stop_ns = begin + int((self._job.seconds or self._job.deadline_s) * _NS)
        step_ns = int(_NS / self._job.rate)
        report_ns = begin + _NS
        pending: set[asyncio.Task[None]] = set()
        intended_ns = begin
        while intended_ns < stop_ns and (not self._job.messages or self._begun < self._job.messages):
            await asyncio.sleep(max(intended_ns - time.monotonic_ns(), 0) / _NS)
            task = asyncio.create_task(self._ask(self._requests[self._begun % len(self._requests)], intended_ns))
            pending.add(task)
            task.add_done_callback(pending.discard)
            self._begun += 1
            intended_ns += step_ns
            if time.monotonic_ns() >= report_ns:
                self._report(len(pending))
                report_ns += _NS
        left_s = self._job.deadline_s - (time.monotonic_ns() - begin) / _NS
        unfinished = set[asyncio.Task[None]]()
        if pending:
            _, unfinished = await asyncio.wait(pending, timeout=max(left_s, 0))
        end = "deadline" if unfinished else "done"
        self._report(0, end=end, unanswered=len(unfinished), cpu_s=time.process_time() - cpu_s)

    async def _ask(self, request: Callable[[], Awaitable[object]], intended_ns: int) -> None:
        begin = time.monotonic_ns()
        try:
            await request()
        except PostroadError as error:
            self._errors[error.reason or error.code.name] += 1
            return
        self._last_ns = now = time.monotonic_ns()
        self._answered += 1
        self._dot.record(now, now - begin)
        self._message.record(now, now - intended_ns)
        kind = request.__name__.strip("_").replace("_", " ")
        self._kinds.setdefault(kind, Timeline()).record(now, now - intended_ns)

    def _report(self, open_count: int, **more: object) -> None:
        say(
            {
                "begun": self._begun,
                "answered": self._answered,
                "last_ns": self._last_ns,
                "open": open_count,
                "errors": dict(self._errors),
                "connect": {},
                "dot": self._dot.take(),
                "message": self._message.take(),
                "kinds": {kind: timeline.take() for kind, timeline in self._kinds.items()},
                **more,
            }
        )

    def _get_account(self) -> Awaitable[object]:
        return self._client.accounts.GetAccount(GetAccountRequest(name=self._account))

    def _list_messages(self) -> Awaitable[object]:
        return self._client.messages.ListMessages(ListMessagesRequest(parent=self._account, page_size=50))

    def _list_credentials(self) -> Awaitable[object]:
        return self._client.credentials.ListSmtpCredentials(ListSmtpCredentialsRequest(parent=self._account))

    def _list_providers(self) -> Awaitable[object]:
        return self._client.providers.ListProviders(ListProvidersRequest(parent=self._account))

    def _list_nodes(self) -> Awaitable[object]:
        return self._client.nodes.ListNodes(ListNodesRequest())

    async def _rename_provider(self) -> object:
        if not self._providers:
            # All are being renamed: the server lags by more than a second of writes.
            return await self._get_account()
        # One that no other request is just renaming: its etag would be stale.
        provider = self._providers.popleft()
        try:
            provider.display_name = f"renamed {self._begun}"
            request = UpdateProviderRequest(provider=provider, update_mask=FieldMask(paths=["display_name"]))
            provider = await self._client.providers.UpdateProvider(request)
        finally:
            self._providers.append(provider)
        return provider


async def _run(job: Job) -> None:
    async with connect_async(f"127.0.0.1:{job.port}", job.password, Path(job.ca_file)) as client:
        load = ApiLoad(job, client)
        await load.prepare()
        say({"ready": True})
        if await asyncio.to_thread(sys.stdin.readline):
            await load.run()


def main() -> None:
    """Run the job from standard input; see the module."""
    asyncio.run(_run(job_from_json(sys.stdin.readline())))


if __name__ == "__main__":
    main()
