from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dataplane.failpoints import SPENT_VARIABLE, VARIABLE, make_failpoint


def test_without_names_passing_does_nothing() -> None:
    failpoint = make_failpoint("")
    for _ in range(100):
        failpoint("spool.before_commit")


def test_points_that_are_not_named_do_nothing() -> None:
    make_failpoint("spool.after_commit:1")("spool.before_commit")


@pytest.mark.parametrize("text", ["spool", "spool:", ":1", "spool:0", "spool:-1", "spool:one", "a:1,,b:1"])
def test_a_malformed_text_is_an_error_rather_than_no_failpoint(text: str) -> None:
    with pytest.raises(ValueError, match=r"name:n|invalid literal"):
        make_failpoint(text)


def test_the_named_pass_kills_the_process_and_the_ones_before_do_not() -> None:
    program = (
        "import os\nfrom dataplane.failpoints import failpoint\n"
        "for number in range(1, 9):\n    failpoint('here')\n    os.write(1, b'%d' % number)\n"
    )
    environment = {**os.environ, VARIABLE: "elsewhere:1, here:4"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    assert result.returncode == -signal.SIGKILL
    assert result.stdout == b"123"


def test_a_point_that_is_spent_kills_one_process_and_not_the_one_that_follows(tmp_path: Path) -> None:
    program = "from dataplane.failpoints import failpoint\nfailpoint('here')\nprint('passed')\n"
    environment = {**os.environ, VARIABLE: "here:1", SPENT_VARIABLE: str(tmp_path)}
    first, second = [
        subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
        for _ in range(2)
    ]
    assert (first.returncode, first.stdout) == (-signal.SIGKILL, b"")
    assert (second.returncode, second.stdout) == (0, b"passed\n")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
