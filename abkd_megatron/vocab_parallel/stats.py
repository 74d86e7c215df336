"""Per-token statistics over the whole vocabulary, in fp64, merged from the records of all ranks.

A record contains the maxima that its sums are relative to. Shifting the sums to the global maxima is exact and makes
them additive, so a divergence that separates needs no second pass over the logits.

Legend: N tokens, R ranks.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from abkd_megatron.kernels.record import Layout, Model, View, base
from abkd_megatron.losses.base import Divergence, weigh

# In a packed number the id takes the low bits of the fp64 mantissa, which are 0 for fp32 values.
_ID_BITS = 29


class Distribution(NamedTuple):
    """One model's distribution over the whole vocabulary, [N] fp64 each."""

    maximum: Tensor  # of the raw logits
    log_z: Tensor  # log sum_k exp((logit_k - maximum) / T)
    log_z_at_1: Tensor  # the same at T = 1
    target: Tensor | None  # the label's raw logit
    top: Tensor | None  # the lowest id of the maximum

    def cross_entropy(self) -> Tensor:
        """Return the cross entropy on the labels, in nats at T = 1."""
        assert self.target is not None
        return self.log_z_at_1 - (self.target - self.maximum)


class GlobalStats(NamedTuple):
    """Statistics from the records of all ranks, [N] fp64 each."""

    q: Distribution
    p: Distribution
    value: Tensor | None  # D; None unless the divergence separates
    slope_sum: Tensor | None  # H; None unless it separates
    metrics: list[Tensor]  # with labels: KL(p || q) and the entropies of p and q at T = 1


def merge(records: Tensor, divergence: Divergence, layout: Layout) -> Tensor:
    """Merge the records of all ranks; bitwise identical on every rank.

    Args:
        records: [R, fields, N] fp64, in the order of `layout`.
        divergence: as in `local_record`.
        layout: as in `local_record`.

    Returns:
        [fields, N].
    """
    whole = records.amax(dim=0)  # valid for the maxima and the labels' logits; the rest is overwritten
    if layout.has_labels:
        # The smallest id among the ranks that hold the maximum.
        beaten = records[:, layout.maxima] != whole[layout.maxima]
        whole[layout.tops] = records[:, layout.tops].masked_fill(beaten, math.inf).amin(dim=0)
    first, *others = records.unbind(0)
    sums = shift_max(first, whole, divergence, layout)
    for record in others:
        sums += shift_max(record, whole, divergence, layout)
    layout.set_additive(whole, sums)
    return whole


def shift_max(record: Tensor, whole: Tensor, divergence: Divergence, layout: Layout) -> Tensor:
    """Return `Layout.additive` of a shard's record, relative to the maxima in `whole`."""
    ours, theirs = (tuple(of[layout.maxima].unbind(0)) for of in (record, whole))
    q_rise, p_rise = (base(mine) - base(other) for mine, other in zip(ours, theirs, strict=True))
    no_q, no_p = (maximum == -math.inf for maximum in ours)

    def shift_by(temperature: float) -> View:
        return _shift(q_rise / temperature, p_rise / temperature, (p_rise - q_rise) / temperature, no_q, no_p)

    return layout.additive(_relative(record, shift_by(layout.temperature), shift_by(1.0), divergence, layout))


def conclude(whole: Tensor, divergence: Divergence, layout: Layout) -> GlobalStats:
    """Compute the statistics from the merged record, [fields, N]."""
    models = [Model.of(list(whole[fields]), layout) for fields in (layout.student, layout.teacher)]
    q, p = (
        Distribution(model.maximum, model.sum_exp.log(), model.sum_exp_at_1.log(), model.target, model.top)
        for model in models
    )
    no_q, no_p = (model.maximum == -math.inf for model in models)
    shift = _shift(-q.log_z, -p.log_z, -(p.log_z - q.log_z), no_q, no_p)
    shift_at_1 = _shift(-q.log_z_at_1, -p.log_z_at_1, -(p.log_z_at_1 - q.log_z_at_1), no_q, no_p)
    fields = _relative(whole, shift, shift_at_1, divergence, layout)
    value, slope_sum = divergence.finalize(tuple(fields[layout.sums])) if divergence.num_partial_sums else (None, None)
    metrics = []
    if layout.has_labels:
        kl, negative_p, negative_q = fields[layout.metrics]
        metrics = [kl, -negative_p, -negative_q]
    return GlobalStats(q, p, value, slope_sum, metrics)


