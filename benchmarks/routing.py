"""What it costs to route a recipient by 10,000 rules, and what else of the pure rules stands on a message's way.

Run: python -m benchmarks.routing. Prints microseconds, the best of several rounds each.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable

from dataplane.core.address import parse_path
from dataplane.core.config import HeaderCondition, Rule, Target
from dataplane.core.headers import scan
from dataplane.core.routing import MessageRouter, compile_rules, may_match, route

SENDER, RECIPIENT = "user7@example.com", "jane@d42.example"
HEADERS = {"subject": ("Your order has been sent",), "x-tag": ("orders",)}
MESSAGE_ID = bytes(range(16))
TARGETS = (Target("providers/a", "", 9), Target("providers/b", "", 1))
CONTENT = (
    b"From: John Smith <john@example.com>\r\nTo: jane@example.org\r\nSubject: Your order has been sent\r\n"
    b"Date: Fri, 20 Nov 2026 10:00:00 +0000\r\nMessage-ID: <abc.123@example.com>\r\nMIME-Version: 1.0\r\n"
    b'Content-Type: text/plain; charset="utf-8"\r\nContent-Transfer-Encoding: 7bit\r\n\r\n'
) + b"Sixty-four octets of text, which is what most lines come to, say\r\n" * 60


def rules(count: int, residue_count: int) -> list[Rule]:
    """Rules of one account: by sender and recipient domain, and some by header only."""
    addressed = [
        Rule(
            f"accounts/demo/routingRules/r{n}",
            n,
            TARGETS,
            sender_patterns=(f"user{n % 100}@example.com",),
            recipient_patterns=(f"@d{n // 100}.example",),
        )
        for n in range(count - residue_count)
    ]
    return addressed + [
        Rule(
            f"accounts/demo/routingRules/z{n}",
            1_000_000,
            TARGETS,
            headers=(HeaderCondition("subject", f"*campaign?{n}*"),),
        )
        for n in range(residue_count)
    ]


def report(what: str, call: Callable[[], object], number: int = 2_000) -> None:
    """Print what one call costs."""
    best = min(timeit.repeat(call, number=number, repeat=7)) / number * 1e6
    print(f"{what:60} {best:10.2f} µs")


def main() -> None:
    """Measure."""
    compiled = compile_rules(rules(10_000, 0))
    mixed = compile_rules(rules(10_000, 500))
    router = MessageRouter(mixed, SENDER, 4_096, HEADERS, MESSAGE_ID)
    report("compile 100 rules", lambda: compile_rules(rules(100, 10)), 100)
    report("route, 10,000 rules", lambda: route(compiled, SENDER, RECIPIENT, 4_096, HEADERS, MESSAGE_ID))
    report("route one more recipient, 500 of them residue", lambda: router.route(RECIPIENT))
    report("may_match, 10,000 rules", lambda: may_match(compiled, SENDER, RECIPIENT))
    report(
        "route by the last of 500 residue rules",
        lambda: route(mixed, SENDER, "jane@nowhere.example", 4_096, HEADERS, MESSAGE_ID),
        100,
    )
    report("parse_path of a recipient", lambda: parse_path(f"<{RECIPIENT}>", recipient=True))
    report("scan of a header with 8 fields", lambda: scan(CONTENT))


if __name__ == "__main__":
    main()
