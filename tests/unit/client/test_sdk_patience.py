"""Calls that wait for a quota instead of failing: which, how long, how often."""

from __future__ import annotations

from typing import Any, NamedTuple

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from postroad.control.v1.account_service_pb2 import CreateAccountRequest, GetAccountRequest
from postroad.control.v1.credential_service_pb2 import CreateApiKeyRequest
from postroad.sdk import ResourceExhaustedError, UnavailableError
from postroad.sdk.channel import DEFAULT_TIMEOUT_S
from postroad.sdk.interceptors import AsyncUnaryInterceptor, SyncInterceptor

GET = "/postroad.control.v1.AccountService/GetAccount"
CREATE = "/postroad.control.v1.AccountService/CreateAccount"
CREATE_KEY = "/postroad.control.v1.CredentialService/CreateApiKey"


class Details(NamedTuple):
    """As gRPC gives them to an interceptor."""

    method: Any
    timeout: float | None = None
    metadata: Any = None
    credentials: Any = None
    wait_for_ready: Any = None


class Refused(grpc.RpcError):
    """As gRPC raises it."""

    def __init__(self, status: grpc.StatusCode, *metadata: tuple[str, bytes]) -> None:
        self._status = status
        self._metadata = metadata

    def code(self) -> grpc.StatusCode:
        return self._status

    def details(self) -> str:
        return "no"

    def trailing_metadata(self) -> Any:
        return self._metadata


def refusal(
    wait_s: float | None, reason: str = "REQUESTS_EXHAUSTED", code: grpc.StatusCode = grpc.StatusCode.RESOURCE_EXHAUSTED
) -> Refused:
    status = status_pb2.Status(code=code.value[0], message="no")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain="postroad"))
    if wait_s is not None:
        delay = Duration()
        delay.FromMicroseconds(round(wait_s * 1_000_000))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return Refused(code, ("grpc-status-details-bin", status.SerializeToString()))


class Line:
    """A channel that refuses as it is told, then answers; time passes only while a call sleeps."""

    def __init__(self, *refusals: Refused) -> None:
        self.refusals = list(refusals)
        self.now_s = 100.0
        self.slept_s: list[float] = []
        self.tries: list[tuple[float | None, str]] = []

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.now_s += seconds

    def __call__(self, details: Any, request: Any) -> Line:
        self.tries.append((details.timeout, getattr(request, "request_id", "")))
        return self

    def result(self) -> str:
        if self.refusals:
            raise self.refusals.pop(0)
        return "answer"

    def call(self, method: Any, request: Any, timeout: float | None = None) -> Any:
        interceptor = SyncInterceptor(self.sleep, self.clock)
        return interceptor.intercept_unary_unary(self, Details(method, timeout), request)


def test_a_call_without_requests_left_waits_as_long_as_the_server_says() -> None:
    line = Line(refusal(0.6), refusal(1.25))
    assert line.call(GET, GetAccountRequest()).result() == "answer"
    assert line.slept_s == [0.6, 1.25]
    # The waits come out of the call's own time.
    assert [timeout for timeout, _ in line.tries] == pytest.approx(
        [DEFAULT_TIMEOUT_S, DEFAULT_TIMEOUT_S - 0.6, DEFAULT_TIMEOUT_S - 1.85]
    )


def test_a_change_is_repeated_with_the_same_request_id() -> None:
    line = Line(refusal(0.6))
    line.call(CREATE, CreateAccountRequest())
    (_, first), (_, second) = line.tries
    assert first == second != ""


def test_a_call_that_shows_a_secret_is_repeated_where_nothing_was_done() -> None:
    line = Line(refusal(0.6))
    line.call(CREATE_KEY, CreateApiKeyRequest())
    assert line.slept_s == [0.6]
    line = Line(refusal(0.6, "TOO_MANY_DENIED_CREDENTIALS"))
    with pytest.raises(ResourceExhaustedError):
        line.call(CREATE_KEY, CreateApiKeyRequest())
    assert line.slept_s == []


def test_another_quota_is_waited_for_where_repeating_does_no_harm() -> None:
    line = Line(refusal(2, "TOO_MANY_WATCHERS"))
    line.call(CREATE, CreateAccountRequest())
    assert line.slept_s == [2]


@pytest.mark.parametrize(
    ("error", "timeout", "expected"),
    [
        (refusal(31), None, ResourceExhaustedError),
        (refusal(2), 1.5, ResourceExhaustedError),
        (refusal(None), None, ResourceExhaustedError),
        (refusal(0.6, "DRAINING", grpc.StatusCode.UNAVAILABLE), None, UnavailableError),
    ],
)
def test_a_call_does_not_wait_beyond_its_time_or_for_something_else(
    error: Refused, timeout: float | None, expected: type[Exception]
) -> None:
    line = Line(error)
    with pytest.raises(expected):
        line.call(GET, GetAccountRequest(), timeout)
    assert line.slept_s == []


def test_a_call_gives_up_after_five_waits() -> None:
    line = Line(*(refusal(0.5) for _ in range(10)))
    with pytest.raises(ResourceExhaustedError) as caught:
        line.call(GET, GetAccountRequest())
    assert len(line.slept_s) == 5
    assert caught.value.details.retry_after_s == 0.5


async def test_calls_of_asyncio_wait_in_the_same_way() -> None:
    line = Line()
    refusals = [refusal(0.6)]

    async def sleep(seconds: float) -> None:
        line.sleep(seconds)

    async def answer() -> str:
        if refusals:
            error = refusals.pop(0)
            raise grpc.aio.AioRpcError(
                error.code(), grpc.aio.Metadata(), grpc.aio.Metadata(*error.trailing_metadata()), error.details()
            )
        return "answer"

    async def call(details: Any, _request: Any) -> Any:
        line.tries.append((details.timeout, ""))
        return answer()

    interceptor = AsyncUnaryInterceptor(sleep, line.clock)
    assert await interceptor.intercept_unary_unary(call, Details(GET.encode()), GetAccountRequest()) == "answer"
    assert line.slept_s == [0.6]
    assert [timeout for timeout, _ in line.tries] == pytest.approx([DEFAULT_TIMEOUT_S, DEFAULT_TIMEOUT_S - 0.6])
