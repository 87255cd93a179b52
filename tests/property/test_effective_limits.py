"""What the API says holds for an account is what a node finds, whatever limits there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from controlplane.domain.limits import Limit, config_of, defaults_of, effective, is_about, replaced_subjects
from dataplane.core.config import NodeSettings
from dataplane.core.limits import Limit as NodeLimit
from dataplane.core.limits import LimitScope, LimitTable, LimitUnit, counting_limit

ACCOUNT = "acme"
SUBJECTS = {
    LimitScope.ACCOUNT: ("accounts/acme",),
    LimitScope.CREDENTIAL: ("accounts/acme/smtpCredentials/app", "accounts/acme/smtpCredentials/web"),
    LimitScope.ADDRESS: ("192.0.2.1", "192.0.2.2"),
    LimitScope.PROVIDER: ("accounts/acme/providers/relay", "providers/shared"),
    LimitScope.DESTINATION: ("mx.example", "mx2.example"),
}
FOREIGN = {LimitScope.ACCOUNT: ("accounts/acme-2",), LimitScope.CREDENTIAL: ("accounts/other/smtpCredentials/app",)}
SETTINGS = NodeSettings()


@st.composite
def limits(draw: st.DrawFn, account: str | None) -> list[Limit]:
    """Limits of one owner as the database admits them: none counts the same as another one."""
    found = {}
    for number in range(draw(st.integers(0, 12))):
        scopes = (
            list(LimitScope) if account is None else [LimitScope.ACCOUNT, LimitScope.CREDENTIAL, LimitScope.PROVIDER]
        )
        scope = draw(st.sampled_from(scopes))
        subjects = ["", *SUBJECTS[scope]]
        if account is None:
            subjects += FOREIGN.get(scope, ())
        else:
            subjects = [""] if scope is LimitScope.ACCOUNT else [one for one in subjects if not one.startswith("pro")]
        unit = draw(st.sampled_from([LimitUnit.MESSAGE, LimitUnit.CONNECTION]))
        period_s = draw(st.sampled_from([0.0, 60.0]))
        subject = draw(st.sampled_from(subjects))
        found[scope, unit, period_s, subject] = Limit(
            account, f"l{number}", scope=scope, unit=unit, subject=subject, amount=5, period_s=period_s
        )
    return list(found.values())


def node_finds(
    own: Sequence[Limit], shared: Sequence[Limit], scope: LimitScope, unit: LimitUnit, subject: str, *, at_once: bool
) -> NodeLimit | None:
    tables = [LimitTable([config_of(one) for one in some]) for some in (own, [*shared, *defaults_of(SETTINGS)])]
    return counting_limit(tables[0], tables[1], scope, unit, subject, at_once=at_once)


@given(limits(ACCOUNT), limits(None))
def test_a_limit_is_listed_if_and_only_if_it_counts_for_somebody(own: list[Limit], shared: list[Limit]) -> None:
    listed = {config_of(one) for one in effective(own, [one for one in shared if is_about(one, ACCOUNT)], SETTINGS)}
    counting = set()
    for scope, subjects in SUBJECTS.items():
        # Somebody who will be there tomorrow is limited as well.
        tomorrow = {
            LimitScope.CREDENTIAL: ["accounts/acme/smtpCredentials/new"],
            LimitScope.PROVIDER: ["accounts/acme/providers/new", "providers/new"],
            LimitScope.ADDRESS: ["192.0.2.9"],
            LimitScope.DESTINATION: ["new.example"],
        }
        for subject in (*subjects, *tomorrow.get(scope, ())):
            for unit in LimitUnit:
                for at_once in (False, True):
                    found = node_finds(own, shared, scope, unit, subject, at_once=at_once)
                    if found is not None:
                        counting.add(found)
    assert listed == counting


@given(limits(ACCOUNT), limits(None))
def test_a_subject_is_shown_below_the_limit_that_counts_for_it(own: list[Limit], shared: list[Limit]) -> None:
    everything = [*own, *shared]
    for limit in [*everything, *defaults_of(SETTINGS)]:
        if limit.subject or limit.scope is None or limit.unit is None:
            continue
        mine = SUBJECTS[limit.scope]
        if limit.account is not None:
            mine = tuple(one for one in mine if one.startswith("accounts/"))
        replaced = replaced_subjects(limit, mine, everything)
        for subject in mine:
            at_once = not limit.period_s
            found = node_finds(own, shared, limit.scope, limit.unit, subject, at_once=at_once)
            assert (found == config_of(limit)) is (subject not in replaced), (limit, subject)


def test_a_pool_without_limits_has_no_defaults() -> None:
    none = replace(
        SETTINGS, account_messages_per_hour=0, credential_messages_per_hour=0, address_connections_per_minute=0
    )
    assert defaults_of(none) == []
    assert [one.amount for one in defaults_of(replace(none, account_messages_per_hour=10**12))] == [4_000_000_000]
