"""The OpenAPI 3.1 document of the JSON API, made from the same routes and descriptors that serve it.

Contract. `describe(routes)` returns the document as plain values; every message that a route takes or gives has a
schema under its full name. Comments are not in it: generated code does not carry them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from google.api import field_behavior_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from controlplane.adapters.http.routes import Route

Schema = dict[str, Any]

_WELL_KNOWN: dict[str, Schema] = {
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    "google.protobuf.Duration": {"type": "string", "examples": ["3.5s"]},
    "google.protobuf.FieldMask": {"type": "string", "examples": ["displayName,senderDomains"]},
    "google.protobuf.Any": {"type": "object", "properties": {"@type": {"type": "string"}}},
    "google.protobuf.Empty": {"type": "object"},
    "google.protobuf.Struct": {"type": "object"},
}
_STRINGS_OF_NUMBERS = {
    FieldDescriptor.TYPE_INT64,
    FieldDescriptor.TYPE_UINT64,
    FieldDescriptor.TYPE_SINT64,
    FieldDescriptor.TYPE_FIXED64,
    FieldDescriptor.TYPE_SFIXED64,
}
_FLOATS = {FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT}
_STATUS = "google.rpc.Status"


def describe(routes: Iterable[Route]) -> dict[str, Any]:
    """The document."""
    schemas: dict[str, Schema] = {
        _STATUS: {
            "type": "object",
            "properties": {
                "code": {"type": "integer"},
                "message": {"type": "string"},
                "details": {"type": "array", "items": _WELL_KNOWN["google.protobuf.Any"]},
            },
        }
    }
    paths: dict[str, dict[str, Any]] = {}
    counts: Counter[str] = Counter()
    for route in routes:
        counts[route.method.name] += 1
        number = counts[route.method.name]
        operation_id = route.method.name if number == 1 else f"{route.method.name}{number}"
        operation = _operation(route, operation_id, schemas)
        paths.setdefault(_path(route), {})[route.verb.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "Postroad", "version": "v1"},
        "security": [{"apiKey": []}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"apiKey": {"type": "http", "scheme": "bearer"}},
        },
    }


def _path(route: Route) -> str:
    """The template with OpenAPI's variables: `{name=accounts/*}` becomes `accounts/{name_1}`."""
    parts = []
    for before, field, pattern in _pieces(route.template):
        count = iter(range(1, 100))
        name = field.replace(".", "_")
        segments = [f"{{{name}_{next(count)}}}" if part in {"*", "**"} else part for part in pattern.split("/")]
        parts.append(before + ("/".join(segments) if field else ""))
    return "".join(parts)


def _pieces(template: str) -> list[tuple[str, str, str]]:
    pieces = []
    rest = template
    while "{" in rest:
        before, _, rest = rest.partition("{")
        variable, _, rest = rest.partition("}")
        field, _, pattern = variable.partition("=")
        pieces.append((before, field, pattern or "*"))
    return [*pieces, (rest, "", "")]


def _operation(route: Route, operation_id: str, schemas: dict[str, Schema]) -> dict[str, Any]:
    method = route.method
    taken = {field.partition(".")[0] for field in route.fields}
    media = "application/x-ndjson" if method.server_streaming else "application/json"
    operation: dict[str, Any] = {
        "operationId": operation_id,
        "tags": [method.containing_service.name],
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in _path_names(route)
        ],
        "responses": {
            "200": {"description": "OK", "content": {media: {"schema": _message(method.output_type, schemas)}}},
            "default": {
                "description": "Error",
                "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{_STATUS}"}}},
            },
        },
    }
    if route.body:
        body: Any = method.input_type
        if route.body != "*":
            body = method.input_type.fields_by_name[route.body].message_type
        operation["requestBody"] = {"content": {"application/json": {"schema": _message(body, schemas)}}}
    if route.body != "*":
        operation["parameters"] += [
            {"name": field.json_name, "in": "query", "schema": _field(field, schemas)}
            for field in method.input_type.fields
            if field.name not in taken and field.name != route.body
        ]
    return operation


def _path_names(route: Route) -> list[str]:
    return [piece.partition("}")[0] for piece in _path(route).split("{")[1:]]


def _message(message: Descriptor, schemas: dict[str, Schema]) -> Schema:
    if message.full_name in _WELL_KNOWN:
        return _WELL_KNOWN[message.full_name]
    if message.full_name not in schemas:
        # Before its fields: messages may hold themselves.
        schema = schemas[message.full_name] = {"type": "object", "additionalProperties": False}
        schema["properties"] = {field.json_name: _field(field, schemas) for field in message.fields}
    return {"$ref": f"#/components/schemas/{message.full_name}"}


def _field(field: FieldDescriptor, schemas: dict[str, Schema]) -> Schema:
    schema = _single(field, schemas)
    if field.is_repeated:
        schema = {"type": "array", "items": schema}
    # The stubs of Google's own protos do not say whose extension it is.
    field_behavior: Any = field_behavior_pb2.field_behavior
    behavior: Any = field.GetOptions().Extensions[field_behavior]
    if field_behavior_pb2.OUTPUT_ONLY in behavior:
        schema = {**schema, "readOnly": True}
    return schema


def _single(field: FieldDescriptor, schemas: dict[str, Schema]) -> Schema:
    if field.message_type is not None:
        return _message(field.message_type, schemas)
    if field.enum_type is not None:
        return {"type": "string", "enum": [value.name for value in field.enum_type.values if value.number]}
    if field.type == FieldDescriptor.TYPE_BOOL:
        return {"type": "boolean"}
    if field.type == FieldDescriptor.TYPE_STRING:
        return {"type": "string"}
    if field.type == FieldDescriptor.TYPE_BYTES:
        return {"type": "string", "contentEncoding": "base64"}
    if field.type in _STRINGS_OF_NUMBERS:
        return {"type": "string", "format": "int64"}
    return {"type": "number" if field.type in _FLOATS else "integer"}
