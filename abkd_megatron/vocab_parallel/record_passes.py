"""Passes over a batch of sharded student logits against teacher records, and their collective.

Kept columns are those of a record's ids, all others form the rest. The pass over the logits is the kernels' own: with
the kept columns excluded, the record of a student compared with itself has what the rest needs. The kept logits are
exchanged with it, after which every rank has the student's K + 1 buckets. Buckets are compared in fp64. In the
gradient the columns of the rest are one softmax times one number per token; the kept ones are then written over it.

Legend: N tokens, n of them in a chunk, K kept ids per token, C this rank's real columns, R ranks.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from abkd_megatron import kernels
from abkd_megatron.kernels.record import Layout, base
from abkd_megatron.losses.base import Divergence, weigh
from abkd_megatron.vocab_parallel.logits import STUDENT_ONLY
from abkd_megatron.vocab_parallel.passes import Rows
from abkd_megatron.vocab_parallel.shard import VocabShard
from abkd_megatron.vocab_parallel.teacher_records import BUCKETED_KL, SAMPLED_KL, TeacherRecords
from abkd_megatron.vocab_parallel.terms import Terms


class RecordBatch:
    """Student logits [..., W] on this rank, and records and labels [N] of the same tokens."""

    def __init__(self, student: Tensor, records: TeacherRecords, labels: Tensor, passes: "RecordPasses") -> None:
        self.student = Rows(student, passes.shard.num_columns, passes.kernel.strided)
        self.disposable = passes.disposable
        self.records = records
        self.labels = labels.reshape(-1)
        self.num_tokens = self.labels.numel()
        self.shard = passes.shard
        self.columns = records.ids.long() - self.shard.start
        """[N, K], of the kept tokens; out of range on other ranks."""

    @functools.cached_property
    def owned(self) -> Tensor:
        """[N, K] bool: the kept token is a column of this rank."""
        return (self.columns >= 0) & (self.columns < self.shard.num_columns)

    @property
    def own_label(self) -> Tensor:
        """[N] bool: the label is a column of the rest on this rank."""
        is_kept = (self.records.ids == self.labels.unsqueeze(-1)).any(dim=-1)
        return (self.labels >= self.shard.start) & (self.labels < self.shard.stop) & ~is_kept

    def excluded(self, chunk: slice) -> Tensor:
        """Return a chunk's logits [n, C] with the kept columns at -inf: in place if disposable, else in a copy."""
        whole = self.student
        if self.disposable:
            rows = whole[chunk]
        else:
            rows = Rows(whole.logits, whole.num_columns, True, whole.index)[chunk]
            rows = rows.clone(memory_format=torch.contiguous_format)
        if rows.shape[-1]:
            _write_owned(rows, self.columns[chunk], self.owned[chunk], rows.new_full((), -math.inf))
        return rows


def _write_owned(rows: Tensor, columns: Tensor, owned: Tensor, values: Tensor) -> None:
    """Write `values`, [n, K] or scalar, to the `owned` [n, K] ones of `columns` in rows [n, C].

    The others are directed to the place and value of an owned one, or rewrite column 0: writes of equal values to one
    place have a defined result without a synchronization.
    """
    at = owned.int().argmax(dim=-1, keepdim=True)
    any_owned = owned.gather(-1, at)
    values = values.to(rows.dtype).expand(columns.shape)
    other_column = torch.where(any_owned, columns.gather(-1, at), 0)
    other_value = torch.where(any_owned, values.gather(-1, at), rows[:, :1])
    rows.scatter_(-1, torch.where(owned, columns, other_column), torch.where(owned, values, other_value))


