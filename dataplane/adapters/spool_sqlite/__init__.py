"""The durable spool: one folder, one SQLite file in it, and large contents beside that file.

`SqliteSpool.open` is the entrance; docs/spool.md says what is on disk. The parts:

    spool         gathers writes, groups them into commits, says what became of them
    transaction   the statements of one commit, run on the loop's thread
    committer     the one thread that runs COMMIT and checkpoints
    reader        the read-only connection
    contents      files of large messages
    identity      the lock on the folder, node and incarnation
    salvage       readable rows of a damaged file into a new one
    takeover      another node's folder into this node's
    schema, codec what lies in the file
"""

from __future__ import annotations

from dataplane.adapters.spool_sqlite.limits import SpoolLimits
from dataplane.adapters.spool_sqlite.salvage import SalvageReport, read_losses
from dataplane.adapters.spool_sqlite.spool import SqliteSpool
from dataplane.adapters.spool_sqlite.takeover import TakenSpool, take_folder

__all__ = ["SalvageReport", "SpoolLimits", "SqliteSpool", "TakenSpool", "read_losses", "take_folder"]
