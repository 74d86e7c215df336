"""The teacher's likeliest token preferred to the student's."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from abkd_megatron.losses.base import LogitLoss
from abkd_megatron.losses.columns import Columns
from abkd_megatron.validation import positive_number


@dataclass(frozen=True)
class Preference(LogitLoss):
    """The token preference of DPKD, arXiv 2406.19774, as its released code has it.

        -log sigmoid(beta [(log q(y_t) - log q(y_s)) - (log p(y_t) - log p(y_s))]),  y_t = argmax p,  y_s = argmax q

    The paper prefers whole outputs; its code prefers tokens, and so does this. Of equal probabilities the lowest global
    id is the likeliest. Where y_t = y_s the loss is log 2 and the gradient 0. The normalisers cancel: the gradient is
    of the two logits alone. Infinite where the teacher gives y_s no probability.

    Collectives: forward: 2 for each chunk of tokens (4 floats a token each). Backward: none.

    Args:
        beta: steepness, above 0.

    Raises:
        ConfigError: for a beta that is not above 0.
    """

    beta: float = 0.1
    name: ClassVar[str] = "preference"
    num_collectives = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", positive_number("preference", "beta", self.beta))

    def __call__(self, student: Tensor, teacher: Tensor, columns: Columns, counted: Tensor) -> Tensor:
        """-log sigmoid of the scaled margin."""
        (y_t, s_of_t, t_of_t), (y_s, s_of_s, t_of_s) = (
            columns.top_k(ranked, 1, student, teacher) for ranked in (teacher, student)
        )
        margin = ((s_of_t - s_of_s) - (t_of_t - t_of_s)).masked_fill(y_t == y_s, 0.0)
        return -torch.nn.functional.logsigmoid(self.beta * margin).squeeze(-1)
