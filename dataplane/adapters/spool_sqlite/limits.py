"""What bounds a spool's use of disk, and when it does its housekeeping; plain values, all in bytes or pages."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class SpoolLimits:
    """Sizes of a spool.

    `inline_bytes`: larger contents go to files. `checkpoint_bytes`: a WAL above it is checkpointed. `wal_cap_bytes`: a
    WAL above it, because a reader holds on to it, makes accepting fail. `floor_bytes`: free disk that accepting leaves
    alone, at least 1.5 times the largest message. `vacuum_pages`: more free pages than this, and more than half of the
    file, are given back to the file system. `reserve_bytes`: room kept for what must be written on a full disk.
    `incoming_count`: so many contents may be arriving in files at once, for each has a descriptor.
    """

    inline_bytes: int = 64 * 1024
    checkpoint_bytes: int = 8 * MIB
    wal_cap_bytes: int = 256 * MIB
    floor_bytes: int = 64 * MIB
    vacuum_pages: int = 4096
    reserve_bytes: int = 16 * MIB
    incoming_count: int = 1_000
