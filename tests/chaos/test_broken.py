"""The judge is trusted because it fails: builds that break one promise each are caught by it."""

from __future__ import annotations

import pytest

from support.chaos.broken import BUILDS, BrokenBuildError, Build, Edit, catch, edited

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

# In this process alone, and so quick enough for every run; `make broken-builds` takes all.
_QUICK = frozenset({"unread-replies", "cancelled-commit"})


def by_name(build: Build) -> str:
    return build.name


@pytest.mark.parametrize("build", BUILDS, ids=by_name)
def test_a_broken_build_still_applies_to_the_tree(build: Build) -> None:
    assert edited(build)


def test_an_edit_that_no_longer_applies_is_an_error() -> None:
    gone = Build("gone", "", (Edit("dataplane/process.py", "no such text", ""),), "", frozenset())
    with pytest.raises(BrokenBuildError, match="stands 0 times"):
        edited(gone)


def test_a_build_that_breaks_nothing_is_not_taken_for_caught() -> None:
    quick = "tests/chaos/test_campaign.py::test_the_same_seed_draws_the_same_faults"
    harmless = Build("harmless", "", (), quick, frozenset({"lost"}))
    with pytest.raises(BrokenBuildError, match="the test passed"):
        catch(harmless)


@pytest.mark.parametrize(
    "build",
    [pytest.param(build, id=build.name, marks=() if build.name in _QUICK else pytest.mark.nightly) for build in BUILDS],
)
def test_a_broken_build_is_caught_by_the_judge(build: Build) -> None:
    assert catch(build)
