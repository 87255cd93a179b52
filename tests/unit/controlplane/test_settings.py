"""Settings of the control plane: where they come from, what is refused, what is shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from redis.asyncio import ConnectionPool

from controlplane.settings import SettingsError, load_settings, redacted, setting_names

MINIMAL = """
database:
  api_dsn: postgresql://postroad_api:canary-secret@127.0.0.1:7432/postroad
  fleet_dsn: postgresql://postroad_fleet:canary-secret@127.0.0.1:7432/postroad
pki_dir: pki
keyring_dir: keys
"""
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _clean_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("POSTROAD_CONFIG", raising=False)
    monkeypatch.setattr("controlplane.settings.SYSTEM_FOLDER", tmp_path / "etc")


def _write(folder: Path, text: str = MINIMAL) -> Path:
    file = folder / "controlplane.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_the_file_named_on_the_command_line_wins_over_all_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path, MINIMAL + "log_level: error\n")
    named = tmp_path / "named.yaml"
    named.write_text(MINIMAL + "log_level: warning\n", encoding="utf-8")
    monkeypatch.setenv("POSTROAD_CONFIG", str(tmp_path))

    assert load_settings(named).log_level == "warning"
    assert load_settings().log_level == "error"


def test_the_system_folder_is_the_last_resort(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    _write(tmp_path / "etc", MINIMAL + "log_level: debug\n")

    assert load_settings().log_level == "debug"


def test_the_environment_wins_over_the_file_and_nests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, MINIMAL + "grpc: {port: 1}\nhttp: {port: 2}\n")
    monkeypatch.setenv("POSTROAD_CONTROLPLANE_GRPC__PORT", "0")

    settings = load_settings()

    assert (settings.grpc.port, settings.http.port) == (0, 2)


@pytest.mark.parametrize("text", ["colour: red\n", "grpc: {colour: red}\n"])
def test_an_unknown_key_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    _write(tmp_path, MINIMAL + text)

    with pytest.raises(SettingsError, match="colour"):
        load_settings()


@pytest.mark.parametrize("name", ["POSTROAD_CONTROLPLANE_COLOUR", "POSTROAD_CONTROLPLANE_GRPC__COLOUR"])
def test_an_unknown_variable_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    _write(tmp_path)
    monkeypatch.setenv(name, "red")

    with pytest.raises(SettingsError, match=name):
        load_settings()


def test_a_wrong_value_is_named_and_not_shown(tmp_path: Path) -> None:
    _write(tmp_path, MINIMAL.replace("postgresql://postroad_api", "mysql://postroad_api"))

    with pytest.raises(SettingsError, match="api_dsn") as caught:
        load_settings()

    assert "canary-secret" not in str(caught.value)


def test_a_missing_file_is_an_error_when_it_was_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is no file"):
        load_settings(tmp_path / "absent.yaml")


def test_passwords_are_never_shown(tmp_path: Path) -> None:
    _write(tmp_path)
    settings = load_settings()

    shown = redacted(settings)

    assert "canary-secret" not in shown + repr(settings) + str(settings)
    assert "postgresql://postroad_api:***@127.0.0.1:7432/postroad" in shown


def test_settings_cannot_be_changed_afterwards(tmp_path: Path) -> None:
    _write(tmp_path)
    settings = load_settings()

    with pytest.raises(ValueError, match="frozen"):
        setattr(settings, "log_level", "debug")  # noqa: B010 - mypy knows already that it is refused


def test_documented_settings_are_the_settings_that_exist() -> None:
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `([a-z_.]+)` \|", text, flags=re.MULTILINE)

    assert sorted(documented) == setting_names()


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
    _write(tmp_path, MINIMAL + f"redis: {{url: '{url}'}}\n")

    with pytest.raises(SettingsError, match=problem) as caught:
        load_settings()

    assert "canary" not in str(caught.value)


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
    _write(tmp_path, MINIMAL + f"redis: {{url: '{url}'}}\n")

    taken = load_settings().redis.url

    assert taken is not None
    assert ConnectionPool.from_url(url).make_connection() is not None  # type: ignore[no-untyped-call] # redis-py's
    assert taken.get_secret_value() == url


def test_the_password_of_redis_is_not_shown(tmp_path: Path) -> None:
    _write(tmp_path, MINIMAL + "redis: {url: 'redis://:canary-redis@127.0.0.1:6379/0'}\n")

    assert "canary-redis" not in redacted(load_settings())
