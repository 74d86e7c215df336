"""Passes over a batch of sharded logits, and the collectives between them.

The first pass computes a record of this rank's columns, the ranks exchange records, and the last pass writes the
gradient. A divergence that does not separate needs another pass and another exchange in between.

Legend: N tokens, C this rank's real columns, W the width of its logits, R ranks.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

import abkd_megatron.kernels as kernels
from abkd_megatron.kernels.record import Layout
from abkd_megatron.losses.base import Divergence
from abkd_megatron.vocab_parallel import stats
from abkd_megatron.vocab_parallel.shard import VocabShard
from abkd_megatron.vocab_parallel.stats import GlobalStats
from abkd_megatron.vocab_parallel.terms import METRICS, Terms

# Renamed by torch.
_all_gather_tensor = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# Largest group that all-gathers its records: all-gather traffic grows with the group, all-reduce traffic does not.
GATHER_UP_TO = 16


def unravel(rows: Tensor, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """Compute torch.unravel_index without its copy of the shape to the GPU, which synchronizes."""
    coordinates = []
    for size in reversed(shape):
        coordinates.append(rows % size)
        rows = rows // size
    return tuple(reversed(coordinates))


class Rows:
    """Rows of [..., W] logits as [N, W], one chunk at a time, real columns only; at most a chunk is copied.

    Contiguous unless the kernel accepts strides, so that equal logits give equal sums in any memory layout. With
    `index`, [N], only those rows, in that order.
    """

    def __init__(self, logits: Tensor, num_columns: int, strided: bool, index: Tensor | None = None) -> None:
        self.strided = strided
        self.tokens = logits.shape[:-1]
        self.num_columns = num_columns
        self.logits = logits
        self.index = index
        try:
            self.flat: Tensor | None = logits.view(self.tokens.numel(), logits.shape[-1])
        except RuntimeError:  # no single stride over the tokens, as after a transposition
            self.flat = None

    @property
    def copied(self) -> bool:
        """True if rows have to be copied."""
        return self.flat is None or self.index is not None

    @property
    def num_rows(self) -> int:
        """N."""
        return self.tokens.numel() if self.index is None else self.index.numel()

    def __getitem__(self, chunk: slice) -> Tensor:
        at = chunk if self.index is None else self.index[chunk]
        if self.flat is not None:
            rows = self.flat[:, : self.num_columns][at]
        else:
            if isinstance(at, slice):
                at = torch.arange(at.start, at.stop, device=self.logits.device)
            rows = self.logits[unravel(at, self.tokens)][:, : self.num_columns]
        return rows if self.strided and rows.stride(-1) == 1 else rows.contiguous()


class Batch:
    """Student and teacher logits [..., W] of the same tokens on this rank, and their labels [...] or None.

    With `rows`, [N], the student's logits are indexed after flattening, like the labels; the teacher's logits are
    [N, W] for these rows, or the student's. A kernel that accepts an index reads the rows in place.
    """

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        shard: VocabShard,
        kernel: kernels.Kernel,
        rows: Tensor | None = None,
    ) -> None:
        self.rows = rows
        self.student = Rows(student, shard.num_columns, kernel.strided)
        self.indexed = rows is not None and kernel.indexed and not self.student.copied and student.stride(-1) == 1
        self.teacher = Rows(teacher, shard.num_columns, kernel.strided)
        self.teacher_rows = rows if teacher is student else None
        if not self.indexed:
            self.student.index, self.teacher.index = rows, self.teacher_rows
        self.all_labels = labels.reshape(-1) if labels is not None else None
        self.num_tokens = self.student.num_rows if rows is None else rows.numel()

    @functools.cached_property
    def labels(self) -> Tensor | None:
        """[N], or None."""
        if self.all_labels is None or self.rows is None:
            return self.all_labels
        return self.all_labels[self.rows]

    def chunks(self, kernel: kernels.Kernel) -> list[slice]:
        """Return the kernel's chunks."""
        copied = self.student.copied or self.teacher.copied
        return kernel.chunks(self.num_tokens, self.student.num_columns, self.student.logits.device, copied)

    def operands(self, chunk: slice) -> tuple[tuple[Tensor, Tensor, Tensor | None], dict[str, Tensor | None]]:
        """Return both models' logits and the labels; and, if indexed, the arguments `rows` and `teacher_rows`."""
        if not self.indexed:
            return (self.student[chunk], self.teacher[chunk], _at(self.labels, chunk)), {}
        every, teacher_rows = slice(None), _at(self.teacher_rows, chunk)
        teacher = self.teacher[chunk if teacher_rows is None else every]
        return (self.student[every], teacher, self.all_labels), {
            "rows": _at(self.rows, chunk),
            "teacher_rows": teacher_rows,
        }


def _at(per_token: Tensor | None, chunk: slice) -> Tensor | None:
    return None if per_token is None else per_token[chunk]


