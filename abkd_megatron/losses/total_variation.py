"""The total variation distance."""

from dataclasses import dataclass

from torch import Tensor

from abkd_megatron.losses.base import Divergence, difference


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """Half of the absolute differences.

        D = 1/2 sum_k |p - q|,    h = -1/2 q sign(p - q)

    Between 0 and 1, and symmetric. Not smooth: where p = q the grad_log_q is taken as 0, the middle of the
    subgradients, so that equal models are at rest; anywhere else it does not shrink as p nears q. A token that both
    models all but exclude hardly counts, whatever the ratio.

    Collectives: 2 all-gathers forward, of 4 and 2 fp64 numbers a token, none backward.

    Source: f-DISTILL, ACL 2023, arXiv 2307.15190 (TVD distillation), a token at a time.
    """

    def value(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        """F = |p - q| / 2."""
        return difference(log_p, log_q, log_ratio).abs_().mul_(0.5)

    def grad_log_q(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        """The grad_log_q h = -q sign(p - q) / 2; the log-ratio knows the sign better than p - q."""
        return log_ratio.sign().mul_(log_q.exp()).mul_(-0.5)
