"""Resource names: `accounts/demo/routingRules/default` and its relatives, to ids and back.

Contract. A pattern is a name with `*` for each id. `parse_name` takes a name apart or raises InvalidArgumentError with
the field that it came from; `check_id` holds the grammar of ids that callers choose: 1 to 63 of a-z, 0-9 and '-',
beginning with a letter, not ending with '-'. Messages and operations have UUIDs in their place, destinations domains.
An id is what tables hold; a full name is what the API and bundles show.
"""

from __future__ import annotations

import re
import uuid

from controlplane.domain.errors import invalid
from dataplane.core.config import is_destination

ACCOUNT = "accounts/*"
API_KEY = "accounts/*/apiKeys/*"
OPERATOR_KEY = "apiKeys/*"
SMTP_CREDENTIAL = "accounts/*/smtpCredentials/*"
PROVIDER = "accounts/*/providers/*"
SHARED_PROVIDER = "providers/*"
DESTINATION = "accounts/*/destinations/*"
SHARED_DESTINATION = "destinations/*"
ROUTING_RULE = "accounts/*/routingRules/*"
MESSAGE = "accounts/*/messages/*"
OPERATION = "accounts/*/operations/*"
LIMIT = "accounts/*/limits/*"
SHARED_LIMIT = "limits/*"
BOOK = "accounts/*/books/*"
BOOK_FINDING = "accounts/*/bookFindings/*"
NODE = "nodes/*"
NODE_POOL = "nodePools/*"

_ID = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")


def check_id(text: str, field: str) -> str:
    """Return `text` when it is an id; InvalidArgumentError for `field` otherwise."""
    if _ID.fullmatch(text) is None:
        raise invalid(field, "must be 1 to 63 of a-z, 0-9 and '-', begin with a letter and not end with '-'")
    return text


def check_uuid(text: str, field: str) -> str:
    """Return `text` when it is a UUID in its usual form; InvalidArgumentError for `field` otherwise."""
    try:
        usual = str(uuid.UUID(text)) == text
    except ValueError:
        usual = False
    if not usual:
        raise invalid(field, "must be a UUID in lower case")
    return text


def check_destination(text: str, field: str) -> str:
    """Return `text` when it is a domain, or `*.` and a domain; InvalidArgumentError for `field` otherwise."""
    if not is_destination(text):
        raise invalid(field, "must be a domain or *.domain, lower case, A-labels")
    return text


_CHECKS = {"messages": check_uuid, "operations": check_uuid, "destinations": check_destination}


def parse_name(name: str, pattern: str, field: str = "name") -> tuple[str, ...]:
    """Return the ids in `name`; InvalidArgumentError for `field` when it does not follow `pattern`."""
    parts, wanted = name.split("/"), pattern.split("/")
    if len(parts) != len(wanted) or any(want not in ("*", part) for part, want in zip(parts, wanted, strict=True)):
        raise invalid(field, f"must look like {pattern}")
    for collection, part in zip(parts[::2], parts[1::2], strict=True):
        _CHECKS.get(collection, check_id)(part, field)
    return tuple(parts[1::2])


def parse_account_or_every(name: str, field: str = "name") -> str:
    """Return the account that a name stands for, or `-` for every one."""
    return "-" if name == "accounts/-" else parse_name(name, ACCOUNT, field)[0]


def parse_operation(name: str) -> tuple[str, str]:
    """Return account, `-` for every one, and id of an operation."""
    if name.startswith("accounts/-/operations/"):
        return "-", check_uuid(name.removeprefix("accounts/-/operations/"), "name")
    account, operation = parse_name(name, OPERATION)
    return account, operation


def parse_owned(name: str, owned: str, shared: str, field: str = "name") -> tuple[str | None, str]:
    """Take apart the name of what an account may own or nobody: (account or None, id)."""
    if name.startswith("accounts/"):
        account, item = parse_name(name, owned, field)
        return account, item
    return None, parse_name(name, shared, field)[0]


def parse_parent(parent: str, field: str = "parent") -> str | None:
    """Return the account that a parent names; None for the empty parent of shared resources."""
    return parse_name(parent, ACCOUNT, field)[0] if parent else None


def format_name(pattern: str, *ids: str) -> str:
    """Put ids into a pattern."""
    remaining = iter(ids)
    return "/".join(next(remaining) if part == "*" else part for part in pattern.split("/"))


def format_owned(account: str | None, item: str, owned: str, shared: str) -> str:
    """Name what an account owns, or, with None, nobody."""
    return format_name(shared, item) if account is None else format_name(owned, account, item)


def provider_name(account: str | None, provider: str) -> str:
    """Name a provider of an account, or a shared one."""
    return format_owned(account, provider, PROVIDER, SHARED_PROVIDER)


def destination_name(account: str | None, destination: str) -> str:
    """Name a destination of an account, or of all together."""
    return format_owned(account, destination, DESTINATION, SHARED_DESTINATION)


def limit_name(account: str | None, limit: str) -> str:
    """Name a limit of an account, or a shared one."""
    return format_owned(account, limit, LIMIT, SHARED_LIMIT)


def api_key_name(account: str | None, api_key: str) -> str:
    """Name a key of an account, or an operator's."""
    return format_owned(account, api_key, API_KEY, OPERATOR_KEY)
