"""Where the command line finds its server and key, and to whom a key may go."""

from __future__ import annotations

from pathlib import Path

import pytest

from postroad.cli.connection import (
    ConnectionSettingsError,
    Flags,
    find_connection,
    read_contexts,
    user_folder,
    write_contexts,
)

_LOCAL = """
server: 127.0.0.1:7443
api_key: prk_file
ca_file: pki/ca.pem
account: accounts/demo
smtp: {server: "127.0.0.1:2587", username: demo.app, password: prs_file, ca_file: pki/ca.pem}
inbox: inbox
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / ".postroad").mkdir()
    _write(tmp_path / ".postroad" / "cli.yaml", _LOCAL)
    (tmp_path / "deep" / "down").mkdir(parents=True)
    return tmp_path


def _write(file: Path, text: str, mode: int = 0o600) -> None:
    file.write_text(text, encoding="utf-8")
    file.chmod(mode)


def _home(folder: Path) -> dict[str, str]:
    return {"HOME": str(folder / "home")}


def test_nearest_file_upwards_is_used_and_its_paths_are_relative_to_it(project: Path) -> None:
    found = find_connection(Flags(), _home(project), project / "deep" / "down")
    assert (found.server, found.api_key, found.account) == ("127.0.0.1:7443", "prk_file", "accounts/demo")
    assert found.ca_file == project / ".postroad" / "pki" / "ca.pem"
    assert found.inbox == project / ".postroad" / "inbox"
    assert found.smtp.password == "prs_file"


def test_flags_win_over_environment_and_environment_over_the_file(project: Path) -> None:
    environment = {**_home(project), "POSTROAD_API_KEY": "prk_environment", "POSTROAD_ACCOUNT": "other"}
    found = find_connection(Flags(api_key="prk_flag"), environment, project)
    assert found.api_key == "prk_flag"
    assert found.account == "accounts/other"
    assert find_connection(Flags(), environment, project).api_key == "prk_environment"


@pytest.mark.parametrize("by_flag", [True, False])
def test_the_key_of_a_file_never_goes_to_another_server(project: Path, *, by_flag: bool) -> None:
    flags = Flags(server="evil.example:7443") if by_flag else Flags()
    environment = _home(project) if by_flag else {**_home(project), "POSTROAD_SERVER": "evil.example:7443"}
    found = find_connection(flags, environment, project)
    assert found.server == "evil.example:7443"
    assert found.api_key == ""
    assert found.smtp.password == ""


def test_naming_the_server_of_the_file_keeps_its_key(project: Path) -> None:
    assert find_connection(Flags(server="127.0.0.1:7443"), _home(project), project).api_key == "prk_file"


def test_a_file_that_others_may_read_is_refused(project: Path) -> None:
    (project / ".postroad" / "cli.yaml").chmod(0o640)
    with pytest.raises(ConnectionSettingsError, match="others may read it") as caught:
        find_connection(Flags(), _home(project), project)
    assert "chmod 600" in caught.value.advice


@pytest.mark.parametrize("text", ["- a list", "server: [", "sever: typo", "smtp: {hsot: x}"])
def test_a_file_with_mistakes_is_refused_with_its_name(project: Path, text: str) -> None:
    _write(project / ".postroad" / "cli.yaml", text)
    with pytest.raises(ConnectionSettingsError, match=r"cli\.yaml"):
        find_connection(Flags(), _home(project), project)


def test_contexts_are_kept_and_the_current_one_is_used_where_no_file_is_near(tmp_path: Path) -> None:
    environment = _home(tmp_path)
    contexts = {"prod": {"server": "mail.example:443", "api_key": "prk_prod"}, "test": {"server": "test:1"}}
    write_contexts(user_folder(environment), "prod", contexts)
    found = find_connection(Flags(), environment, tmp_path)
    assert (found.server, found.api_key, found.source) == ("mail.example:443", "prk_prod", "context prod")
    assert find_connection(Flags(context="test"), environment, tmp_path).server == "test:1"
    assert read_contexts(user_folder(environment)) == ("prod", contexts)
    assert (user_folder(environment) / "contexts.yaml").stat().st_mode & 0o777 == 0o600


def test_a_named_context_wins_over_the_nearest_file(project: Path) -> None:
    environment = {**_home(project), "POSTROAD_CONTEXT": "prod"}
    write_contexts(user_folder(environment), "", {"prod": {"server": "mail.example:443"}})
    assert find_connection(Flags(), environment, project).server == "mail.example:443"


def test_an_unknown_context_is_named_with_the_known_ones(tmp_path: Path) -> None:
    write_contexts(user_folder(_home(tmp_path)), "", {"prod": {}})
    with pytest.raises(ConnectionSettingsError, match="'nope'") as caught:
        find_connection(Flags(context="nope"), _home(tmp_path), tmp_path)
    assert "prod" in caught.value.advice


def test_nothing_anywhere_is_an_empty_connection(tmp_path: Path) -> None:
    found = find_connection(Flags(), _home(tmp_path), tmp_path)
    assert (found.server, found.api_key, found.account) == ("", "", "")


def test_secrets_do_not_show_in_representations(project: Path) -> None:
    found = find_connection(Flags(), _home(project), project)
    assert "prk_file" not in repr(found)
    assert "prs_file" not in repr(found)


@pytest.mark.parametrize("named", ["absolute", "relative"])
def test_the_folder_that_postroad_up_was_told_is_found_from_elsewhere(project: Path, named: str) -> None:
    stack = project / "stack"
    stack.mkdir()
    _write(stack / "cli.yaml", _LOCAL.replace("7443", "9443"))
    environment = {**_home(project), "POSTROAD_DIR": str(stack) if named == "absolute" else "../stack"}
    found = find_connection(Flags(), environment, project / "deep")
    assert found.server == "127.0.0.1:9443"
    assert found.inbox is not None
    assert found.inbox.resolve() == stack / "inbox"


def test_a_folder_without_a_stack_is_an_error_and_no_reason_to_look_elsewhere(project: Path) -> None:
    with pytest.raises(ConnectionSettingsError, match="POSTROAD_DIR") as caught:
        find_connection(Flags(), {**_home(project), "POSTROAD_DIR": str(project / "deep")}, project)
    assert "postroad up" in caught.value.advice


def test_a_context_that_is_named_comes_before_the_folder(project: Path) -> None:
    environment = {**_home(project), "POSTROAD_DIR": str(project / "deep")}
    write_contexts(user_folder(environment), "", {"prod": {"server": "mail.example.com:7443"}})
    assert find_connection(Flags(context="prod"), environment, project).server == "mail.example.com:7443"
