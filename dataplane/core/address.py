"""Mail addresses as RFC 5321 writes them: the arguments of MAIL and RCPT, and mailboxes in configuration.

Contract. `parse_mailbox`, `parse_recipient` and `parse_path` take text that came from outside and return values
in one canonical form, or raise AddressError with a text that is fit for a reply (it repeats nothing of the input).

    domain      lower case, A-labels, at most 253 octets; each label by itself: letters, digits, inner hyphens, 63
    literal     `[192.0.2.1]`, `[IPv6:...]`: a mailbox may have one, a recipient may not
    local part  unquoted value; `text` quotes it only where it must: `"a"@b.c` and `a@b.c` are one address
    UTF-8       only where the transaction said SMTPUTF8 (RFC 6531), else NonAsciiAddressError

Decisions. Source routes (`@a:b@c`) are refused, not stripped: RFC 5321 (4.1.1.3, appendix F.2) deprecates them
and nobody who submits mail sends them. A recipient's local part may not hold `%`, `!` or `@`, which a host behind
us might read as a route; a sender's may. Labels with other letters than ASCII become A-labels by RFC 5891, never
by the `idna` codec of the standard library: that one knows IDNA 2003 only and would send mail for a name with a
sharp s to somebody else's domain. An A-label given as such must be good punycode, but may name what RFC 5892
disallows: such domains exist and get mail.
"""

from __future__ import annotations

import re
import unicodedata
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

MAX_LOCAL_OCTETS = 64
MAX_DOMAIN_OCTETS = 253
MAX_MAILBOX_OCTETS = 254
"""RFC 5321, 4.5.3.1.3: a path has 256 octets, two of them its brackets."""

_MAX_LABEL_OCTETS = 63
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]++"
_LABEL = r"[A-Za-z0-9]++(?:-++[A-Za-z0-9]++)*"
# Runs are possessive and one character decides every step, so time is linear in the length. Groups are not possessive:
# Python before 3.11.5 takes a repetition that failed half-way for a match.
_PLAIN_MAILBOX = re.compile(rf"({_ATOM}(?:\.{_ATOM})*)@((?:{_LABEL}\.)*{_LABEL})")
_PLAIN_DOMAIN = re.compile(rf"(?:{_LABEL}\.)*{_LABEL}")
_DOT_ATOM = re.compile(rf"{_ATOM}(?:\.{_ATOM})*")
_QUOTED = re.compile(r'"((?:[^"\\\x00-\x1f\x7f]|\\[ -~])*)"')
_ESCAPED = re.compile(r"\\(.)")
_MUST_ESCAPE = re.compile(r'(["\\])')
_ATEXT = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!#$%&'*+/=?^_`{|}~-.")

_LABEL_CATEGORIES = frozenset({"Ll", "Lo", "Lm", "Mn", "Mc", "Nd"})
# RFC 5892, 2.6: good in a label although case folding or compatibility would change them.
_LABEL_EXCEPTIONS = frozenset("\u00df\u03c2\u06fd\u06fe\u0f0b\u3007")
_JOINERS = frozenset("\u200c\u200d")
_UNSAFE_CATEGORIES = frozenset({"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"})


class AddressError(ValueError):
    """The text is no address that we take; the message is fit for a reply."""


class NonAsciiAddressError(AddressError):
    """The address needs SMTPUTF8, and the transaction did not ask for it (553 5.6.7)."""


class Mailbox(NamedTuple):
    """An address: `local` unquoted, `domain` in lower case and A-labels, `text` as written on the wire."""

    local: str
    domain: str
    text: str


class Path(NamedTuple):
    """Argument of MAIL or RCPT: `mailbox` is None for `<>`; `parameters` is what follows, without outer spaces."""

    mailbox: Mailbox | None
    parameters: str


