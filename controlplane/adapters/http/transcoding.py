"""The JSON form of the API: one definition, in the descriptors; every call runs as over gRPC.

Contract. A request becomes the method's message: the body is the whole of it or the field that the annotation names,
path variables and query parameters fill the rest (dotted names, JSON or proto spelling). It runs through
`ApiRegistry.call`: same keys, same checks, same errors. The answer is JSON; of a method that streams, a line of JSON
for each message, flushed at once. An error is a google.rpc.Status in JSON with the HTTP status of its code; in a
stream that has begun it is the last line, `{"error": …}`. What is unknown in path, query or body is an error, never
passed over.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from aiohttp import web
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import code_pb2, error_details_pb2, status_pb2

from controlplane.adapters.grpc.calls import LARGE_METHODS, MAX_LARGE_BYTES, MAX_RECEIVE_BYTES
from controlplane.adapters.grpc.context import coming_from
from controlplane.adapters.grpc.errors import ApiStatusError, to_status
from controlplane.adapters.grpc.registry import ApiRegistry
from controlplane.adapters.http.openapi import describe
from controlplane.adapters.http.routes import Found, Router, compile_routes
from controlplane.domain.acceptance import Origin
from controlplane.domain.errors import InvalidArgumentError, Reason, UnimplementedError, Violation
from controlplane.metric_table import UNKNOWN_PATH
from dataplane.core.limits import normalize_address

# The table of google/rpc/code.proto.
HTTP_STATUSES: dict[int, int] = {
    code_pb2.CANCELLED: 499,
    code_pb2.UNKNOWN: 500,
    code_pb2.INVALID_ARGUMENT: 400,
    code_pb2.DEADLINE_EXCEEDED: 504,
    code_pb2.NOT_FOUND: 404,
    code_pb2.ALREADY_EXISTS: 409,
    code_pb2.PERMISSION_DENIED: 403,
    code_pb2.UNAUTHENTICATED: 401,
    code_pb2.RESOURCE_EXHAUSTED: 429,
    code_pb2.FAILED_PRECONDITION: 400,
    code_pb2.ABORTED: 409,
    code_pb2.OUT_OF_RANGE: 400,
    code_pb2.UNIMPLEMENTED: 501,
    code_pb2.INTERNAL: 500,
    code_pb2.UNAVAILABLE: 503,
    code_pb2.DATA_LOSS: 500,
}

RequestObserver = Callable[[str, str, int, float | None], None]
"""Told of each request that ended: verb, pattern of the route, HTTP status, seconds (None for one that streamed)."""

BODY_S = 30.0
MAX_BODY_BYTES = MAX_RECEIVE_BYTES
# What is octets in a message is a third longer in JSON.
MAX_LARGE_BODY_BYTES = MAX_LARGE_BYTES // 3 * 4 + 64 * 1024
_HUNG_UP = 499
_OUR_FAULT = 500
_FIRST_ANSWER_S = 0.5
_TRUTH = {"true": True, "false": False}
_SCALAR_MESSAGES = frozenset(
    f"google.protobuf.{name}" for name in ("Timestamp", "Duration", "FieldMask", "Int64Value", "StringValue")
)


def add_json_api(
    app: web.Application,
    registry: ApiRegistry,
    observe: RequestObserver = lambda _verb, _path, _status, _seconds: None,
) -> None:
    """Serve `/api/v1/…` and its OpenAPI document."""
    router = Router(compile_routes(service.descriptor for service in registry.services))
    document = json.dumps(describe(router.routes)).encode()

    async def openapi(_: web.Request) -> web.Response:
        return web.Response(body=document, content_type="application/json")

    async def call(request: web.Request) -> web.StreamResponse:
        found = router.find(request.method, request.rel_url.raw_path)
        begun, status = time.monotonic(), _HUNG_UP
        try:
            if isinstance(found, Found):
                response = await answer(request, found)
            else:
                response = _no_route(request, found)
            status = response.status
        except Exception:
            status = _OUR_FAULT
            raise
        finally:
            path = found.route.template if isinstance(found, Found) else UNKNOWN_PATH
            streamed = isinstance(found, Found) and found.route.method.server_streaming
            observe(request.method, path, status, None if streamed else time.monotonic() - begun)
        return response

    async def answer(request: web.Request, found: Found) -> web.StreamResponse:
        try:
            with coming_from(lambda: _origin(request)):
                # Read when the call is let in: nobody makes us read and take apart what no key opens.
                said = await registry.call(
                    found.route.full_name, lambda: _request_message(request, found), _metadata(request)
                )
            if isinstance(said, Message):
                return web.Response(body=_to_json(said), content_type="application/json")
        except ApiStatusError as error:
            return _error(error.status)
        async with aclosing(said):
            return await _stream(request, registry, said)

    app.router.add_get("/api/v1/openapi.json", openapi)
    app.router.add_route("*", "/api/v1/{path:(?s:.*)}", call)


async def _stream(
    request: web.Request, registry: ApiRegistry, answers: AsyncGenerator[Message, None]
) -> web.StreamResponse:
    """Lines as they come. A refusal is an error of its own; who is not refused hears so after a moment of silence."""
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson", "Cache-Control": "no-store"})
    waiting = asyncio.ensure_future(anext(answers, None))
    try:
        await asyncio.wait({waiting}, timeout=_FIRST_ANSWER_S)
        if waiting.done() and isinstance(refusal := waiting.exception(), ApiStatusError):
            return _error(refusal.status)
        await response.prepare(request)
        while (answer := await waiting) is not None:
            try:
                await registry.take(answers, response.write(_to_json(answer) + b"\n"))
            except ApiStatusError:
                # Who reads nothing would not read why, either.
                return _cut(request, response)
            waiting = asyncio.ensure_future(anext(answers, None))
    except ApiStatusError as error:
        await response.write(json.dumps({"error": _status_json(error.status)}).encode() + b"\n")
    finally:
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    await response.write_eof()
    return response


def _cut(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.abort()
    return response


# --- requests --------------------------------------------------------------------------------------------------------


async def _request_message(request: web.Request, found: Found) -> Message:
    route = found.route
    values: dict[str, Any] = {}
    if route.method.server_streaming and request.can_read_body:
        raise _invalid("body", "this method takes none")
    body = await _body(request, MAX_LARGE_BODY_BYTES if route.full_name in LARGE_METHODS else MAX_BODY_BYTES)
    if route.body == "*":
        values = body
    elif route.body:
        values[route.body] = body
    elif body:
        raise _invalid("body", "this method takes none")
    for name, texts in _query(request).items():
        path, field = _field(route.method.input_type, name, values=None)
        if ".".join(path) in found.variables:
            raise _invalid(name, "stands in the path")
        if route.body == "*" or path[0] == route.body:
            raise _invalid(name, "belongs into the body")
        _put(values, path, _query_value(field, name, texts))
    for name, text in found.variables.items():
        path, _ = _field(route.method.input_type, name, values=values)
        _put(values, path, text)
    message: Message = GetMessageClass(route.method.input_type)()
    try:
        json_format.ParseDict(values, message)
    except (json_format.ParseError, ValueError, TypeError, RecursionError) as error:
        raise _no_message(route.method.input_type, values, error) from error
    return message


def _no_message(kind: Descriptor, values: dict[str, Any], error: Exception) -> ApiStatusError:
    rivals = _rivals(kind, values)
    if rivals is None:
        return _invalid("request", _first_line(error))
    where, names = rivals
    return _invalid(where or "request", f"must have only one of {' and '.join(names)}")


def _rivals(owner: Descriptor, values: dict[str, Any], where: str = "") -> tuple[str, list[str]] | None:
    """Return the path of the first object that has several fields of a oneof, and these; None where none has."""
    chosen: dict[str, list[str]] = {}
    for name, value in values.items():
        field = owner.fields_by_name.get(name) or owner.fields_by_camelcase_name.get(name)
        if field is None or value is None:
            continue
        if field.containing_oneof is not None:
            chosen.setdefault(field.containing_oneof.name, []).append(field.name)
        path = f"{where}.{field.name}" if where else field.name
        within = [(path, value)]
        if isinstance(value, list):
            within = [(f"{path}[{number}]", one) for number, one in enumerate(value)]
        for at, one in within:
            if field.message_type is not None and isinstance(one, dict):
                found = _rivals(field.message_type, one, at)
                if found is not None:
                    return found
    return next(((where, names) for names in chosen.values() if len(names) > 1), None)


async def _body(request: web.Request, most_bytes: int) -> dict[str, Any]:
    try:
        async with asyncio.timeout(BODY_S):
            # How much is read depends on the method, not on the server.
            raw = await request.clone(client_max_size=most_bytes).read()
    except TimeoutError as error:
        raise _invalid("body", f"did not come within {BODY_S:g} s") from error
    except web.HTTPRequestEntityTooLarge as error:
        raise _invalid("body", f"is larger than {most_bytes >> 20} MiB") from error
    if not raw:
        return {}
    # Also keeps a web page from sending one as a form, without asking.
    if request.content_type != "application/json":
        raise _invalid("body", "must be application/json")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _invalid("body", "is no JSON") from error
    if not isinstance(value, dict):
        raise _invalid("body", "must be a JSON object")
    return value


def _query(request: web.Request) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, text in request.query.items():
        found.setdefault(name, []).append(text)
    return found


def _field(owner: Descriptor | None, name: str, *, values: dict[str, Any] | None) -> tuple[list[str], FieldDescriptor]:
    """The path of a dotted name in proto spelling, and its last field. In `values` other spellings give way."""
    part, _, rest = name.partition(".")
    field = None
    if owner is not None:
        field = owner.fields_by_name.get(part) or owner.fields_by_camelcase_name.get(part)
    if field is None:
        raise _invalid(name, "is no field of this method")
    below = None
    if values is not None:
        if field.json_name != field.name and field.json_name in values:
            values[field.name] = values.pop(field.json_name)
        below = values.get(field.name)
    if not rest:
        return [field.name], field
    path, last = _field(field.message_type, rest, values=below if isinstance(below, dict) else None)
    return [field.name, *path], last


def _query_value(field: FieldDescriptor, name: str, texts: list[str]) -> Any:
    if field.message_type is not None and field.message_type.full_name not in _SCALAR_MESSAGES:
        raise _invalid(name, "cannot stand in a query")
    if not field.is_repeated and len(texts) != 1:
        raise _invalid(name, "stands there more than once")
    values: list[Any] = list(texts)
    if field.type == FieldDescriptor.TYPE_BOOL:
        if not all(text in _TRUTH for text in texts):
            raise _invalid(name, "must be true or false")
        values = [_TRUTH[text] for text in texts]
    return values if field.is_repeated else values[0]


def _put(values: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        below = values.setdefault(part, {})
        if not isinstance(below, dict):
            raise _invalid(part, "must be a JSON object")
        values = below
    values[path[-1]] = value


def _origin(request: web.Request) -> Origin:
    encrypted = request.get_extra_info("ssl_object")
    protocol, tls = ("HTTP", "") if encrypted is None else ("HTTPS", encrypted.version() or "TLS")
    return Origin(normalize_address(request.remote or ""), protocol, tls)


def _metadata(request: web.Request) -> list[tuple[str, str]]:
    return [("authorization", value) for value in request.headers.getall("Authorization", [])]


# --- answers ---------------------------------------------------------------------------------------------------------


def _to_json(message: Message) -> bytes:
    return json.dumps(json_format.MessageToDict(message), ensure_ascii=False).encode()


def _error(status: status_pb2.Status) -> web.Response:
    body = json.dumps(_status_json(status), ensure_ascii=False).encode()
    headers = {}
    for detail in status.details:
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(retry):
            headers["Retry-After"] = str(max(1, retry.retry_delay.seconds + bool(retry.retry_delay.nanos)))
    if status.code == code_pb2.UNAUTHENTICATED:
        headers["WWW-Authenticate"] = "Bearer"
    return web.Response(
        status=HTTP_STATUSES.get(status.code, 500), body=body, content_type="application/json", headers=headers
    )


def _status_json(status: status_pb2.Status) -> dict[str, Any]:
    return dict(json_format.MessageToDict(status))


def _no_route(request: web.Request, verbs: set[str]) -> web.Response:
    if verbs:
        unknown = UnimplementedError(Reason.METHOD_UNKNOWN, f"{request.method} is not for this path")
        response = _error(to_status(unknown, ""))
        response.set_status(405)
        response.headers["Allow"] = ", ".join(sorted(verbs))
        return response
    response = _error(to_status(UnimplementedError(Reason.METHOD_UNKNOWN, "there is no such path"), ""))
    response.set_status(404)
    return response


def _invalid(field: str, text: str) -> ApiStatusError:
    return ApiStatusError(to_status(InvalidArgumentError([Violation(field, text)]), ""))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300] or type(error).__name__
