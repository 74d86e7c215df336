"""Total variation distance."""

from dataclasses import dataclass

from torch import Tensor

from abkd_megatron.losses.base import Divergence, difference


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """Total variation distance, half the L1 distance of the probabilities.

        D = 1/2 sum_k |p - q|,    h = -1/2 q sign(p - q)

    Between 0 and 1, and symmetric. Not smooth: at p = q, h is 0, the middle of the subgradients, so that equal models
    stay equal. Elsewhere h does not shrink as p approaches q. A vocabulary entry that is unlikely under both models has
    little influence, whatever its ratio.

    Collectives: forward: 2 all-gathers of 4 and 2 fp64 numbers per token. Backward: none.

    Source: f-DISTILL, ACL 2023, arXiv 2307.15190 (TVD distillation), per token.
    """

    def value(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        """Return F."""
        return difference(log_p, log_q, log_ratio).abs_().mul_(0.5)

    def grad_log_q(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        """Return h; the log-ratio has a more accurate sign than p - q."""
        return log_ratio.sign().mul_(log_q.exp()).mul_(-0.5)