def _shift(log_q: Tensor, log_p: Tensor, log_ratio: Tensor, no_q: Tensor, no_p: Tensor) -> View:
    """Return the shifts of log p, log q and log p/q; a model that excludes the whole shard has probability 0."""
    log_q, log_p = log_q.masked_fill(no_q, -math.inf), log_p.masked_fill(no_p, -math.inf)
    log_ratio = log_ratio.masked_fill(no_q, math.inf).masked_fill(no_p, -math.inf)
    return View(log_p, log_q, log_ratio, no_p & no_q)


def _relative(record: Tensor, shift: View, shift_at_1: View, divergence: Divergence, layout: Layout) -> Tensor:
    """Shift the additive fields of a record; [fields, N]."""
    result = record.clone()
    for model, at_t, at_1 in (
        (layout.student, shift.log_q, shift_at_1.log_q),
        (layout.teacher, shift.log_p, shift_at_1.log_p),
    ):
        result[model.start + 1] = weigh(record[model.start + 1], at_t.exp())
        if layout.of_model == 5:
            result[model.start + 4] = weigh(record[model.start + 4], at_1.exp())
    if divergence.num_partial_sums:
        sums = divergence.shift_max(tuple(record[layout.sums]), *shift[:3])
        result[layout.sums] = torch.stack(sums).masked_fill(shift.outside, 0.0)
    if layout.has_labels:
        q, p = (Model.of(list(record[fields]), layout).sum_exp_at_1 for fields in (layout.student, layout.teacher))
        kl, negative_p, negative_q = record[layout.metrics]
        q_share, p_share = shift_at_1.log_q.exp(), shift_at_1.log_p.exp()
        metrics = [
            weigh(p_share, kl + weigh(p, shift_at_1.log_ratio)),
            weigh(p_share, negative_p + weigh(p, shift_at_1.log_p)),
            weigh(q_share, negative_q + weigh(q, shift_at_1.log_q)),
        ]
        result[layout.metrics] = torch.stack(metrics).masked_fill(shift_at_1.outside, 0.0)
    return result


def pack(record: Tensor, layout: Layout) -> Tensor:
    """Pack the non-additive fields of a record of fp32 logits, so that a MAX all-reduce merges them.

    The id of a maximum is stored in its zero bits, such that among equal maxima the lowest id is the largest number.
    """
    maxima = record[layout.maxima]
    if not layout.has_labels:
        return maxima.clone()  # it is reduced in place, and the record is still needed
    ids = record[layout.tops].clamp_max(2.0**_ID_BITS - 1).long()
    bits = (maxima + 0.0).view(torch.int64)  # + 0.0 turns -0.0 into 0.0
    bits = bits | torch.where(maxima >= 0, 2**_ID_BITS - 1 - ids, ids)
    packed = torch.where(maxima.isfinite(), bits.view(torch.float64), maxima)
    return torch.cat([packed, record[layout.targets]])


def unpack(packed: Tensor, layout: Layout) -> Tensor:
    """Build a merged record, without its sums, from packed numbers."""
    whole = packed.new_zeros(layout.size, packed.shape[-1])
    whole[layout.maxima] = packed[:2]
    if layout.has_labels:
        bits = packed[:2].contiguous().view(torch.int64)
        ids = bits & (2**_ID_BITS - 1)
        finite = packed[:2].isfinite()
        whole[layout.maxima] = torch.where(finite, (bits - ids).view(torch.float64), packed[:2])
        tops = torch.where(packed[:2] >= 0, 2**_ID_BITS - 1 - ids, ids).double()
        whole[layout.tops] = tops.masked_fill(~finite, math.inf)
        whole[layout.targets] = packed[2:]
    return whole
