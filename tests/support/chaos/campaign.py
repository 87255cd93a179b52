"""A campaign: a whole stack, applications that submit all the while, and a schedule of faults drawn from a seed.

The first half has one node. The second half has two, and adds to what may break: partitions between nodes, control
plane and PostgreSQL, a PostgreSQL that fails over and loses its last commits, clocks that jump by an hour, and a disk
that is put back. Where the seed is even, a part of the mail is REPLICATED, a node stands still past its lease or is
lost for a while, and PostgreSQL loses nothing.

Each step waits until mail flows, breaks something, and lets it heal; faults of links last while some more mail is
tried. At the end everything is healed, the last messages end, and the judge compares the books with Postroad's ledger.
The same seed draws the same faults in the same order; when they strike in the flow of mail is the machine's choice.

    python -m tests.chaos.campaign --seed 3 --steps 12        one line, and the violations; status 1 when there are any
    python -m tests.chaos.campaign --seeds 1-20               both halves of each
    python -m tests.chaos.campaign --seed 3 --half 2
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from support.chaos.application import Application
from support.chaos.books import Books, Strike
from support.chaos.disk import fail_next_fsync, full_disk
from support.chaos.fleet_stack import NODES, PARTITIONS, SAFE_SENDER, SECOND_SERVERS, FleetStack
from support.chaos.judge import Case, Violation, judge, summary
from support.chaos.sink import POLITE, Manners, end_of
from support.chaos.stack import LINKS, SERVERS, ChaosStack
from support.fault_proxy import Fault, Kind, in_thread
from support.killable_stack import wait_until
from support.local_stack import stack_folder

STEPS = 12
_APPLICATIONS = 3
_SHOWN = 30
_LONGEST = 1_000
_FLOW = 25  # messages acknowledged between two faults
_HOUR_S = 3_600
_JUMPED_S = 2.0
_QUIET_S = 180.0
_FLOW_S = 150.0
_SUBMISSION_BYTES = (8_000, 6_000)  # about what a connection with TLS moves before its second message
_NEXT_HOP_BYTES = (3_000, 900)


class Step(NamedTuple):
    """One fault. `kind` is server, pause, link, sink, disk, in the second half also partition, failover, clock, old
    disk; `what` the server, the link, the node, or what the disk does.
    """

    kind: str
    what: str
    fault: Fault | None = None
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.kind} {self.what}" + (f" {self.fault}" if self.fault else "")


@dataclass
class Result:
    """What came of a campaign."""

    seed: int
    half: int
    violations: list[Violation]
    numbers: dict[str, int]
    steps: list[Step]
    seconds: float
    books: str = ""

    def line(self) -> str:
        """The result in one line."""
        counts = " ".join(f"{name}={count}" for name, count in self.numbers.items())
        verdict = "clean" if not self.violations else f"{len(self.violations)} VIOLATIONS"
        return f"seed {self.seed}.{self.half}: {verdict} {counts} steps={len(self.steps)} seconds={self.seconds:.0f}"

    def report(self) -> str:
        """What is needed to look into violations, and to see them again."""
        shown = [f"  {violation.rule}: {violation.what}" for violation in self.violations[:_SHOWN]]
        again = f"--seed {self.seed} --half {self.half} --steps {len(self.steps)}"
        return "\n".join(
            [
                self.line(),
                *shown,
                f"  faults: {'; '.join(map(str, self.steps))}",
                f"  books, logs and spools: {self.books}",
                f"  again: .venv/bin/python -m tests.chaos.campaign {again}",
            ]
        )


def draw_steps(seed: int, count: int, half: int = 1) -> list[Step]:
    """The schedule of a seed."""
    chooser = random.Random(f"steps {seed}" if half == 1 else f"steps {seed}.{half}")
    if half == 1:
        return [_draw(chooser) for _ in range(count)]
    return [_draw_of_two_nodes(chooser, safe=has_replicated_mail(seed)) for _ in range(count)]


def has_replicated_mail(seed: int) -> bool:
    """Whether a part of the mail of a second half is REPLICATED: what PostgreSQL lost of that would be lost."""
    return seed % 2 == 0


def _draw(chooser: random.Random) -> Step:
    kind = chooser.choices(("server", "pause", "link", "sink", "disk"), (5, 1, 6, 2, 2))[0]
    if kind == "server":
        return Step(kind, chooser.choice(SERVERS))
    if kind == "pause":
        return Step(kind, chooser.choice(("worker", "agent", "controlplane", "valkey")), None, chooser.uniform(0.2, 2))
    if kind == "sink":
        return Step(kind, chooser.choice(("hang up", "stray", "slow", "reset")))
    if kind == "disk":
        return Step(kind, chooser.choice(("full", "late", "fsync")))
    link = chooser.choice(LINKS)
    return Step(kind, link, _draw_fault(link, chooser))


def _draw_of_two_nodes(chooser: random.Random, *, safe: bool) -> Step:
    kinds = {"of one": 5, "server": 3, "partition": 4, "clock": 3, "old disk": 2, "drain": 2}
    kinds |= {"lease": 2, "lost node": 2} if safe else {"failover": 3}
    kind = chooser.choices(list(kinds), list(kinds.values()))[0]
    if kind == "server":
        return Step(kind, chooser.choice(SECOND_SERVERS))
    if kind == "partition":
        return Step(kind, chooser.choice(tuple(PARTITIONS)), None, chooser.uniform(1, 6))
    if kind == "failover":
        return Step(kind, "postgres")
    if kind == "clock":
        return Step(kind, chooser.choice(NODES), None, chooser.choice((_HOUR_S, -_HOUR_S)))
    if kind in {"old disk", "drain", "lease", "lost node"}:
        return Step(kind, "node-2")
    return _draw(chooser)


def _draw_fault(link: str, chooser: random.Random) -> Fault:
    kind = chooser.choice(list(Kind))
    upstream = chooser.random() < 0.5
    limits = {"submission": _SUBMISSION_BYTES, "next-hop": _NEXT_HOP_BYTES}.get(link, (20_000, 20_000))
    after_bytes = chooser.randrange(1, limits[0 if upstream else 1])
    if kind is Kind.BLACK_HOLE and chooser.random() < 0.5:
        after_bytes = 0
    seconds = {Kind.DELAY: 0.05, Kind.DRIP: 0.0005}.get(kind, 0.0)
    return Fault(kind, 0 if seconds else after_bytes, upstream, seconds)


class Campaign:
    """One run on a stack that is up."""

    def __init__(self, stack: ChaosStack, seed: int, steps: list[Step], tell: Callable[[str], None]) -> None:
        self._stack = stack
        self._books = stack.books
        self._seed = seed
        self._steps = steps
        self._tell = tell
        self._chooser = random.Random(f"run {seed}")
        self._applications: list[Application] = []

    def run(self) -> Case:
        """All steps, then the judge's case. AssertionError when mail does not flow again or does not end."""
        ready = self._stack.ready
        login = (ready["smtp_username"], ready["smtp_password"])
        ports = [proxy.port for link, proxy in self._stack.proxies.items() if link.startswith("submission")]
        self._applications = [
            Application(self._books, f"a{number}", ports, login, ready["ca_file"], self._seed)
            for number in range(_APPLICATIONS)
        ]
        if isinstance(self._stack, FleetStack) and has_replicated_mail(self._seed):
            self._stack.make_safe_account()
            self._applications.append(
                Application(
                    self._books, "safe", ports, self._stack.safe_login, ready["ca_file"], self._seed, SAFE_SENDER
                )
            )
        for application in self._applications:
            application.start()
        try:
            for place, step in enumerate(self._steps):
                self._flow(f"before step {place + 1}, {step}")
                self._tell(f"  step {place + 1}: {step}")
                self._do(step)
            self._flow("after the last step")
        finally:
            self._stack.heal()
            for application in self._applications:
                application.stop()
        for application in self._applications:
            application.join()
        if self._stack.lift_quarantines():
            self._tell("  a spool was quarantined: the node was started again")
        self._stack.wait_quiet(_QUIET_S)
        tries, copies, strikes, confirmed = self._books.snapshot()
        return Case(
            tries,
            copies,
            strikes,
            frozenset(confirmed),
            self._stack.ledger(),
            self._stack.left_in_spools(),
            end_of,
            knows_all_strikes=True,
            wrong_in_books=self._stack.wrong_in_books(),
        )

    def _flow(self, what: str) -> None:
        wanted = self._books.acknowledged() + _FLOW
        wait_until(lambda: self._books.acknowledged() >= wanted, f"mail flows {what}", _FLOW_S)

    def _do(self, step: Step) -> None:
        if step.kind == "server":
            self._stack.strike_server(step.what)
        elif step.kind == "pause":
            self._stack.pause(step.what, step.seconds)
        elif step.kind == "link" and step.fault is not None:
            self._break_link(step.what, step.fault)
        elif step.kind == "sink":
            self._spoil(step.what)
        elif step.kind == "disk":
            self._fill(step.what)
        else:
            assert isinstance(self._stack, FleetStack)
            self._do_with_two_nodes(self._stack, step)

    def _do_with_two_nodes(self, stack: FleetStack, step: Step) -> None:
        if step.kind == "partition":
            for link in PARTITIONS[step.what]:
                stack.strike_link(link, Fault(Kind.BLACK_HOLE), open_too=True)
            time.sleep(step.seconds)
            stack.heal()
        elif step.kind == "failover":
            stack.copy_database()
            self._flow("before PostgreSQL fails over")
            stack.fail_over()
        elif step.kind == "clock":
            stack.jump(step.what, int(step.seconds))
            time.sleep(_JUMPED_S)
            self._flow("with a clock that jumped")
            stack.jump(step.what, 0)
        elif step.kind == "drain":
            stack.drain_second()
            self._flow("while a node is drained")
            stack.undrain_second()
        elif step.kind == "lease":
            stack.sleep_past_lease()
        elif step.kind == "lost node":
            stack.lose_second()
            self._flow("while a node is lost")
            stack.bring_back_second()
        else:
            stack.copy_disk()
            self._flow("before the disk is put back")
            stack.restore_disk()
            self._flow("while the old disk is refused")
            stack.find_disk()

    def _break_link(self, link: str, fault: Fault) -> None:
        # On links that are opened once and kept, only what strikes open connections is felt.
        kept = link in {"nodes", "valkey", "postgres"}
        spoilt = self._chooser.randrange(2, 30)
        self._stack.strike_link(link, fault, open_too=kept)

        def plan() -> Fault | None:
            nonlocal spoilt
            spoilt -= 1
            # A connection in three passes, so that mail goes on.
            return fault if spoilt >= 0 and self._chooser.random() < 0.7 else None

        self._stack.plan(link, plan)
        self._last(2.0)
        self._stack.heal()

    def _last(self, seconds: float) -> None:
        """Let a fault last until more mail is acknowledged, or for a while if none is."""
        ends_s = time.monotonic() + seconds
        wanted = self._books.acknowledged() + _FLOW
        while time.monotonic() < ends_s and self._books.acknowledged() < wanted:
            time.sleep(0.05)

    def _spoil(self, how: str) -> None:
        manners = {
            "hang up": Manners(reply=None),
            "stray": Manners(after_reply=b"550 5.7.1 of another message\r\n"),
            "slow": Manners(delay_s=0.3),
            "reset": Manners(hang_up=True),
        }[how]
        self._books.note_strike(Strike("sink", how))
        chooser = random.Random(f"manners {self._seed}")
        self._stack.sink.manners = lambda: manners if chooser.random() < 0.4 else POLITE
        self._last(3.0)
        self._stack.sink.manners = lambda: POLITE

    def _fill(self, how: str) -> None:
        if how == "fsync":
            # Only the process that it strikes ends, and that it delivered meanwhile is known to nobody.
            self._books.note_strike(Strike("disk", how, ends_worker=True))
            if not fail_next_fsync(self._stack.disk):
                self._tell("  no fsync came")
            self._books.note_strike(Strike("disk", how, ends_worker=True))
            return
        self._books.note_strike(Strike("disk", how))
        with full_disk(self._stack.disk, told=how == "full"):
            self._last(2.0)


