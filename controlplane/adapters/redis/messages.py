"""Buckets of messages that are sent by API, shared with the nodes.

Contract. `RedisMessageBudget` implements `ports_sending.MessageBudget`: the same functions, buckets and costs as nodes
use at DATA, so that an account has one allowance whichever door its mail comes in by. Takes are asked tag by tag, each
in one call; what a later tag refuses is given back to the earlier ones. Where Redis cannot be asked `local` decides.
Never raises.

Over-admission while Redis is away: one part of each bucket for each control plane, beside those of the nodes; see
`services.sending_budget`.
"""

from __future__ import annotations

from collections.abc import Sequence

from controlplane.adapters.redis.functions import RedisAwayError, RedisFunctions
from controlplane.adapters.redis.limits import MICRO
from controlplane.domain.sending_limits import Take
from controlplane.ports_sending import Denied, MessageBudget
from dataplane.core.limits import MAX_TOKENS, server_key

_TAKE, _REFUND = "postroad_take_2", "postroad_refund_2"


class RedisMessageBudget:
    """See the module."""

    def __init__(self, functions: RedisFunctions, local: MessageBudget) -> None:
        self._functions = functions
        self._local = local

    async def take(self, groups: Sequence[Sequence[Take]], parts: int) -> list[Denied | None]:
        """As the port says."""
        try:
            return await self._functions.within(lambda: self._take(groups))
        except RedisAwayError:
            return await self._local.take(groups, parts)

    async def give_back(self, takes: Sequence[Take]) -> None:
        """As the port says."""
        try:
            await self._functions.within(lambda: self._give_back(takes))
        except RedisAwayError:
            await self._local.give_back(takes)

    async def _take(self, groups: Sequence[Sequence[Take]]) -> list[Denied | None]:
        answers: list[Denied | None] = [None] * len(groups)
        taken: list[list[Take]] = [[] for _ in groups]
        for tag in dict.fromkeys(take.tag for group in groups for take in group):
            asking = [
                (number, [take for take in group if take.tag == tag])
                for number, group in enumerate(groups)
                if answers[number] is None
            ]
            asking = [(number, takes) for number, takes in asking if takes]
            refusals = await self._ask(tag, [takes for _, takes in asking])
            for place, (number, takes) in enumerate(asking):
                if place not in refusals:
                    taken[number] += takes
                    continue
                answers[number] = refusals[place]
                await self._give_back(taken[number])
        return answers

    async def _ask(self, tag: str, groups: Sequence[Sequence[Take]]) -> dict[int, Denied]:
        """Take groups of one tag; those that were refused by their place."""
        numbers: dict[str, int] = {}
        sizes: list[str | int] = []
        words: list[int] = []
        for takes in groups:
            words.append(len(takes))
            for take in takes:
                number = numbers.setdefault(server_key(tag, take.key), len(numbers) + 1)
                if 2 * number > len(sizes):
                    sizes += _sizes(take)
                words += (number, min(take.cost, MAX_TOKENS))
        # The first key says of which epoch the buckets are, which nobody remembers here.
        keys = (server_key(tag, "epoch"), *numbers)
        arguments = ("", len(numbers), *sizes, *words)
        answer = await self._functions.call(tag, _TAKE, keys, arguments, only_looks=False)
        refused = zip(answer[1::3], answer[2::3], answer[3::3], strict=True)
        return {
            group - 1: Denied(wait_us / MICRO, groups[group - 1][which - 1].key) for group, wait_us, which in refused
        }

    async def _give_back(self, takes: Sequence[Take]) -> None:
        for tag in dict.fromkeys(take.tag for take in takes):
            by_key: dict[str, tuple[Take, int]] = {}
            for take in takes:
                if take.tag == tag:
                    key = server_key(tag, take.key)
                    by_key[key] = (take, by_key[key][1] + take.cost if key in by_key else take.cost)
            words = [each for take, cost in by_key.values() for each in (*_sizes(take), min(cost, MAX_TOKENS))]
            await self._functions.call(tag, _REFUND, tuple(by_key), words, only_looks=False)


def _sizes(take: Take) -> tuple[int, str]:
    # A rate may be less than a micro-token a second.
    return min(take.capacity, MAX_TOKENS) * MICRO, repr(take.rate_per_s * MICRO)
