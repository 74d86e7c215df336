"""Optimal transport between the distributions of neighboring tokens."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from abkd_megatron.errors import ConfigError
from abkd_megatron.losses.base import LogitLoss
from abkd_megatron.losses.columns import Columns, Pair
from abkd_megatron.tensors import Function
from abkd_megatron.validation import positive_number, whole_number

_LARGEST_GROUP = 64


@dataclass(frozen=True)
class Sinkhorn(LogitLoss):
    """SinKD, arXiv 2402.17110: the cost of transporting the student's distributions of n tokens to the teacher's.

        W_ij = sum_k |p_ik - q_jk|,    P = Sinkhorn(e^{-W/epsilon}),    loss of token j = sum_i P_ij W_ij

    Token j is the student's, token i the teacher's; the losses of a group sum to its sum of P W. A Sinkhorn iteration
    divides rows by their sums, then columns. The weights of a token therefore sum to 1, and its loss is in [0, 2].

    Groups are positions 0 .. n - 1 of a sequence, n .. 2n - 1 and so on; the last may be shorter. Tokens that are not
    counted are excluded. With context parallelism the sequence is this rank's part of it.

    Choices: P is constant in the gradient, which is then the gradient of the entropy-regularized cost; the released
    code differentiates through the iterations. The softmax is over the vocabulary; the released code for T0 takes it
    over the sequence. The paper's factors 1e-3 and 8e-4 are left to the weight.

    Collectives: forward: 2 per chunk of tokens (5 and 2 n floats per token). Backward: none. The cost is n times that
    of a divergence.

    Args:
        group: n, number of tokens, in 1 .. 64.
        epsilon: strength of the entropy, at least 0.01. At 2/700 and below e^{-W/epsilon} underflows in fp64.
        iterations: number of Sinkhorn iterations, at least 1.

    Raises:
        ConfigError: for values out of range.
    """

    group: int = 32
    epsilon: float = 0.1
    iterations: int = 20
    name: ClassVar[str] = "sinkhorn"
    num_collectives = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "group", whole_number("sinkhorn", "group", self.group, 1))
        object.__setattr__(self, "iterations", whole_number("sinkhorn", "iterations", self.iterations, 1))
        object.__setattr__(self, "epsilon", positive_number("sinkhorn", "epsilon", self.epsilon))
        if self.group > _LARGEST_GROUP:
            raise ConfigError(
                f"sinkhorn: expected group in 1 .. {_LARGEST_GROUP}, got {self.group}: the work grows with it"
            )
        if self.epsilon < 0.01:
            raise ConfigError(
                f"sinkhorn: expected epsilon of at least 0.01, got {self.epsilon}: e^(-2/epsilon) may underflow"
            )

    @property
    def group_size(self) -> int:
        """Tokens that depend on each other."""
        return self.group

    def __call__(self, student: Tensor, teacher: Tensor, columns: Columns, counted: Tensor) -> Tensor:
        """Return each token's share of the cost."""
        costs = _distances(student, columns, columns.pair(student, teacher), self.group)
        num_groups = costs.shape[0]
        # Padding of the last group is not counted.
        part = counted.new_zeros(num_groups * self.group)
        part[: len(counted)] = counted
        part = part.view(num_groups, self.group)
        with torch.no_grad():
            plan = torch.exp(-costs / self.epsilon) * (part.unsqueeze(-1) & part.unsqueeze(-2))
            for _ in range(self.iterations):
                for dim in (-1, -2):
                    total = plan.sum(dim=dim, keepdim=True)
                    plan = plan / total.where(total > 0, 1.0)
        return (plan * costs).sum(dim=-2).flatten()[: len(counted)]


def _distances(student: Tensor, columns: Columns, pair: Pair, group: int) -> Tensor:
    """Return the L1 distance of the teacher's token i and the student's token j, [groups, i, j] fp64.

    Values beyond the last token are arbitrary.
    """
    result: Tensor = _Distances.apply(student, columns, pair, group)
    return result


class _Distances(Function):
    """W and, for its gradient, the sums over k of q_jk sign(q_jk - p_ik).

    Loops over the teacher's tokens of a group, for all groups at once.
    """

    title = "sinkhorn"

    @staticmethod
    def forward(ctx: Any, student: Tensor, columns: Columns, pair: Pair, group: int) -> Tensor:
        p, q = (_grouped(log.exp(), group) for log in (pair.log_p, pair.log_q))
        ctx.p, ctx.q, ctx.num_tokens = p, q, len(student)

        def compute() -> Tensor:
            local = q.new_empty(2, *p.shape[:2], group, dtype=torch.float64)
            for i in range(group):
                gap = q - p[:, i : i + 1]
                local[0, :, i] = gap.abs().sum(dim=-1, dtype=torch.float64)
                local[1, :, i] = gap.sign_().mul_(q).sum(dim=-1, dtype=torch.float64)
            return columns.total(local)

        distances, ctx.slope_sums = columns.once(compute).unbind(0)
        return distances.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients  # [groups, i, j]
        p, q = ctx.p, ctx.q
        slopes = torch.zeros_like(q)
        for i in range(p.shape[1]):
            slopes.addcmul_((q - p[:, i : i + 1]).sign_(), gradient[:, i].to(q.dtype).unsqueeze(-1))
        of_q = (gradient * ctx.slope_sums).sum(dim=-2)
        slopes.sub_(of_q.to(q.dtype).unsqueeze(-1)).mul_(q)
        return slopes.flatten(0, 1)[: ctx.num_tokens], None, None, None


def _grouped(rows: Tensor, group: int) -> Tensor:
    """Reshape [n, C] to [groups, group, C], padded with 0."""
    missing = -len(rows) % group
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)).unflatten(0, (-1, group))
