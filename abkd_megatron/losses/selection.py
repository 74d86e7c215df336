"""Which tokens are distilled: a property of each token decides, whatever it shares a micro-batch or a rank with.

Legend: s sequence, b micro-batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from abkd_megatron.errors import ConfigError, check_name
from abkd_megatron.validation import positive_number, whole_number

KEYS = {"every": ("n",), "teacher_entropy": ("at_least", "at_most"), "disagreement": ("kl_at_least",)}
"""By kind of selection, the keys that it takes."""


@dataclass(frozen=True)
class TokenSelection:
    """The tokens whose divergence is trained; the cross entropy is trained on all of them.

    - ``every``: positions n - 1, 2n - 1 and so on of a sequence, counted from 0. The teacher's LM head is spared all
      others.
    - ``teacher_entropy``: where the teacher's entropy is within bounds.
    - ``disagreement``: where the two models' likeliest next tokens differ; with `kl_at_least`, where the teacher's
      KL from the student is at least that, instead.

    Numbers of the last two are in nats, at temperature 1, and compared in the arithmetic of the loss, fp32 at least: a
    token whose number is a bound to rounding may fall on either side in another layout.

    Raises:
        ConfigError: for a kind that is none of `KEYS`, numbers that it does not take or lacks, or bounds between which
            there is nothing.
    """

    select: str
    n: int | None = None
    """2 or more."""
    at_least: float | None = None
    """Nats."""
    at_most: float | None = None
    """Nats."""
    kl_at_least: float | None = None
    """Nats."""

    def __post_init__(self) -> None:
        check_name(self.select, KEYS, "a selection of tokens", "select")
        known = KEYS[self.select]
        for name in ("n", "at_least", "at_most", "kl_at_least"):
            value = getattr(self, name)
            if value is None:
                continue
            if name not in known:
                raise ConfigError(
                    f"expected no {name} with select: {self.select}, which takes {', '.join(known)}, got {value}; "
                    "leave it out"
                )
            checked: float = (
                self._checked_n(value)
                if name == "n"
                else positive_number(f"select: {self.select}", name, value, "it is in nats; or leave it out")
            )
            object.__setattr__(self, name, checked)
        if self.select == "every" and self.n is None:
            self._checked_n(None)
        if self.select == "teacher_entropy":
            if self.at_least is None and self.at_most is None:
                raise ConfigError("expected at_least or at_most with select: teacher_entropy, got neither; give one")
            if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
                raise ConfigError(
                    f"expected at_least to be no more than at_most, got {self.at_least} and {self.at_most}, between "
                    "which there is nothing; exchange them"
                )

    @staticmethod
    def _checked_n(n: object) -> int:
        remedy = "leave the selection out to distill on every token"
        return whole_number("select: every", "n", n, least=2, remedy=remedy)

    def __str__(self) -> str:
        return ", ".join(f"{name}: {value}" for name, value in self.described().items())

    @property
    def by_position(self) -> bool:
        """Whether it is known before the teacher's logits are, which the other tokens are then spared."""
        return self.select == "every"

    def described(self) -> dict[str, str | int | float]:
        """The keys that were given, and their values."""
        given = {name: getattr(self, name) for name in ("select", *KEYS[self.select])}
        return {name: value for name, value in given.items() if value is not None}

    def at(self, positions: Tensor) -> Tensor:
        """By position: bool, of the shape of `positions`, int64 from 0 on."""
        assert self.n is not None
        return positions % self.n == self.n - 1

    def of(self, metrics: Mapping[str, Tensor]) -> Tensor:
        """By what the models say: bool, of the shape of the engine's `metrics`. NaN selects nothing."""
        if self.select == "disagreement":
            if self.kl_at_least is None:
                return metrics["top-1 agreement"] == 0.0
            return metrics["kl to teacher"] >= self.kl_at_least
        entropy = metrics["teacher entropy"]
        selected = entropy == entropy
        if self.at_least is not None:
            selected = selected & (entropy >= self.at_least)
        if self.at_most is not None:
            selected = selected & (entropy <= self.at_most)
        return selected


def positions_here(length: int, ends: Tensor | None, rank: int, size: int) -> Tensor:
    """Where this rank's tokens stand in their sequences, by Megatron's layout for context parallelism.

    Of a sequence's 2 * size equal chunks a rank holds the one of its number and that one's mirror.

    Args:
        length: of the row on this rank.
        ends: [sequences + 1] ints, where the sequences packed into the row begin and end over all ranks together, 0
            first (Megatron's cu_seqlens); None for one sequence. Tokens after the last end are a sequence of their own.
        rank: in the context-parallel group.
        size: of the context-parallel group.

    Returns:
        [length] int64, on the device of `ends` (the CPU without).
    """
    if ends is None:
        ends = torch.tensor([0, length * size], device="cpu")
    ends = ends.long()
    here = torch.arange(length, device=ends.device)
    begins = ends // size
    sequence = torch.searchsorted(begins, here, right=True) - 1
    offset = here - begins[sequence]
    if size == 1:
        return offset
    whole = torch.cat([ends.diff(), (length * size - ends[-1:]).clamp_min(0)])[sequence]
    chunk = whole // (2 * size)
    return torch.where(offset < chunk, rank * chunk + offset, (2 * size - 2 - rank) * chunk + offset)