@dataclass(frozen=True)
class Passes:
    """Specification of the passes: divergence, columns, dtype and kernel."""

    divergence: Divergence
    shard: VocabShard
    temperature: float
    dtype: torch.dtype
    """Dtype of the arithmetic on logits."""
    kernel: kernels.Kernel
    layout: Layout

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics of labeled tokens."""
        return METRICS

    @classmethod
    def of(
        cls,
        student: Tensor,
        teacher: Tensor,
        divergence: Divergence,
        shard: VocabShard,
        temperature: float,
        has_labels: bool,
    ) -> "Passes":
        """Select dtype and kernel for these logits."""
        dtype = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
        kernel = kernels.select(divergence, student, teacher)
        return cls(divergence, shard, temperature, dtype, kernel, Layout(divergence, has_labels, temperature))

    def batch(self, student: Tensor, teacher: Tensor, labels: Tensor | None, rows: Tensor | None = None) -> Batch:
        """Build a batch of [..., W] logits and [...] labels; only the tokens `rows` if given, see `Batch`."""
        return Batch(student, teacher, labels, self.shard, self.kernel, rows)

    def start(self, batch: Batch, async_op: bool = False) -> "PendingRecord":
        """Run the first pass and start to exchange the records."""

        def of(chunk: slice) -> Tensor:
            operands, index = batch.operands(chunk)
            record: Tensor = self.kernel.local_record(
                *operands, self.shard.start, self.divergence, self.layout, self.dtype, **index
            )
            return record

        return PendingRecord(self, self._of_chunks(batch, self.layout.size, of), async_op)

    def conclude(self, batch: Batch, pending_record: "PendingRecord", needs_gradient: bool, out: Terms) -> "TokenStats":
        """Write the terms after waiting for the records, and a second exchange if needed; return the gradient's needs.

        `out` has the batch's tokens in their order, or by `out.rows`.
        """
        native = self._native(batch)
        global_stats: GlobalStats | None = None
        value: Tensor | None = None
        if native is not None:
            scalars, has_value, has_slope = native.conclude(
                pending_record.of_ranks(), batch.all_labels, self.divergence, self.layout, **vars(out)
            )
        else:
            global_stats = stats.conclude(pending_record.result(), self.divergence, self.layout)
            q, p, value, slope_sum, _ = global_stats
            has_value, has_slope = value is not None, slope_sum is not None
            of_slope = q.log_z if slope_sum is None else slope_sum  # to be overwritten
            scalars = torch.stack([q.maximum, q.log_z, q.log_z_at_1, p.maximum, p.log_z, of_slope])
        token_stats = TokenStats(scalars)
        ask_slope = needs_gradient and not has_slope
        if not has_value or ask_slope:
            of_whole = scalars[6:] if native is not None else torch.stack([*scalars[:2], *scalars[3:5]])
            record = self._second_record(batch, of_whole, not has_value, ask_slope)
            # Only the gradient needs H, so its exchange may stay pending.
            pending = PendingSum(record, self.shard, async_op=has_value)
            if has_value:
                token_stats.pending = pending
            elif native is not None:
                native.finish(pending.of_ranks(), scalars, **vars(out), has_value=True, has_slope=ask_slope)
            else:
                value, *of_slopes = pending.result()
                if ask_slope:
                    scalars[5] = of_slopes[0]
        if global_stats is not None:
            assert value is not None
            out.write(value, global_stats, batch.labels)
        return token_stats

    def _native(self, batch: Batch) -> ModuleType | None:
        """Return the kernel's module that merges records, if it supports this divergence."""
        merge = self.kernel.merge
        return merge if merge is not None and batch.num_tokens and merge.can_merge(self.divergence) else None

    def _second_record(self, batch: Batch, scalars: Tensor, value: bool, slope: bool) -> Tensor:
        def of(chunk: slice) -> Tensor:
            (student, teacher, _), index = batch.operands(chunk)
            record: Tensor = self.kernel.local_second_record(
                student,
                teacher,
                self.divergence,
                self.temperature,
                self.dtype,
                scalars[:, chunk].contiguous(),  # a stride that depends on N would trigger a recompilation
                value,
                slope,
                **index,
            )
            return record

        return self._of_chunks(batch, value + slope, of)

    def _of_chunks(self, batch: Batch, num_fields: int, of: Callable[[slice], Tensor]) -> Tensor:
        """Return the records [num_fields, N], given those of each chunk."""
        chunks = batch.chunks(self.kernel)
        if len(chunks) == 1:
            return of(chunks[0])
        record = batch.student.logits.new_empty(num_fields, batch.num_tokens, dtype=torch.float64)
        for chunk in chunks:
            record[:, chunk] = of(chunk)
        return record

    def write_gradient(
        self,
        out: Tensor,
        batch: Batch,
        token_stats: "TokenStats",
        of_divergence: Tensor | None,
        of_cross_entropy: Tensor | None,
    ) -> None:
        """Write the gradient of the student's logits into `out`, contiguous [..., W], without the padding.

        `out` may be the student's logits. `of_divergence` and `of_cross_entropy` are [...], or None for 0. For a batch
        with `rows`, only these are written.
        """
        if token_stats.pending is not None:
            native, pending = self._native(batch), token_stats.pending
            if native is not None:
                native.finish(pending.of_ranks(), token_stats.scalars, has_slope=True)
            else:
                token_stats.scalars[5] = pending.result()[-1]
            token_stats.pending = None
        scalars = token_stats.scalars[:6]
        out_rows = out.view(batch.student.tokens.numel(), out.shape[-1])
        columns = slice(0, self.shard.num_columns)

        of_terms = [None if it is None else it.reshape(-1) for it in (of_divergence, of_cross_entropy)]
        if batch.rows is not None and not batch.indexed:
            of_terms = [None if it is None else it[batch.rows] for it in of_terms]
        for chunk in batch.chunks(self.kernel):
            (student, teacher, labels), index = batch.operands(chunk)
            weights = of_terms if batch.indexed else [_at(it, chunk) for it in of_terms]
            copied = batch.rows is not None and not batch.indexed
            of_rows = out_rows[:, columns] if batch.indexed else out_rows[chunk, columns]
            if copied:
                of_rows = torch.empty_like(student)
            self.kernel.local_gradient(
                of_rows,
                student,
                teacher,
                labels,
                self.shard.start,
                self.divergence,
                self.temperature,
                self.dtype,
                scalars[:, chunk].contiguous(),
                *weights,
                **index,
            )
            if copied:
                assert batch.rows is not None
                out_rows[:, columns].index_copy_(0, batch.rows[chunk], of_rows)

    def clear_padding(self, out: Tensor) -> None:
        """Write 0 into the columns of `out`, contiguous [..., W], beyond the vocabulary."""
        out_rows = out.view(out.shape[:-1].numel(), out.shape[-1])
        if self.shard.num_columns < out.shape[-1]:
            out_rows[:, self.shard.num_columns :] = 0.0


