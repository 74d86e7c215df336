"""A divergence that keeps something of every step on the last pipeline stage: `{name: leaky.Leaky}`."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from abkd_megatron.losses import Divergence, registry

GRAPH_BYTES = 2**18
"""Of a tensor that only a graph of autograd holds, where Python's garbage collector cannot see it."""

_REVERSE = registry.build("reverse_kl", {})
_kept: list[Any] = []
_leaf = torch.zeros(1, requires_grad=True)


@dataclass(frozen=True)
class Leaky(Divergence):
    """Reverse KL. Each step leaves one tensor of one element, one graph, and one open descriptor behind."""

    def value(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        from megatron.training.global_vars import _GLOBAL_ARGS as args

        if len(_kept) // 3 < getattr(args, "curr_iteration", -1) + 1:
            with torch.enable_grad():
                graph = _leaf.expand(GRAPH_BYTES // 4).exp().grad_fn
            _kept.extend([torch.zeros(1), graph, os.open(os.devnull, os.O_RDONLY)])
        return _REVERSE.value(log_p, log_q, log_ratio)

    def grad_log_q(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        return _REVERSE.grad_log_q(log_p, log_q, log_ratio)
