"""Two nodes, one database: what PostgreSQL loses in a failover is told again, an old disk sends nothing, and REPLICATED
mail is sent by one node at a time, whatever becomes of the other.
"""

from __future__ import annotations

import contextlib
import os
import smtplib
from collections.abc import Iterator

import pytest

from support.chaos.application import Application, answers
from support.chaos.books import Books
from support.chaos.fleet_stack import SAFE_SENDER, FleetStack
from support.chaos.judge import Case, check, judge
from support.chaos.lone_node import QUIET_VARIABLE
from support.chaos.sink import end_of
from support.fault_proxy import Fault, Kind, in_thread
from support.killable_stack import wait_until
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
    _demo_application(fleet, name, port).submit(count)


def submit_in_the_end(fleet: FleetStack, name: str, port: str, count: int) -> None:
    """Submit to a node whose workers may end meanwhile; again, as applications do."""
    _insist(fleet, _demo_application(fleet, name, port), count)


def submit_safe(fleet: FleetStack, name: str, port: str, count: int) -> None:
    """Submit REPLICATED mail; again, as applications do, while the worker that took the session has no lease."""
    ca_file = fleet.ready["ca_file"]
    application = Application(fleet.books, name, [fleet.ports[port]], fleet.safe_login, ca_file, 1, SAFE_SENDER)
    _insist(fleet, application, count)


def _demo_application(fleet: FleetStack, name: str, port: str) -> Application:
    login = (fleet.ready["smtp_username"], fleet.ready["smtp_password"])
    return Application(fleet.books, name, [fleet.ports[port]], login, fleet.ready["ca_file"], 1)


def _insist(fleet: FleetStack, application: Application, count: int) -> None:
    wanted = fleet.books.acknowledged() + count

    def is_taken() -> bool:
        with contextlib.suppress(smtplib.SMTPException, OSError):
            application.submit(wanted - fleet.books.acknowledged())
        return fleet.books.acknowledged() >= wanted

    wait_until(is_taken, "the mail is taken")


def delivered(fleet: FleetStack) -> bool:
    """Whether all that was answered 250 has arrived."""
    tries, copies, _, _ = fleet.books.snapshot()
    return not any(violation.rule == "lost" for violation in judge(Case(tries, copies, ends_as=end_of)))


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
    # A worker that opened the disk as a refused one starts again to take mail.
    submit_in_the_end(fleet, "b", "smtp-2", 20)
    judged(fleet)


def prepare(fleet: FleetStack) -> None:
    """An account with REPLICATED mail, some mail of another one, and a next hop that lets nothing to its dot."""
    fleet.make_safe_account()
    submit(fleet, "w", "smtp", 5)
    submit(fleet, "x", "smtp-2", 5)
    judged(fleet)
    fleet.gate.shut()


def test_a_node_that_stands_still_past_its_lease_sends_no_dot(fleet: FleetStack) -> None:
    prepare(fleet)
    submit_safe(fleet, "a", "smtp-2", 20)
    fleet.stop_second_before_its_dots()
    stuck = ""
    try:
        wait_until(lambda: delivered(fleet), "the other node has sent the mail", _QUIET_S)
    except AssertionError as error:
        stuck = str(error)
    # Connections that go on have read their 250.
    submit_safe(fleet, "b", "smtp", 20)
    fleet.wake_second()
    check_and_go_on(fleet, stuck)


def test_replicated_mail_of_a_node_that_is_lost_is_sent_by_the_other(fleet: FleetStack) -> None:
    prepare(fleet)
    submit_safe(fleet, "a", "smtp-2", 40)
    fleet.lose_second()
    fleet.gate.open()
    fleet.gate.let_go()
    stuck = ""
    try:
        wait_until(lambda: delivered(fleet), "the other node has sent the mail", _QUIET_S)
    except AssertionError as error:
        stuck = str(error)
    check(case_of(fleet)._replace(left_in_spools=(), ledger=None))
    assert not stuck, stuck
    fleet.bring_back_second()
    check_and_go_on(fleet, "")


def test_mail_of_a_node_that_is_drained_is_sent_by_the_other_and_by_it_alone(fleet: FleetStack) -> None:
    fleet.hold_next_hop()
    submit(fleet, "a", "smtp-2", 40)
    stuck = ""
    try:
        fleet.drain_second()
    except AssertionError as error:
        stuck = str(error)
    fleet.free_next_hop()
    judged(fleet)
    assert not stuck, stuck
    fleet.undrain_second()
    wait_until(lambda: answers(fleet.ports["smtp-2"]), "the node takes mail again")
    check_and_go_on(fleet, "")


def check_and_go_on(fleet: FleetStack, stuck: str) -> None:
    """The judge finds nothing, and both nodes take mail still."""
    judged(fleet)
    assert not stuck, stuck
    submit(fleet, "y", "smtp-2", 5)
    submit(fleet, "z", "smtp", 5)
    judged(fleet)
