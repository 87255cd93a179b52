"""The ledgers side by side: what was answered with 250, what arrived, what was recorded.

Contract. The ledgers of a stream are bytes by message number: what was answered (0 or 1), how often it arrived. A
message that was answered and did not arrive is lost; one that arrived without an answer is none of ours to judge: its
client was told nothing. Arriving twice is allowed, and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verdict:
    """Counts of messages; `lost` with the numbers of the first few."""

    answered: int
    arrived: int
    lost: int
    duplicates: int
    first_lost: tuple[int, ...] = ()


def judge(answered: bytes, arrived: bytes) -> Verdict:
    """Compare the two ledgers of a stream."""
    padded = arrived[: len(answered)].ljust(len(answered), b"\0")
    lost = [number for number, answer in enumerate(answered) if answer and not padded[number]]
    return Verdict(
        answered=sum(answered),
        arrived=len(arrived) - arrived.count(0),
        lost=len(lost),
        duplicates=sum(times - 1 for times in arrived if times > 1),
        first_lost=tuple(lost[:10]),
    )


def add_verdicts(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the sum; of the first lost ones the first."""
    return Verdict(
        answered=sum(verdict.answered for verdict in verdicts),
        arrived=sum(verdict.arrived for verdict in verdicts),
        lost=sum(verdict.lost for verdict in verdicts),
        duplicates=sum(verdict.duplicates for verdict in verdicts),
        first_lost=tuple(number for verdict in verdicts for number in verdict.first_lost)[:10],
    )
