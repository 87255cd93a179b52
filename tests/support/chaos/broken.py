"""Broken builds: the judge is trusted because it catches each of them.

A build is a copy of the tree with a few texts replaced, each of which must stand there exactly once: a replacement that
no longer applies is an error. The tests named run against the copy and must fail by the judge's verdict, for one of the
rules named; failing in any other way, or passing, is an error too.

    python -m tests.chaos.broken            every build
    python -m tests.chaos.broken no-fsync   one
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from support.chaos.judge import VERDICT

ROOT = Path(__file__).parents[3]
_FOLDERS = ("dataplane", "controlplane", "clients/python", "migrations", "tests/chaos", "tests/support")
_FILES = ("pyproject.toml", "tests/conftest.py")
_TEST_S = 240.0
_RULE = re.compile(r"^(?:E +)?  ([a-z ]+): ", re.MULTILINE)


class BrokenBuildError(Exception):
    """A build that could not be made, or that was not caught."""


@dataclass(frozen=True, slots=True)
class Edit:
    """One text of one file and what takes its place."""

    path: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Build:
    """`what` is broken, which test must say so, by which rules of the judge."""

    name: str
    what: str
    edits: tuple[Edit, ...]
    test: str
    rules: frozenset[str]


BUILDS = (
    Build(
        "no-fsync",
        "250 is said before the spool is synced",
        (Edit("dataplane/adapters/spool_sqlite/schema.py", "PRAGMA synchronous = FULL", "PRAGMA synchronous = OFF"),),
        "tests/chaos/test_disk.py::test_what_was_answered_outlives_power_cuts[1]",
        frozenset({"lost"}),
    ),
    Build(
        "two-transactions",
        "an outcome and its record are committed one after the other",
        (
            Edit(
                "dataplane/delivery/settler.py",
                "future = self._spool.settle(settlement)\n",
                "future = self._spool.settle(settlement._replace(record=None))\n"
                "        if settlement.record is not None:\n"
                "            future.add_done_callback(lambda _: self._spool.write_record(settlement.record))\n",
            ),
        ),
        "tests/chaos/test_failpoints.py::test_a_kill_at_a_failpoint_opens_no_other_window[delivery.settled]",
        frozenset({"unended"}),
    ),
    Build(
        "unread-replies",
        "octets that a next hop sent too many are read as the answers to the next message",
        (
            Edit(
                "dataplane/core/reply_reader.py",
                "return self._code != 0 or self._start < len(self._buffer)",
                "return self._code != 0 and self._start < 0",
            ),
        ),
        "tests/chaos/test_cuts.py::test_a_line_too_many_of_the_next_hop_is_no_verdict_of_another_message",
        frozenset({"wrong end", "lost"}),
    ),
    Build(
        "cancelled-commit",
        "the end of a client's connection cancels the commit of its message",
        (
            Edit(
                "dataplane/ingress/submission.py",
                "        future = owner.accept(envelope, stored, rows)\n",
                "        future = owner.accept(envelope, stored, rows)\n        UNDER_WAY[self.session_id] = future\n",
            ),
            Edit("dataplane/ingress/submission.py", "\nclass Submitter:", "\nUNDER_WAY = {}\n\n\nclass Submitter:"),
            Edit(
                "dataplane/ingress/protocol.py",
                "            self._service.counters.answers_lost += 1\n        self._lose()\n",
                "            self._service.counters.answers_lost += 1\n"
                "        from dataplane.ingress.submission import UNDER_WAY\n"
                "        if self._submitter.session_id in UNDER_WAY:\n"
                "            UNDER_WAY[self._submitter.session_id].cancel()\n"
                "        self._lose()\n",
            ),
        ),
        "tests/chaos/test_cuts.py::test_a_client_that_leaves_behind_its_dot_leaves_its_message_whole_and_on_its_way",
        frozenset({"left behind"}),
    ),
    Build(
        "no-recovery",
        "attempts that a killed worker had begun are not put back",
        (Edit("dataplane/delivery/engine.py", "        await self._recovery.recover_interrupted()\n", ""),),
        "tests/chaos/test_failpoints.py::test_a_kill_at_a_failpoint_opens_no_other_window[accept.stored]",
        frozenset({"left behind", "lost"}),
    ),
    Build(
        "cursor-not-checked",
        "a spool that has fewer records than are stored, and another opening, is taken for the newest",
        (
            Edit(
                "controlplane/domain/openings.py",
                "    if last_record < cursor:\n        return True\n    if stored_opening is None:\n",
                "    if stored_opening is None or stored_opening:\n",
            ),
        ),
        "tests/chaos/test_fleet.py::test_an_old_disk_sends_nothing_and_the_newest_one_goes_on",
        frozenset({"duplicate"}),
    ),
    Build(
        "epoch-unchecked",
        "a node sends what it held under a lease that is over",
        (
            Edit(
                "dataplane/core/lease.py",
                "return 0 != epoch == self._epoch and now_s < self._until_s",
                "return epoch != 0",
            ),
        ),
        "tests/chaos/test_fleet.py::test_a_node_that_stands_still_past_its_lease_sends_no_dot",
        frozenset({"window"}),
    ),
    Build(
        "poll-removed",
        "a node asks for REPLICATED mail only when it has stored some itself",
        (Edit("dataplane/adapters/replicated_queue.py", "asyncio.timeout(wait_s)", "asyncio.timeout(None)"),),
        "tests/chaos/test_fleet.py::test_replicated_mail_of_a_node_that_is_lost_is_sent_by_the_other",
        frozenset({"lost"}),
    ),
    Build(
        "hand-over-sends",
        "a draining node sends what it gave up as long as nobody has answered that he has it",
        (
            Edit(
                "dataplane/adapters/spool_sqlite/transaction.py",
                "        self._execute(_DELETE_RECIPIENTS, (message_id,))\n"
                "        self._waiting_count -= self._connection.changes()\n"
                "        self._remove(message_id)\n"
                "        self._execute(_DELETE_UNREPORTED, (message_id,))\n"
                "        self._records += operation.records\n",
                "        self._execute(_DELETE_UNREPORTED, (message_id,))\n"
                "        self._records += operation.records\n",
            ),
        ),
        "tests/chaos/test_fleet.py::test_mail_of_a_node_that_is_drained_is_sent_by_the_other_and_by_it_alone",
        frozenset({"duplicate", "unended"}),
    ),
)


def edited(build: Build, root: Path = ROOT) -> dict[str, str]:
    """The files of a build as they are to be; BrokenBuildError when an edit does not apply."""
    texts: dict[str, str] = {}
    for edit in build.edits:
        text = texts.get(edit.path) or (root / edit.path).read_text(encoding="utf-8")
        if text.count(edit.old) != 1:
            raise BrokenBuildError(f"{build.name}: stands {text.count(edit.old)} times in {edit.path}: {edit.old!r}")
        texts[edit.path] = text.replace(edit.old, edit.new)
    return texts


def catch(build: Build) -> str:
    """Make the build, run its test, and return the rule that caught it; BrokenBuildError when none did."""
    texts = edited(build)
    with tempfile.TemporaryDirectory(prefix=f"postroad-broken-{build.name}-") as name:
        copy = Path(name)
        _copy_tree(copy)
        for path, text in texts.items():
            (copy / path).write_text(text, encoding="utf-8")
        status, output = _run(build.test, copy)
    if status == 0:
        raise BrokenBuildError(f"{build.name}: the test passed")
    verdict = output.find(VERDICT)
    if verdict < 0:
        raise BrokenBuildError(f"{build.name}: the test failed, and not by the judge:\n{output[-4_000:]}")
    found = set(_RULE.findall(output[verdict:]))
    if not found & build.rules:
        raise BrokenBuildError(f"{build.name}: the judge found {sorted(found)}, not {sorted(build.rules)}")
    return ", ".join(sorted(found & build.rules))


def _copy_tree(copy: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".pytest_cache")
    for folder in _FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for file in _FILES:
        shutil.copy2(ROOT / file, copy / file)


def _run(test: str, copy: Path) -> tuple[int, str]:
    paths = [str(copy), str(copy / "clients" / "python"), str(copy / "tests")]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("POSTROAD_", "PYTEST_"))},
        "PYTHONPATH": os.pathsep.join(paths),
        "CHAOS_QUIET_S": "15",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "-p", "no:cacheprovider", "--tb=short"]
    command += ["-m", "nightly or not nightly", "-x", test]
    process = subprocess.run(
        command, cwd=copy, env=environment, capture_output=True, text=True, timeout=_TEST_S, check=False
    )
    return process.returncode, process.stdout + process.stderr


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 when every build was caught."""
    names = [build.name for build in BUILDS]
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos.broken",
        description="Builds that break one promise each: the judge must catch every one.",
        epilog="\n".join(["builds:", *(f"  {build.name:18}{build.what}" for build in BUILDS)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("builds", nargs="*", metavar="build", help="those to be tried; all of them when none is named")
    wanted = parser.parse_args(arguments).builds
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"no build is named {', '.join(unknown)}; there are {', '.join(names)}")
    builds = [build for build in BUILDS if not wanted or build.name in wanted]
    missed = 0
    for build in builds:
        try:
            said = f"caught: {catch(build)}"
        except (BrokenBuildError, subprocess.TimeoutExpired) as error:
            missed += 1
            said = f"NOT CAUGHT: {error}"
        sys.stdout.write(f"{build.name} ({build.what}): {said}\n")
        sys.stdout.flush()
    return 1 if missed else 0
