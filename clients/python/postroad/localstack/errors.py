"""What can go wrong in the local stack: one error type that carries what happened and what to do about it."""

from __future__ import annotations


class LocalStackError(Exception):
    """The local stack cannot do what was asked; `problem` says what happened, `advice` what to do."""

    def __init__(self, problem: str, advice: str) -> None:
        super().__init__(f"{problem}. {advice}")
        self.problem = problem
        self.advice = advice
