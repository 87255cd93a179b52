"""What the processes of a node are given of its settings, and what of them may change while they run."""

from __future__ import annotations

import base64
import os
import re
from pathlib import Path
from typing import Any

import pytest

from dataplane.settings import Settings, SettingsError
from dataplane.settings_handover import RELOADABLE, HandedSettings, read_handed, take_over

KEY = base64.b64encode(bytes(32)).decode()


def settings(**values: Any) -> Settings:
    return Settings(**{"data_dir": Path("/x"), "hostname": "h", "listeners": [{"port": 25, "mode": "plain"}], **values})


def test_what_may_change_is_taken_over_and_the_rest_is_named() -> None:
    running = settings(workers=2, metrics={"port": 1})
    read = settings(
        workers=3, metrics={"port": 2}, log_level="debug", ingress={"connections": 7, "content_bytes": 2_000_000}
    )
    taken = take_over(running, read)
    assert sorted(taken.changed) == ["ingress.connections", "log_level"]
    assert sorted(taken.kept) == ["ingress.content_bytes", "metrics.port", "workers"]
    assert (taken.settings.log_level, taken.settings.ingress.connections) == ("debug", 7)
    assert (taken.settings.workers, taken.settings.metrics.port) == (2, 1)
    assert taken.settings.ingress.content_bytes == running.ingress.content_bytes


def test_every_setting_that_may_change_exists() -> None:
    for name in RELOADABLE:
        value: Any = settings()
        for part in name.split("."):
            value = getattr(value, part)


def test_what_may_change_is_what_the_documentation_says() -> None:
    text = (Path(__file__).parents[3] / "docs" / "node.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- `([a-z_.]+)`$", text, re.MULTILINE)
    assert sorted(listed) == sorted(RELOADABLE)


def test_a_process_gets_the_settings_with_their_secrets_whatever_stands_in_its_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = settings(
        workers=3,
        seal_key=KEY,
        redis={"url": "redis://:hidden@localhost/0"},
        tls={"certificate_file": "/a", "key_file": "/b"},
        delivery={"allowed_private_networks": ["10.0.0.0/8"]},
    )
    handed = HandedSettings(given)
    monkeypatch.setenv("POSTROAD_NODE_WORKERS", "0")
    read = read_handed(handed.descriptor)
    assert read.model_dump(context={"secrets": True}) == given.model_dump(context={"secrets": True})
    assert read.redis is not None
    assert read.redis.url.get_secret_value() == "redis://:hidden@localhost/0"
    os.close(handed.descriptor)


def test_settings_are_replaced_whole_however_long_they_were() -> None:
    handed = HandedSettings(settings(hostname="a" * 200))
    handed.put(settings(hostname="b"))
    assert read_handed(handed.descriptor).hostname == "b"
    os.close(handed.descriptor)


def test_settings_that_are_half_written_are_an_error_that_shows_none_of_them() -> None:
    handed = HandedSettings(settings(redis={"url": "redis://:hidden@localhost/0"}))
    os.ftruncate(handed.descriptor, 300)
    with pytest.raises(SettingsError) as failed:
        read_handed(handed.descriptor)
    assert "hidden" not in str(failed.value)
    os.close(handed.descriptor)
