"""Field masks (AIP-134, 203): which fields of a resource an edit changes, and the resource that comes out.

Contract. A resource states its fields as a tree: the path that the API uses, the attribute of the value, children of a
sub-message, and what may not be set. `merge` takes the stored value, the value that was sent and the mask; it returns
the stored value with the masked fields replaced. An empty mask means the fields that were populated, `*` all that may
be set. Output-only fields are ignored wherever they appear, an unknown path is InvalidArgumentError.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from controlplane.domain.errors import invalid

Resource = TypeVar("Resource")


@dataclass(frozen=True, slots=True)
class Field:
    """One field that may be set: the attribute that holds it, and the fields below it."""

    attribute: str
    children: Mapping[str, Field] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Fields:
    """All fields of a resource: what may be set by path, and what is output only."""

    settable: Mapping[str, Field]
    output_only: frozenset[str]


def merge(stored: Resource, sent: Resource, mask: Iterable[str], populated: Iterable[str], fields: Fields) -> Resource:
    """Return `stored` with the fields of the mask taken from `sent`."""
    paths = list(mask) or list(populated)
    if "*" in paths:
        paths = list(fields.settable)
    merged = stored
    for path in paths:
        if path in fields.output_only or path.split(".")[0] in fields.output_only:
            continue
        merged = _take(merged, sent, path.split("."), fields.settable, path)
    return merged


def changed_paths(mask: Iterable[str], populated: Iterable[str], fields: Fields) -> set[str]:
    """Return the top-level fields that an edit touches; output-only ones are left out."""
    paths = list(mask) or list(populated)
    tops = set(fields.settable) if "*" in paths else {path.split(".")[0] for path in paths}
    return tops - fields.output_only


def _take(stored: Any, sent: Any, parts: list[str], settable: Mapping[str, Field], path: str) -> Any:
    known = settable.get(parts[0])
    if known is None:
        raise invalid("update_mask", f"there is no field {path!r}")
    if len(parts) == 1:
        return replace(stored, **{known.attribute: getattr(sent, known.attribute)})
    inner = _take(getattr(stored, known.attribute), getattr(sent, known.attribute), parts[1:], known.children, path)
    return replace(stored, **{known.attribute: inner})
