"""The clock of a thread's work counts while it works, and stands still while it sleeps."""

from __future__ import annotations

import threading
import time

from dataplane.busy_time import busy_time


def test_work_counts_and_waiting_does_not() -> None:
    clock = busy_time()
    began_s, began_busy_s = time.monotonic(), clock()
    while time.thread_time() and clock() - began_busy_s < 0.01:
        assert time.monotonic() - began_s < 30.0
    busy_s, waited = clock(), threading.Event()
    waited.wait(0.05)
    assert clock() - busy_s < 0.05
