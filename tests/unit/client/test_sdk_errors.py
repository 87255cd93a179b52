"""The table of errors and its way back: what the server raises is what a program catches."""

from __future__ import annotations

import inspect

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from controlplane.domain import errors as domain
from postroad.cli.problems import ADVICE
from postroad.sdk import (
    AbortedError,
    EtagMismatchError,
    FieldViolation,
    InternalError,
    InvalidArgumentError,
    PostroadError,
    UnavailableError,
)
from postroad.sdk import errors as sdk
from postroad.sdk.channel import is_repeatable, methods


def _details(*details: object) -> list[tuple[str, str | bytes]]:
    status = status_pb2.Status(code=3, message="text")
    for detail in details:
        status.details.add().Pack(detail)  # type: ignore[arg-type]  # any message
    return [("other", "x"), ("grpc-status-details-bin", status.SerializeToString())]


def _info(reason: str, info_domain: str = "postroad", **metadata: str) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=reason, domain=info_domain, metadata=metadata)


def test_every_reason_of_the_server_has_a_class_and_there_are_no_others() -> None:
    assert set(sdk.BY_REASON) == {reason.value for reason in domain.Reason}


def test_every_error_of_the_domain_has_a_class_of_the_same_name() -> None:
    classes = {
        name
        for name, kind in inspect.getmembers(domain, inspect.isclass)
        if issubclass(kind, domain.ControlPlaneError) and kind is not domain.ControlPlaneError
    }
    assert classes <= {name for name, kind in inspect.getmembers(sdk, inspect.isclass)}


def test_every_status_but_ok_has_a_class() -> None:
    assert set(sdk.BY_CODE) == set(grpc.StatusCode) - {grpc.StatusCode.OK}


def test_advice_is_for_reasons_that_exist() -> None:
    assert set(ADVICE) <= {reason.value for reason in domain.Reason}


def test_class_follows_the_reason_and_details_are_decoded() -> None:
    error = sdk.to_error(
        grpc.StatusCode.INVALID_ARGUMENT,
        "bad",
        _details(
            _info("FIELD_INVALID", key="value"),
            error_details_pb2.BadRequest(
                field_violations=[error_details_pb2.BadRequest.FieldViolation(field="account.name", description="no")]
            ),
            error_details_pb2.RequestInfo(request_id="r-1"),
            error_details_pb2.ResourceInfo(resource_name="accounts/demo"),
            error_details_pb2.RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000)),
        ),
    )
    assert isinstance(error, InvalidArgumentError)
    assert str(error) == "bad"
    assert error.reason == "FIELD_INVALID"
    assert error.details.metadata == {"key": "value"}
    assert error.details.violations == (FieldViolation("account.name", "no"),)
    assert (error.details.request_id, error.details.resource, error.details.retry_after_s) == (
        "r-1",
        "accounts/demo",
        1.5,
    )


def test_a_finer_class_is_still_caught_by_the_class_of_its_status() -> None:
    error = sdk.to_error(grpc.StatusCode.ABORTED, "stale", _details(_info("ETAG_MISMATCH")))
    assert type(error) is EtagMismatchError
    assert isinstance(error, AbortedError)


@pytest.mark.parametrize(
    ("code", "reason", "expected"),
    [
        (grpc.StatusCode.UNAVAILABLE, "A_REASON_OF_THE_FUTURE", UnavailableError),
        (grpc.StatusCode.INTERNAL, "ETAG_MISMATCH", InternalError),
        (grpc.StatusCode.UNKNOWN, "", InternalError),
    ],
)
def test_unknown_or_misplaced_reasons_fall_back_to_the_status(
    code: grpc.StatusCode, reason: str, expected: type[PostroadError]
) -> None:
    assert type(sdk.to_error(code, "text", _details(_info(reason)))) is expected


def test_reasons_of_other_domains_and_damaged_details_are_left_out() -> None:
    other = sdk.to_error(grpc.StatusCode.ABORTED, "x", _details(_info("ETAG_MISMATCH", "googleapis.com")))
    assert (type(other), other.reason) == (AbortedError, "")
    damaged = sdk.to_error(grpc.StatusCode.ABORTED, None, [("grpc-status-details-bin", b"\xff\xff")])
    assert (type(damaged), str(damaged)) == (AbortedError, "ABORTED")


def test_calls_that_show_a_secret_once_and_streams_are_never_repeated() -> None:
    repeatable = {method.name: is_repeatable(method) for method in methods()}
    assert not any(
        repeatable[name]
        for name in ("CreateApiKey", "RotateSmtpCredential", "CreateNode", "ResetNodeEnrollment", "WatchEvents")
    )
    assert all(repeatable[name] for name in ("GetMessage", "ListAccounts", "CreateAccount", "CancelMessage"))
