"""The HTTP routes that the API's descriptors state: `google.api.http` annotations, compiled once.

Contract. `compile_routes` takes the services' descriptors; each rule and each of its additional bindings becomes a
`Route`. `Router.find` returns the route of a method and a raw path with the values of its variables, percent-decoded,
or the methods that the path has (none: the path is unknown). Path templates are those of google.api.http: literals,
`*`, `**`, variables `{field.path=segments}`, a verb after `:`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote

from google.api import annotations_pb2, http_pb2
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

# google.longrunning annotates its own methods for names that are not ours.
_OPERATIONS = {
    "ListOperations": http_pb2.HttpRule(get="/api/v1/{name=accounts/*}/operations"),
    "GetOperation": http_pb2.HttpRule(get="/api/v1/{name=accounts/*/operations/*}"),
    "WaitOperation": http_pb2.HttpRule(post="/api/v1/{name=accounts/*/operations/*}:wait", body="*"),
}
_OPERATIONS_SERVICE = "google.longrunning.Operations"
_TOKEN = re.compile(r"\{(?P<field>[a-z0-9_.]+)(?:=(?P<pattern>[^{}]+))?\}|(?P<literal>[^{}]+)")


class Route(NamedTuple):
    """One way to call a method. `fields` are the dotted paths of its variables, in the order of the groups."""

    verb: str
    template: str
    pattern: re.Pattern[str]
    fields: tuple[str, ...]
    body: str
    method: MethodDescriptor

    @property
    def full_name(self) -> str:
        """`/package.Service/Method`."""
        service = self.method.containing_service
        return f"/{service.full_name}/{self.method.name}"


class Found(NamedTuple):
    """A route and the values of its variables, by field path."""

    route: Route
    variables: dict[str, str]


class Router:
    """See the module."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self.routes = tuple(routes)

    def find(self, verb: str, raw_path: str) -> Found | set[str]:
        """The route, or the verbs that the path has."""
        verbs = set()
        for route in self.routes:
            match = route.pattern.fullmatch(raw_path)
            if match is None:
                continue
            if route.verb == verb:
                return Found(route, dict(zip(route.fields, map(unquote, match.groups()), strict=True)))
            verbs.add(route.verb)
        return verbs


def compile_routes(services: Iterable[ServiceDescriptor]) -> Iterator[Route]:
    """Every route of the services' methods."""
    for service in services:
        for method in service.methods:
            rule = _OPERATIONS.get(method.name) if service.full_name == _OPERATIONS_SERVICE else _rule_of(method)
            if rule is not None:
                for binding in (rule, *rule.additional_bindings):
                    yield _route(binding, method)


def _rule_of(method: MethodDescriptor) -> http_pb2.HttpRule | None:
    # The stubs of Google's own protos do not say whose extension it is.
    http: Any = annotations_pb2.http
    options = method.GetOptions()
    return options.Extensions[http] if options.HasExtension(http) else None


def _route(rule: http_pb2.HttpRule, method: MethodDescriptor) -> Route:
    verb = rule.WhichOneof("pattern") or "get"
    template: str = getattr(rule, verb)
    pattern, fields = [], []
    for token in _TOKEN.finditer(template):
        if token["field"] is None:
            pattern.append(re.escape(token["literal"]))
        else:
            fields.append(token["field"])
            pattern.append(f"({_segments(token['pattern'] or '*')})")
    return Route(verb.upper(), template, re.compile("".join(pattern)), tuple(fields), rule.body, method)


def _segments(pattern: str) -> str:
    kinds = {"*": "[^/:]+", "**": "[^:]+"}
    return "/".join(kinds.get(segment, re.escape(segment)) for segment in pattern.split("/"))
