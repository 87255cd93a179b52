"""Submitting over SMTP as an application would: TLS verified by the local CA, AUTH, and the id from the 250.

Contract. `compose` builds a message, `submit` sends copies of one over one connection and notes the ids in the order of
the `250`s, so that its caller knows them also when a later copy is refused. Every refusal is a `CommandError` with the
server's words; without TLS nothing is sent, the password least of all.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncIterator, Sequence
from email.errors import MessageError
from email.message import EmailMessage
from email.policy import SMTP, SMTPUTF8
from typing import NamedTuple, cast

import aiosmtplib
import typer

from postroad.cli.connection import SmtpSettings
from postroad.cli.problems import NOT_ALLOWED, NOT_CONFIGURED, UNREACHABLE, CommandError

_QUEUED = re.compile(r"queued as ([0-9a-f-]{36})")
_TIMEOUT_S = 60.0
_AWAY = (ssl.SSLError, aiosmtplib.SMTPConnectError, aiosmtplib.SMTPServerDisconnected, aiosmtplib.SMTPTimeoutError)
_PERMANENT = 500
_DAY_S = 86_400


class Parameter(NamedTuple):
    """A parameter of MAIL, the extension that the server must offer for it, and how long it is to hold the mail."""

    extension: str
    text: str
    hold_s: int = 0


def compose(sender: str, recipients: Sequence[str], subject: str, body: str) -> bytes:
    """A plain text message. Date and Message-ID are left to the node, as RFC 6409 section 8 lets it add them.

    typer.BadParameter for what is no address and for a subject of several lines.
    """
    for option, address in (("--from", sender), *(("--to", recipient) for recipient in recipients)):
        if not _is_address(address):
            raise typer.BadParameter(f"{option}: {address!r} is no address")
    if len(subject.splitlines()) > 1:
        raise typer.BadParameter("--subject: it is one line")
    international = not (sender + "".join(recipients)).isascii()
    message = EmailMessage(policy=SMTPUTF8 if international else SMTP)
    message["From"] = sender
    message["To"] = ", ".join(recipients)
    message["Subject"] = subject
    message.set_content(body)
    return message.as_bytes()


def _is_address(text: str) -> bool:
    try:
        addresses = SMTPUTF8.header_factory("To", text).addresses
    except (MessageError, ValueError, IndexError):  # IndexError is how Python's parser may meet a missing domain
        return False
    return len(addresses) == 1 and bool(addresses[0].username and addresses[0].domain)


def canonical(content: bytes) -> bytes:
    """The content with CRLF at the end of each line: a file on a disk usually has LF."""
    content = re.sub(rb"\r\n|\r|\n", b"\r\n", content)
    return content if content.endswith(b"\r\n") else content + b"\r\n"


def submit(
    settings: SmtpSettings,
    accepted: list[str],
    *,
    implicit_tls: bool,
    sender: str,
    recipients: Sequence[str],
    content: bytes,
    count: int,
    parameters: Sequence[Parameter] = (),
) -> None:
    """Submit `count` copies, and append to `accepted` the id from each `250` when it comes."""
    server = settings.tls_server if implicit_tls else settings.server
    host, _, port = server.rpartition(":")
    if not host or not port.isdecimal():
        raise CommandError(
            f"{server!r} is no host:port of an SMTP server", "Check POSTROAD_SMTP_SERVER", NOT_CONFIGURED
        )
    if not settings.username:
        raise CommandError("no SMTP user is known", "Set POSTROAD_SMTP_USERNAME and _PASSWORD", NOT_CONFIGURED)
    client = aiosmtplib.SMTP(
        hostname=host,
        port=int(port),
        use_tls=implicit_tls,
        start_tls=not implicit_tls,
        tls_context=_tls_context(settings),
        username=settings.username,
        password=settings.password,
        timeout=_TIMEOUT_S,
    )
    try:
        asyncio.run(_submit(client, sender, recipients, content, count, accepted, parameters))
    except aiosmtplib.SMTPAuthenticationError as error:
        if error.code < _PERMANENT:
            raise CommandError(
                f"{server}: {error.code} {error.message}",
                "Try again in a moment; a suspended account or credential has to be resumed: `postroad accounts list`",
                UNREACHABLE,
            ) from error
        raise CommandError(
            f"AUTH as {settings.username} was refused: {error.message}",
            "Check user and password: `postroad credentials list`, `postroad credentials rotate …`",
            NOT_ALLOWED,
        ) from error
    except aiosmtplib.SMTPConnectResponseError as error:
        # It runs, and says why it takes no connection.
        raise CommandError(f"{server}: {error.code} {error.message}", "Try again in a moment", UNREACHABLE) from error
    except _AWAY as error:
        raise _unreachable(server, error) from error
    except aiosmtplib.SMTPRecipientsRefused as error:
        first = error.recipients[0]
        raise CommandError(f"recipient {first.recipient} was refused: {first.code} {first.message}") from error
    except aiosmtplib.SMTPResponseException as error:
        raise CommandError(f"the message was refused: {error.code} {error.message}") from error
    except aiosmtplib.SMTPException as error:
        raise CommandError(f"{server}: {error.message}") from error


@contextlib.asynccontextmanager
async def _connected(client: aiosmtplib.SMTP) -> AsyncIterator[None]:
    """Be connected, and leave nothing open: a loop that ends would not wait for the other end's word on TLS."""
    transport: asyncio.Transport | None = None
    try:
        async with client:
            transport = cast("asyncio.Transport", client.transport)
            yield
    finally:
        if transport is not None:
            transport.abort()


