"""A divergence that is NaN, infinite or huge at one step, on one rank or on all: `{name: faulty.Faulty, rank: 1}`."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from abkd_megatron.losses import Divergence, registry


@dataclass(frozen=True)
class Faulty(Divergence):
    """Reverse KL, but at one step `number` more in every column: NaN, or 1e39, which is infinite in fp32."""

    step: float = 3.0
    """Counted from 1, as Megatron logs it."""
    rank: float = -1.0
    """-1: all ranks."""
    number: float = float("nan")

    def value(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        value = _REVERSE.value(log_p, log_q, log_ratio)
        return value + self.number if self._is_due() else value

    def grad_log_q(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        return _REVERSE.grad_log_q(log_p, log_q, log_ratio)

    def _is_due(self) -> bool:
        from megatron.training.global_vars import _GLOBAL_ARGS as args

        step = getattr(args, "curr_iteration", None)
        return step is not None and step + 1 == self.step and self.rank in (-1.0, dist.get_rank())


_REVERSE = registry.build("reverse_kl", {})