def parse_mailbox(text: str, smtputf8: bool = False) -> Mailbox:  # noqa: FBT001, FBT002 - said positionally by all who call
    """Return the mailbox that `text` (without brackets) writes. AddressError, NonAsciiAddressError."""
    plain = _PLAIN_MAILBOX.fullmatch(text)
    if plain is not None:
        local, domain = plain.groups()
        if len(local) <= MAX_LOCAL_OCTETS and len(domain) <= _MAX_LABEL_OCTETS and not domain[-1].isdigit():
            domain = domain.lower()
            if "xn--" not in domain:
                return Mailbox(local, domain, f"{local}@{domain}")
    return _parse_unusual(text, smtputf8=smtputf8)


def parse_recipient(text: str, smtputf8: bool = False) -> Mailbox:  # noqa: FBT001, FBT002 - as parse_mailbox
    """Return a mailbox that mail may be sent to: no address literal, no local part that reads as a route."""
    mailbox = parse_mailbox(text, smtputf8)
    local = mailbox.local
    if "%" in local or "!" in local or "@" in local:
        raise AddressError("routes in the local part are not taken")
    if mailbox.domain[0] == "[":
        raise AddressError("address literals are not taken")
    return mailbox


def parse_path(argument: str, *, smtputf8: bool = False, recipient: bool = False) -> Path:
    """Return what stands behind `MAIL FROM:` or `RCPT TO:`; spaces before the path are forgiven.

    `<>` is a path for MAIL only. AddressError, NonAsciiAddressError.
    """
    start = len(argument) - len(argument.lstrip(" "))
    if not argument.startswith("<", start):
        raise AddressError("the address must stand in angle brackets")
    end = _path_end(argument, start + 1)
    parameters = argument[end + 1 :]
    if parameters and parameters[0] != " ":
        raise AddressError("a space must follow the address")
    address = argument[start + 1 : end]
    if not address and not recipient:
        return Path(None, parameters.strip(" "))
    parse = parse_recipient if recipient else parse_mailbox
    return Path(parse(address, smtputf8), parameters.strip(" "))


def parse_domain(text: str, *, smtputf8: bool = False) -> str:
    """Return the domain name in lower case and A-labels. AddressError; literals are no names."""
    if not text.isascii() and not smtputf8:
        raise NonAsciiAddressError("the domain needs SMTPUTF8")
    # The ideographic full stops are no separators here (RFC 5891 leaves that to what people type into).
    domain = ".".join([_parse_label(label) for label in text.split(".")])
    if len(domain) > MAX_DOMAIN_OCTETS:
        raise AddressError("the domain is too long")
    if domain[domain.rfind(".") + 1 :].isdigit():
        raise AddressError("an address without brackets is no domain")
    return domain


def _parse_unusual(text: str, *, smtputf8: bool) -> Mailbox:
    """Quoted local parts, literals, other letters, long names; and the reason for whatever is wrong."""
    if not text.isascii() and not smtputf8:
        raise NonAsciiAddressError("the address needs SMTPUTF8")
    if text.startswith("@"):
        raise AddressError("source routes are not taken")
    written, at, domain_text = text.rpartition("@")
    if not at or not written or not domain_text:
        raise AddressError("the address must read local@domain")
    local = _parse_local(written)
    domain = _parse_literal(domain_text) if domain_text[0] == "[" else parse_domain(domain_text, smtputf8=smtputf8)
    canonical = f"{_write_local(local)}@{domain}"
    if len(canonical.encode()) > MAX_MAILBOX_OCTETS:
        raise AddressError("the address is too long")
    return Mailbox(local, domain, canonical)


def _parse_local(written: str) -> str:
    quoted = _QUOTED.fullmatch(written)
    local = written if quoted is None else _ESCAPED.sub(r"\1", quoted[1])
    # RFC 5321 counts the local part as it is written; one that shrinks when unquoted is measured as it came.
    if _octets(written) > MAX_LOCAL_OCTETS:
        raise AddressError("the local part is too long")
    if not all(char.isascii() or _is_safe(char) for char in local):
        raise AddressError("the local part holds characters that are not taken")
    if quoted is None and not _is_dot_string(local):
        raise AddressError("the local part must be quoted or is malformed")
    return local