@dataclass(frozen=True)
class RecordPasses:
    """Specification of the passes: divergence, columns, dtype and kernel."""

    divergence: Divergence
    shard: VocabShard
    temperature: float
    dtype: torch.dtype
    """Dtype of the arithmetic on logits."""
    kernel: kernels.Kernel
    layout: Layout
    """Of the kernel's record of the rest."""
    metrics: tuple[str, ...]
    disposable: bool
    """The logits may be overwritten in the first pass."""

    @classmethod
    def of(
        cls,
        student: Tensor,
        records: TeacherRecords,
        divergence: Divergence,
        shard: VocabShard,
        temperature: float,
        disposable: bool,
    ) -> "RecordPasses":
        """Select dtype and kernel for these logits."""
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        kernel = kernels.select(STUDENT_ONLY, student, student)
        layout = Layout(STUDENT_ONLY, True, temperature)
        return cls(divergence, shard, temperature, dtype, kernel, layout, records.metrics(temperature), disposable)

    def batch(self, student: Tensor, teacher: TeacherRecords, labels: Tensor) -> RecordBatch:
        """Build a batch of [..., W] logits, and records and labels of its tokens."""
        return RecordBatch(student, teacher, labels, self)

    def start(self, batch: RecordBatch, async_op: bool = False) -> "PendingBuckets":
        """Run the first pass and start to exchange the kept logits and the record of the rest."""
        shard, layout = self.shard, self.layout
        rank = dist.get_rank(shard.group) if shard.num_ranks > 1 else 0
        # Of a student with itself the teacher's fields repeat the student's; the last is sum q log q.
        of_rest, num_fields = [layout.student, slice(layout.size - 1, layout.size)], layout.of_model + 1
        num_kept = batch.columns.shape[-1]
        buffer = batch.student.logits.new_zeros(
            shard.num_ranks * num_fields + num_kept, batch.num_tokens, dtype=torch.float64
        )
        own, kept = buffer[rank * num_fields : (rank + 1) * num_fields], buffer[shard.num_ranks * num_fields :]
        if (native := self.kernel.records) is not None and shard.num_columns:
            for chunk in self._native_chunks(batch):
                rows, labels, columns = batch.student[chunk], batch.labels[chunk], batch.columns[chunk]
                native.rest_record(
                    *(own[:, chunk], kept[:, chunk], rows, labels, columns, shard.start, self.temperature)
                )
            return PendingBuckets(buffer, num_fields, shard, async_op)
        columns = batch.columns.clamp(0, max(shard.num_columns - 1, 0))
        chunks = self.kernel.chunks(batch.num_tokens, shard.num_columns, buffer.device, not batch.disposable)
        for chunk in chunks:
            if shard.num_columns:
                logits = batch.student[chunk].gather(-1, columns[chunk])
                kept[:, chunk] = torch.where(batch.owned[chunk], logits, 0.0).t()
            rows, labels = batch.excluded(chunk), batch.labels[chunk]
            record = self.kernel.local_record(rows, rows, labels, shard.start, STUDENT_ONLY, layout, self.dtype)
            own[:, chunk] = torch.cat([record[fields] for fields in of_rest])
        return PendingBuckets(buffer, num_fields, shard, async_op)

    def _native_chunks(self, batch: RecordBatch) -> list[slice]:
        copied = batch.student.copied
        return self.kernel.chunks(batch.num_tokens, self.shard.num_columns, batch.labels.device, copied)

    def conclude(
        self, batch: RecordBatch, pending_record: "PendingBuckets", needs_gradient: bool, out: Terms
    ) -> "BucketStats | None":
        """Write the terms after waiting for the exchange; return what the gradient needs."""
        of_rest, kept = pending_record.result()
        num_buckets = kept.shape[0] + 1
        # Not the kernel's chunks: these are of [K + 1, n] fp64.
        rows = max(1, kernels.chunk_elements(kept.device) // num_buckets)
        chunks = [slice(first, first + rows) for first in range(0, max(batch.num_tokens, 1), rows)]
        found = [self._conclude(batch, chunk, of_rest[:, :, chunk], kept[:, chunk], needs_gradient) for chunk in chunks]
        terms, stats = zip(*found, strict=True)
        out.write_rows(torch.cat(terms, dim=-1).to(out.terms.dtype))
        if not needs_gradient:
            return None
        return BucketStats(*(torch.cat(parts, dim=-1) for parts in zip(*stats, strict=True)))

    def _conclude(
        self, batch: RecordBatch, chunk: slice, of_rest: Tensor, kept: Tensor, needs_gradient: bool
    ) -> "tuple[Tensor, BucketStats | tuple[()]]":
        """Return the terms [rows, n] of a chunk, and what its gradient needs; from [R, fields, n] and [K, n]."""
        records, labels, temperature = batch.records[chunk], batch.labels[chunk], self.temperature
        ids = records.ids.t().contiguous()
        is_padding = ids < 0
        kept = kept.masked_fill(is_padding, -math.inf).masked_fill_(ids >= self.shard.size, math.nan)
        log_p = kept.new_empty(len(ids) + 1, len(labels))
        log_p[:-1] = records.log_probs.t()
        log_p[:-1].masked_fill_(is_padding, -math.inf)
        log_p[-1] = records.log_rest
        maxima, masses, targets, tops, *others, logs = of_rest.unbind(1)
        masses_at_1 = others[0] if others else masses
        rest_maximum = maxima.amax(dim=0)
        maximum = torch.maximum(rest_maximum, kept.amax(dim=0))
        above = maxima - base(maximum)  # -inf where a rank has no rest
        logits = kept - base(maximum)

        def buckets(masses: Tensor, temperature: float) -> _Buckets:
            rest = _sum_over_ranks(weigh(masses, (above / temperature).exp())).log()
            log_q = torch.cat([logits / temperature if temperature != 1.0 else logits, rest[None]])
            log_z = log_q.exp().sum(dim=0).log()
            log_q -= log_z
            return _Buckets(log_q, log_q.exp(), log_z, rest)

        at_t = at_1 = buckets(masses, temperature)
        if temperature != 1.0:
            at_1 = buckets(masses_at_1, 1.0)
        log_q, q, log_ratio = at_t.log_q, at_t.q, log_p - at_t.log_q
        outside = (log_p == -math.inf) & (log_q == -math.inf)

        if needs_gradient:
            value, h = self.divergence.value_and_grad(log_p, log_q, log_ratio)
            h.masked_fill_(outside, 0.0)
        else:
            value, h = self.divergence.value(log_p, log_q, log_ratio), None
        value.masked_fill_(outside, 0.0)
        p = log_p.exp()
        if records.draws is not None:
            p = self._estimate(records, p, at_t, value, h)
        is_label = ids == labels
        target = torch.maximum(targets.amax(dim=0), torch.where(is_label, kept, -math.inf).amax(dim=0))
        log_q_label = target - base(maximum) - at_1.log_z
        values = {
            "divergence": value.sum(dim=0),
            "cross entropy": (-log_q_label).masked_fill(labels < 0, 0.0),
        }
        if records.label_log_prob is not None:
            values["teacher lm loss"] = (-records.label_log_prob).masked_fill(labels < 0, 0.0)
        values[BUCKETED_KL] = values[SAMPLED_KL] = weigh(p, log_ratio).sum(dim=0)
        if records.entropy is not None:
            values["teacher entropy"] = records.entropy
        shift = above - at_1.log_z
        of_ranks = weigh(shift.exp(), logs + weigh(masses_at_1, shift))
        of_kept = weigh(at_1.q[:-1], at_1.log_q[:-1]).sum(dim=0)
        values["student entropy"] = -(of_kept + _sum_over_ranks(of_ranks))

        def lowest(chosen: Tensor) -> Tensor:
            return ids.masked_fill(~chosen, torch.iinfo(ids.dtype).max).amin(dim=0)

        of_teacher = log_p[: records.num_kept].amax(dim=0)
        top = torch.minimum(
            torch.where(maxima == maximum, tops, math.inf).amin(dim=0),
            lowest(kept == maximum).double(),  # ids are exact in fp64
        )
        # A draw's may equal a kept one's in a cache's precision.
        is_top = log_p[:-1] == of_teacher
        is_top[records.num_kept :] = False
        teacher_top = lowest(is_top)
        values["top-1 agreement"] = (top == teacher_top) & top.isfinite() & of_teacher.isfinite()
        values["top-1 accuracy"] = top == labels
        values["student confidence"] = (-at_1.log_z).exp()
        names = ("divergence", "cross entropy", *self.metrics)
        terms = torch.stack([values[name].double() for name in names])
        if h is None:
            return terms, ()

        of_divergence = h.addcmul_(q, h.sum(dim=0), value=-1.0)
        if temperature != 1.0:
            of_divergence /= temperature
        of_cross_entropy = at_1.q
        of_cross_entropy[:-1] -= is_label.double()
        # The last bucket's become the label's, as a column of the rest.
        of_rest_divergence, of_rest_cross_entropy = of_divergence[-1].clone(), of_cross_entropy[-1].clone()
        log_share = (target - base(maximum)) / temperature - at_t.rest
        of_divergence[-1] = weigh(log_share.exp(), of_rest_divergence)
        of_cross_entropy[-1] = log_q_label.exp() - 1.0
        no_rest = at_t.rest == -math.inf  # its columns are -inf, if there are any
        scalars = [base(maximum), at_t.rest.masked_fill(no_rest, 0.0), at_1.log_z]
        scalars += [of_rest_divergence, of_rest_cross_entropy]
        return terms, BucketStats(torch.stack(scalars), of_divergence.to(self.dtype), of_cross_entropy.to(self.dtype))

    def _estimate(
        self, records: TeacherRecords, p: Tensor, student: "_Buckets", value: Tensor, h: Tensor | None
    ) -> Tensor:
        """Replace the rest's F and h, [K + R + 1, n], by estimates of their sums over the tail, see `records`.

        Returns the mass that each bucket stands for: p, that of the draws, and 0.
        """
        assert records.draws is not None
        first, counts = records.num_kept, records.draws.t().double()
        log_rest = records.log_rest.double()
        mass = weigh(counts / records.num_draws, log_rest.exp())
        weight = weigh(counts / records.num_draws, (log_rest - records.log_probs[:, first:].t().double()).exp())
        q, q_tail = student.q, student.q[first:].sum(dim=0)
        log_mean = (q_tail / max(self.shard.size - first, 1)).log()
        nothing = torch.full_like(log_mean, -math.inf)
        slope = self.divergence.grad_log_q(nothing, log_mean, nothing) / log_mean.exp()
        slope = torch.where(q_tail > 0, slope, 0.0)
        linear = slope * q[first:-1]
        value[first:-1] = weigh(weight, value[first:-1] - linear)
        value[-1] = slope * q_tail
        if h is not None:
            h[first:-1] = weigh(weight, h[first:-1] - linear) + linear
            h[-1] = slope * q[-1]
        return torch.cat([p[:first], mass, torch.zeros_like(p[-1:])])

    def write_gradient(
        self,
        out: Tensor,
        batch: RecordBatch,
        token_stats: "BucketStats",
        of_divergence: Tensor | None,
        of_cross_entropy: Tensor | None,
    ) -> None:
        """Write the gradient of the student's logits into `out`, contiguous [..., W], without the padding.

        `out` may be the student's logits. `of_divergence` and `of_cross_entropy` are [...], or None for 0.
        """
        shard, (maximum, rest, log_z_at_1, of_rest_divergence, of_rest_cross_entropy) = self.shard, token_stats.scalars
        if shard.num_columns == 0:
            return
        nothing = maximum.new_zeros(batch.num_tokens, dtype=self.dtype)
        of_terms = [
            nothing if it is None else it.reshape(-1).to(self.dtype) for it in (of_divergence, of_cross_entropy)
        ]
        of_value, of_label = of_terms[0], of_terms[1].masked_fill(batch.labels < 0, 0.0)

        def times(weight: Tensor, gradient: Tensor) -> Tensor:
            return torch.where(weight == 0.0, 0.0, weight * gradient)

        # The kernel writes the columns of the rest as q times a weight. The divergence is 0 for a student compared with
        # itself, so that H = -1 leaves q; no column has the label.
        weight, elsewhere = times(of_value, of_rest_divergence), torch.full_like(batch.labels, shard.size)
        of_columns: tuple[Tensor | None, Tensor] = weight * self.temperature, of_label
        if self.temperature == 1.0:
            of_columns, log_z_at_1 = (None, weight + times(of_label, of_rest_cross_entropy)), rest
        scalars = torch.stack([maximum, rest, log_z_at_1, maximum, rest, torch.full_like(rest, -1.0)])
        gradients = times(of_value, token_stats.of_divergence) + times(of_label, token_stats.of_cross_entropy)
        native = self.kernel.records
        columns = torch.cat([batch.columns, (batch.labels - shard.start).unsqueeze(-1)], dim=-1)
        if native is None:
            owned = torch.cat([batch.owned, batch.own_label.unsqueeze(-1)], dim=-1)
        out_rows = out.view(batch.student.tokens.numel(), out.shape[-1])[:, : shard.num_columns]
        for chunk in self.kernel.chunks(batch.num_tokens, shard.num_columns, out.device, batch.student.copied):
            rows = batch.student[chunk]
            self.kernel.local_gradient(
                out_rows[chunk],
                rows,
                rows,
                elsewhere[chunk],
                shard.start,
                STUDENT_ONLY,
                self.temperature,
                self.dtype,
                scalars[:, chunk].contiguous(),
                *(None if it is None else it[chunk].to(self.dtype) for it in of_columns),
            )
            if native is not None:
                native.write_columns(out_rows[chunk], columns[chunk], gradients[:, chunk])
            else:
                _write_owned(out_rows[chunk], columns[chunk], owned[chunk], gradients[:, chunk].t())

    def clear_padding(self, out: Tensor) -> None:
        """Write 0 into the columns of `out`, contiguous [..., W], beyond the vocabulary."""
        out[..., self.shard.num_columns :] = 0.0


class _Buckets(NamedTuple):
    """The student's distribution at one temperature."""

    log_q: Tensor  # [K + 1, n]
    q: Tensor
    log_z: Tensor  # [n], log of the sum of exponentials relative to the largest logit of all
    rest: Tensor  # [n], the same over the rest


class BucketStats(NamedTuple):
    """What a gradient needs per token."""

    scalars: Tensor
    """[5, N] fp64: the student's maximum; logs relative to it of the sums of exponentials, of the rest at T and of all
    columns at T = 1; derivatives of divergence and cross entropy with respect to a common shift of the rest's logits.
    """
    of_divergence: Tensor
    """[K + 1, N], the divergence's gradient in the kept columns, and in the label's if that is in the rest."""
    of_cross_entropy: Tensor
    """[K + 1, N], likewise of the cross entropy."""


class PendingBuckets:
    """Kept logits and the ranks' records of the rest, being exchanged; bitwise identical on every rank.

    Each number is one rank's, and 0 on all others. Their sum is exact in any order, and transmits NaN and infinities.
    """

    def __init__(self, buffer: Tensor, num_fields: int, shard: VocabShard, async_op: bool) -> None:
        self.buffer, self.num_fields, self.num_ranks = buffer, num_fields, shard.num_ranks
        self.work: dist.Work | None = None
        if shard.num_ranks > 1 and buffer.numel():
            self.work = dist.all_reduce(buffer, group=shard.group, async_op=async_op)

    def result(self) -> tuple[Tensor, Tensor]:
        """Wait for the records [R, fields, N] and the kept logits [K, N]."""
        if self.work is not None:
            self.work.wait()
        of_ranks = self.num_ranks * self.num_fields
        return self.buffer[:of_ranks].view(self.num_ranks, self.num_fields, -1), self.buffer[of_ranks:]


def _sum_over_ranks(terms: Tensor) -> Tensor:
    """Sum [R, n] over the ranks in their order."""
    total, *others = terms.unbind(0)
    for other in others:
        total = total + other
    return total
