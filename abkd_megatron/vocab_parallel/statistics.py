"""What all ranks know together from the records of their shards: sums a token, in fp64.

What a shard's sums are relative to is known from its record. What the whole vocabulary adds, a factor on each
probability and a shift of each log-ratio, enters here, exactly: a divergence that separates needs no second look at
the logits.

Legend: N tokens, R ranks.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from abkd_megatron.divergences.base import Divergence, weigh
from abkd_megatron.kernels.record import Layout, Model, View, base


class Distribution(NamedTuple):
    """One model over the whole vocabulary, [N] fp64 each."""

    maximum: Tensor  # of the raw logits
    log_z: Tensor  # log sum_k exp((logit_k - maximum) / T)
    log_z_at_1: Tensor  # the same at T = 1
    target: Tensor | None  # the label's raw logit
    top: Tensor | None  # the lowest id of the maximum

    @classmethod
    def merged(cls, shards: Model, temperature: float) -> "Distribution":
        """Of the shards' [N, R]."""
        maximum = shards.maximum.amax(dim=-1)
        below = shards.maximum - base(maximum).unsqueeze(-1)
        log_z = (shards.sum_exp * (below / temperature).exp()).sum(dim=-1).log()
        if shards.target is None or shards.top is None:
            return cls(maximum, log_z, log_z, None, None)
        log_z_at_1 = log_z if temperature == 1.0 else (shards.sum_exp_at_1 * below.exp()).sum(dim=-1).log()
        # The smallest id among the ranks that hold the maximum, whatever their order.
        top = shards.top.masked_fill(shards.maximum != maximum.unsqueeze(-1), math.inf).amin(dim=-1)
        return cls(maximum, log_z, log_z_at_1, shards.target.amax(dim=-1), top)

    def cross_entropy(self) -> Tensor:
        """On the labels, in nats at T = 1."""
        assert self.target is not None
        return self.log_z_at_1 - (self.target - self.maximum)


class Merged(NamedTuple):
    """What all records together say, [N] fp64 each."""

    q: Distribution
    p: Distribution
    value: Tensor | None  # D; None unless the divergence separates
    slope_sum: Tensor | None  # H; likewise
    metrics: list[Tensor]  # with labels: KL(p || q) and the entropies of p and q at T = 1


def merge(records: Tensor, divergence: Divergence, layout: Layout) -> Merged:
    """Merge every rank's record, [R, fields, N]; the same bits wherever it is done.

    Args:
        records: fp64, in the order of `layout`.
        divergence: as in `local_record`.
        layout: as in `local_record`.
    """
    fields = records.permute(1, 2, 0)  # [fields, N, R]
    shards = [Model.of(list(fields[model]), layout) for model in (layout.student, layout.teacher)]
    q, p = (Distribution.merged(shard, layout.temperature) for shard in shards)
    value, slope_sum, metrics = None, None, []
    if divergence.num_sums:
        shift = _shift(shards, (q.maximum, q.log_z), (p.maximum, p.log_z), layout.temperature)
        sums = divergence.rebase(tuple(fields[layout.sums]), *shift[:3])
        value, slope_sum = divergence.from_sums(tuple(shift.sum(terms) for terms in sums))
    if layout.has_labels:
        shift = _shift(shards, (q.maximum, q.log_z_at_1), (p.maximum, p.log_z_at_1), 1.0)
        kl, negative_p, negative_q = fields[layout.metrics]
        q_sum, p_sum = (shard.sum_exp_at_1 for shard in shards)
        q_share, p_share = shift.log_q.exp(), shift.log_p.exp()
        metrics = [
            shift.sum(weigh(p_share, kl + weigh(p_sum, shift.log_ratio))),
            -shift.sum(weigh(p_share, negative_p + weigh(p_sum, shift.log_p))),
            -shift.sum(weigh(q_share, negative_q + weigh(q_sum, shift.log_q))),
        ]
    return Merged(q, p, value, slope_sum, metrics)


def _shift(shards: Sequence[Model], q: tuple[Tensor, Tensor], p: tuple[Tensor, Tensor], temperature: float) -> View:
    """From each shard's maxima to the whole: the factors on p and q and the shift of log p/q, [N, R].

    The difference of the two logarithms is taken as it is in backward.
    """
    no_q, no_p = (shard.maximum == -math.inf for shard in shards)
    q_rise, p_rise = (
        (base(shard.maximum) - whole[0].unsqueeze(-1)) / temperature
        for shard, whole in zip(shards, (q, p), strict=True)
    )
    log_q = (q_rise - q[1].unsqueeze(-1)).masked_fill(no_q, -math.inf)
    log_p = (p_rise - p[1].unsqueeze(-1)).masked_fill(no_p, -math.inf)
    log_ratio = (p_rise - q_rise) - (p[1] - q[1]).unsqueeze(-1)
    log_ratio = log_ratio.masked_fill(no_q, math.inf).masked_fill(no_p, -math.inf)
    return View(log_p, log_q, log_ratio, no_p & no_q)
