"""Which providers a message goes through: an account's rules compiled once, then asked per recipient.

Contract. `compile_rules` takes valid rules (`dataplane.core.config.validate_account`) and returns dictionaries by
patterns plus an ordered residue. `route` returns the Decision of the first rule, in the order of priority and
name, whose non-empty conditions all hold, or None; a message with many recipients makes one MessageRouter and asks
it for each, so that what does not depend on the recipient is looked at once. `may_match` answers what can be known
at RCPT: whether a rule could still match whatever size and headers turn out to be. Nothing raises.

    rule has                          where it stands                        looked at
    recipient and sender patterns     under each pair; over 64, recipient    when message and recipient have them
    recipient patterns only           under each of them                     when the recipient has one
    sender patterns only              under each of them                     when the sender has one, once a message
    neither                           residue, at most 500 an account        once a message, up to the first match

An address has few patterns: itself, `@domain`, and `*.parent` for each parent of its domain. So the cost is a few
look-ups and the rules found, whatever the number of rules. Addresses compare in lower case.

A rule's targets with a weight are ordered by a hash of the message id: whichever attempt asks, and on whichever
node, a message takes the same way. Targets without weight keep their places.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from dataplane.core.config import NULL_SENDER_PATTERN, Rule, Target

# Above it a rule with patterns of both kinds would fill the table: it stands under its recipients then.
_MAX_PAIRS = 64

_Key = TypeVar("_Key")

Glob = tuple[str, ...]
"""A glob's pieces, as `compile_glob` makes them."""

Headers = Mapping[str, Sequence[str]]
"""Values by lower-case field name, as in `Envelope.headers`."""


class Decision(NamedTuple):
    """The rule that matched and its targets in the order in which they are tried."""

    rule: str
    targets: tuple[Target, ...]


class _Entry(NamedTuple):
    """A rule in its place among the account's rules."""

    position: int
    rule: Rule
    sender_patterns: frozenset[str]
    headers: tuple[tuple[str, Glob], ...]


@dataclass(frozen=True, slots=True)
class CompiledRules:
    """Rules by pattern, each list in the order of the rules; `by_pair` has keys of recipient and sender pattern."""

    by_pair: dict[tuple[str, str], list[_Entry]] = field(default_factory=dict)
    by_recipient: dict[str, list[_Entry]] = field(default_factory=dict)
    by_sender: dict[str, list[_Entry]] = field(default_factory=dict)
    residue: list[_Entry] = field(default_factory=list)


def compile_rules(rules: Iterable[Rule]) -> CompiledRules:
    """Return the rules ready to be asked; the order in which they come does not matter."""
    compiled = CompiledRules()
    for position, rule in enumerate(sorted(rules, key=lambda rule: (rule.priority, rule.name))):
        recipients, senders = dict.fromkeys(rule.recipient_patterns), dict.fromkeys(rule.sender_patterns)
        headers = tuple((condition.name, compile_glob(condition.pattern)) for condition in rule.headers)
        entry = _Entry(position, rule, frozenset(senders), headers)
        if not recipients and not senders:
            compiled.residue.append(entry)
        elif not recipients:
            _enter(compiled.by_sender, senders, entry)
        elif senders and len(recipients) * len(senders) <= _MAX_PAIRS:
            pairs = [(recipient, sender) for recipient in recipients for sender in senders]
            _enter(compiled.by_pair, pairs, entry)
        else:
            _enter(compiled.by_recipient, recipients, entry)
    return compiled


def _enter(table: dict[_Key, list[_Entry]], keys: Iterable[_Key], entry: _Entry) -> None:
    for key in keys:
        table.setdefault(key, []).append(entry)


def address_patterns(address: str) -> list[str]:
    """Return every pattern that matches `address`; the empty address is the null sender."""
    if not address:
        return [NULL_SENDER_PATTERN]
    lower = address.lower()
    domain = lower[lower.rfind("@") + 1 :]
    patterns = [lower, f"@{domain}"]
    dot = domain.find(".")
    while dot >= 0:
        patterns.append(f"*{domain[dot:]}")
        dot = domain.find(".", dot + 1)
    return patterns


def candidates(rules: CompiledRules, sender_patterns: list[str], recipient: str) -> list[list[_Entry]]:
    """Return the lists of rules whose recipient patterns fit; what may be left to ask is sender, size and headers."""
    found: list[list[_Entry]] = []
    if rules.by_recipient or rules.by_pair:
        patterns = address_patterns(recipient)
        if rules.by_recipient:
            found = [entries for key in patterns if (entries := rules.by_recipient.get(key))]
        if rules.by_pair:
            pairs = ((pattern, sender) for pattern in patterns for sender in sender_patterns)
            found += [entries for key in pairs if (entries := rules.by_pair.get(key))]
    return found


def may_match(rules: CompiledRules, sender: str, recipient: str) -> bool:
    """Whether some rule could match once size and headers are known. `sender` is empty for the null sender."""
    if rules.residue:
        return True
    sender_patterns = address_patterns(sender)
    if any(pattern in rules.by_sender for pattern in sender_patterns):
        return True
    return any(
        _sender_matches(entry, sender_patterns)
        for entries in candidates(rules, sender_patterns, recipient)
        for entry in entries
    )


