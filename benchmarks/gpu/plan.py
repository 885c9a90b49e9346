"""Which stages there are, which part of the time each may take, and what a stage is told."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic

from .rows import Place
from .timer import Timer

# Parts of the time. What a stage leaves goes to those after it.
SHARES = {"facts": 4, "correctness": 8, "layers": 42, "features": 6, "training": 40}
STAGES = tuple(SHARES)


def stage_end(now: float, end: float, left: Sequence[str]) -> float:
    """When the first of the stages that are left must be done, so that each of the others has its part."""
    return now + max(0.0, end - now) * SHARES[left[0]] / sum(SHARES[stage] for stage in left)


def case_end(now: float, end: float, cases_left: int) -> float:
    return now + max(0.0, end - now) / cases_left


@dataclass(frozen=True)
class Run:
    """What a stage is told: how to time, what its rows have in common, when to be done, and what it is asked for."""

    timer: Timer
    place: Place
    end: float
    only: re.Pattern[str] | None = None

    def wants(self, name: str) -> bool:
        return self.only is None or self.only.search(name) is not None

    @property
    def seconds_left(self) -> float:
        return self.end - monotonic()


class Allowance:
    """Seconds for something whose length is known only afterwards, such as compiling: it may begin while what is left
    is as long as the longest so far."""

    def __init__(self, seconds: float, guess: float) -> None:
        self._left = seconds
        self._longest = guess

    def may_begin(self) -> bool:
        return self._left >= self._longest

    def spend(self, seconds: float) -> None:
        self._left -= seconds
        self._longest = max(self._longest, seconds)
