"""Per-token statistics over the whole vocabulary, in fp64, merged from the records of all ranks.

A record contains the maxima that its sums are relative to. Shifting the sums to the global maxima is exact and makes
them additive, so a divergence that separates needs no second pass over the logits.

Legend: N tokens, R ranks.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from abkd_megatron.kernels.record import Layout, base
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
    # All ranks at once, because the host's time per launch exceeds the time of the arithmetic.
    of_ranks = shift_max(records.transpose(0, 1), whole.unsqueeze(1), divergence, layout)
    sums, *others = of_ranks.unbind(1)
    for of_rank in others:  # a sum over the dimension would have no defined order
        sums += of_rank
    layout.set_additive(whole, sums)
    return whole


def shift_max(record: Tensor, whole: Tensor, divergence: Divergence, layout: Layout) -> Tensor:
    """Return `Layout.additive` of a shard's record, relative to the maxima in `whole`.

    `record` may have a dimension of shards after the fields, to which `whole` broadcasts.
    """
    ours = record[layout.maxima]
    absent = ours == -math.inf
    rises = ours.masked_fill(absent, 0.0) - base(whole[layout.maxima])
    ratio = rises[1] - rises[0]
    shift = shift_at_1 = _shift(rises, ratio, absent)
    if layout.temperature != 1.0:
        shift = _shift(rises / layout.temperature, ratio / layout.temperature, absent)
    masses = weigh(record[layout.masses], shift.logs.exp())
    of_models = [masses]
    if layout.masses_at_1 != layout.masses:
        of_models.append(weigh(record[layout.masses_at_1], shift_at_1.logs.exp()))
    by_model = [masses[model : model + 1] for model in (0, 1) for masses in of_models]
    return torch.cat([*by_model, *_relative(record, shift, shift_at_1, divergence, layout)])


def conclude(whole: Tensor, divergence: Divergence, layout: Layout) -> GlobalStats:
    """Compute the statistics from the merged record, [fields, N]."""
    maxima = whole[layout.maxima]
    absent = maxima == -math.inf
    log_z = log_z_at_1 = whole[layout.masses].log()
    shift = shift_at_1 = _shift(-log_z, log_z[0] - log_z[1], absent)
    if layout.masses_at_1 != layout.masses:
        log_z_at_1 = whole[layout.masses_at_1].log()
        shift_at_1 = _shift(-log_z_at_1, log_z_at_1[0] - log_z_at_1[1], absent)
    of_labels = (whole[layout.targets], whole[layout.tops]) if layout.has_labels else ((None, None), (None, None))
    q, p = (Distribution(*of_model) for of_model in zip(maxima, log_z, log_z_at_1, *of_labels, strict=True))
    value, slope_sum, metrics = None, None, []
    fields = _relative(whole, shift, shift_at_1, divergence, layout)
    if divergence.num_partial_sums:
        value, slope_sum = divergence.finalize(tuple(fields[0]))
    if layout.has_labels:
        kl, p_entropy, q_entropy = fields[-1][0], *fields[-1][1:].neg()
        metrics = [kl, p_entropy, q_entropy]
    return GlobalStats(q, p, value, slope_sum, metrics)


class _Shift(NamedTuple):
    """Shifts of the logarithms that a record's sums are relative to, over the tokens."""

    logs: Tensor  # [2, ...], of log q and log p
    log_ratio: Tensor
    outside: Tensor  # neither model uses the shard


def _shift(logs: Tensor, log_ratio: Tensor, absent: Tensor) -> _Shift:
    """Give a model that excludes the whole shard, `absent` [2, ...], probability 0."""
    no_q, no_p = absent
    log_ratio = log_ratio.masked_fill(no_q, math.inf).masked_fill_(no_p, -math.inf)
    return _Shift(logs.masked_fill(absent, -math.inf), log_ratio, no_p & no_q)


def _relative(
    record: Tensor, shift: _Shift, shift_at_1: _Shift, divergence: Divergence, layout: Layout
) -> list[Tensor]:
    """Shift the sums and the metrics of a record, which has them from `Layout.sums` on."""
    fields = []
    if divergence.num_partial_sums:
        log_q, log_p = shift.logs
        sums = divergence.shift_max(tuple(record[layout.sums]), log_p, log_q, shift.log_ratio)
        fields.append(torch.stack(sums).masked_fill_(shift.outside, 0.0))
    if layout.has_labels:
        (q, p), (log_q, log_p) = record[layout.masses_at_1], shift_at_1.logs
        terms = weigh(torch.stack([p, p, q]), torch.stack([shift_at_1.log_ratio, log_p, log_q]))
        shares = torch.stack([log_p, log_p, log_q]).exp_()
        metrics = weigh(shares, terms.add_(record[layout.metrics]))
        fields.append(metrics.masked_fill_(shift_at_1.outside, 0.0))
    return fields


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
