"""Every reply that the SMTP server gives: one table, so that code, enhanced code and wording are decided in one place.

Contract. A reply is a value: `wire` is what is sent, `reason` is the stable word for logs and counters; neither holds
anything that a client sent. The class of an enhanced code is derived from the reply code (RFC 3463, section 2), so the
two cannot disagree. A text that could not stand in one reply line raises ValueError when the reply is made.

    blame                       class    promise
    the client's, for good      5xx      never for a fault of ours
    ours, or for now            4xx      the client tries again
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

_MAX_LINE_OCTETS = 512
"""RFC 5321, section 4.5.3.1.5, with the CRLF."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply. `enhanced` is empty where RFC 2034 has none: greeting, EHLO, HELO and 3xx."""

    code: int
    enhanced: str
    text: str
    reason: str
    wire: bytes


def make_reply(code: int, detail: str, text: str, reason: str) -> Reply:
    """Return a one-line reply; `detail` is the enhanced code without its class ("7.1"), or empty for none."""
    enhanced = f"{code // 100}.{detail}" if detail else ""
    line = f"{code} {enhanced} {text}\r\n" if enhanced else f"{code} {text}\r\n"
    if not text.isascii() or not text.isprintable() or len(line) > _MAX_LINE_OCTETS:
        raise ValueError("not one line of printable ASCII")
    return Reply(code, enhanced, text, reason, line.encode("ascii"))


# --- success and intermediate ----------------------------------------------------------------------------------------

OK = make_reply(250, "0.0", "Ok", "ok")
SENDER_OK = make_reply(250, "1.0", "Sender ok", "sender_ok")
RECIPIENT_OK = make_reply(250, "1.5", "Recipient ok", "recipient_ok")
AUTHENTICATED = make_reply(235, "7.0", "Authentication succeeded", "authenticated")
READY_FOR_TLS = make_reply(220, "0.0", "Ready to start TLS", "ready_for_tls")
BYE = make_reply(221, "0.0", "Bye", "bye")
HELP = make_reply(214, "0.0", "RFC 5321, 6409 and 4954 say what is understood here", "help")
NOT_VERIFIED = make_reply(252, "0.0", "Not verified; send mail and see", "not_verified")
START_DATA = make_reply(354, "", "Send the message, end with a dot on a line by itself", "start_data")
CHALLENGE_EMPTY = make_reply(334, "", "", "challenge")
CHALLENGE_USERNAME = make_reply(334, "", "VXNlcm5hbWU6", "challenge_username")
CHALLENGE_PASSWORD = make_reply(334, "", "UGFzc3dvcmQ6", "challenge_password")

# --- syntax and order ------------------------------------------------------------------------------------------------

UNKNOWN_COMMAND = make_reply(500, "5.2", "Command not recognized", "unknown_command")
COMMAND_TOO_LONG = make_reply(500, "5.2", "Line too long", "command_too_long")
AUTH_TOO_LONG = make_reply(500, "5.6", "Authentication exchange line is too long", "auth_too_long")
NOT_CRLF = make_reply(500, "5.2", "Commands end with CR LF and hold neither alone", "command_not_crlf")
NOT_UTF8 = make_reply(501, "5.2", "Command is not valid UTF-8", "command_not_utf8")
BAD_ARGUMENT = make_reply(501, "5.4", "Syntax error in argument", "bad_argument")
BAD_HELLO = make_reply(501, "5.2", "A host name or address literal must follow", "bad_hello")
BAD_BASE64 = make_reply(501, "5.2", "Not valid base64", "bad_base64")
BAD_PRIORITY = make_reply(501, "5.2", "MT-PRIORITY is a number from -9 to 9, once", "bad_priority")
HOLD_TOO_LONG = make_reply(501, "5.4", "HOLDUNTIL lies further ahead than FUTURERELEASE offers", "hold_too_long")
AUTH_CANCELLED = make_reply(501, "7.0", "Authentication cancelled", "auth_cancelled")
NOT_IMPLEMENTED = make_reply(502, "5.1", "Command not implemented", "not_implemented")
NOTHING_MAY_FOLLOW = make_reply(503, "5.1", "Nothing may follow that command before its reply", "pipelining")
HELLO_FIRST = make_reply(503, "5.1", "EHLO first", "hello_first")
NESTED_MAIL = make_reply(503, "5.1", "A transaction is under way", "nested_mail")
MAIL_FIRST = make_reply(503, "5.1", "MAIL first", "mail_first")
RECIPIENT_FIRST = make_reply(503, "5.1", "RCPT first", "recipient_first")
NO_VALID_RECIPIENT = make_reply(554, "5.1", "No valid recipient", "no_valid_recipient")
TLS_ACTIVE = make_reply(503, "5.1", "TLS is active already", "tls_active")
TLS_TOO_LATE = make_reply(503, "5.1", "STARTTLS comes before AUTH and MAIL", "tls_too_late")
AUTH_TWICE = make_reply(503, "5.1", "Authenticated already", "auth_twice")
AUTH_IN_TRANSACTION = make_reply(503, "5.1", "AUTH comes before MAIL", "auth_in_transaction")
AUTH_UNAVAILABLE = make_reply(503, "5.1", "AUTH is not offered here", "auth_unavailable")
UNKNOWN_MECHANISM = make_reply(504, "5.4", "Authentication mechanism not supported", "unknown_mechanism")
UNKNOWN_PARAMETER = make_reply(555, "5.4", "Parameter not recognized or not implemented", "unknown_parameter")

