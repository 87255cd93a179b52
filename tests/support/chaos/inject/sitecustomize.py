"""Found by every Python that is started with this folder in PYTHONPATH: gives a node a clock that jumps, and its
workers a disk that fails.
"""

from __future__ import annotations

import importlib
import os
import sys

if os.environ.get("CHAOS_CLOCK") and "dataplane" in sys.orig_argv:
    importlib.import_module("chaos_clock").install(os.environ["CHAOS_CLOCK"])
if os.environ.get("CHAOS_DISK") and {"dataplane", "worker"} <= set(sys.orig_argv):
    importlib.import_module("chaos_disk").install(
        os.environ["CHAOS_DISK"], loses=bool(os.environ.get("CHAOS_DISK_LOSES"))
    )
