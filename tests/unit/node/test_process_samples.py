"""What is told of the node's processes: what the kernel and the supervisor say, and nothing where they say nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

from dataplane.agent.processes import process_samples
from dataplane.spool_folders import quarantine_spool
from dataplane.telemetry import SampleValue


def samples(ready: Path, folder: Path) -> dict[tuple[str, ...], SampleValue]:
    return {(name, *labels): value for name, labels, value in process_samples(ready, folder / "spool", folder)}


def fake_process(proc: Path, pid: int, pages: int, user: int, system: int, fds: int) -> None:
    folder = proc / str(pid)
    (folder / "fd").mkdir(parents=True)
    for number in range(fds):
        (folder / "fd" / str(number)).touch()
    (folder / "statm").write_text(f"9999 {pages} 1 1 0 1 0\n")
    fields = ["S", *["0"] * 10, str(user), str(system), "0"]
    (folder / "stat").write_text(f"{pid} (a ) name) {' '.join(fields)}\n")


def test_memory_descriptors_time_and_restarts_of_each_process(tmp_path: Path) -> None:
    for pid, pages in ((10, 100), (11, 200)):
        fake_process(tmp_path, pid, pages, 150, 50, 3)
    ready = tmp_path / "ready.json"
    ready.write_text(json.dumps({"pid": 10, "processes": {"worker-0": 11}, "restarts": {"worker-0": 2}}))
    for spool in ("one", "two", "three"):
        (tmp_path / "spool" / spool).mkdir(parents=True)
    quarantine_spool(tmp_path / "spool" / "one", "damaged")
    quarantine_spool(tmp_path / "spool" / "three", "damaged")
    rows = samples(ready, tmp_path)
    page, ticks = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
    assert rows["process_resident_memory_bytes", "supervisor"] == 100 * page
    assert rows["process_resident_memory_bytes", "worker-0"] == 200 * page
    assert rows["process_cpu_seconds_total", "worker-0"] == 200 / ticks
    assert rows["process_open_fds", "worker-0"] == 3
    assert rows["process_restarts_total", "worker-0"] == 2
    assert rows["spools_quarantined",] == 2


def test_a_process_that_ended_and_a_missing_file_leave_the_rest(tmp_path: Path) -> None:
    fake_process(tmp_path, os.getpid(), 5, 1, 1, 1)
    rows = samples(tmp_path / "ready.json", tmp_path)
    assert set(rows) == {
        ("process_resident_memory_bytes", "agent"),
        ("process_cpu_seconds_total", "agent"),
        ("process_open_fds", "agent"),
        ("spools_quarantined",),
    }


def test_a_file_that_is_no_json_is_no_file(tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    ready.write_text("{")
    assert samples(ready, tmp_path) == {("spools_quarantined",): 0}
