"""Preference of the teacher's most likely token over the student's."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from abkd_megatron.losses.base import LogitLoss
from abkd_megatron.losses.columns import Columns
from abkd_megatron.validation import positive_number


@dataclass(frozen=True)
class Preference(LogitLoss):
    """Token preference of DPKD, arXiv 2406.19774, as in its released code.

        -log sigmoid(beta [(log q(y_t) - log q(y_s)) - (log p(y_t) - log p(y_s))]),  y_t = argmax p,  y_s = argmax q

    The paper compares whole outputs; its code and this loss compare tokens. Ties are broken by lowest global id. Where
    y_t = y_s the loss is log 2 and the gradient 0. The normalizers cancel, so only the two logits have a gradient.
    Infinite where the teacher's probability of y_s is 0.

    Collectives: forward: 2 per chunk of tokens (4 floats per token each). Backward: none.

    Args:
        beta: steepness, above 0.

    Raises:
        ConfigError: if beta is not above 0.
    """

    beta: float = 0.1
    name: ClassVar[str] = "preference"
    num_collectives = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", positive_number("preference", "beta", self.beta))

    def __call__(self, student: Tensor, teacher: Tensor, columns: Columns, counted: Tensor) -> Tensor:
        """Return -log sigmoid of the scaled margin."""
        (y_t, s_of_t, t_of_t), (y_s, s_of_s, t_of_s) = (
            columns.top_k(ranked, 1, student, teacher) for ranked in (teacher, student)
        )
        margin = ((s_of_t - s_of_s) - (t_of_t - t_of_s)).masked_fill(y_t == y_s, 0.0)
        return -torch.nn.functional.logsigmoid(self.beta * margin).squeeze(-1)
