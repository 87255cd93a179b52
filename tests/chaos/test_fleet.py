"""Two nodes, one database: what PostgreSQL loses in a failover is told again, and an old disk sends nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from support.chaos.application import Application
from support.chaos.books import Books
from support.chaos.fleet_stack import FleetStack
from support.chaos.judge import Case, check
from support.chaos.lone_node import QUIET_VARIABLE
from support.chaos.sink import end_of
from support.fault_proxy import Fault, Kind, in_thread
from support.local_stack import stack_folder

pytestmark = [pytest.mark.chaos, pytest.mark.nightly, pytest.mark.timeout(600)]

# Less where a broken build is expected never to come to rest.
_QUIET_S = 2 * float(os.environ.get(QUIET_VARIABLE, "60"))


@pytest.fixture
def fleet() -> Iterator[FleetStack]:
    """Two nodes that are up."""
    with stack_folder() as folder, in_thread() as thread:
        stack = FleetStack(folder, Books(folder / "books"), thread)
        try:
            stack.bring_up()
            yield stack
        finally:
            if stack.is_running:
                stack.stop()
            stack.take_down()


def submit(fleet: FleetStack, name: str, port: str, count: int) -> None:
    login = (fleet.ready["smtp_username"], fleet.ready["smtp_password"])
    Application(fleet.books, name, [fleet.ports[port]], login, fleet.ready["ca_file"], 1).submit(count)


def case_of(fleet: FleetStack) -> Case:
    """What the judge is given now."""
    tries, copies, strikes, confirmed = fleet.books.snapshot()
    left = fleet.left_in_spools()
    return Case(tries, copies, strikes, frozenset(confirmed), fleet.ledger(), left, end_of)


def judged(fleet: FleetStack) -> Case:
    """The case, when all mail has ended and the judge finds nothing; he speaks of what does not end, too."""
    stuck = ""
    try:
        fleet.wait_quiet(_QUIET_S)
    except AssertionError as error:
        stuck = str(error)
    case = check(case_of(fleet))
    assert not stuck, stuck
    return check(case._replace(wrong_in_books=fleet.wrong_in_books()))


def test_what_postgresql_lost_in_a_failover_is_told_again(fleet: FleetStack) -> None:
    for name, port in (("a", "smtp"), ("b", "smtp-2")):
        submit(fleet, name, port, 20)
    fleet.copy_database()
    for name, port in (("c", "smtp"), ("d", "smtp-2")):
        submit(fleet, name, port, 40)
    before = judged(fleet)
    fleet.fail_over()
    after = judged(fleet)
    assert len(after.copies) == len(before.copies), "nothing is sent again for that"
    submit(fleet, "e", "smtp-2", 10)
    judged(fleet)


def test_an_old_disk_sends_nothing_and_the_newest_one_goes_on(fleet: FleetStack) -> None:
    fleet.strike_link("next-hop", Fault(Kind.BLACK_HOLE), open_too=True)
    submit(fleet, "a", "smtp-2", 20)
    fleet.copy_disk()
    fleet.heal()
    before = judged(fleet)
    stuck = ""
    try:
        fleet.restore_disk(_QUIET_S)
    except AssertionError as error:
        stuck = str(error)
    # What the copy holds stays where it is, and nobody misses it.
    while_refused = check(case_of(fleet)._replace(left_in_spools=()))
    assert not stuck, stuck
    assert len(while_refused.copies) == len(before.copies)
    fleet.find_disk()
    submit(fleet, "b", "smtp-2", 20)
    judged(fleet)
