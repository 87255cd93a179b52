"""The node's program: `postroad-node` or `python -m dataplane`.

    run            start the node: the supervisor, an agent and the workers
    enroll         get the node's certificate with a one-time token
    attach         take the folder of another node's spool into this node
    check-config   print the settings in force, without secrets
    agent, worker  the processes that `run` starts; of no use by hand

Exit codes: 0 done, 1 the node could not be drained in time or a process failed, 2 wrong arguments, 69 something that is
needed is in use or away, 78 settings or enrolment are wrong. An error is one line on standard error that says what to
do; that of `agent` and `worker`, of which nobody waits for a word, is a line of the log.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from dataplane.event_log import EventLogger
from dataplane.process import EXIT_UNAVAILABLE, Child
from dataplane.settings import Settings, SettingsError, load_settings, redacted
from dataplane.settings_handover import read_handed
from dataplane.telemetry import configure_logging, get_logger

EXIT_FAILED = 1
EXIT_CONFIG = 78


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    try:
        settings = load_settings(parsed.config) if parsed.settings_fd < 0 else read_handed(parsed.settings_fd)
    except SettingsError as error:
        return _fail(str(error), EXIT_CONFIG)
    command: Callable[[argparse.Namespace, Settings], int] = parsed.run
    return command(parsed, settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="postroad-node", description="A node of Postroad.")
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(name: str, run: Callable[[argparse.Namespace, Settings], int], text: str | None) -> argparse.ArgumentParser:
        # argparse shows a command only when it has a help text.
        made = commands.add_parser(name, help=text) if text else commands.add_parser(name)
        made.add_argument("--config", type=Path, help="node.yaml, or the folder it lies in")
        made.set_defaults(run=run, settings_fd=-1)
        return made

    add("run", _run, "start the node")
    add("check-config", _check_config, "print the settings in force, without secrets")
    enroll = add("enroll", _enroll, "get the node's certificate")
    enroll.add_argument("--token", help="the one-time token; without, $POSTROAD_ENROLL_TOKEN")
    enroll.add_argument("--server", help="host:port of the control plane's public port")
    enroll.add_argument("--ca-file", type=Path, help="the CA of the public port's certificate")
    attach = add("attach", _attach, "take the folder of another node's spool into this node")
    attach.add_argument("folder", type=Path, help="the other node's spool/<uuid>, as mounted or copied here")
    for child in (add("agent", _agent, None), add("worker", _worker, None)):
        child.add_argument("--settings-fd", type=int, default=-1)
        child.add_argument("--lifeline-fd", type=int, default=-1)
        child.add_argument("--ready-fd", type=int, default=-1)
        child.add_argument("--parent-pid", type=int, default=0)
        child.add_argument("--workers", type=int, default=1)
        child.add_argument("--index", type=int, default=0)
        child.add_argument("--spools", type=_comma_separated, default=[])
        child.add_argument("--listener-fds", type=_numbers, default=[])
        child.add_argument("--counts-fd", type=int, default=-1)
    return parser


def _comma_separated(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in _comma_separated(text)]


def _fail(text: str, code: int) -> int:
    print(f"postroad-node: {text}", file=sys.stderr)
    return code


def _check_config(parsed: argparse.Namespace, settings: Settings) -> int:
    del parsed
    print(redacted(settings), end="")
    return 0


def _run(parsed: argparse.Namespace, settings: Settings) -> int:
    from dataplane.data_dir import DataDirError, lock_data_dir, prepare_data_dir
    from dataplane.listening_sockets import PortTakenError
    from dataplane.supervisor import Supervisor

    config_file = parsed.config.absolute() if parsed.config is not None else None
    # Until there is a handler: whoever finds us by the lock may send one.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        prepare_data_dir(settings.data_dir)
        lock_data_dir(settings.data_dir)
    except (DataDirError, OSError) as error:
        return _fail(str(error), EXIT_UNAVAILABLE)
    if not (settings.data_dir / "identity" / "certificate.pem").is_file():
        return _fail("this node is not enrolled: run `postroad-node enroll --token …`", EXIT_CONFIG)
    configure_logging(settings.log_level, "supervisor")
    here = Path.cwd()
    os.chdir(settings.data_dir)
    try:
        return Supervisor(settings, here, config_file, get_logger("supervisor")).run()
    except (PortTakenError, OSError) as error:
        return _fail(str(error), EXIT_UNAVAILABLE)


def _enroll(parsed: argparse.Namespace, settings: Settings) -> int:
    from dataplane.agent.enrollment import enroll
    from dataplane.agent.identity import IdentityError

    token = parsed.token or os.environ.get("POSTROAD_ENROLL_TOKEN", "")
    if not token:
        return _fail("no token: give --token or set POSTROAD_ENROLL_TOKEN", EXIT_CONFIG)
    server = parsed.server or settings.control_plane.enroll_address
    ca_file = parsed.ca_file or settings.control_plane.ca_file
    try:
        identity = enroll(settings.data_dir, server, ca_file, token, version("postroad"))
    except (IdentityError, OSError) as error:
        return _fail(str(error), EXIT_UNAVAILABLE)
    print(f"enrolled as {identity.node}, certificate good until {identity.not_after:%Y-%m-%d}")
    return 0


def _attach(parsed: argparse.Namespace, settings: Settings) -> int:
    from dataplane.attachment import AttachmentError, attach

    try:
        said = attach(settings.data_dir, parsed.folder)
    except AttachmentError as error:
        return _fail(str(error), EXIT_UNAVAILABLE)
    print(said, end="")
    return 0


def _agent(parsed: argparse.Namespace, settings: Settings) -> int:
    from dataplane.agent.identity import IdentityError
    from dataplane.agent.metrics import MetricsPortError
    from dataplane.agent.ports import StoreError
    from dataplane.agent_process import run_agent

    configure_logging(settings.log_level, "agent")
    log = get_logger("agent")
    return _serve(
        parsed,
        settings,
        lambda child: run_agent(settings, parsed.workers, child, log),
        (IdentityError, MetricsPortError, StoreError),
        log,
    )


def _worker(parsed: argparse.Namespace, settings: Settings) -> int:
    from dataplane.worker import WorkerError, run_worker

    process = f"worker-{parsed.index}"
    configure_logging(settings.log_level, process)
    log = get_logger(process)
    return _serve(
        parsed,
        settings,
        lambda child: run_worker(settings, parsed.index, parsed.spools, parsed.listener_fds, child, log),
        (WorkerError,),
        log,
    )


def _serve(
    parsed: argparse.Namespace,
    settings: Settings,
    run: Callable[[Child], Awaitable[None]],
    expected: tuple[type[Exception], ...],
    log: EventLogger,
) -> int:
    """Run a child on uvloop, tied to its supervisor; one that cannot begin or go on is one line and an exit code."""
    import uvloop

    cannot_begin: tuple[type[Exception], ...] = (OSError, *expected)
    os.chdir(settings.data_dir)
    child = Child(parsed.lifeline_fd, parsed.ready_fd, parsed.parent_pid, parsed.settings_fd, parsed.counts_fd)

    async def tied() -> None:
        child.tie()
        await run(child)

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(tied())
    except cannot_begin as error:
        log.warning("process.ends", error=str(error))
        code: int = getattr(error, "exit_code", EXIT_UNAVAILABLE)
        return code
    except Exception as error:
        if not isinstance(error, ExceptionGroup) or error.split(expected)[1] is not None:
            log.error("process.crashed", error=type(error).__name__, exc_info=error)  # noqa: TRY400 - an event
        else:
            log.warning("process.ends", error="; ".join(map(str, error.exceptions)))
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
