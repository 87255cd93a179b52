"""node.yaml: where it is found, what wins, and that every failure says what to mend."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml

from dataplane.adapters.limiter_link import Server
from dataplane.settings import Settings, SettingsError, TlsSettings, load_settings, redacted, setting_names

PLAIN = [{"port": 2525, "mode": "plain"}]
DOCUMENT = Path(__file__).parents[3] / "docs" / "settings-node.md"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.startswith("POSTROAD_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def write(folder: Path, **values: object) -> Path:
    file = folder / "node.yaml"
    file.write_text(yaml.safe_dump({"data_dir": "data", "listeners": PLAIN, **values}))
    return file


def test_the_file_is_found_where_it_should_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("named", "environment"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, hostname=f"{name}.example")
    write(tmp_path, hostname="here.example")
    assert load_settings(tmp_path / "named").hostname == "named.example"
    assert load_settings().hostname == "here.example"
    monkeypatch.setenv("POSTROAD_CONFIG", str(tmp_path / "environment" / "node.yaml"))
    assert load_settings().hostname == "environment.example"


def test_relative_paths_are_meant_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    tls = {"certificate_file": "tls/cert.pem", "key_file": "/abs/key.pem"}
    settings = load_settings(write(tmp_path / "etc", tls=tls))
    assert settings.data_dir == tmp_path / "etc" / "data"
    assert settings.tls is not None
    assert settings.tls.certificate_file == tmp_path / "etc" / "tls" / "cert.pem"
    assert settings.tls.key_file == Path("/abs/key.pem")


def test_the_environment_wins_and_nests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTROAD_NODE_METRICS__PORT", "9")
    monkeypatch.setenv("POSTROAD_NODE_HOSTNAME", "env.example")
    settings = load_settings(write(tmp_path, hostname="file.example", metrics={"port": 8, "address": "127.0.0.2"}))
    assert (settings.hostname, settings.metrics.port, settings.metrics.address) == ("env.example", 9, "127.0.0.2")


def test_the_environment_alone_is_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("POSTROAD_NODE_DATA_DIR", "/var/lib/node")
    monkeypatch.setenv("POSTROAD_NODE_LISTENERS", '[{"port": 2525, "mode": "plain"}]')
    assert load_settings().data_dir == Path("/var/lib/node")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"no_such": 1}, "no_such"),
        ({"metrics": {"prot": 1}}, "metrics.prot"),
        ({"listeners": [{"port": 25, "mode": "smtps"}]}, "listeners.0.mode"),
        ({"listeners": []}, "name at least one"),
        ({"listeners": [{"port": 587, "mode": "starttls"}]}, "certificate_file"),
        ({"listeners": PLAIN * 2}, "twice"),
        ({"control_plane": {"address": "nowhere"}}, "host:port"),
        ({"listeners": [{"port": 25, "mode": "plain", "address": "localhost"}]}, "listeners.0.address"),
        ({"workers": -1}, "workers"),
        ({"delivery": {"allowed_private_networks": ["10.0.0.0/99"]}}, "allowed_private_networks"),
        # With no room at all nothing would ever be delivered.
        ({"delivery": {"handover_bytes": 0}}, "delivery.handover_bytes"),
    ],
)
def test_what_means_nothing_is_an_error_that_names_it(tmp_path: Path, values: dict[str, object], said: str) -> None:
    file = write(tmp_path, **values)
    with pytest.raises(SettingsError, match=re.escape(said)) as raised:
        load_settings(file)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_unknown_variable_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTROAD_NODE_METRICS__PROT", "1")
    with pytest.raises(SettingsError, match="POSTROAD_NODE_METRICS__PROT"):
        load_settings(write(tmp_path))


@pytest.mark.parametrize("content", ["[1]", "data_dir: [", "\xff"])
def test_a_file_that_is_no_mapping_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "node.yaml").write_text(content, encoding="latin-1")
    with pytest.raises(SettingsError):
        load_settings(tmp_path)


def test_a_missing_file_is_an_error_where_it_was_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--config"):
        load_settings(tmp_path / "none.yaml")


def test_secrets_are_not_shown_and_nothing_can_be_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTROAD_NODE_SEAL_KEY", "hush")
    settings = load_settings(write(tmp_path, redis={"url": "redis://user:hush@127.0.0.1:6379/0"}))
    shown = redacted(settings)
    assert "hush" not in shown
    assert "redis://user:***@127.0.0.1:6379/0" in shown
    with pytest.raises(ValueError, match="frozen"):
        settings.workers = 2


def test_a_wrong_secret_is_not_repeated_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as raised:
        load_settings(write(tmp_path, redis={"url": {"hush": 1}}))
    assert "hush" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://127.0.0.1:6379/0", "no redis://"),
        ("127.0.0.1:6379", "no redis://"),
        ("redis:127.0.0.1", "no redis://"),
        ("redis://:canary/secret@127.0.0.1:6379/0", "percent-encoded"),
        ("redis://:canary#secret@127.0.0.1:6379/0", "percent-encoded"),
        ("redis://canary#secret@127.0.0.1:6379/0", "percent-encoded"),
        ("redis://127.0.0.1:canary/0", "no number"),
        ("redis://127.0.0.1:65536/0", "no number"),
        ("redis://[canary/0", "cannot be read"),
        ("redis://127.0.0.1:6379/canary", "no number as database"),
        ("redis://127.0.0.1:6379?db=canary", "no number as db"),
        ("redis://127.0.0.1:6379?canary=1", "options other than db"),
        ("redis://127.0.0.1:6379?ssl_ca_certs=ca.pem", "options other than db"),
        ("rediss://127.0.0.1:6379?ssl_cert_reqs=canary", "ssl_cert_reqs"),
        ("unix://", "no socket"),
    ],
)
def test_a_url_of_redis_that_is_none_is_refused_without_its_password(tmp_path: Path, url: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem) as raised:
        load_settings(write(tmp_path, redis={"url": url}))
    assert "canary" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1",
        "redis://:p%2Fw@[::1]:6379/15",
        "rediss://user:secret@cache.example:6380/0?ssl_ca_certs=/etc/ca.pem&ssl_cert_reqs=required",
        "unix:///run/valkey.sock?db=3",
    ],
)
def test_a_url_that_the_client_of_redis_understands_is_taken(tmp_path: Path, url: str) -> None:
    settings = load_settings(write(tmp_path, redis={"url": url})).redis
    assert settings is not None
    assert settings.url.get_secret_value() == url
    assert Server(url).connection(None) is not None


def test_every_setting_is_documented_and_nothing_else_is() -> None:
    documented = re.findall(r"^\| `([a-z_.]+)` \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(documented) == setting_names()


def test_documented_defaults_are_the_real_ones() -> None:
    rows = re.findall(r"^\| `([a-z_.]+)` \| `([^`|]*)` \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    tls = TlsSettings(certificate_file=Path("/c"), key_file=Path("/k"))
    shown = yaml.safe_load(redacted(Settings(data_dir=Path("/x"), hostname="h", tls=tls)))
    assert len(rows) > 15
    for name, default in rows:
        value = shown
        for part in name.split("."):
            value = value[0][part] if isinstance(value, list) else value[part]
        assert yaml.safe_load(default) == value, name