def run_campaign(
    seed: int, count: int = STEPS, tell: Callable[[str], None] = lambda _: None, *, half: int = 1
) -> Result:
    """Run one seed from an empty folder; the books of a run with violations are kept, and the result says where."""
    steps = draw_steps(seed, count, half)
    begun_s = time.monotonic()
    with stack_folder() as folder, in_thread() as thread:
        books = Books(folder / "books")
        stack = (ChaosStack if half == 1 else FleetStack)(folder, books, thread)
        case: Case | None = None
        try:
            stack.bring_up()
            case = Campaign(stack, seed, steps, tell).run()
            violations = judge(case)
        except AssertionError as error:
            violations = [Violation("stuck", str(error)[:_LONGEST]), *_stuck(stack)]
        finally:
            if stack.is_running:
                stack.stop()
            stack.take_down()
        kept = ""
        if violations:
            kept = tempfile.mkdtemp(prefix=f"postroad-chaos-{seed}-")
            shutil.copytree(folder / "books", Path(kept) / "books")
            shutil.copytree(folder / ".postroad" / "logs", Path(kept) / "logs")
            for spools in (folder / ".postroad").glob("node-*/spool"):
                shutil.copytree(spools, Path(kept) / spools.parent.name / "spool")
        numbers = dict(summary(case)) if case is not None else dict(summary(_so_far(books)))
        return Result(seed, half, violations, numbers, steps, time.monotonic() - begun_s, kept)


