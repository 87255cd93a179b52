"""Which addresses may be dialled, however they are written, and how names become addresses."""

from __future__ import annotations

import asyncio
from ipaddress import ip_address

import pytest

from dataplane.adapters.resolver import CACHE_S, CheckingResolver, may_dial
from support.spools import ManualClock

FORBIDDEN = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "10.255.255.255",
    "100.64.0.1",
    "100.127.255.254",
    "127.0.0.1",
    "127.255.255.255",
    "169.254.0.1",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.1",
    "192.0.0.170",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.0.1",
    "192.168.255.255",
    "198.18.0.1",
    "198.19.255.255",
    "198.51.100.7",
    "203.0.113.9",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::10.0.0.1",
    "::8.8.8.8",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:0:7f00:1",
    "::ffff:0:a00:1",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b::8.8.8.8",
    "64:ff9b:1::1",
    "64:ff9b:1:ffff::a00:1",
    "100::1",
    "2001::1",
    "2001:0:7f00:1::",
    "2001:2::1",
    "2001:10::1",
    "2001:20::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:a9fe:a9fe::1",
    "2002:808:808::1",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fd12:3456:789a::1",
    "fe80::1",
    "febf::1",
    "fec0::1",
    "ff02::1",
    "ff0e::1",
]
PUBLIC = ["8.8.8.8", "100.128.0.1", "172.32.0.1", "198.20.0.1", "2606:4700::1111", "::ffff:8.8.8.8", "2a00:1450::1"]


@pytest.mark.parametrize("text", FORBIDDEN)
def test_what_is_not_on_the_public_internet_is_forbidden(text: str) -> None:
    assert not may_dial(ip_address(text), ())


@pytest.mark.parametrize("text", PUBLIC)
def test_public_addresses_may_be_dialled(text: str) -> None:
    assert may_dial(ip_address(text), ())


def test_a_deployment_may_allow_networks_of_its_own() -> None:
    allowed = ("10.1.0.0/16", "fd00::/8")
    assert may_dial(ip_address("10.1.2.3"), allowed)
    assert may_dial(ip_address("::ffff:10.1.2.3"), allowed)
    assert may_dial(ip_address("fd00::1"), allowed)
    assert not may_dial(ip_address("10.2.0.1"), allowed)
    assert not may_dial(ip_address("2002:a01:203::"), allowed)


class Names:
    """A name server of the test's making; each answer is used once, the last one for ever."""

    def __init__(self, *answers: list[str] | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []
        self.was_asked = asyncio.Event()
        self.gate: asyncio.Event | None = None

    async def __call__(self, name: str) -> list[str]:
        self.asked.append(name)
        self.was_asked.set()
        if self.gate is not None:
            await self.gate.wait()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def resolver(dns: Names, system: Names | None = None, clock: ManualClock | None = None) -> CheckingResolver:
    return CheckingResolver(clock or ManualClock(), dns_lookup=dns, system_lookup=system or Names([]))


@pytest.mark.parametrize("text", FORBIDDEN)
async def test_a_forbidden_literal_is_never_handed_out(text: str) -> None:
    with pytest.raises(PermissionError):
        await resolver(Names([])).addresses(text)


@pytest.mark.parametrize("text", FORBIDDEN)
async def test_one_forbidden_address_among_many_forbids_the_name(text: str) -> None:
    with pytest.raises(PermissionError):
        await resolver(Names(["8.8.8.8", text])).addresses("relay.example")


@pytest.mark.parametrize("text", ["127.1", "0x7f.1", "2130706433", "0177.0.0.1", "localhost", "LOCALHOST."])
async def test_other_spellings_of_loopback_are_names_and_their_answers_are_checked(text: str) -> None:
    with pytest.raises(PermissionError):
        await resolver(Names(["127.0.0.1"]), Names(["127.0.0.1"])).addresses(text)


async def test_a_scoped_answer_is_forbidden() -> None:
    with pytest.raises(PermissionError):
        await resolver(Names(["fe80::1%eth0"])).addresses("relay.example")


async def test_rebinding_is_caught_by_checking_every_answer() -> None:
    clock = ManualClock()
    checking = resolver(Names(["8.8.8.8"], ["127.0.0.1"]), clock=clock)
    assert await checking.addresses("relay.example") == ["8.8.8.8"]
    clock.advance(CACHE_S)
    with pytest.raises(PermissionError):
        await checking.addresses("relay.example")


async def test_an_answer_is_kept_for_a_while() -> None:
    names = Names(["8.8.8.8"])
    checking = resolver(names)
    for _ in range(3):
        assert await checking.addresses("Relay.Example.") == ["8.8.8.8"]
    assert names.asked == ["relay.example"]


async def test_questions_for_one_name_are_one_question_and_a_cancelled_asker_leaves_it_to_the_others() -> None:
    names = Names(["8.8.8.8"])
    names.gate = asyncio.Event()
    checking = resolver(names)
    tasks = [asyncio.create_task(checking.addresses("relay.example")) for _ in range(3)]
    await names.was_asked.wait()
    tasks[0].cancel()
    names.gate.set()
    assert await asyncio.gather(*tasks[1:]) == [["8.8.8.8"], ["8.8.8.8"]]
    assert names.asked == ["relay.example"]


async def test_a_name_without_addresses_is_told_from_an_answer_that_could_not_be_had() -> None:
    with pytest.raises(LookupError):
        await resolver(Names([])).addresses("relay.example")
    with pytest.raises(OSError, match="no answer"):
        await resolver(Names(OSError("no answer"))).addresses("relay.example")


async def test_names_without_a_dot_are_asked_of_the_system_only() -> None:
    dns, system = Names(["8.8.4.4"]), Names(["8.8.8.8"])
    assert await resolver(dns, system).addresses("relay") == ["8.8.8.8"]
    assert dns.asked == []


async def test_a_name_that_dns_does_not_know_is_asked_of_the_system() -> None:
    assert await resolver(Names([]), Names(["8.8.8.8"])).addresses("relay.internal") == ["8.8.8.8"]


async def test_the_number_of_addresses_is_bounded() -> None:
    many = [f"8.8.{high}.{low}" for high in range(10) for low in range(100)]
    assert len(await resolver(Names(many)).addresses("relay.example")) == 16


async def test_the_systems_own_lookup_knows_localhost() -> None:
    checking = CheckingResolver(ManualClock(), ("127.0.0.0/8", "::1/128"))
    assert set(await checking.addresses("localhost")) <= {"127.0.0.1", "::1"}


@pytest.mark.parametrize("name", ["", ".", "a" * 70, "\u00fc" * 70, "a..b"])
async def test_a_name_that_can_be_none_has_no_address(name: str) -> None:
    checking = CheckingResolver(ManualClock(), dns_lookup=Names([]))
    with pytest.raises((LookupError, OSError, PermissionError)):
        await checking.addresses(name)


@pytest.mark.parametrize("network", ["10.0.0.0/33", "relay", "10.0.0.1/8"])
def test_an_allowed_network_that_is_none_is_refused(network: str) -> None:
    with pytest.raises(ValueError, match=r"appear to be|host bits"):
        CheckingResolver(ManualClock(), (network,))
