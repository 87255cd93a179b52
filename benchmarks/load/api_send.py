"""One load process that sends mail by the API at a steady rate, and speaks of it as generator.py does.

Run by `python -m benchmarks.load.api_send` with a job whose port is the API's, `ca_file` its CA, `username` an account
and `password` an API key. Each call of SendMessage has a `request_id` of its own and a message of parts, from which the
control plane makes a MIME message; its Message-ID is the mark that the sink looks for. `message` latencies count from
the moment a message was meant to be sent, `dot` from when it was. Errors count by their reason.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from pathlib import Path

from benchmarks.load.content import make_mark, make_rest
from benchmarks.load.generator import say
from benchmarks.load.job import Job, job_from_json
from benchmarks.load.latency import Timeline
from postroad.control.v1.message_service_pb2 import SendMessageRequest
from postroad.control.v1.outgoing_message_pb2 import EmailAddress, HeaderField, MessageContent, OutgoingMessage
from postroad.sdk import AsyncClient, PostroadError, connect_async

_NS = 1_000_000_000


class SendingLoad:
    """Runs one job; see the module."""

    def __init__(self, job: Job, client: AsyncClient) -> None:
        self._job = job
        self._client = client
        self._ledger = bytearray()
        self._last_ns = 0
        self._errors: Counter[str] = Counter()
        self._dot, self._message = Timeline(), Timeline()
        self._text = make_rest(job.size_bytes, job.sender, job.recipient).partition(b"\r\n\r\n")[2].decode("ascii")
        self._places = asyncio.Semaphore(job.sessions)

    async def run(self) -> None:
        """Send on schedule, or in a closed loop of as many as there are sessions, until the bound of the job."""
        begin, cpu_s = time.monotonic_ns(), time.process_time()
        stop_ns = begin + int((self._job.seconds or self._job.deadline_s) * _NS)
        step_ns = int(_NS / self._job.rate) if self._job.rate else 0
        report_ns = begin + _NS
        pending: set[asyncio.Task[None]] = set()
        intended_ns = begin
        while intended_ns < stop_ns and (not self._job.messages or len(self._ledger) < self._job.messages):
            await asyncio.sleep(max(intended_ns - time.monotonic_ns(), 0) / _NS)
            if not step_ns:
                await self._places.acquire()
                self._places.release()
            self._ledger.append(0)
            task = asyncio.create_task(self._send(len(self._ledger) - 1, intended_ns))
            pending.add(task)
            task.add_done_callback(pending.discard)
            intended_ns = intended_ns + step_ns if step_ns else time.monotonic_ns()
            if time.monotonic_ns() >= report_ns:
                self._report(len(pending))
                report_ns += _NS
        left_s = self._job.deadline_s - (time.monotonic_ns() - begin) / _NS
        unfinished = set[asyncio.Task[None]]()
        if pending:
            _, unfinished = await asyncio.wait(pending, timeout=max(left_s, 0))
        await asyncio.to_thread(Path(self._job.ledger_file).write_bytes, bytes(self._ledger))
        end = "deadline" if unfinished else "done"
        self._report(0, end=end, unanswered=len(unfinished), cpu_s=time.process_time() - cpu_s)

    async def _send(self, number: int, intended_ns: int) -> None:
        async with self._places:
            begin = time.monotonic_ns()
            try:
                await self._client.messages.SendMessage(self._request(number, intended_ns))
            except PostroadError as error:
                self._errors[error.reason or error.code.name] += 1
                return
        self._last_ns = now = time.monotonic_ns()
        self._ledger[number] = 1
        self._dot.record(now, now - begin)
        self._message.record(now, now - intended_ns)

    def _request(self, number: int, intended_ns: int) -> SendMessageRequest:
        name, _, value = make_mark(self._job.stream, number, intended_ns).decode("ascii").rstrip().partition(": ")
        content = MessageContent(
            author=EmailAddress(address=self._job.sender, display_name="Load"),
            to=[EmailAddress(address=self._job.recipient)],
            subject="a message of the load harness",
            headers=[HeaderField(name=name, value=value)],
            text=self._text,
        )
        return SendMessageRequest(parent=f"accounts/{self._job.username}", message=OutgoingMessage(content=content))

    def _report(self, open_count: int, **more: object) -> None:
        say(
            {
                "begun": len(self._ledger),
                "answered": self._ledger.count(1),
                "last_ns": self._last_ns,
                "open": open_count,
                "errors": dict(self._errors),
                "connect": {},
                "dot": self._dot.take(),
                "message": self._message.take(),
                "kinds": {},
                **more,
            }
        )


async def _run(job: Job) -> None:
    async with connect_async(f"127.0.0.1:{job.port}", job.password, Path(job.ca_file)) as client:
        load = SendingLoad(job, client)
        say({"ready": True})
        if await asyncio.to_thread(sys.stdin.readline):
            await load.run()


def main() -> None:
    """Run the job from standard input; see the module."""
    asyncio.run(_run(job_from_json(sys.stdin.readline())))


if __name__ == "__main__":
    main()