class MessageRouter:
    """Routes the recipients of one message; `sender` is empty for the null sender.

    State: `_held` remembers which rules fit sender, size and headers; the residue is read from its beginning only
    as far as some recipient needs it, up to its first rule that fits.
    """

    __slots__ = (
        "_by_sender",
        "_headers",
        "_held",
        "_message_id",
        "_residue_match",
        "_residue_read",
        "_rules",
        "_sender_patterns",
        "_size_bytes",
    )

    def __init__(self, rules: CompiledRules, sender: str, size_bytes: int, headers: Headers, message_id: bytes) -> None:
        self._rules = rules
        self._sender_patterns = address_patterns(sender)
        self._size_bytes = size_bytes
        self._headers = {name: [value.lower() for value in values] for name, values in headers.items()}
        self._message_id = message_id
        self._held: dict[int, bool] = {}
        self._residue_read = 0
        self._residue_match: _Entry | None = None
        lists = rules.by_sender
        self._by_sender = [lists[key] for key in self._sender_patterns if key in lists] if lists else []

    def route(self, recipient: str) -> Decision | None:
        """Return the decision for this recipient."""
        best = self._first(self._by_sender + candidates(self._rules, self._sender_patterns, recipient))
        best = self._residue_before(best)
        if best is None:
            return None
        return Decision(best.rule.name, order_targets(best.rule.targets, self._message_id))

    def _first(self, lists: list[list[_Entry]]) -> _Entry | None:
        """Return the first rule of all lists that holds."""
        best: _Entry | None = None
        for entries in lists:
            for entry in entries:
                if best is not None and entry.position >= best.position:
                    break
                if self._holds(entry):
                    best = entry
                    break
        return best

    def _residue_before(self, best: _Entry | None) -> _Entry | None:
        """Return the first rule of the residue that holds, or `best` when that comes before it."""
        residue = self._rules.residue
        while self._residue_match is None and self._residue_read < len(residue):
            entry = residue[self._residue_read]
            if best is not None and entry.position >= best.position:
                return best
            self._residue_read += 1
            if self._content_matches(entry):
                self._residue_match = entry
        match = self._residue_match
        if match is None or (best is not None and best.position < match.position):
            return best
        return match

    def _holds(self, entry: _Entry) -> bool:
        """Whether sender, size and headers fit; found out once a message and rule."""
        held = self._held.get(entry.position)
        if held is None:
            held = _sender_matches(entry, self._sender_patterns) and self._content_matches(entry)
            self._held[entry.position] = held
        return held

    def _content_matches(self, entry: _Entry) -> bool:
        rule = entry.rule
        if self._size_bytes < rule.min_size_bytes or 0 < rule.max_size_bytes < self._size_bytes:
            return False
        for name, glob in entry.headers:
            values = self._headers.get(name)
            if not values or not any(matches_glob(glob, value) for value in values):
                return False
        return True


def route(
    rules: CompiledRules, sender: str, recipient: str, size_bytes: int, headers: Headers, message_id: bytes
) -> Decision | None:
    """Return the decision for one recipient. `sender` is empty for the null sender."""
    return MessageRouter(rules, sender, size_bytes, headers, message_id).route(recipient)


def _sender_matches(entry: _Entry, sender_patterns: list[str]) -> bool:
    return not entry.sender_patterns or not entry.sender_patterns.isdisjoint(sender_patterns)


def compile_glob(pattern: str) -> Glob:
    """Return a glob ready to be matched: what stands between its stars, in lower case."""
    return tuple(pattern.lower().split("*"))


def matches_glob(glob: Glob, value: str) -> bool:
    """Whether the glob covers all of `value` (lower case): `*` any run, `?` one character.

    Pieces between stars are looked for from left to right, each at its first place: no way back beyond a piece, so
    that no pattern is slow (at most pattern length times value length for pieces with `?`).
    """
    first, last = glob[0], glob[-1]
    if len(glob) == 1:
        return len(first) == len(value) and _piece_at(first, value, 0)
    end = len(value) - len(last)
    if len(first) > end or not _piece_at(first, value, 0) or not _piece_at(last, value, end):
        return False
    position = len(first)
    for piece in glob[1:-1]:
        position = _find_piece(piece, value, position, end)
        if position < 0:
            return False
    return True


def _piece_at(piece: str, value: str, position: int) -> bool:
    if "?" not in piece:
        return value.startswith(piece, position)
    there = value[position : position + len(piece)]
    return len(there) == len(piece) and all(wanted in ("?", found) for wanted, found in zip(piece, there, strict=True))


def _find_piece(piece: str, value: str, start: int, end: int) -> int:
    """Return where the first match of `piece` in `value[start:end]` ends, or -1."""
    if "?" not in piece:
        found = value.find(piece, start, end)
        return found + len(piece) if found >= 0 else -1
    # What stands between question marks is looked for as a whole; only around it letters are compared.
    anchor = max(piece.split("?"), key=len)
    offset = piece.index(anchor)
    found = value.find(anchor, start + offset, end)
    while found >= 0:
        position = found - offset
        if position + len(piece) > end:
            return -1
        if _piece_at(piece, value, position):
            return position + len(piece)
        found = value.find(anchor, found + 1, end)
    return -1


def order_targets(targets: tuple[Target, ...], message_id: bytes) -> tuple[Target, ...]:
    """Return the targets as they are tried for this message.

    Those with a weight exchange places among themselves: each draw takes one with a chance of its weight against
    the weights that are left, and the draws follow from the message id alone.
    """
    places = [place for place, target in enumerate(targets) if target.weight]
    if len(places) < 2:
        return targets
    ordered = list(targets)
    waiting = [targets[place] for place in places]
    # A number far larger than the product of any sums of weights: its remainders are as good as independent.
    number = int.from_bytes(hashlib.blake2b(message_id, digest_size=32).digest(), "big")
    for place in places:
        number, point = divmod(number, sum(target.weight for target in waiting))
        for index, target in enumerate(waiting):
            point -= target.weight
            if point < 0:
                ordered[place] = waiting.pop(index)
                break
    return tuple(ordered)
