"""Rank disagreement on the teacher's most likely tokens."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from abkd_megatron.losses.base import LogitLoss
from abkd_megatron.losses.columns import Columns
from abkd_megatron.validation import positive_number, whole_number


@dataclass(frozen=True)
class Ranking(LogitLoss):
    """One minus a differentiable Kendall tau on the teacher's top k, as in RKKD.

        1 - 2/(k(k-1)) sum_{i<j} tanh(k1 (t_i - t_j)) tanh(k2 (s_i - s_j))

    In [0, 2]; never 0, because tanh is below 1. The paper's form of the steepness was not available; here both are
    parameters, 1 by default. Ties in the top k are broken by lowest global id. Pairs with a column that is -inf in
    either model are left out, also of the number of pairs. Without any pair the loss is 1.

    Collectives: forward: 1 per chunk of tokens (4 k floats per token). Backward: none. Each rank computes k^2 fp64
    numbers per token.

    Args:
        top_k: number of the teacher's most likely tokens, at least 2.
        teacher_steepness: k1 > 0.
        student_steepness: k2 > 0.

    Raises:
        ConfigError: for values out of range.
    """

    top_k: int = 10
    teacher_steepness: float = 1.0
    student_steepness: float = 1.0
    name: ClassVar[str] = "ranking"
    num_collectives = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "top_k", whole_number("ranking", "top_k", self.top_k, 2))
        for name in ("teacher_steepness", "student_steepness"):
            object.__setattr__(self, name, positive_number("ranking", name, getattr(self, name)))

    def __call__(self, student: Tensor, teacher: Tensor, columns: Columns, counted: Tensor) -> Tensor:
        """Return 1 - mean over pairs."""
        _, s, t = columns.top_k(teacher, self.top_k, student, teacher)
        inside = ~(s.isneginf() | t.isneginf())
        s, t = s.masked_fill(~inside, 0.0), t.masked_fill(~inside, 0.0)
        agreement = torch.tanh(self.teacher_steepness * _differences(t))
        agreement = agreement * torch.tanh(self.student_steepness * _differences(s))
        pairs = torch.triu(inside.unsqueeze(-1) & inside.unsqueeze(-2), diagonal=1)
        return 1.0 - (agreement * pairs).sum(dim=(-2, -1)) / pairs.sum(dim=(-2, -1)).clamp_min(1)


def _differences(logits: Tensor) -> Tensor:
    """Return logit i minus logit j, [n, k, k]."""
    return logits.unsqueeze(-1) - logits.unsqueeze(-2)