@dataclass
class TokenStats:
    """Statistics per token that a gradient needs."""

    scalars: Tensor
    """[at least 6, N] fp64: the student's maximum, log_z and log_z at T = 1, the teacher's maximum and log_z, and H."""
    pending: "PendingSum | None" = None
    """H, if it is not yet in `scalars`."""


def all_gather(record: Tensor, shard: VocabShard, async_op: bool) -> tuple[Tensor, dist.Work | None]:
    """All-gather records, [R, fields, N] in rank order; valid only after waiting for the work if async."""
    num_fields, num_tokens = record.shape
    records = record.new_empty(shard.num_ranks * num_fields, num_tokens)
    work = _all_gather_tensor(records, record, group=shard.group, async_op=async_op)
    return records.view(shard.num_ranks, num_fields, num_tokens), work


class PendingRecord:
    """Record [fields, N] being merged over the ranks; bitwise identical on every rank."""

    def __init__(self, passes: Passes, record: Tensor, async_op: bool) -> None:
        self.passes = passes
        self.work: dist.Work | None = None
        self.record: Tensor | None = record
        self.gathered: Tensor | None = None
        shard = passes.shard
        if shard.num_ranks == 1 or record.numel() == 0:
            return
        # Packing an id needs zero bits, which an fp64 maximum does not have.
        if shard.num_ranks <= GATHER_UP_TO or passes.dtype == torch.float64:
            self.gathered, self.work = all_gather(record, shard, async_op)
            if not async_op:
                self.record = None
        else:
            self.packed = stats.pack(record, passes.layout)
            self.work = dist.all_reduce(self.packed, dist.ReduceOp.MAX, group=shard.group, async_op=async_op)

    def of_ranks(self) -> Tensor:
        """Wait for the records of all ranks, [R, fields, N]; [1, fields, N] if they have been merged."""
        if self.gathered is None:
            return self.result().unsqueeze(0)
        if self.work is not None:
            self.work.wait()
        return self.gathered

    def result(self) -> Tensor:
        """Wait for the merged record, [fields, N]."""
        if self.work is not None:
            self.work.wait()
        shard, divergence, layout = self.passes.shard, self.passes.divergence, self.passes.layout
        if self.gathered is not None:
            return stats.merge(self.gathered, divergence, layout)
        assert self.record is not None
        if shard.num_ranks == 1 or self.record.numel() == 0:
            return self.record
        whole = stats.unpack(self.packed, layout)
        sums = stats.shift_max(self.record, whole, divergence, layout)
        dist.all_reduce(sums, group=shard.group)
        layout.set_additive(whole, sums)
        return whole


class PendingSum:
    """Records [fields, N] being summed over the ranks; bitwise identical on every rank."""

    def __init__(self, record: Tensor, shard: VocabShard, async_op: bool) -> None:
        self.records = record.unsqueeze(0)
        self.work: dist.Work | None = None
        if shard.num_ranks == 1 or record.numel() == 0:
            return
        if shard.num_ranks <= GATHER_UP_TO:
            self.records, self.work = all_gather(record, shard, async_op)
        else:
            self.work = dist.all_reduce(record, group=shard.group, async_op=async_op)

    def of_ranks(self) -> Tensor:
        """Wait for the records of all ranks, [R, fields, N]; [1, fields, N] if they have been summed."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        return self.records

    def result(self) -> Tensor:
        """Wait for the sum, [fields, N]."""
        return self.of_ranks().sum(dim=0)
