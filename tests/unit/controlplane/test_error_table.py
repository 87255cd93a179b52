from __future__ import annotations

import re
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2

import controlplane
from controlplane.adapters.grpc.errors import STATUS_CODES, code_of, to_status
from controlplane.domain import errors
from controlplane.domain.errors import ControlPlaneError, Reason, Violation

ERRORS = [
    errors.UnauthenticatedError(Reason.API_KEY_INVALID),
    errors.PermissionDeniedError(Reason.SCOPE_MISSING),
    errors.InvalidArgumentError([Violation("a.b", "is bad"), Violation("c", "too")]),
    errors.NotFoundError("accounts/a"),
    errors.AlreadyExistsError("accounts/a"),
    errors.FailedPreconditionError(Reason.PROVIDER_IN_USE, "in use", subject="providers/p"),
    errors.AbortedError(Reason.ETAG_MISMATCH),
    errors.ResourceExhaustedError(Reason.READER_TOO_SLOW, retry_after_s=1.5),
    errors.UnavailableError(Reason.DATABASE_UNAVAILABLE, retry_after_s=2),
    errors.UnimplementedError(Reason.METHOD_UNKNOWN),
    errors.DeadlineError(Reason.DEADLINE_TOO_SHORT),
]


def details_of(error: Exception) -> list[str]:
    return [packed.TypeName().rsplit(".", 1)[1] for packed in to_status(error, "r").details]


def test_the_table_knows_every_error_of_the_domain() -> None:
    assert set(STATUS_CODES) == set(ControlPlaneError.__subclasses__())
    assert {type(error) for error in ERRORS} == set(STATUS_CODES)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_every_error_has_its_code_and_exactly_one_error_info(error: ControlPlaneError) -> None:
    status = to_status(error, "r")
    assert code_of(status) is STATUS_CODES[type(error)]
    assert status.message
    assert details_of(error).count("ErrorInfo") == 1
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == (error.reason, "postroad")


def test_each_kind_has_its_own_details() -> None:
    kinds = {type(error): details_of(error)[1:] for error in ERRORS}
    assert kinds[errors.InvalidArgumentError] == ["BadRequest"]
    assert kinds[errors.NotFoundError] == kinds[errors.AlreadyExistsError] == ["ResourceInfo"]
    assert kinds[errors.FailedPreconditionError] == ["PreconditionFailure"]
    assert kinds[errors.ResourceExhaustedError] == ["QuotaFailure", "RetryInfo"]
    assert kinds[errors.UnavailableError] == ["RetryInfo"]


def test_a_defect_of_ours_says_nothing_of_itself() -> None:
    status = to_status(RuntimeError("password hunter2"), "request-1")
    assert code_of(status) is grpc.StatusCode.INTERNAL
    assert b"hunter2" not in status.SerializeToString()
    assert details_of(RuntimeError()) == ["ErrorInfo", "RequestInfo"]


def test_every_reason_is_short_upper_case_and_raised_somewhere() -> None:
    folder = Path(controlplane.__file__).parent
    code = "\n".join(file.read_text("utf-8") for file in folder.rglob("*.py"))
    for reason in Reason:
        assert re.fullmatch(r"[A-Z][A-Z0-9_]{1,62}", reason)
        assert code.count(f"Reason.{reason.name}"), reason
