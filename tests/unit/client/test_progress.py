"""What `postroad up` says, and that it goes on when nobody listens any more."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest
from rich.console import Console

from postroad.localstack.progress import JsonProgress, PlainProgress, TerminalProgress


def test_plain_progress_is_a_line_a_step() -> None:
    out = io.StringIO()
    progress = PlainProgress(Console(file=out, width=200))
    with progress.step("Valkey"):
        pass
    progress.remark("Inbox: mail 1 [1]")
    first, second = out.getvalue().splitlines()
    assert first.startswith("Valkey: done in ")
    assert second == "Inbox: mail 1 [1]"


def test_a_step_that_fails_is_not_said_to_be_done() -> None:
    out = io.StringIO()
    with pytest.raises(KeyError), PlainProgress(Console(file=out)).step("Valkey"):
        raise KeyError
    assert out.getvalue() == ""


def test_steps_side_by_side_are_shown_together_on_a_terminal() -> None:
    out = io.StringIO()
    progress = TerminalProgress(Console(file=out, force_terminal=True, width=200))
    with progress.step("Valkey"), progress.step("PostgreSQL"):
        pass
    assert "✓" in out.getvalue()
    assert "Valkey, PostgreSQL" in out.getvalue()


def test_programs_get_an_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    progress = JsonProgress()
    with progress.step("Valkey"):
        pass
    progress.ready({"host": "127.0.0.1"}, "text for people")
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["up.step", "up.ready"]
    assert events[1]["host"] == "127.0.0.1"


@pytest.mark.parametrize("json_lines", ["True", "False"])
def test_a_reader_that_has_gone_does_not_end_the_program(json_lines: str) -> None:
    program = f"""
from postroad.localstack.progress import progress_for
progress = progress_for(json_lines={json_lines})
for _ in range(100):
    progress.remark("x" * 10_000)
    with progress.step("Valkey"):
        pass
import os
os._exit(7)
"""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        result = subprocess.run([sys.executable, "-c", program], stdout=writing, timeout=50, check=False)
    finally:
        os.close(writing)
    assert result.returncode == 7
