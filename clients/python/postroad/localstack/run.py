"""`postroad up` from its first line to its last: signals, the text that is shown, and the end.

Contract. Returns after Ctrl-C, SIGTERM or SIGHUP (a closed terminal) once everything has stopped in order; raises
`LocalStackError` when the stack does not come up, after stopping what did. A second signal hurries: what the node still
delivers goes on at the next start. SIGKILL at any moment is safe; the next start cleans up.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from postroad.localstack import setup
from postroad.localstack.layout import Layout
from postroad.localstack.ports import LOOPBACK, settle_ports
from postroad.localstack.progress import Progress
from postroad.localstack.stack import Facts, Stack

_INBOX_LOOK_S = 0.5
_SHOWN_AT_ONCE = 3
_SAME_WISH_S = 1.0


def run_stack(folder: Path, wishes: Mapping[str, int], progress: Progress, workers: int) -> None:
    """Run a stack in `folder` until a signal comes; `workers` of 0 is one a core. See the module."""
    layout = Layout(folder).open()
    try:
        ports = settle_ports(wishes, layout.note("ports") or {})
        layout.keep_note("ports", ports)
        asyncio.run(_run(layout, Stack(layout, ports, progress, workers), progress))
    finally:
        layout.close()


async def _run(layout: Layout, stack: Stack, progress: Progress) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    stopped_at = 0.0

    def on_signal() -> None:
        nonlocal stopped_at
        if not stopping.is_set():
            stopped_at = loop.time()
            stopping.set()
            progress.remark("Stopping: what is being delivered gets half a minute; Ctrl-C again does not wait for it")
        # One wish to stop may come as two signals at once: from a terminal and from whoever started us.
        elif loop.time() - stopped_at > _SAME_WISH_S:
            progress.remark("Hurrying")
            stack.hurry()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, on_signal)
    work = asyncio.create_task(_up(stack, layout, progress))
    stop = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            await work  # it never ends well by itself: this raises
    finally:
        stop.cancel()
        work.cancel()
        await asyncio.wait({work, stop})
        await stack.stop()


async def _up(stack: Stack, layout: Layout, progress: Progress) -> None:
    facts = await stack.start()
    progress.ready(_for_programs(facts), _for_people(facts, layout))
    async with asyncio.TaskGroup() as group:
        group.create_task(stack.keep_alive())
        group.create_task(_tell_of_mail(layout.log("inbox"), pasted_command(layout.root), progress))


async def _tell_of_mail(log: Path, command: str, progress: Progress) -> None:
    """Say what the inbox stores from now on, and the command that shows it."""
    with log.open(encoding="utf-8", errors="replace") as stream:
        stream.seek(0, 2)
        while True:
            mails = [mail for line in stream.readlines() if (mail := _received(line)) is not None]
            for mail in mails[-_SHOWN_AT_ONCE:]:
                progress.remark(
                    f"Inbox: mail {mail['number']} from <{mail['sender']}>, {mail['size_bytes']} bytes; "
                    f"`{command} inbox show {mail['number']}`"
                )
            if len(mails) > _SHOWN_AT_ONCE:
                progress.remark(f"Inbox: {len(mails) - _SHOWN_AT_ONCE} more")
            await asyncio.sleep(_INBOX_LOOK_S)


def _received(line: str) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError):
        fields = json.loads(line)
        if isinstance(fields, dict) and fields.get("event") == "inbox.received":
            return fields
    return None


def _for_programs(facts: Facts) -> dict[str, Any]:
    return {
        "ports": facts.ports,
        "host": LOOPBACK,
        "smtp_username": facts.smtp_username,
        "smtp_password": facts.smtp_password,
        "ca_file": str(facts.ca_file),
    }


def _for_people(facts: Facts, layout: Layout) -> str:
    ports = facts.ports
    ca_file = _shown(facts.ca_file)
    return f"""
Postroad is up. Everything lives in {_shown(layout.root)}; Ctrl-C stops it, the next start goes on with it.

  SMTP host       {LOOPBACK}
  SMTP ports      {ports["smtp"]} (STARTTLS), {ports["smtps"]} (TLS), {ports["plain"]} (networks bound to an account)
  SMTP user       {facts.smtp_username}
  SMTP password   {facts.smtp_password or _how_to_renew(layout)}
  CA certificate  {ca_file}
  gRPC            {LOOPBACK}:{ports["grpc"]}
  HTTP            http://{LOOPBACK}:{ports["http"]}/api/v1   node: http://{LOOPBACK}:{ports["node-http"]}/metrics

Send a mail:

  {pasted_command(layout.root)} send --to someone@example.net --subject hello
"""


def _how_to_renew(layout: Layout) -> str:
    kept = _shown(setup.credential_file(layout))
    return f"is not the one that was kept; for a new one stop this, delete {kept}, and start again"


def pasted_command(root: Path) -> str:
    """Return this very `postroad` as it can be pasted here, with the stack's folder where it does not find it alone."""
    return _command() if _is_found(root) else f"POSTROAD_DIR={shlex.quote(_shown(root))} {_command()}"


def _is_found(root: Path) -> bool:
    here = Path.cwd()
    nearest = next((near for one in (here, *here.parents) if ((near := one / ".postroad") / "cli.yaml").exists()), None)
    return "POSTROAD_DIR" not in os.environ and nearest is not None and nearest.resolve() == root.resolve()


def _command() -> str:
    program = Path(sys.executable).with_name("postroad")
    on_path = shutil.which("postroad")
    if on_path is not None and Path(on_path).resolve() == program.resolve():
        return "postroad"
    return _shown(program) if program.exists() else f"{sys.executable} -m postroad.cli"


def _shown(path: Path) -> str:
    """Relative to here where that is shorter to read and paste."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
