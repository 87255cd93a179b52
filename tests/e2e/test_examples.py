"""The Python examples of the documents, run as somebody would paste them who has filled in ports, key and password."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from support.killable_stack import wait_until
from support.local_stack import LocalStack, environment

pytestmark = pytest.mark.timeout(180)

_ROOT = Path(__file__).parents[2]
_EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_EXAMPLES = [
    pytest.param(match.group(1), id=f"{document.relative_to(_ROOT)}-{number}")
    for document in (_ROOT / "README.md", *sorted((_ROOT / "docs").glob("*.md")))
    for number, match in enumerate(_EXAMPLE.finditer(document.read_text(encoding="utf-8")), 1)
]


def _filled_in(example: str, stack: LocalStack) -> str:
    """The example with this stack's ports and secrets in place of those of a `make up` that found all ports free."""
    kept = yaml.safe_load((stack.folder / ".postroad" / "cli.yaml").read_text(encoding="utf-8"))
    ports = stack.ready["ports"]
    values = {
        "7443": str(ports["grpc"]),
        "2587": str(ports["smtp"]),
        "prk_…": kept["api_key"],
        "prs_…": kept["smtp"]["password"],
    }
    for word, value in values.items():
        example = example.replace(word, value)
    return example


@pytest.mark.parametrize("example", _EXAMPLES)
def test_an_example_sends_a_mail_that_arrives(stack: LocalStack, example: str, tmp_path: Path) -> None:
    file = tmp_path / "example.py"
    file.write_text(_filled_in(example, stack), encoding="utf-8")
    before = len(stack.inbox.mails())
    run = subprocess.run(
        [sys.executable, str(file)],
        cwd=stack.folder,
        env=environment(stack.folder),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    wait_until(lambda: len(stack.inbox.mails()) > before, "the mail has arrived")
