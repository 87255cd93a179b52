"""Which buckets a connection and a message draw from."""

from __future__ import annotations

import pytest

from dataplane.core.config import Account, NodeSettings
from dataplane.core.limits import Limit, LimitScope, LimitUnit
from dataplane.core.policy import CompiledAccount, compile_account
from dataplane.ingress.buckets import IngressLimits, MessageLimits, Permit
from dataplane.ports import Take

NAME = "accounts/a"
CREDENTIAL = f"{NAME}/smtpCredentials/c"
ADDRESS = "192.0.2.1"
NONE = NodeSettings(account_messages_per_hour=0, credential_messages_per_hour=0, address_connections_per_minute=0)


def own(scope: LimitScope, unit: LimitUnit, amount: int, subject: str = "") -> Limit:
    return Limit(f"{NAME}/limits/{scope.name.lower()}-{unit.name.lower()}", scope, unit, amount, 60.0, amount, subject)


def shared(scope: LimitScope, unit: LimitUnit, amount: int, subject: str = "") -> Limit:
    return Limit(f"limits/{scope.name.lower()}-{unit.name.lower()}", scope, unit, amount, 60.0, amount, subject)


def account(*limits: Limit) -> CompiledAccount:
    return compile_account(Account(NAME, "uid", 1, limits=limits))


def of_message(
    settings: NodeSettings, compiled: CompiledAccount, credential: str = CREDENTIAL, *, listed: bool = False
) -> MessageLimits:
    return IngressLimits().of_message(settings, compiled, credential, ADDRESS, listed=listed)


def test_a_limit_of_0_asks_nobody() -> None:
    assert of_message(NONE, account()).takes(3, 1_000) == ()
    assert IngressLimits().of_connection(NONE, ADDRESS, listed=False) == ()


def test_default_buckets_hold_a_tenth_and_share_the_accounts_tag() -> None:
    of_account, of_credential = of_message(NodeSettings(), account()).takes(1, 0)
    assert (of_account.capacity, round(of_account.rate_per_s * 3600), of_account.cost) == (10_000, 100_000, 1)
    assert (of_credential.capacity, round(of_credential.rate_per_s * 3600)) == (5_000, 50_000)
    assert of_account.tag == of_credential.tag
    assert of_account.key != of_credential.key
    (connections,) = IngressLimits().of_connection(NodeSettings(), ADDRESS, listed=False)
    assert (connections.capacity, round(connections.rate_per_s * 60)) == (10, 10)


def test_a_client_known_by_its_network_has_no_bucket_of_a_credential() -> None:
    assert len(of_message(NodeSettings(), account(), "").takes(1, 0)) == 1


def test_an_accounts_own_limit_takes_the_place_of_the_default() -> None:
    takes = of_message(NodeSettings(), account(own(LimitScope.ACCOUNT, LimitUnit.MESSAGE, 7))).takes(1, 0)
    assert [take.capacity for take in takes] == [7, 5_000]


def test_a_message_pays_for_itself_its_recipients_and_its_octets() -> None:
    compiled = account(
        own(LimitScope.ACCOUNT, LimitUnit.RECIPIENT, 500),
        own(LimitScope.CREDENTIAL, LimitUnit.BYTE, 10_000_000, CREDENTIAL),
    )
    takes = of_message(NodeSettings(), compiled).takes(12, 4_096)
    assert [(take.key.rpartition(":")[2], take.cost) for take in takes] == [
        ("message", 1),
        ("message", 1),
        ("recipient", 12),
        ("byte", 4_096),
    ]


def test_octets_that_nobody_declared_cost_one_before_they_come() -> None:
    limits = of_message(NONE, account(own(LimitScope.ACCOUNT, LimitUnit.BYTE, 1_000)))
    assert [take.cost for take in limits.takes(1, 0)] == [1]


