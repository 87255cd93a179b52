"""Places of large calls: how many are in hand at once, and that no account takes all of them."""

from __future__ import annotations

import asyncio

from controlplane.adapters.grpc.places import Places


class Hall:
    """Calls that hold a place until they are let go."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._end = asyncio.Event()
        self.inside: list[str | None] = []

    async def call(self, account: str | None) -> None:
        async with self._places.place(account):
            self.inside.append(account)
            await self._end.wait()

    def end(self) -> None:
        self._end.set()


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_an_account_has_its_part_and_others_come_in_beside_it() -> None:
    hall = Hall(places := Places(in_all=4, of_account=2))
    async with asyncio.TaskGroup() as group:
        for account in ("loud", "loud", "loud", "quiet", None):
            group.create_task(hall.call(account))
        await settled()
        assert hall.inside == ["loud", "loud", "quiet", None]
        hall.end()
    assert sorted(map(str, hall.inside)) == ["None", "loud", "loud", "loud", "quiet"]
    assert len(places) == 0


async def test_who_gives_up_waiting_leaves_nothing_behind() -> None:
    hall = Hall(places := Places(in_all=1, of_account=1))
    first, second = asyncio.create_task(hall.call("a")), asyncio.create_task(hall.call("b"))
    await settled()
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    third = asyncio.create_task(hall.call("c"))
    hall.end()
    await asyncio.gather(first, third)
    assert hall.inside == ["a", "c"]
    assert len(places) == 0