# --- who may do what -------------------------------------------------------------------------------------------------

AUTH_REQUIRED = make_reply(530, "7.0", "Authentication required", "auth_required")
NETWORK_UNBOUND = make_reply(550, "7.1", "Only networks bound to an account may send here", "network_unbound")
AUTH_NEEDS_TLS = make_reply(538, "7.11", "Encryption required for authentication", "auth_needs_tls")
AUTH_FAILED = make_reply(535, "7.8", "Authentication credentials invalid", "auth_failed")
SENDER_DENIED = make_reply(550, "7.1", "Sending is not allowed", "sender_denied")
SENDER_NOT_OWNED = make_reply(553, "7.1", "Sender domain does not belong to the account", "sender_not_owned")
FROM_NOT_OWNED = make_reply(550, "7.1", "From names a domain of somebody else", "from_not_owned")
BAD_SENDER = make_reply(553, "1.7", "Sender address not understood", "bad_sender")
BAD_RECIPIENT = make_reply(553, "1.3", "Recipient address not understood", "bad_recipient")
NEEDS_SMTPUTF8 = make_reply(553, "6.7", "Address needs SMTPUTF8", "needs_smtputf8")
NO_ROUTE = make_reply(550, "4.4", "No routing rule matches", "no_route")

KEY_TAKEN = make_reply(550, "7.0", "This Idempotency-Key was used for another message", "key_taken")

# --- size and content ------------------------------------------------------------------------------------------------

TOO_BIG = make_reply(552, "3.4", "Message is too big", "too_big")
TOO_MANY_RECIPIENTS = make_reply(452, "5.3", "Too many recipients", "too_many_recipients")
STRAY_LINE_END = make_reply(550, "6.0", "Message has CR or LF outside of CR LF", "stray_line_end")
NUL_IN_CONTENT = make_reply(550, "6.0", "Message has NUL octets", "nul_in_content")
CONTENT_LINE_TOO_LONG = make_reply(550, "6.0", "Message has a line above 998 octets", "content_line_too_long")

# --- ours, or for now ------------------------------------------------------------------------------------------------

