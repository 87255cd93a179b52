"""The compiled rules decide what looking at each rule in turn would decide."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dataplane.core.config import HeaderCondition, Rule, Target
from dataplane.core.routing import MessageRouter, compile_glob, compile_rules, matches_glob, may_match, route

_DOMAINS = ["a.b", "c.a.b", "d.e"]
_ADDRESSES = [f"{local}@{domain}" for local in ("p", "Q") for domain in _DOMAINS]
_PATTERNS = [address.lower() for address in _ADDRESSES] + [f"@{d}" for d in _DOMAINS] + [f"*.{d}" for d in _DOMAINS]
_GLOB_TEXT = st.text("ab*?", max_size=8)
_VALUES = st.text("abAB", max_size=10)

_CONDITIONS = st.builds(HeaderCondition, st.sampled_from(["subject", "x-tag"]), _GLOB_TEXT)
_RULES = st.lists(
    st.builds(
        Rule,
        name=st.text("rst", min_size=1, max_size=3),
        priority=st.integers(0, 3),
        targets=st.just((Target("providers/a"),)),
        sender_patterns=st.lists(st.sampled_from([*_PATTERNS, "<>"]), max_size=3).map(tuple),
        recipient_patterns=st.lists(st.sampled_from(_PATTERNS), max_size=3).map(tuple),
        headers=st.one_of(st.just(()), st.lists(_CONDITIONS, max_size=2).map(tuple)),
        min_size_bytes=st.integers(0, 2),
        max_size_bytes=st.integers(0, 3),
    ),
    max_size=12,
    unique_by=lambda rule: rule.name,
)
_HEADERS = st.dictionaries(st.sampled_from(["subject", "x-tag", "list-id"]), st.lists(_VALUES, max_size=3))


def pattern_holds(pattern: str, address: str) -> bool:
    address = address.lower()
    if pattern == "<>":
        return not address
    if pattern.startswith("@"):
        return address.endswith(pattern)
    if pattern.startswith("*."):
        return address.rpartition("@")[2].endswith(pattern[1:])
    return address == pattern


def glob_holds(pattern: str, value: str) -> bool:
    """The definition: a table over prefixes of both."""
    holds = [[False] * (len(value) + 1) for _ in range(len(pattern) + 1)]
    holds[0][0] = True
    for i, char in enumerate(pattern.lower(), 1):
        for j in range(len(value) + 1):
            if char == "*":
                holds[i][j] = holds[i - 1][j] or (j > 0 and holds[i][j - 1])
            elif j > 0:
                holds[i][j] = holds[i - 1][j - 1] and char in ("?", value[j - 1].lower())
    return holds[-1][-1]


def addresses_hold(rule: Rule, sender: str, recipient: str) -> bool:
    senders, recipients = rule.sender_patterns, rule.recipient_patterns
    return (not senders or any(pattern_holds(pattern, sender) for pattern in senders)) and (
        not recipients or any(pattern_holds(pattern, recipient) for pattern in recipients)
    )


def rule_holds(rule: Rule, sender: str, recipient: str, size_bytes: int, headers: dict[str, list[str]]) -> bool:
    return (
        addresses_hold(rule, sender, recipient)
        and size_bytes >= rule.min_size_bytes
        and (rule.max_size_bytes == 0 or size_bytes <= rule.max_size_bytes)
        and all(any(glob_holds(each.pattern, value) for value in headers.get(each.name, ())) for each in rule.headers)
    )


@given(
    _RULES,
    st.sampled_from([*_ADDRESSES, ""]),
    st.lists(st.sampled_from(_ADDRESSES), min_size=1, max_size=4),
    st.integers(0, 3),
    _HEADERS,
)
def test_compiled_and_naive_routing_agree(
    rules: list[Rule], sender: str, recipients: list[str], size_bytes: int, headers: dict[str, list[str]]
) -> None:
    compiled = compile_rules(rules)
    router = MessageRouter(compiled, sender, size_bytes, headers, b"m" * 16)
    in_order = sorted(rules, key=lambda rule: (rule.priority, rule.name))
    for recipient in recipients:
        expected = next((r.name for r in in_order if rule_holds(r, sender, recipient, size_bytes, headers)), None)
        for decision in (router.route(recipient), route(compiled, sender, recipient, size_bytes, headers, b"m" * 16)):
            assert (decision.rule if decision else None) == expected
        assert may_match(compiled, sender, recipient) == any(addresses_hold(r, sender, recipient) for r in rules)


@given(_GLOB_TEXT, _VALUES)
def test_globs_do_what_their_definition_says(pattern: str, value: str) -> None:
    assert matches_glob(compile_glob(pattern), value.lower()) == glob_holds(pattern, value)