def _octets(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _is_safe(char: str) -> bool:
    return char in _JOINERS or unicodedata.category(char) not in _UNSAFE_CATEGORIES


def _is_dot_string(local: str) -> bool:
    """Whether `local` may stand without quotes: Dot-string of RFC 5321, 4.1.2, with RFC 6531's letters."""
    if _DOT_ATOM.fullmatch(local):
        return True
    return (
        all(char in _ATEXT or not char.isascii() for char in local)
        and "" not in local.split(".")
        and not local.isascii()
    )


def _write_local(local: str) -> str:
    if _is_dot_string(local):
        return local
    escaped = _MUST_ESCAPE.sub(r"\\\1", local)
    return f'"{escaped}"'


def _parse_literal(text: str) -> str:
    """Return an address literal (RFC 5321, 4.1.3) in canonical form."""
    if not text.endswith("]"):
        raise AddressError("the address literal is malformed")
    inner = text[1:-1]
    try:
        if inner[:5].lower() == "ipv6:":
            address = IPv6Address(inner[5:])
            if address.scope_id is not None:
                raise AddressError("the address literal is malformed")
            return f"[IPv6:{address.compressed}]"
        return f"[{IPv4Address(inner)}]"
    except ValueError as error:
        raise AddressError("the address literal is malformed") from error


def _parse_label(label: str) -> str:
    if not label.isascii():
        return _encode_label(label)
    lower = label.lower()
    if len(lower) > _MAX_LABEL_OCTETS:
        raise AddressError("a label of the domain is too long")
    if "." in lower or not _PLAIN_DOMAIN.fullmatch(lower):
        raise AddressError("the domain is malformed")
    if lower.startswith("xn--"):
        _check_a_label(lower)
    return lower


def _encode_label(label: str) -> str:
    """Return the A-label of a label with other letters (RFC 5891, 5.3 to 5.4, without contextual rules)."""
    mapped = unicodedata.normalize("NFC", label.lower())
    if mapped[0] == "-" or mapped[-1] == "-" or mapped[2:4] == "--" or unicodedata.category(mapped[0])[0] == "M":
        raise AddressError("the domain is malformed")
    if not all(_is_label_char(char) for char in mapped):
        raise AddressError("the domain holds characters that are not taken")
    encoded = mapped if mapped.isascii() else f"xn--{mapped.encode('punycode').decode('ascii')}"
    if len(encoded) > _MAX_LABEL_OCTETS:
        raise AddressError("a label of the domain is too long")
    return encoded


def _is_label_char(char: str) -> bool:
    if char.isascii():
        return char.isalnum() or char == "-"
    if char in _LABEL_EXCEPTIONS:
        return True
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", char).casefold())
    return unicodedata.category(char) in _LABEL_CATEGORIES and folded == char


def _check_a_label(label: str) -> None:
    encoded = label[4:]
    try:
        decoded = encoded.encode("ascii").decode("punycode")
        good = not decoded.isascii() and decoded.encode("punycode").decode("ascii") == encoded
    except (UnicodeError, ValueError, OverflowError) as error:
        raise AddressError("the domain is malformed") from error
    if not good or not all(_is_safe(char) for char in decoded):
        raise AddressError("the domain is malformed")


def _path_end(argument: str, start: int) -> int:
    """Return where the path's `>` stands; one inside a quoted string is none."""
    end = argument.find(">", start)
    quote = argument.find('"', start)
    if end < 0:
        raise AddressError("the address must stand in angle brackets")
    if quote < 0 or quote > end:
        return end
    quoted = _QUOTED.match(argument, start)
    if quoted is None:
        raise AddressError("the quoted local part is malformed")
    end = argument.find(">", quoted.end())
    if end < 0:
        raise AddressError("the address must stand in angle brackets")
    return end