async def _submit(
    client: aiosmtplib.SMTP,
    sender: str,
    recipients: Sequence[str],
    content: bytes,
    count: int,
    accepted: list[str],
    parameters: Sequence[Parameter],
) -> None:
    async with _connected(client):
        options = ["SMTPUTF8"] if not (sender + "".join(recipients)).isascii() else []
        for parameter in parameters:
            # Without the extension the server would refuse the parameter, or worse, not know what it was asked.
            if not client.supports_extension(parameter.extension):
                raise CommandError(f"the server does not offer {parameter.extension}: nothing was submitted")
            _check_hold(parameter, client.esmtp_extensions[parameter.extension.lower()])
            options.append(parameter.text)
        for _ in range(count):
            errors, reply = await client.sendmail(sender, list(recipients), content, mail_options=options)
            found = _QUEUED.search(reply)
            if found is not None:
                accepted.append(found.group(1))
            if errors:
                address, (code, text) = next(iter(errors.items()))
                raise CommandError(
                    f"recipient {address} was refused, the others were accepted: {code} {text} ({reply})"
                )
            if found is None:
                raise CommandError(f"the server accepted the message, but named no id: {reply}")


def _check_hold(parameter: Parameter, offered: str) -> None:
    """Refuse what lies further ahead than the seconds that FUTURERELEASE offers (RFC 4865, section 3)."""
    most = offered.partition(" ")[0]
    if most.isdecimal() and parameter.hold_s > int(most):
        days, rest = divmod(int(most), _DAY_S)
        text = f"{most} s" if rest or not days else f"{days} day{'' if days == 1 else 's'}"
        raise CommandError(f"the server holds mail for {text} at most: nothing was submitted")


def _unreachable(server: str, error: Exception) -> CommandError:
    cause = error if isinstance(error, ssl.SSLError) else error.__cause__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return CommandError(
            f"{server}: its certificate is not trusted: {cause.verify_message}",
            "Name the CA that it hangs on with POSTROAD_SMTP_CA_FILE; without it the system's are asked",
            UNREACHABLE,
        )
    return CommandError(f"{server}: {error}", "Is it running? `postroad status` looks", UNREACHABLE)


def _tls_context(settings: SmtpSettings) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=settings.ca_file)
    except OSError as error:
        raise CommandError(
            f"the CA file {settings.ca_file} cannot be used: {error}", "Check it", NOT_CONFIGURED
        ) from error
