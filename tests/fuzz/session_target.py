"""One input of the fuzzer for the SMTP session: octets become a configuration, cuts and what the client sends.

Invariant: garbage is answered or ends the session; nothing is raised, nothing unbounded is kept, every reply is one of
the table's, and a message that was taken has canonical line ends. `python tests/fuzz/session_target.py [corpus…]` runs
it under Atheris where that is installed; the seeded run of `test_fuzz_session.py` needs nothing.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

from dataplane.core.session_contract import Action, Limits
from support.transcript import Recorder, start

LIMITS = Limits(
    max_message_bytes=4_096, drain_bytes=1_024, overlong_bytes=8_192, pending_bytes=8_192, commands_per_turn=10
)
_REPLY = re.compile(rb"(?:[2345][0-9]{2}[ -][\x20-\x7e]*\r\n)*")


def run_one(data: bytes) -> None:
    """Feed one input; AssertionError, or whatever the machine raises, is a finding."""
    if len(data) < 2:
        return
    flags, step = data[0], data[1] % 61 + 1
    policy = Recorder()
    driver = start(
        policy, LIMITS, tls_available=bool(flags & 1), tls_active=bool(flags & 2), authorized=bool(flags & 4)
    )
    stream = data[2:]
    for place in range(0, len(stream), step):
        driver.send(stream[place : place + step])
        session = driver.session
        assert session.action in {Action.NONE, Action.CLOSE}
        assert len(session._buffer) <= LIMITS.auth_bytes
        assert session.held_bytes <= LIMITS.max_message_bytes + step
        assert _REPLY.fullmatch(driver.answer())
    assert policy.errors == []
    for _, recipients, content in policy.messages:
        assert recipients
        assert len(content) <= LIMITS.max_message_bytes
        assert content.count(b"\r") == content.count(b"\n") == content.count(b"\r\n")
        assert b"\0" not in content


def main() -> None:
    """Run under Atheris."""
    atheris = importlib.import_module("atheris")  # only on machines that fuzz
    atheris.Setup(sys.argv, run_one)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
