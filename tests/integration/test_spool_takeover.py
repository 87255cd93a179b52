"""Another node's folder, taken over: what it is called then, what is left behind, what is no spool, what it lost."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from dataplane.adapters.spool_sqlite import SqliteSpool, read_losses, take_folder
from dataplane.adapters.spool_sqlite.identity import lock_folder
from dataplane.adapters.spool_sqlite.salvage import MARKER
from dataplane.core.envelope import Envelope
from dataplane.core.ids import format_message_id
from dataplane.ports import SpoolError, SpoolIdentity, SpoolLosses
from dataplane.spool_folders import QUARANTINE_FILE, REFUSED_FILE, is_refused
from support.spools import ManualClock, fail_test, make_envelope, make_row, open_durable

LARGE = b"x" * 100_000


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def spools(tmp_path: Path) -> Path:
    folder = tmp_path / "mx2" / "spool"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system."""
    shared = Path("/dev/shm")  # noqa: S108 - memory, so another file system
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system")
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


async def filled(folder: Path, clock: ManualClock) -> tuple[Path, list[Envelope]]:
    """A spool of node-1 with a small message and a large one."""
    source = folder / str(uuid.uuid4())
    spool = await open_durable(source, clock)
    envelopes = [make_envelope(), make_envelope()]
    for envelope, content in zip(envelopes, (b"small", LARGE), strict=True):
        await spool.accept(envelope, content, [make_row(0)])
    await spool.close()
    (source / QUARANTINE_FILE).write_text("of the former node\n")
    return source, envelopes


async def opened(spools: Path, name: str, clock: ManualClock) -> SqliteSpool:
    return await SqliteSpool.open(spools / name, "nodes/mx2", clock, on_failed=fail_test)


async def check_taken(spools: Path, source: Path, envelopes: list[Envelope], clock: ManualClock) -> None:
    assert is_refused(spools / source.name)
    spool = await opened(spools, source.name, clock)
    assert spool.identity == SpoolIdentity(source.name, "nodes/mx2", 2)
    for envelope, content in zip(envelopes, (b"small", LARGE), strict=True):
        stored = await spool.load(envelope.message_id)
        assert stored is not None
        assert (stored.envelope, stored.content) == (envelope, content)
    await spool.close()


async def test_on_the_same_disk_the_folder_moves(tmp_path: Path, spools: Path, clock: ManualClock) -> None:
    source, envelopes = await filled(tmp_path, clock)
    taken = take_folder(source, spools, "nodes/mx2")
    assert (taken.spool, taken.former_node, taken.incarnation) == (source.name, "node-1", 1)
    assert not source.exists()
    await check_taken(spools, source, envelopes, clock)


async def test_from_another_disk_it_is_copied_and_the_former_node_cannot_open_what_is_left(
    other_disk: Path, spools: Path, clock: ManualClock
) -> None:
    source, envelopes = await filled(other_disk, clock)
    leftover = spools / f"{source.name}.attaching"
    leftover.mkdir()
    (leftover / "of a copy that was cut").write_text("")
    assert not take_folder(source, spools, "nodes/mx2").left_unmarked
    assert [folder.name for folder in spools.iterdir()] == [source.name]
    assert not (spools / source.name / QUARANTINE_FILE).exists()
    await check_taken(spools, source, envelopes, clock)
    assert is_refused(source)
    with pytest.raises(SpoolError, match="belongs to node nodes/mx2"):
        await open_durable(source, clock)


async def test_a_folder_whose_taking_was_cut_behind_the_mark_can_be_taken_again(
    tmp_path: Path, spools: Path, clock: ManualClock
) -> None:
    source, envelopes = await filled(tmp_path, clock)
    (source / REFUSED_FILE).write_text("attached to nodes/mx3: waits for the control plane\n")
    (source / "identity").write_bytes(orjson.dumps({"spool": source.name, "node": "nodes/mx3", "incarnation": 1}))
    assert take_folder(source, spools, "nodes/mx2").former_node == "nodes/mx3"
    await check_taken(spools, source, envelopes, clock)


async def test_what_is_open_damaged_or_no_spool_is_left_as_it_is(
    tmp_path: Path, spools: Path, clock: ManualClock
) -> None:
    source, _ = await filled(tmp_path, clock)
    lock = lock_folder(source)
    with pytest.raises(SpoolError, match="in use by another process"):
        take_folder(source, spools, "nodes/mx2")
    os.close(lock)
    (source / "spool.db").rename(source / "away")
    with pytest.raises(SpoolError, match="holds no spool"):
        take_folder(source, spools, "nodes/mx2")
    (source / "away").rename(source / "spool.db")
    renamed = source.rename(source.with_name(str(uuid.uuid4())))
    with pytest.raises(SpoolError, match="a copied spool must not be opened"):
        take_folder(renamed, spools, "nodes/mx2")
    renamed.rename(source)
    (source / "identity").write_text("of nobody")
    with pytest.raises(SpoolError, match="cannot be read"):
        take_folder(source, spools, "nodes/mx2")
    assert list(spools.iterdir()) == []
    assert not is_refused(source)


async def test_what_a_damaged_spool_lost_is_named_for_as_long_as_the_damaged_file_is_kept(
    tmp_path: Path, spools: Path, clock: ManualClock
) -> None:
    source, envelopes = await filled(tmp_path, clock)
    assert read_losses(source) == SpoolLosses()
    (source / "content" / envelopes[1].message_id.hex()).unlink()
    (source / MARKER).write_text("somebody doubts it")
    take_folder(source, spools, "nodes/mx2")
    spool = await opened(spools, source.name, clock)
    await spool.close()
    lost = (format_message_id(envelopes[1].message_id),)
    for _ in range(2):
        assert read_losses(spools / source.name) == SpoolLosses(lost, 1, 0, 0)
        spool = await opened(spools, source.name, clock)
        await spool.close()
    for kept in (spools / source.name / "quarantine").iterdir():
        (kept / "report.json").write_text("not ours")
    assert read_losses(spools / source.name) == SpoolLosses()
