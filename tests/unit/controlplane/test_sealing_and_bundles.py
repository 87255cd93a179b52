from __future__ import annotations

import hashlib
import itertools
import os
from dataclasses import replace
from pathlib import Path

import pytest

from controlplane.adapters.bundles import ProtobufBundleEncoder
from controlplane.adapters.sealing import Keyring, KeyringError, KeyringSealer
from controlplane.ports import UnsealError
from dataplane.adapters import bundle_codec
from dataplane.adapters.sealing import KeyRing
from dataplane.core import config
from postroad.config.v1 import bundle_pb2

KEY = bytes(range(32))
PLACE = ("acme", "providers", "row", "password_sealed")


@pytest.fixture
def sealer() -> KeyringSealer:
    return KeyringSealer(Keyring({"k1": KEY}))


def test_a_secret_comes_back_from_its_own_place_only(sealer: KeyringSealer) -> None:
    sealed = sealer.seal(b"hunter2", *PLACE)
    assert sealer.unseal(sealed, *PLACE) == b"hunter2"
    assert b"hunter2" not in sealed
    for index in range(4):
        moved = [*PLACE]
        moved[index] = "elsewhere"
        with pytest.raises(UnsealError):
            sealer.unseal(sealed, *moved)


def test_no_byte_of_sealed_bytes_can_be_changed(sealer: KeyringSealer) -> None:
    sealed = sealer.seal(b"hunter2", *PLACE)
    for place in range(len(sealed)):
        changed = bytearray(sealed)
        changed[place] ^= 1
        with pytest.raises(UnsealError):
            sealer.unseal(bytes(changed), *PLACE)
    for length in range(len(sealed)):
        with pytest.raises(UnsealError):
            sealer.unseal(sealed[:length], *PLACE)


def test_a_new_key_seals_and_old_bytes_still_open_until_their_key_is_gone(sealer: KeyringSealer) -> None:
    old = sealer.seal(b"secret", *PLACE)
    both = KeyringSealer(Keyring({"k1": KEY, "k2": KEY[::-1]}))
    new = both.seal(b"secret", *PLACE)
    assert both.unseal(old, *PLACE) == both.unseal(new, *PLACE) == b"secret"
    alone = KeyringSealer(Keyring({"k2": KEY[::-1]}))
    assert alone.unseal(new, *PLACE) == b"secret"
    with pytest.raises(UnsealError, match="no key k1"):
        alone.unseal(old, *PLACE)


def test_the_keyring_is_a_folder_of_private_files(tmp_path: Path) -> None:
    made = Keyring.load_or_create(tmp_path / "keys")
    (file,) = (tmp_path / "keys").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    again = Keyring.load(tmp_path / "keys")
    assert again.page_token_key() == made.page_token_key()
    assert Keyring.add_key(tmp_path / "keys") == Keyring.load(tmp_path / "keys").active
    file.chmod(0o644)
    with pytest.raises(KeyringError, match="chmod 600"):
        Keyring.load(tmp_path / "keys")


@pytest.mark.parametrize("content", ["", "not base64!", "AAAA"])
def test_a_bad_key_file_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "k1.key"
    file.write_text(content)
    file.chmod(0o600)
    with pytest.raises(KeyringError):
        Keyring.load(tmp_path)
    with pytest.raises(KeyringError):
        Keyring({})


def test_a_bundle_secret_opens_on_a_node_and_seals_to_the_same_bytes_again(sealer: KeyringSealer) -> None:
    context = config.seal_context("accounts/a", "accounts/a/providers/p", "password")
    sealed = sealer.seal_for_pool(b"hunter2", "pool-1", KEY, context)
    assert sealed == sealer.seal_for_pool(b"hunter2", "pool-1", KEY, context)
    assert KeyRing({"pool-1": KEY}).unseal(sealed, context) == b"hunter2"


def test_two_bundle_secrets_never_share_a_nonce(sealer: KeyringSealer) -> None:
    nonces = {
        sealer.seal_for_pool(secret, "pool-1", KEY, context).ciphertext[:12]
        for secret, context in itertools.product((b"a", b"b", b""), (b"x", b"y", b"xa"))
    }
    assert len(nonces) == 9


def account(order: int = 1) -> config.Account:
    credentials = [config.Credential(f"accounts/a/smtpCredentials/c{n}", bytes(32), expire_ms=n) for n in range(3)]
    sealed = config.SealedValue("k", bytes(40))
    provider = config.SmtpProvider(
        name="accounts/a/providers/p",
        account="accounts/a",
        endpoints=(config.Endpoint("relay.example.com", 465, implicit_tls=True),),
        tls_policy=config.TlsPolicy.REQUIRED_VERIFIED,
        username="u",
        password=sealed,
    )
    rule = config.Rule(
        name="accounts/a/routingRules/r",
        priority=3,
        targets=(config.Target("accounts/a/providers/p", weight=2),),
        sender_patterns=("<>",),
        recipient_patterns=("@b.example",),
        headers=(config.HeaderCondition("subject", "*x*"),),
        min_size_bytes=1,
        max_size_bytes=2,
    )
    return config.Account(
        name="accounts/a",
        uid="0192f8a0-0000-4000-8000-000000000000",
        revision=0,
        sender_domains=("a.example", "*.a.example"),
        credentials={one.name: one for one in credentials[::order]},
        providers={provider.name: provider},
        rules=(rule,),
        retry_policy=config.RetryPolicy(1.5, 2.5, 30.25, 90.0),
    )


def test_a_node_reads_the_account_that_was_written() -> None:
    written = account()
    content = ProtobufBundleEncoder().account(written)
    bundle = bundle_pb2.Bundle(
        name=written.name,
        kind=bundle_pb2.BUNDLE_KIND_ACCOUNT,
        revision=7,
        hash=hashlib.sha256(content).digest(),
        content=content,
    )
    assert bundle_codec.check_bundle(bundle) == []
    assert bundle_codec.decode_account(bundle) == replace(written, revision=7)


def test_the_order_in_which_credentials_came_does_not_show() -> None:
    encoder = ProtobufBundleEncoder()
    assert encoder.account(account()) == encoder.account(account(order=-1))


def test_the_keyring_takes_randomness_from_where_it_is_told() -> None:
    taken: list[int] = []

    def random(size: int) -> bytes:
        taken.append(size)
        return os.urandom(size)

    KeyringSealer(Keyring({"k1": KEY}), random).seal(b"x", *PLACE)
    assert sorted(taken) == [12, 12, 32]