def test_without_limits_on_recipients_and_octets_each_message_asks_for_the_same() -> None:
    limits = of_message(NodeSettings(), account())
    assert limits.takes(1, 0) is limits.takes(50, 9_999)


@pytest.mark.parametrize(("declared", "size", "given_back"), [(0, 5_000, -4_999), (8_000, 5_000, 3_000)])
def test_the_difference_to_the_real_size_is_settled(declared: int, size: int, given_back: int) -> None:
    limits = of_message(NodeSettings(), account(own(LimitScope.ACCOUNT, LimitUnit.BYTE, 10_000)))
    takes = limits.takes(1, declared)
    permit = Permit(takes, takes[-1:])
    assert [(take.key, take.cost) for take in permit.difference(size)] == [("account:byte", given_back)]
    assert permit.difference(declared or 1) == []


def test_messages_of_an_address_are_limited_beside_those_of_the_account() -> None:
    settings = NodeSettings(limits=(shared(LimitScope.ADDRESS, LimitUnit.MESSAGE, 30),))
    takes = of_message(settings, account()).takes(1, 0)
    assert [take.tag for take in takes] == ["a:accounts/a", "a:accounts/a", f"ip:{ADDRESS}"]


def test_a_network_bound_to_an_account_is_held_only_to_limits_that_name_the_address() -> None:
    general = shared(LimitScope.ADDRESS, LimitUnit.CONNECTION, 5)
    named = shared(LimitScope.ADDRESS, LimitUnit.CONNECTION, 7, ADDRESS)
    messages = shared(LimitScope.ADDRESS, LimitUnit.MESSAGE, 9)

    def capacities(settings: NodeSettings, *, listed: bool) -> list[int]:
        return [take.capacity for take in IngressLimits().of_connection(settings, ADDRESS, listed=listed)]

    assert capacities(NodeSettings(), listed=True) == []
    assert capacities(NodeSettings(limits=(general,)), listed=True) == []
    assert capacities(NodeSettings(limits=(general,)), listed=False) == [5]
    assert capacities(NodeSettings(limits=(general, named)), listed=True) == [7]
    limited = NodeSettings(limits=(messages,))
    assert len(of_message(limited, account(), listed=True).takes(1, 0)) == 2
    assert len(of_message(limited, account(), listed=False).takes(1, 0)) == 3


def test_limits_are_compiled_once_for_each_configuration() -> None:
    limits, settings, compiled = IngressLimits(), NodeSettings(), account()

    def find(settings: NodeSettings, compiled: CompiledAccount) -> MessageLimits:
        return limits.of_message(settings, compiled, CREDENTIAL, ADDRESS, listed=False)

    first = find(settings, compiled)
    assert find(settings, compiled) is first
    assert find(settings, account(own(LimitScope.ACCOUNT, LimitUnit.MESSAGE, 7))).per_message[0].capacity == 7
    assert find(NONE, compiled).per_message == ()


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dataplane.ingress.buckets._MAX_COMPILED", 3)
    limits, settings, compiled = IngressLimits(), NodeSettings(), account()
    for number in range(10):
        limits.of_message(settings, compiled, f"{NAME}/smtpCredentials/c{number}", ADDRESS, listed=False)
    assert len(limits._compiled) <= 3


def test_a_take_of_everything_there_is_has_one_group() -> None:
    every = [own(scope, unit, 100) for scope in (LimitScope.ACCOUNT, LimitScope.CREDENTIAL) for unit in _UNITS]
    address = tuple(shared(LimitScope.ADDRESS, unit, 100) for unit in _UNITS)
    takes = of_message(NodeSettings(limits=address), account(*every)).takes(2, 3)
    assert len({(take.tag, take.key) for take in takes}) == len(takes) == 9
    assert all(isinstance(take, Take) for take in takes)
    assert [take.cost for take in takes] == [1] * 3 + [2] * 3 + [3] * 3


_UNITS = (LimitUnit.MESSAGE, LimitUnit.RECIPIENT, LimitUnit.BYTE)
