"""What every budget of messages holds: a control plane's own, and the one that is shared with the nodes in Redis."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence

import pytest

from controlplane.adapters.redis.functions import RedisFunctions
from controlplane.adapters.redis.messages import RedisMessageBudget
from controlplane.domain.sending_limits import Take
from controlplane.ports_sending import Denied, MessageBudget
from controlplane.services.sending_budget import LocalMessageBudget
from dataplane.core.limits import server_key


class NoBudget:
    """Stands where nobody may be asked."""

    async def take(self, groups: Sequence[Sequence[Take]], parts: int) -> list[Denied | None]:
        raise AssertionError("the control plane counted by itself")

    async def give_back(self, takes: Sequence[Take]) -> None:
        raise AssertionError("the control plane counted by itself")


@pytest.fixture(params=["local", "redis"])
async def budget(request: pytest.FixtureRequest) -> AsyncIterator[MessageBudget]:
    if request.param == "local":
        yield LocalMessageBudget(time.monotonic)
        return
    functions = RedisFunctions(request.getfixturevalue("valkey_url"), timeout_s=20.0)
    yield RedisMessageBudget(functions, NoBudget())
    await functions.close()


@pytest.fixture
def tag() -> str:
    return f"a:{uuid.uuid4()}"


def messages(tag: str, cost: int = 1, capacity: int = 3) -> Take:
    return Take(tag, "account:message", capacity, capacity / 3_600, cost)


async def test_groups_are_granted_one_after_the_other_until_the_bucket_is_empty(
    budget: MessageBudget, tag: str
) -> None:
    answers = await budget.take([[messages(tag)] for _ in range(5)], 1)
    assert [answer is None for answer in answers] == [True, True, True, False, False]
    refused = answers[3]
    assert refused is not None
    assert refused.key == "account:message"
    assert 1_100 < refused.wait_s <= 1_200


async def test_a_group_takes_all_or_nothing(budget: MessageBudget, tag: str) -> None:
    recipients = Take(tag, "account:recipient", 5, 0.001, 6)
    (first,) = await budget.take([[messages(tag), recipients._replace(cost=5)]], 1)
    (refused,) = await budget.take([[messages(tag), recipients]], 1)
    assert first is None
    assert refused is not None
    assert refused.key == "account:recipient"
    answers = await budget.take([[messages(tag)] for _ in range(3)], 1)
    assert [answer is None for answer in answers] == [True, True, False]


async def test_what_a_second_tag_refuses_is_given_back_to_the_first(budget: MessageBudget, tag: str) -> None:
    address = Take(f"ip:{tag}", "address:message", 1, 0.001, 1)
    assert await budget.take([[messages(tag), address]], 1) == [None]
    for _ in range(4):
        (refused,) = await budget.take([[messages(tag), address]], 1)
        assert refused is not None
        assert refused.key == "address:message"
    assert await budget.take([[messages(tag)], [messages(tag)]], 1) == [None, None]


async def test_what_was_given_back_can_be_taken_again(budget: MessageBudget, tag: str) -> None:
    takes = [messages(tag) for _ in range(3)]
    assert await budget.take([[take] for take in takes], 1) == [None] * 3
    await budget.give_back(takes[:2])
    answers = await budget.take([[messages(tag)] for _ in range(3)], 1)
    assert [answer is None for answer in answers] == [True, True, False]


async def test_what_costs_more_than_the_bucket_passes_when_it_is_full(budget: MessageBudget, tag: str) -> None:
    assert await budget.take([[messages(tag, cost=10)]], 1) == [None]
    (refused,) = await budget.take([[messages(tag)]], 1)
    assert refused is not None
    assert refused.wait_s > 1_200


async def test_a_bucket_is_the_one_that_nodes_draw_from(valkey_url: str, tag: str) -> None:
    functions = RedisFunctions(valkey_url, timeout_s=20.0)
    await RedisMessageBudget(functions, NoBudget()).take([[messages(tag, capacity=10)]], 1)
    key = server_key(tag, "account:message")
    (level,) = await functions.within(
        lambda: functions.call(tag, "postroad_peek_2", [key], [10_000_000, 0], only_looks=True)
    )
    await functions.close()
    assert level == 9_000_000


async def test_without_redis_the_control_plane_has_its_part() -> None:
    functions = RedisFunctions("redis://127.0.0.1:1", timeout_s=1.0)
    budget = RedisMessageBudget(functions, LocalMessageBudget(time.monotonic))
    answers = await budget.take([[messages("a:x", capacity=10)] for _ in range(10)], 5)
    await budget.give_back([messages("a:x", capacity=10)])
    await functions.close()
    assert sum(answer is None for answer in answers) == 2
