"""Last-known-good: whole or refused, in order, in bounded pieces, and what a worker makes of it."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from dataplane.adapters import lkg
from dataplane.adapters.bundle_check import check_bundles
from dataplane.adapters.config_view import MappedConfigView
from dataplane.adapters.lkg import LastKnownGoodFiles
from dataplane.adapters.sealing import KeyRing, SealKey
from dataplane.agent.held import EMPTY, HeldConfig, Proposal, propose_snapshot
from dataplane.agent.ports import StoreError
from dataplane.core.config import SealedValue, seal_context
from postroad.config.v1 import bundle_pb2 as pb
from postroad.config.v1.denials_pb2 import Denial, DenialSet

KEY = SealKey(b"k" * 32)
POOL_KEY = b"p" * 32
NODE = "nodes/n1"
DAY_MS = 86_400_000


class Clock:
    def __init__(self, wall_ms: int = 1_790_000_000_000) -> None:
        self.now_ms = wall_ms

    def wall_ms(self) -> int:
        return self.now_ms

    def monotonic(self) -> float:
        return self.now_ms / 1000


def made(name: str, kind: pb.BundleKind.ValueType, content: bytes, revision: int = 1) -> pb.Bundle:
    return pb.Bundle(name=name, kind=kind, revision=revision, hash=hashlib.sha256(content).digest(), content=content)


def account(name: str, revision: int = 1, password: SealedValue | None = None) -> pb.Bundle:
    content = pb.AccountBundle(
        account=f"accounts/{name}", uid="3b1c1bb0-29f5-4d6c-8f0c-0d6d1f2a7c11", sender_domains=["example.com"]
    )
    content.retry_policy.base.seconds = 60
    content.retry_policy.factor = 2
    content.retry_policy.cap.seconds = 3600
    content.retry_policy.lifetime.seconds = 432_000
    provider = content.providers.add(name=f"accounts/{name}/providers/out")
    provider.smtp.endpoints.add(host="mx.example.net", port=25)
    provider.smtp.tls_policy = pb.SmtpProvider.TLS_POLICY_REQUIRED_VERIFIED
    provider.smtp.max_connections = 20
    provider.smtp.max_messages_per_connection = 100
    if password is not None:
        provider.smtp.username = "user"
        provider.smtp.password.key_id = password.key_id
        provider.smtp.password.ciphertext = password.ciphertext
    return made(f"accounts/{name}", pb.BUNDLE_KIND_ACCOUNT, content.SerializeToString(), revision)


def networks(network: str, name: str) -> pb.Bundle:
    content = pb.NetworksBundle(bindings=[pb.NetworksBundle.Binding(network=network, account=name)])
    return made("pools/default/networks", pb.BUNDLE_KIND_NETWORKS, content.SerializeToString())


def held(*bundles: pb.Bundle) -> HeldConfig:
    keys = {"k1": pb.PoolKey(key_id="k1", key=POOL_KEY)}
    return HeldConfig("nodePools/default", {bundle.name: bundle for bundle in bundles}, keys)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def files(tmp_path: Path, clock: Clock) -> LastKnownGoodFiles:
    return LastKnownGoodFiles(tmp_path / "last-known-good", KEY, NODE, clock)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    return tmp_path / "last-known-good" / "config"


def test_nothing_written_is_nothing_held(files: LastKnownGoodFiles) -> None:
    assert files.read_config() is EMPTY
    assert files.read_denials() == DenialSet()
    assert files.read_contact() == 0


def test_what_was_written_is_read_back(files: LastKnownGoodFiles) -> None:
    config = held(account("b"), account("a"), networks("192.0.2.0/24", "accounts/a"))
    files.write_config(config)
    assert files.read_config() == config
    assert files.load().digest == config.digest


def many(count: int) -> HeldConfig:
    return held(*(made(f"accounts/{number:05}", pb.BUNDLE_KIND_ACCOUNT, bytes(3_000)) for number in range(count)))


def test_a_large_configuration_is_written_and_read_in_parts(files: LastKnownGoodFiles) -> None:
    config = many(400)
    files.write_config(config)
    parts = list(files._parts())
    assert len(parts) == 5
    assert max(part.ByteSize() for part in parts) < 1.1 * lkg.PART_BYTES
    assert files.read_config() == config


def test_the_file_is_closed_to_others_and_shows_nothing(files: LastKnownGoodFiles, config_file: Path) -> None:
    files.write_config(held(account("secretive")))
    assert config_file.stat().st_mode & 0o077 == 0
    assert b"secretive" not in config_file.read_bytes()
    assert POOL_KEY not in config_file.read_bytes()


def test_a_shortened_file_is_refused_wherever_it_was_cut(files: LastKnownGoodFiles, config_file: Path) -> None:
    files.write_config(many(100))
    whole = config_file.read_bytes()
    second_part = 23 + 4 + int.from_bytes(whole[23:27], "big")
    for cut in (0, 5, 22, 23, 25, 1_000, second_part, second_part + 4, len(whole) - 1):
        config_file.write_bytes(whole[:cut])
        with pytest.raises(StoreError):
            files.load()


def test_a_changed_byte_is_refused_wherever_it_is(files: LastKnownGoodFiles, config_file: Path) -> None:
    files.write_config(many(100))
    whole = config_file.read_bytes()
    for place in (0, 8, 24, 30, 40, 5_000, len(whole) // 2, len(whole) - 1):
        changed = bytearray(whole)
        changed[place] ^= 1
        config_file.write_bytes(changed)
        with pytest.raises(StoreError):
            files.load()


def test_parts_of_two_writings_do_not_mix(files: LastKnownGoodFiles, config_file: Path) -> None:
    files.write_config(many(100))
    first = config_file.read_bytes()
    files.write_config(many(100))
    second = config_file.read_bytes()
    middle = 23 + 4 + int.from_bytes(first[23:27], "big")
    config_file.write_bytes(first[:middle] + second[middle:])
    with pytest.raises(StoreError):
        files.load()


def test_another_key_or_another_node_is_refused_in_words(files: LastKnownGoodFiles, tmp_path: Path) -> None:
    files.write_config(held(account("a")))
    files.write_denials(DenialSet(version=3))
    other_key = LastKnownGoodFiles(tmp_path / "last-known-good", SealKey(b"o" * 32), NODE, Clock())
    with pytest.raises(StoreError, match="another seal key"):
        other_key.load()
    other_node = LastKnownGoodFiles(tmp_path / "last-known-good", KEY, "nodes/n2", Clock())
    with pytest.raises(StoreError, match="nodes/n1"):
        other_node.load()
    with pytest.raises(StoreError):
        other_node.read_denials()


def test_a_folder_that_cannot_be_written_is_an_error_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    files = LastKnownGoodFiles(tmp_path / "file" / "folder", KEY, NODE, Clock())
    with pytest.raises(StoreError, match="cannot be written"):
        files.write_denials(DenialSet(version=1))


def view_of(files: LastKnownGoodFiles, clock: Clock, **more: int) -> MappedConfigView:
    return MappedConfigView(files, clock, 7 * 86_400.0, **more)


def test_a_view_serves_accounts_networks_providers_and_secrets(files: LastKnownGoodFiles, clock: Clock) -> None:
    context = seal_context("accounts/a", "accounts/a/providers/out", "password")
    sealed = KeyRing({"k1": POOL_KEY}).seal("k1", b"hush", context)
    files.write_config(held(account("a", password=sealed), networks("192.0.2.0/24", "accounts/a")))
    view = view_of(files, clock)
    assert view.load() == files.load().digest.hex() == view.digest
    compiled = view.account("accounts/a")
    assert compiled is not None
    assert compiled.owns_sender_domain("example.com")
    assert view.account("accounts/b") is None
    assert view.account("pools/default/networks") is None
    assert view.account_of_network("192.0.2.9") == "accounts/a"
    provider = view.provider("accounts/a/providers/out")
    assert provider is not None
    assert provider.password is not None
    assert view.unseal(provider.password, "accounts/a", provider.name, "password") == b"hush"
    assert view.provider("accounts/b/providers/out") is None
    assert view.provider("providers/none") is None


def test_a_torn_file_leaves_what_is_in_use(files: LastKnownGoodFiles, clock: Clock, config_file: Path) -> None:
    files.write_config(held(account("a")))
    view = view_of(files, clock)
    view.load()
    files.write_config(held(account("b")))
    config_file.write_bytes(config_file.read_bytes()[:-1])
    with pytest.raises(StoreError):
        view.load()
    assert view.account("accounts/a") is not None


def test_an_account_is_compiled_once_until_it_changes(files: LastKnownGoodFiles, clock: Clock) -> None:
    files.write_config(held(account("a"), account("b")))
    view = view_of(files, clock)
    view.load()
    first, other = view.account("accounts/a"), view.account("accounts/b")
    files.write_config(held(account("a", revision=2), account("b")))
    view.load()
    assert view.account("accounts/b") is other
    changed = view.account("accounts/a")
    assert changed is not first
    assert changed is not None
    assert changed.account.revision == 2


def test_compiled_accounts_are_bounded(files: LastKnownGoodFiles, clock: Clock) -> None:
    files.write_config(held(account("a"), account("b"), account("c")))
    view = view_of(files, clock, cached_accounts=2)
    view.load()
    first = view.account("accounts/a")
    view.account("accounts/b")
    assert view.account("accounts/a") is first
    view.account("accounts/c")
    assert view.account("accounts/a") is first
    assert len(view._compiled) == 2


def test_denials_never_go_backwards_in_a_worker(files: LastKnownGoodFiles, clock: Clock) -> None:
    view = view_of(files, clock)
    files.write_denials(DenialSet(version=5, denials=[Denial(account="accounts/a")]))
    assert view.load_denials() == 5
    files.write_denials(DenialSet(version=4))
    assert view.load_denials() == 5
    assert "accounts/a" in view.denials.accounts


def is_stale(view: MappedConfigView) -> bool:
    return view.stale


def test_age_counts_from_the_last_contact(files: LastKnownGoodFiles, clock: Clock) -> None:
    view = view_of(files, clock)
    assert is_stale(view)
    files.write_config(held(account("a")))
    view.load()
    assert not is_stale(view)
    clock.now_ms += 8 * DAY_MS
    assert is_stale(view)
    view.note_contact(clock.now_ms - DAY_MS)
    assert not is_stale(view)
    files.write_contact(clock.now_ms + DAY_MS)
    view.load_contact()
    assert view.contact_ms == clock.now_ms + DAY_MS


def proposal(*bundles: pb.Bundle, key_id: str = "k1") -> Proposal:
    return propose_snapshot(EMPTY, "pool", bundles, [pb.PoolKey(key_id=key_id, key=POOL_KEY)], len(bundles))


def test_the_check_names_bundles_that_cannot_be_read_or_are_wrong() -> None:
    torn = made("accounts/torn", pb.BUNDLE_KIND_ACCOUNT, b"\xff\xff")
    unknown = made("x", pb.BUNDLE_KIND_UNSPECIFIED, b"")
    lying = account("lying")
    lying.hash = b"0" * 32
    errors = check_bundles(proposal(torn, unknown, lying, account("good"), networks("0.0.0.0/0", "accounts/a")))
    assert set(errors) == {"accounts/torn", "x", "accounts/lying", "pools/default/networks"}


def test_the_check_refuses_secrets_that_do_not_open() -> None:
    elsewhere = KeyRing({"k1": POOL_KEY}).seal("k1", b"hush", seal_context("accounts/b", "x", "password"))
    assert set(check_bundles(proposal(account("a", password=elsewhere)))) == {"accounts/a"}
    here = KeyRing({"k1": POOL_KEY}).seal(
        "k1", b"hush", seal_context("accounts/a", "accounts/a/providers/out", "password")
    )
    assert check_bundles(proposal(account("a", password=here))) == {}
    assert set(check_bundles(proposal(account("a", password=here), key_id="k2"))) == {"accounts/a"}


def test_denials_are_stored_on_a_full_disk_in_the_room_kept_for_them(
    files: LastKnownGoodFiles, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve = config_file.parent / lkg.RESERVE
    files.write_denials(DenialSet(version=1))
    assert reserve.exists()
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if reserve.exists():
            raise OSError(errno.ENOSPC, "no space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    files.write_denials(DenialSet(version=2))
    assert files.read_denials().version == 2
    # Others have eaten that room as well.
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space left on device")))
    with pytest.raises(StoreError):
        files.write_denials(DenialSet(version=3))
    assert files.read_denials().version == 2