def _so_far(books: Books) -> Case:
    tries, copies, strikes, confirmed = books.snapshot()
    return Case(tries, copies, strikes, frozenset(confirmed), ends_as=end_of)


def _stuck(stack: ChaosStack) -> list[Violation]:
    """What the judge can say of a run that did not come to its end."""
    found: list[Violation] = []
    try:
        found = [Violation("left behind", row) for row in stack.left_in_spools()[:10]]
    except Exception as error:  # noqa: BLE001 - this only adds to what is reported
        found.append(Violation("left behind", f"not to be read: {error}"))
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 when every seed was clean."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.campaign", description=__doc__)
    parser.add_argument("--seed", type=int, help="one seed")
    parser.add_argument("--seeds", type=read_seeds, default="1-20", help="several: 1-20, or 1,4,7")
    parser.add_argument("--half", type=int, choices=(1, 2), help="one node, or two; both unless it is said")
    parser.add_argument("--steps", type=int, default=STEPS, help="faults in each campaign")
    parser.add_argument("--quiet", action="store_true", help="one line a seed")
    options = parser.parse_args(arguments)
    seeds = [options.seed] if options.seed is not None else options.seeds
    halves = (1, 2) if options.half is None else (options.half,)
    failed: list[str] = []
    for seed in seeds:
        for half in halves:
            result = run_campaign(seed, options.steps, (lambda _: None) if options.quiet else _say, half=half)
            _say(result.report() if result.violations else result.line())
            failed += [f"{seed}.{half}"] * bool(result.violations)
    count = len(seeds) * len(halves)
    _say(f"{count - len(failed)} of {count} campaigns clean" + (f"; not clean: {failed}" if failed else ""))
    return 1 if failed else 0


def read_seeds(text: str) -> list[int]:
    """`1-20` or `1,4,7` as numbers; ArgumentTypeError when it is neither, or none."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or not (last if dash else first).isdecimal():
            raise argparse.ArgumentTypeError(f"{text!r} is not of the form 1-20 or 1,4,7")
        found += range(int(first), int(last or first) + 1)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} names no seed")
    return found


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