SHUTTING_DOWN = make_reply(421, "3.2", "Closing for maintenance, try again", "shutting_down")
TOO_MANY_CONNECTIONS = make_reply(421, "7.0", "Too many connections, try again later", "too_many_connections")
TIMEOUT = make_reply(421, "4.2", "Timeout, closing", "timeout")
TOO_SLOW = make_reply(421, "4.2", "Too slow, closing", "too_slow")
TOO_MANY_ERRORS = make_reply(421, "7.0", "Too many errors, closing", "too_many_errors")
TOO_MANY_COMMANDS = make_reply(421, "7.0", "Too many commands without a message, closing", "too_many_commands")
TOO_MANY_AUTH_FAILURES = make_reply(421, "7.0", "Too many failed logins, closing", "too_many_auth_failures")
AUTH_THROTTLED = make_reply(454, "7.0", "Too many failed logins, try again later", "auth_throttled")
AUTH_SUSPENDED = make_reply(454, "7.0", "Sending is suspended, try again later", "auth_suspended")
SENDER_SUSPENDED = make_reply(451, "7.1", "Sending is suspended, try again later", "sender_suspended")
AUTH_UNKNOWABLE = make_reply(454, "7.0", "Login cannot be checked now, try again later", "auth_unknowable")
REPLICATION_UNAVAILABLE = make_reply(451, "3.0", "Replicated storage is not available here", "no_replication")
CONFIG_STALE = make_reply(451, "3.2", "Configuration is out of date, try again later", "config_stale")
SPOOL_REFUSED = make_reply(451, "3.2", "No spool here may take mail, try again later", "spool_refused")
COMMIT_TIMEOUT = make_reply(451, "3.0", "Storing took too long, try again", "commit_timeout")
STORAGE_FAILED = make_reply(451, "3.0", "Storing failed, try again later", "storage_failed")
STORAGE_FULL = make_reply(452, "3.1", "Out of storage, try again later", "storage_full")
SUBMISSION_PENDING = make_reply(
    451, "7.1", "A message with this Idempotency-Key is being stored, try again", "submission_pending"
)
OVERLOADED = make_reply(452, "3.1", "Too much mail at once, try again later", "overloaded")
EARLY_TALKER = make_reply(554, "5.1", "Speak after the greeting", "early_talker")


def greeting(hostname: str) -> Reply:
    """Return the 220 that opens a session."""
    return make_reply(220, "", f"{hostname} ESMTP", "greeting")


QUEUED, QUEUED_ONCE, REPEATED = "queued", "queued_once", "repeated"
"""Why the dot is answered 250: stored; stored under a key that the fleet was asked for; stored before."""


def queued(message_id: str, reason: str = QUEUED) -> Reply:
    """Return the 250 to the final dot; from here on the message is ours."""
    wire = b"250 2.0.0 queued as " + message_id.encode("ascii") + b"\r\n"
    return Reply(250, "2.0.0", "queued as " + message_id, reason, wire)


@lru_cache(maxsize=64)
def bad_headers(code: int, enhanced: str, text: str) -> Reply:
    """Return the refusal of a message for its headers; the texts are those of `dataplane.core.headers`."""
    return make_reply(code, enhanced.partition(".")[2], text[:1].upper() + text[1:], "bad_headers")


def rate_limited(wait_s: float) -> Reply:
    """Return the refusal by a token bucket that will have refilled in `wait_s` seconds."""
    return make_reply(450, "7.1", f"Limit reached, try again in {_whole_seconds(wait_s)} s", "rate_limited")


def too_many_connections(wait_s: float) -> Reply:
    """Return the refusal of a connection by its address's bucket."""
    text = f"Too many connections, try again in {_whole_seconds(wait_s)} s"
    return make_reply(421, "7.0", text, "connection_rate")


def _whole_seconds(wait_s: float) -> int:
    # A hundredth is what rounding leaves of a wait that is whole.
    return max(1, math.ceil(wait_s - 0.01))


def internal_error(reference: str) -> Reply:
    """Return the answer to a fault of ours; `reference` is in the log beside what happened."""
    return make_reply(451, "3.0", f"Internal error, try again later (reference {reference})", "internal_error")


@lru_cache(maxsize=64)
def hello(hostname: str, max_message_bytes: int, *, starttls: bool, auth: bool, future_release: str) -> bytes:
    """Return the wire form of the reply to EHLO: every word in it is a promise that a transcript test holds.

    `future_release` is what FUTURERELEASE offers; empty, neither that nor priorities are offered.
    """
    words = [hostname, "PIPELINING", f"SIZE {max_message_bytes}", "8BITMIME", "SMTPUTF8", "ENHANCEDSTATUSCODES"]
    if starttls:
        words.append("STARTTLS")
    if auth:
        words.append("AUTH PLAIN LOGIN")
    if future_release:
        words += [f"FUTURERELEASE {future_release}", "MT-PRIORITY"]
    words.append("HELP")
    lines = [f"250-{word}\r\n" for word in words[:-1]]
    return "".join([*lines, f"250 {words[-1]}\r\n"]).encode("ascii")
