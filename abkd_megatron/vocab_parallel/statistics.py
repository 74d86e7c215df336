"""What a rank knows of its shard, and what all of them know together: sums a token, in fp64.

A shard's sums are taken relative to constants of its own, close to its own log-partitions. What the whole
vocabulary adds, a factor on each probability and a shift of each log-ratio, is known once the records of all
ranks are gathered, and enters then, exactly: a divergence that separates needs no second look at the logits.

A maximum and the logarithm of the sum of exponentials below it stay apart: their sum would round to a logit's
precision, and so would the log-ratio of the two models.

Legend: n tokens of a chunk, N tokens, C this rank's real columns, R ranks.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from abkd_megatron.divergences.base import Divergence, weigh


class View(NamedTuple):
    """The arguments of a divergence for a chunk, [n, C] each."""

    log_p: Tensor
    log_q: Tensor
    log_ratio: Tensor
    outside: Tensor  # where both models exclude the token

    def sum(self, terms: Tensor) -> Tensor:
        """Over the local columns, in fp64; the terms are overwritten where the token is outside."""
        return terms.masked_fill_(self.outside, 0.0).sum(dim=-1, dtype=torch.float64)


def view(student: Tensor, teacher: Tensor, q: tuple[Tensor, ...], p: tuple[Tensor, ...], temperature: float) -> View:
    """Log-probabilities of [n, C] logits relative to each model's (maximum, log of the sum below it), [n] fp64."""

    def column(numbers: Tensor) -> Tensor:
        return numbers.to(student.dtype).unsqueeze(-1)

    y, x = student - column(q[0]), teacher - column(p[0])
    if temperature != 1.0:
        y.div_(temperature)
        x.div_(temperature)
    log_ratio = (x - y).sub_(column(p[1] - q[1]))
    log_q, log_p = y.sub_(column(q[1])), x.sub_(column(p[1]))
    return View(log_p, log_q, log_ratio, (log_p == -math.inf) & (log_q == -math.inf))


class Layout:
    """Which numbers a record holds for each token, in this order.

    Of the student, then of the teacher: the maximum; the sum of exponentials below it, at T; with labels, the
    label's logit (-inf if another rank holds it), the id of the maximum and, if T is not 1, the sum at T = 1.
    Then the divergence's own sums. Then, with labels, sum p log(p/q), sum p log p and sum q log q at T = 1.
    """

    def __init__(self, divergence: Divergence, has_labels: bool, temperature: float) -> None:
        self.has_labels, self.temperature = has_labels, temperature
        self.of_model = 2 + has_labels * (2 + (temperature != 1.0))
        self.student = slice(0, self.of_model)
        self.teacher = slice(self.of_model, 2 * self.of_model)
        self.sums = slice(2 * self.of_model, 2 * self.of_model + divergence.num_sums)
        self.metrics = slice(self.sums.stop, self.sums.stop + 3 * has_labels)
        self.size = self.metrics.stop


class Model(NamedTuple):
    """One model on a shard, of a record's fields; fp64."""

    maximum: Tensor
    sum_exp: Tensor  # of (logit - maximum) / T
    sum_exp_at_1: Tensor
    target: Tensor | None
    top: Tensor | None

    @classmethod
    def of(cls, fields: Sequence[Tensor], layout: Layout) -> "Model":
        """From the model's fields of a record."""
        if not layout.has_labels:
            return cls(fields[0], fields[1], fields[1], None, None)
        return cls(fields[0], fields[1], fields[4 if layout.temperature != 1.0 else 1], fields[2], fields[3])

    def reference(self, dtype: torch.dtype, at_1: bool = False) -> tuple[Tensor, Tensor]:
        """What the shard's log-probabilities are relative to: (maximum, log of the sum), as `dtype` holds them.

        Rounded, so that arithmetic in `dtype` subtracts these very numbers and a merge knows what it has to mend.
        Where the model excludes the whole shard any finite number will do.
        """
        log_sum = (self.sum_exp_at_1 if at_1 else self.sum_exp).log().to(dtype).double()
        empty = self.maximum == -math.inf
        return self.maximum.masked_fill(empty, 0.0), log_sum.masked_fill(empty, 0.0)


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
        below = shards.maximum - maximum.masked_fill(maximum == -math.inf, 0.0).unsqueeze(-1)
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


def local_record(
    student: Tensor, teacher: Tensor, labels: Tensor | None, first_column: int, divergence: Divergence, layout: Layout
) -> Tensor:
    """One rank's record of a chunk, [fields, n] fp64, from logits [n, C]."""
    num_rows, num_columns = student.shape
    if num_columns == 0:  # an all-padding shard
        record = student.new_zeros(layout.size, num_rows, dtype=torch.float64)
        for model in (layout.student, layout.teacher):
            record[model.start : model.stop : 2][:2] = -math.inf  # the maximum and, with labels, the target
        return record
    fields = _of_model(student, labels, first_column, layout.temperature)
    fields += _of_model(teacher, labels, first_column, layout.temperature)
    q, p = Model.of(fields[layout.student], layout), Model.of(fields[layout.teacher], layout)
    dtype = student.dtype
    local = None
    if divergence.num_sums:
        local = view(student, teacher, q.reference(dtype), p.reference(dtype), layout.temperature)
        fields += [local.sum(terms) for terms in divergence.sums(*local[:3])]
    if layout.has_labels:
        if local is None or layout.temperature != 1.0:
            local = view(student, teacher, q.reference(dtype, at_1=True), p.reference(dtype, at_1=True), 1.0)
        p_mass, q_mass = local.log_p.exp(), local.log_q.exp()
        fields += [local.sum(weigh(p_mass, local.log_ratio)), local.sum(weigh(p_mass, local.log_p))]
        fields.append(local.sum(weigh(q_mass, local.log_q)))
    return torch.stack(fields)


