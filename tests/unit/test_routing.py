"""Routing rules: which one matches, in which order its targets come, and how few rules are looked at."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from dataplane.core.config import HeaderCondition, Rule, Target
from dataplane.core.routing import (
    MessageRouter,
    address_patterns,
    candidates,
    compile_glob,
    compile_rules,
    matches_glob,
    may_match,
    order_targets,
    route,
)

ONE = (Target("providers/one"),)


def rule(name: str, priority: int = 0, **conditions: Any) -> Rule:
    return Rule(name=name, priority=priority, targets=ONE, **conditions)


def chosen(
    rules: list[Rule],
    sender: str = "app@example.com",
    recipient: str = "jane@mail.example.org",
    size_bytes: int = 1_000,
    headers: dict[str, tuple[str, ...]] | None = None,
) -> str | None:
    decision = route(compile_rules(rules), sender, recipient, size_bytes, headers or {}, b"m" * 16)
    return None if decision is None else decision.rule


def test_without_rules_there_is_no_decision() -> None:
    assert chosen([]) is None
    assert not may_match(compile_rules([]), "a@b.c", "d@e.f")


def test_a_rule_without_conditions_matches_everything() -> None:
    assert chosen([rule("all")]) == "all"
    assert chosen([rule("all")], sender="") == "all"


def test_the_lowest_priority_wins_and_equal_ones_go_by_name() -> None:
    assert chosen([rule("b", 1), rule("c", 0), rule("a", 1)]) == "c"
    assert chosen([rule("b", 1), rule("a", 1)]) == "a"


@pytest.mark.parametrize(
    ("pattern", "address", "matches"),
    [
        ("jane@example.org", "jane@example.org", True),
        ("jane@example.org", "Jane@Example.org", True),
        ("jane@example.org", "june@example.org", False),
        ("@example.org", "jane@example.org", True),
        ("@example.org", "jane@mail.example.org", False),
        ("*.example.org", "jane@mail.example.org", True),
        ("*.example.org", "jane@a.mail.example.org", True),
        ("*.example.org", "jane@example.org", False),
        ("*.example.org", "jane@badexample.org", False),
        ("*.org", "jane@example.org", True),
        ('"a@b"@example.org', '"a@b"@example.org', True),
        ("@b", '"a@b"@example.org', False),
    ],
)
def test_patterns_match_address_domain_or_parent(pattern: str, address: str, *, matches: bool) -> None:
    assert (chosen([rule("r", recipient_patterns=(pattern,))], recipient=address) == "r") is matches
    assert (chosen([rule("r", sender_patterns=(pattern,))], sender=address) == "r") is matches


def test_the_null_sender_has_a_pattern_of_its_own() -> None:
    rules = [rule("bounces", sender_patterns=("<>",)), rule("rest", 1, sender_patterns=("@example.com",))]
    assert chosen(rules, sender="") == "bounces"
    assert chosen(rules) == "rest"


def test_all_conditions_must_hold() -> None:
    strict = rule(
        "strict",
        sender_patterns=("@example.com",),
        recipient_patterns=("@mail.example.org",),
        headers=(HeaderCondition("x-tag", "news*"), HeaderCondition("subject", "*sale*")),
        min_size_bytes=500,
        max_size_bytes=2_000,
    )
    good: dict[str, Any] = {"headers": {"x-tag": ("other", "NEWS-1"), "subject": ("Big SALE today",)}}
    assert chosen([strict], **good) == "strict"
    assert chosen([strict], **good, sender="a@other.example") is None
    assert chosen([strict], **good, recipient="a@other.example") is None
    assert chosen([strict], **good, size_bytes=499) is None
    assert chosen([strict], **good, size_bytes=2_001) is None
    assert chosen([strict], headers={"x-tag": ("news",)}) is None
    assert chosen([strict], headers={"x-tag": ("old news",), "subject": ("sale",)}) is None


def test_sizes_are_bounds_that_belong_to_the_range() -> None:
    bounded = [rule("r", min_size_bytes=10, max_size_bytes=20)]
    assert [chosen(bounded, size_bytes=size) for size in (9, 10, 20, 21)] == [None, "r", "r", None]


def test_a_rule_of_every_kind_is_found_in_its_order() -> None:
    rules = [
        rule("pair", 0, sender_patterns=("@example.com",), recipient_patterns=("@a.example",)),
        rule("recipient", 1, recipient_patterns=("@b.example",)),
        rule("sender", 2, sender_patterns=("app@example.com",)),
        rule("size", 3, max_size_bytes=10),
        rule("many", 4, recipient_patterns=tuple(f"@x{n}.example" for n in range(80)), sender_patterns=("@y.example",)),
        rule("rest", 5),
    ]
    assert chosen(rules, recipient="x@a.example") == "pair"
    assert chosen(rules, recipient="x@b.example") == "recipient"
    assert chosen(rules, recipient="x@c.example") == "sender"
    assert chosen(rules, sender="z@y.example", recipient="x@c.example", size_bytes=5) == "size"
    assert chosen(rules, sender="z@y.example", recipient="x@x7.example") == "many"
    assert chosen(rules, sender="z@z.example", recipient="x@x7.example") == "rest"


def test_one_router_answers_for_all_recipients_whatever_their_order() -> None:
    rules = compile_rules(
        [rule("early", 0, max_size_bytes=10), rule("b", 1, recipient_patterns=("@b.c",)), rule("z", 2)]
    )
    router = MessageRouter(rules, "a@b.c", 100, {}, b"m" * 16)
    found = [router.route(recipient) for recipient in ("x@b.c", "x@d.e", "x@b.c", "x@d.e")]
    assert [decision.rule for decision in found if decision] == ["b", "z", "b", "z"]


def test_what_may_match_is_known_before_size_and_headers() -> None:
    sized = compile_rules([rule("r", recipient_patterns=("@b.c",), sender_patterns=("@s.t",), min_size_bytes=10**9)])
    assert may_match(sized, "x@s.t", "y@b.c")
    assert not may_match(sized, "x@other.t", "y@b.c")
    assert not may_match(sized, "x@s.t", "y@other.c")
    assert may_match(compile_rules([rule("r", max_size_bytes=1)]), "x@s.t", "y@b.c")
    assert may_match(compile_rules([rule("r", sender_patterns=("<>",))]), "", "y@b.c")


def test_ten_thousand_rules_leave_few_to_look_at() -> None:
    rules = [
        rule(f"g{n}", n, sender_patterns=(f"user{n % 100}@example.com",), recipient_patterns=(f"@d{n // 100}.example",))
        for n in range(9_500)
    ]
    rules += [rule(f"z{n}", 20_000 + n, headers=(HeaderCondition("x-tag", f"{n}"),)) for n in range(500)]
    compiled = compile_rules(rules)
    found = candidates(compiled, address_patterns("user7@example.com"), "a@d42.example")
    assert sum(len(entries) for entries in found) == 1
    # The residue is read only by a message that no earlier rule takes, and once for all its recipients.
    asked: Counter[str] = Counter()

    class CountedHeaders(dict[str, tuple[str, ...]]):
        def get(self, key: str, default: Any = None) -> Any:
            asked[key] += 1
            return super().get(key, default)

    router = MessageRouter(compiled, "user7@example.com", 1, {}, b"m" * 16)
    router._headers = CountedHeaders()  # type: ignore[assignment] # counts, and is else the same
    assert router.route("a@d42.example") is not None
    assert asked.total() == 0
    for _ in range(1_000):
        assert router.route("a@nowhere.example") is None
    assert asked.total() == 500


@pytest.mark.parametrize(
    ("pattern", "value", "matches"),
    [
        ("", "", True),
        ("", "a", False),
        ("*", "", True),
        ("*", "anything", True),
        ("abc", "ABC", True),
        ("abc", "abcd", False),
        ("a*", "abc", True),
        ("*c", "abc", True),
        ("a*c", "ac", True),
        ("a*a", "a", False),
        ("ab*ba", "aba", False),
        ("*b*", "abc", True),
        ("*x*", "abc", False),
        ("a?c", "abc", True),
        ("a?c", "ac", False),
        ("?", "", False),
        ("*?", "a", True),
        ("?*?", "a", False),
        ("*a?c*", "xxabcxx", True),
        ("*a?c*e", "abcde", True),
        ("*a?b*", "axaxb", True),
        ("*a?b*", "axaxa", False),
        ("*??*", "a", False),
        ("*ab*ab*", "ab", False),
        ("*a*b*c*", "xaybzc", True),
        ("*a*b*c*", "xcybza", False),
        ("a.c", "abc", False),
        ("[a]", "a", False),
    ],
)
def test_globs(pattern: str, value: str, *, matches: bool) -> None:
    assert matches_glob(compile_glob(pattern), value.lower()) is matches


def test_no_glob_is_slow() -> None:
    # With backtracking this would take longer than the universe is old.
    assert not matches_glob(compile_glob("*a" * 100 + "b"), "a" * 1_000)
    assert not matches_glob(compile_glob("*a?" * 66 + "*b"), "a" * 1_000)


def test_targets_without_weight_keep_their_places() -> None:
    targets = (Target("a"), Target("b", "", 1), Target("c"), Target("d", "", 1))
    for number in range(50):
        ordered = order_targets(targets, number.to_bytes(16, "big"))
        assert (ordered[0].provider, ordered[2].provider) == ("a", "c")
        assert {ordered[1].provider, ordered[3].provider} == {"b", "d"}


def test_one_message_takes_one_way() -> None:
    targets = (Target("a", "", 1), Target("b", "", 2), Target("c", "", 3))
    for number in range(20):
        message_id = number.to_bytes(16, "big")
        assert order_targets(targets, message_id) == order_targets(targets, message_id)
    # Stored decisions and other nodes depend on it: this order may never change.
    assert [target.provider for target in order_targets(targets, bytes(range(16)))] == ["c", "b", "a"]


def test_many_messages_share_by_weight() -> None:
    targets = (Target("a", "", 1), Target("b", "", 3), Target("c", "", 6))
    firsts = Counter(order_targets(targets, n.to_bytes(16, "big"))[0].provider for n in range(10_000))
    assert abs(firsts["a"] - 1_000) < 150
    assert abs(firsts["b"] - 3_000) < 250
    assert abs(firsts["c"] - 6_000) < 250


def test_the_decision_names_rule_and_ordered_targets() -> None:
    targets = (Target("a", "", 1), Target("b", "", 1))
    rules = compile_rules([Rule("r", 0, targets)])
    decision = route(rules, "a@b.c", "d@e.f", 1, {}, b"m" * 16)
    assert decision is not None
    assert decision.rule == "r"
    assert decision.targets == order_targets(targets, b"m" * 16)
