"""The commands of the chaos tests say what they could do when they are called wrongly."""

from __future__ import annotations

import pytest

from support.chaos import broken, campaign


def test_help_of_broken_builds_names_each_with_what_it_breaks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        broken.main(["--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert all(build.name in said and build.what in said for build in broken.BUILDS)


def test_a_build_that_there_is_not_is_refused_with_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        broken.main(["no-fsync", "nonsense"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "no build is named nonsense" in said
    assert all(build.name in said for build in broken.BUILDS)


@pytest.mark.parametrize("text", ["x", "", "1-", "-3", "1,,2", "5-1", "1-2-3"])
def test_seeds_that_are_none_are_an_error_of_one_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        campaign.main([f"--seeds={text}"])
    assert end.value.code == 2
    assert "argument --seeds" in capsys.readouterr().err


def test_seeds_are_ranges_and_single_ones() -> None:
    assert campaign.read_seeds("1-3,7") == [1, 2, 3, 7]