def _of_model(logits: Tensor, labels: Tensor | None, first_column: int, temperature: float) -> list[Tensor]:
    maximum, argmax = logits.max(dim=-1)
    # Where every local logit is -inf the sum is 0 and any base will do, except -inf itself.
    below = logits - maximum.masked_fill(maximum == -math.inf, 0.0).unsqueeze(-1)
    fields = [maximum.double(), _sum_exp(below if temperature == 1.0 else below / temperature)]
    if labels is not None:
        column = labels - first_column
        held = (column >= 0) & (column < logits.shape[-1])
        target = logits.gather(-1, column.clamp(0, logits.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
        fields += [target.masked_fill(~held, -math.inf).double(), (argmax + first_column).double()]
        if temperature != 1.0:
            fields.append(_sum_exp(below))
    return fields


def _sum_exp(logits: Tensor) -> Tensor:
    return logits.exp().sum(dim=-1, dtype=torch.float64)


class Merged(NamedTuple):
    """What all records together say, [N] fp64 each."""

    q: Distribution
    p: Distribution
    value: Tensor | None  # D; None unless the divergence separates
    slope_sum: Tensor | None  # H; likewise
    metrics: list[Tensor]  # with labels: KL(p || q) and the entropies of p and q at T = 1


def merge(records: Tensor, divergence: Divergence, layout: Layout, dtype: torch.dtype) -> Merged:
    """Merge every rank's record, [R, fields, N]; the same bits wherever it is done.

    Args:
        records: fp64, in the order of `layout`.
        divergence: as in `local_record`.
        layout: as in `local_record`.
        dtype: of the arithmetic in `local_record`.
    """
    fields = records.permute(1, 2, 0)  # [fields, N, R]
    shards = [Model.of(list(fields[model]), layout) for model in (layout.student, layout.teacher)]
    q, p = (Distribution.merged(shard, layout.temperature) for shard in shards)
    value, slope_sum, metrics = None, None, []
    if divergence.num_sums:
        shares = _shares(shards, (q.maximum, q.log_z), (p.maximum, p.log_z), layout.temperature, dtype, at_1=False)
        value_terms, slope_terms = divergence.merge(tuple(fields[layout.sums]), *shares[:3])
        value = shares.sum(value_terms)
        slope_sum = shares.sum(slope_terms) if slope_terms is not None else None
    if layout.has_labels:
        shares = _shares(shards, (q.maximum, q.log_z_at_1), (p.maximum, p.log_z_at_1), 1.0, dtype, at_1=True)
        kl, negative_p, negative_q = fields[layout.metrics]
        # A shard's probabilities sum to 1 only up to the rounding of what they are relative to.
        p_sum, q_sum = (
            shard.sum_exp_at_1 * (-shard.reference(dtype, at_1=True)[1]).exp() for shard in reversed(shards)
        )
        p_share, q_share = shares.log_p.exp(), shares.log_q.exp()
        metrics = [
            shares.sum(weigh(p_share, kl + weigh(p_sum, shares.log_ratio))),
            -shares.sum(weigh(p_share, negative_p + weigh(p_sum, shares.log_p))),
            -shares.sum(weigh(q_share, negative_q + weigh(q_sum, shares.log_q))),
        ]
    return Merged(q, p, value, slope_sum, metrics)


def _shares(
    shards: Sequence[Model],
    q: tuple[Tensor, Tensor],
    p: tuple[Tensor, Tensor],
    temperature: float,
    dtype: torch.dtype,
    at_1: bool,
) -> View:
    """From what each shard is relative to, to the whole: the factors on p and q and the shift of log p/q, [N, R].

    Close to the log-probabilities of the shards themselves, and their log-ratio.
    """
    (q_max, q_log), (p_max, p_log) = (shard.reference(dtype, at_1) for shard in shards)
    q_rise, p_rise = (q_max - q[0].unsqueeze(-1)) / temperature, (p_max - p[0].unsqueeze(-1)) / temperature
    no_q, no_p = (shard.maximum == -math.inf for shard in shards)
    log_q = (q_rise + q_log - q[1].unsqueeze(-1)).masked_fill(no_q, -math.inf)
    log_p = (p_rise + p_log - p[1].unsqueeze(-1)).masked_fill(no_p, -math.inf)
    log_ratio = (p_rise - q_rise) + (p_log - q_log).to(dtype).double() - (p[1] - q[1]).unsqueeze(-1)
    log_ratio = log_ratio.masked_fill(no_q, math.inf).masked_fill(no_p, -math.inf)
    return View(log_p, log_q, log_ratio, no_p & no_q)
