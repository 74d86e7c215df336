"""ToDi: forward and reverse KL, mixed per vocabulary entry by the ratio of the models' probabilities."""

from dataclasses import dataclass

import torch
from torch import Tensor

from abkd_megatron.errors import ConfigError
from abkd_megatron.losses.alpha_beta import AlphaBeta
from abkd_megatron.losses.base import Divergence, coefficient, weigh
from abkd_megatron.validation import finite_number, flag

_FORWARD, _REVERSE = AlphaBeta(1.0, 0.0), AlphaBeta(0.0, 1.0)


@dataclass(frozen=True)
class ToDi(Divergence):
    """Token-wise distillation (ToDi).

        D = sum_k [ w p log(p/q) + (1 - w) q log(q/p) ],    w = sigmoid(scale * log(p/q))

    Forward KL dominates where the teacher's probability is the larger, reverse KL where the student's is. At scale 1
    the value equals forward + reverse KL; at scale 0 it is half their sum.

    With `detach` the weights are constant in the gradient, as in the paper and its code:

        h = -w p + (1 - w) q (1 - rho),    rho = log(p/q)

    This is not the gradient of the value. Without `detach`, h has the additional term -scale w (1 - w) rho (p + q) and
    is the gradient.

    Infinite where exactly one of p, q is 0, like forward + reverse KL.

    Args:
        scale: of the log-ratio inside the sigmoid, finite, >= 0; 1 in the paper's code.
        detach: treat w as constant in the gradient.

    Raises:
        ConfigError: if scale is not a finite number >= 0 or detach is not a bool.

    Source: ToDi, EMNLP 2025, arXiv 2505.16297, equations 7, 8 and 10.
    """

    scale: float = 1.0
    detach: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", finite_number("ToDi", "scale", self.scale))
        if self.scale < 0:
            raise ConfigError(
                f"ToDi: expected scale >= 0, got {self.scale}: a negative one favors the wrong KL term; "
                "give 1.0 for the paper's"
            )
        object.__setattr__(self, "detach", flag("ToDi", "detach", self.detach))

    def value(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        """Return F = (w p - (1 - w) q) rho."""
        w, reverse = self._weights(log_q, log_ratio)
        return weigh(self._excess(w, log_p.exp(), reverse, log_ratio), log_ratio)

    def grad_log_q(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        """Return h, with the gradient through w unless `detach`."""
        w, reverse = self._weights(log_q, log_ratio)
        p = log_p.exp()
        h = self._excess(w, p, reverse, log_ratio).neg_().sub_(weigh(reverse, log_ratio))
        scale = coefficient(self.scale, log_ratio.dtype)
        if not self.detach and scale != 0.0:
            mass = (p * (1.0 - w)).add_(reverse).mul_(w)
            h.sub_(weigh(mass, log_ratio), alpha=scale)
        return h

    @property
    def num_partial_sums(self) -> int:
        """Nonzero only at scale 1, where w p - (1 - w) q = p - q and the value equals forward + reverse KL."""
        return _FORWARD.num_partial_sums + _REVERSE.num_partial_sums if self.scale == 1.0 else 0

    def partial_sums(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> tuple[Tensor, ...]:
        """Return the partial sums of forward and reverse KL, at scale 1."""
        if self.num_partial_sums == 0:
            return ()
        return (*_FORWARD.partial_sums(log_p, log_q, log_ratio), *_REVERSE.partial_sums(log_p, log_q, log_ratio))

    def shift_max(
        self, sums: tuple[Tensor, ...], log_p: Tensor, log_q: Tensor, log_ratio: Tensor
    ) -> tuple[Tensor, ...]:
        """Shift the sums of forward and reverse KL."""
        forward, reverse = sums[: _FORWARD.num_partial_sums], sums[_FORWARD.num_partial_sums :]
        shift = log_p, log_q, log_ratio
        return (*_FORWARD.shift_max(forward, *shift), *_REVERSE.shift_max(reverse, *shift))

    def finalize(self, sums: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        """Return D and, unless the weights are detached, H; the detached H does not separate."""
        forward_value, forward_slope = _FORWARD.finalize(sums[: _FORWARD.num_partial_sums])
        reverse_value, reverse_slope = _REVERSE.finalize(sums[_FORWARD.num_partial_sums :])
        return forward_value + reverse_value, None if self.detach else forward_slope + reverse_slope

    def _weights(self, log_q: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
        """Return w and (1 - w) q."""
        scale = coefficient(self.scale, log_ratio.dtype)
        w = (log_ratio * scale).sigmoid_() if scale != 0.0 else torch.full_like(log_ratio, 0.5)
        return w, (1.0 - w).mul_(log_q.exp())

    def _excess(self, w: Tensor, p: Tensor, reverse: Tensor, log_ratio: Tensor) -> Tensor:
        """Return w p - (1 - w) q; the ratio of the two is exp((1 + scale) rho), so they cancel near rho = 0."""
        rise = log_ratio * (1.0 + coefficient(self.scale, log_ratio.dtype))
        near = rise.expm1().mul_(reverse)
        return torch.where(rise.abs_() < 1.0, near, (w * p).sub_(reverse))
