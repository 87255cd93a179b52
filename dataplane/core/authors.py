"""The domains that a From or Sender field speaks for, read so strictly that no reader can see another author.

Contract. `author_domains` takes the raw values of the fields (folded or not) and returns every domain that any
reader could take for an author's, each once and in order; UnreadableAuthorsError when a value is not an address
list of RFC 5322, 3.4 and RFC 6854 (groups). Comments, quoted strings, encoded display names and several addresses
are read. Not taken, though some readers do: empty list elements, source routes, address literals, encoded words in
an address, text behind an address. An address in an unquoted display name (`a@b.c <d@e.f>`) counts as an author.

Reading costs some microseconds an octet and runs on the loop of everybody's sessions: values above MAX_AUTHOR_OCTETS
together are not taken either. That is room for dozens of authors.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from dataplane.core.address import AddressError, parse_mailbox

MAX_AUTHOR_OCTETS = 4_096

_ATOMS = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]"
_NAME = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~. \t-]"
# What most mail looks like: an optional plain or quoted display name, one plain address. Only sets are possessive,
# never groups: Python before 3.11.5 gets those wrong.
_PLAIN = re.compile(
    rf'[ \t]*+(?:(?:"[^"\\\r\n\x00-\x08]*+"[ \t]*+|{_NAME}*+)<({_ATOMS}++@[A-Za-z0-9.-]++)>'
    rf"|({_ATOMS}++@[A-Za-z0-9.-]++))[ \t]*+".encode("ascii")
)
_TOKEN = re.compile(
    r'(?P<space>[ \t]++)|(?P<quoted>"(?:[^"\\\x00-\x08\x0a-\x1f\x7f]|\\[^\x00-\x08\x0a-\x1f\x7f])*")'
    r'|(?P<special>[<>,;:@])|(?P<atom>[^\x00-\x20\x7f()<>\[\]:;@\\,"]++)'
)
_COMMENT_PART = re.compile(r"[^()\\\x00-\x08\x0a-\x1f\x7f]++|\\[^\x00-\x08\x0a-\x1f\x7f]")
_MAX_COMMENT_DEPTH = 20

_WORDS = frozenset({"atom", "quoted"})
Token = tuple[str, str]


class UnreadableAuthorsError(ValueError):
    """A From or Sender field that is refused because readers could disagree about it."""


def author_domains(values: Sequence[bytes]) -> tuple[str, ...]:
    """Return the domains of all addresses in the values, folded or not. UnreadableAuthorsError."""
    if sum(map(len, values)) > MAX_AUTHOR_OCTETS:
        raise UnreadableAuthorsError("more than anybody has authors")
    domains: dict[str, None] = {}
    for value in values:
        plain = _PLAIN.fullmatch(value)
        addresses = _Reader(value).addresses() if plain is None else [(plain[1] or plain[2]).decode("ascii")]
        for address in addresses:
            domains[_domain(address)] = None
    return tuple(domains)


def _domain(address: str) -> str:
    if "=?" in address:
        raise UnreadableAuthorsError("an encoded word in an address")
    try:
        mailbox = parse_mailbox(address, smtputf8=True)
    except AddressError as error:
        raise UnreadableAuthorsError(str(error)) from error
    if mailbox.domain[0] == "[":
        raise UnreadableAuthorsError("an address literal")
    return mailbox.domain


class _Reader:
    """Recursive descent over the tokens of one value; no way back, so time is linear in its length."""

    def __init__(self, value: bytes) -> None:
        self._tokens = _tokenize(value.replace(b"\r\n", b"").decode("utf-8", "surrogateescape"))
        self._position = 0
        self._addresses: list[str] = []

    def addresses(self) -> list[str]:
        """Read the whole list; at least one address."""
        self._list(end="")
        if not self._addresses:
            raise UnreadableAuthorsError("no address")
        return self._addresses

    def _peek(self) -> Token:
        return self._tokens[self._position]

    def _list(self, end: str) -> None:
        """Read addresses up to `end`: the end of the value, or the semicolon of a group."""
        while True:
            self._address(in_group=end == ";")
            kind, text = self._peek()
            if kind == "special" and text == ",":
                self._position += 1
            elif (kind == "special" and text == end) or (kind == "end" and not end):
                return
            else:
                raise UnreadableAuthorsError("text behind an address")

    def _address(self, *, in_group: bool) -> None:
        """Read a mailbox or a group: words (with addresses among them) up to what follows tells which it is."""
        words = self._words()
        kind, text = self._peek()
        if kind == "special" and text == "<":
            self._addresses.extend(self._unquoted_addresses(words))
            self._position += 1
            self._addresses.append(self._one_address(self._words()))
            if self._peek() != ("special", ">"):
                raise UnreadableAuthorsError("no closing bracket")
            self._position += 1
        elif kind == "special" and text == ":" and not in_group and words:
            self._addresses.extend(self._unquoted_addresses(words))
            self._position += 1
            if self._peek() != ("special", ";"):
                self._list(end=";")
            self._position += 1
        else:
            self._addresses.append(self._one_address(words))

    def _words(self) -> list[Token]:
        start = self._position
        while self._peek()[0] in _WORDS or self._peek() == ("special", "@"):
            self._position += 1
        return self._tokens[start : self._position]

    @staticmethod
    def _one_address(words: list[Token]) -> str:
        """Return the address that the words are: exactly a local part, `@` and a domain."""
        if len(words) != 3 or words[1] != ("special", "@") or words[2][0] != "atom":
            raise UnreadableAuthorsError("no address where one must be")
        return f"{words[0][1]}@{words[2][1]}"

    @staticmethod
    def _unquoted_addresses(words: list[Token]) -> list[str]:
        """Return the addresses that stand bare in a display name: readers exist that take them for the author."""
        found = []
        for position, word in enumerate(words):
            if word == ("special", "@"):
                around = words[max(position - 1, 0) : position + 2]
                found.append(_Reader._one_address(around))
        return found


def _tokenize(text: str) -> list[Token]:
    """Return words and specials; white space and comments fall away."""
    tokens: list[Token] = []
    position = 0
    while position < len(text):
        if text[position] == "(":
            position = _skip_comment(text, position)
            continue
        token = _TOKEN.match(text, position)
        if token is None or token.lastgroup is None:
            raise UnreadableAuthorsError("a character that has no place there")
        if token.lastgroup != "space":
            tokens.append((token.lastgroup, token[0]))
        position = token.end()
    tokens.append(("end", ""))
    return tokens


def _skip_comment(text: str, position: int) -> int:
    depth = 0
    while position < len(text):
        char = text[position]
        if char == "(":
            depth += 1
            position += 1
        elif char == ")":
            depth -= 1
            position += 1
            if depth == 0:
                return position
        else:
            part = _COMMENT_PART.match(text, position)
            if part is None:
                raise UnreadableAuthorsError("a character that has no place in a comment")
            position = part.end()
        if depth > _MAX_COMMENT_DEPTH:
            raise UnreadableAuthorsError("comments in comments in comments")
    raise UnreadableAuthorsError("a comment without end")
