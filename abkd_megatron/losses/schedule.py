"""Schedules of training parameters: pure functions of the training progress.

They have no state, so nothing is checkpointed. A resumed run takes its progress from Megatron's checkpoint.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from abkd_megatron.errors import ConfigError
from abkd_megatron.validation import finite_number, whole_number

KINDS = ("constant", "linear", "cosine", "piecewise")
COUNTS = ("iteration", "samples", "tokens", "fraction")


@dataclass(frozen=True)
class Progress:
    """Training progress before a step; all 0 at the first step of a run."""

    iteration: int = 0
    samples: int = 0
    tokens: int = 0
    fraction: float | None = None
    """Part of the run, 0 to 1; None from a training loop that does not know its length."""

    @classmethod
    def of_run(
        cls, iteration: int, samples: int, seq_length: int, *, iterations: int | None, total_samples: int | None
    ) -> "Progress":
        """Return the progress in a run whose length is known.

        Args:
            iteration: steps before this one.
            samples: sequences before this step.
            seq_length: tokens per sequence.
            iterations: the run's length in steps, as it is configured now; used if `total_samples` is not given.
            total_samples: its length in sequences. A run that counts samples may change its batch size, so that only
                these are proportional to its data.

        Returns:
            The progress. A run of length 0, such as an evaluation, is at 1.
        """
        done, length = (samples, total_samples) if total_samples else (iteration, iterations)
        return cls(iteration, samples, samples * seq_length, min(done / length, 1.0) if length else 1.0)


@dataclass(frozen=True)
class Schedule:
    """Number as a function of the progress: linear or cosine between points, constant outside.

    A value is between the values of the two surrounding points, and exact at a point. Two points at one count are a
    jump: the first ends the previous segment, the second begins the next.

    Args:
        kind: one of `KINDS`.
        points: (count, value), in the order of their counts.
        by: what is counted, one of `COUNTS`. ``fraction`` is the part of the run before a step, so the last of N equal
            steps is at (N - 1) / N.

    Raises:
        ConfigError: unless counts are ordered whole numbers, or fractions from 0 to 1, and values are finite; constant
            takes one point, linear and cosine two with different counts.
    """

    kind: str
    points: tuple[tuple[float, float], ...]
    by: str = "iteration"

    def __post_init__(self) -> None:
        for what, got, known in (("schedule", self.kind, KINDS), ("by", self.by, COUNTS)):
            if got not in known:
                raise ConfigError(f"expected {what} to be one of {', '.join(known)}, got {got!r}")
        counts = [self._checked_count(count) for count, _ in self.points]
        values = [finite_number("a schedule", "a value", value) for _, value in self.points]
        object.__setattr__(self, "points", tuple(zip(counts, values, strict=True)))
        if not counts or any(first > last for first, last in pairwise(counts)):
            raise ConfigError(f"expected points at counts of 0 or more, in order, got {counts}")
        if self.kind in ("linear", "cosine") and not (len(counts) == 2 and counts[0] < counts[1]):
            raise ConfigError(f"expected an end after the start, got {counts}")
        if self.kind == "constant" and len(counts) != 1:
            raise ConfigError(f"expected one value, got {values}")

    def _checked_count(self, count: object) -> float:
        if self.by != "fraction":
            return whole_number("a schedule", "a count", count, least=0)
        fraction = finite_number("a schedule", "a fraction", count)
        if not 0.0 <= fraction <= 1.0:
            raise ConfigError(f"expected fractions of the run from 0 to 1, got {fraction}; 0.5 is half of it")
        return fraction

    @classmethod
    def of(cls, number: "float | Schedule") -> "Schedule":
        """Return a plain number as a constant schedule; a schedule unchanged."""
        return number if isinstance(number, Schedule) else cls("constant", ((0, number),))

    @classmethod
    def linear(cls, first: float, last: float, *, end: float, start: float = 0, by: str = "iteration") -> "Schedule":
        """Interpolate linearly between two values."""
        return cls("linear", ((start, first), (end, last)), by)

    @classmethod
    def cosine(cls, first: float, last: float, *, end: float, start: float = 0, by: str = "iteration") -> "Schedule":
        """Interpolate between two values along half a cosine wave, with zero slope at both ends."""
        return cls("cosine", ((start, first), (end, last)), by)

    @classmethod
    def piecewise(cls, points: Sequence[tuple[float, float]], *, by: str = "iteration") -> "Schedule":
        """Interpolate linearly between points."""
        return cls("piecewise", tuple((count, value) for count, value in points), by)

    def __call__(self, progress: Progress) -> float:
        """Return the value at the given progress.

        Raises:
            ConfigError: it has no fraction, and this schedule needs one.
        """
        count = getattr(progress, self.by)
        if count is None:
            if len(self.points) > 1:
                raise ConfigError(
                    f"{self} needs the length of the run, which this training loop does not give; give Progress its "
                    "fraction, or count iterations, samples or tokens"
                )
            count = 0.0
        return self.value(count)

    def value(self, count: float) -> float:
        """Return the value at the given count."""
        after = bisect_right(self.points, count, key=lambda point: point[0])
        start, first = self.points[max(after - 1, 0)]
        if after in (0, len(self.points)) or count == start:
            return first
        end, last = self.points[after]
        share = (count - start) / (end - start)
        if self.kind == "cosine":
            share = (1.0 - math.cos(math.pi * share)) / 2.0
        low, high = sorted((first, last))
        return min(max(first + (last - first) * share, low), high)

    @property
    def first(self) -> float:
        """Value at the first step of a run."""
        return self.value(0)

    @property
    def lowest(self) -> float:
        """Smallest value."""
        return min(value for _, value in self.points)

    def described(self) -> dict[str, Any]:
        """Return it in the form of the configuration."""
        (start, first), (end, last) = self.points[0], self.points[-1]
        keys: dict[str, Any] = {"from": first, "to": last, "start": start, "end": end, "by": self.by}
        if self.kind == "constant":
            keys = {"value": first}
        elif self.kind == "piecewise":
            keys = {"points": [list(point) for point in self.points], "by": self.by}
        return {"schedule": self.kind, **keys}

    def __str__(self) -> str:
        return "{" + ", ".join(f"{key}: {value}" for key, value in self.described().items()) + "}"


def both_zero(one: Schedule, other: Schedule) -> str | None:
    """Return where both are 0, or may be 0 because they count different things; None if nowhere."""
    if one.lowest > 0 or other.lowest > 0:
        return None
    counted = {schedule.by for schedule in (one, other) if len(schedule.points) > 1}
    if len(counted) > 1:
        return "at some step: one counts " + ", the other ".join(sorted(counted))
    # Neither is negative, so an interval where both are 0 begins at 0 or at a point of one of them.
    for count in sorted({0, *(count for schedule in (one, other) for count, _ in schedule.points)}):
        if one.value(count) == other.value(count) == 0:
            return f"at {counted.pop()} {count}" if counted else "always"
    return None
