"""Divergence, cross entropy and metrics of two vocabulary-sharded distributions, without gathering a logit.

Every rank of the group holds the same tokens and its own columns of the vocabulary. It sums over these, and the
ranks exchange fp64 records of a few numbers a token; each merges all of them itself in the same order, so results
are equal to the bit on every rank. One such round is enough for whatever separates (statistics.py): all of
alpha-beta, the cross entropies, the metrics. Of ToDi at scale 1 the value separates; what its backward needs with
detached weights is on its way while the step goes on. Everything else takes a second round, whose sums wait for the
global log-partitions of the first.

Backward recomputes from the saved logits: each rank knows all it needs for the gradient on its own columns, exactly,
with no collective and no factor of the group's size.

Arithmetic on logits runs over chunks of tokens, in fp32 (fp64 for fp64 logits); sums run in fp64.

A token whose loss is weighted by 0 passes on a gradient of exactly 0, whatever its logits hold.

Legend: N tokens, C this rank's real columns, W the width of its logits, R ranks.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

import abkd_megatron.kernels as kernels
from abkd_megatron.divergences.base import Divergence
from abkd_megatron.errors import ConfigError
from abkd_megatron.kernels.record import Layout
from abkd_megatron.vocab_parallel import statistics
from abkd_megatron.vocab_parallel.shard import VocabShard

# torch renamed the one to the other.
_all_gather_tensor = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# The largest group that gathers its records; the bytes of a gathering grow with the group, those of a reduction do
# not.
GATHER_UP_TO = 16

_CONTIGUOUS = torch.contiguous_format

METRICS = ("teacher lm loss", "kl to teacher", "teacher entropy", "student entropy", "top-1 agreement")


class DistillationTerms(NamedTuple):
    """One number a token each, the same on every rank of the group."""

    divergence: Tensor
    """[...], differentiable."""
    cross_entropy: Tensor
    """[...], the student's on the labels, in nats at temperature 1; differentiable."""
    metrics: dict[str, Tensor]
    """[...] each, detached, at temperature 1: the teacher's cross entropy on the labels, KL(teacher ||
    student) and both entropies, in nats; 1.0 where both models have one likeliest token (of a tie, the lowest
    id)."""


def vocab_parallel_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    divergence: Divergence,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    gradient_in_place: bool = False,
) -> Tensor:
    """D(teacher || student) of every token, over a vocabulary sharded across `group`.

        D = sum_k F(log p_k, log q_k),  p = softmax(teacher / T),  q = softmax(student / T)
        dD/ds_j = (h_j - q_j H) / T,    h_k = dF/dlog q_k,  H = sum_k h_k

    There is no factor T^2: the gradient falls off as 1/T^2 with the temperature unless the caller multiplies
    by it.

    Args:
        student_logits: [..., V/TP], any floating dtype, this rank's columns.
        teacher_logits: [..., V/TP], the same columns; never receives a gradient.
        divergence: for example AlphaBeta(0.2, 0.7).
        group: the tensor-parallel group; None for one rank that holds the whole vocabulary.
        temperature: T > 0; divides the logits of both.
        vocab_size: number of real tokens; columns from there on, in Megatron's layout of equal shards, are
            padding. None if there is none; then the shards may differ in width.
        gradient_in_place: backward overwrites the student's logits with their gradient, and so takes no memory. What
            else needs them in a backward pass of its own has to have been there before, or raises autograd's
            error about a tensor modified in place; what reads them outside of autograd must do so before.

    Returns:
        [...], fp32 (fp64 if either input is), complete over the vocabulary: the same bits on every rank of
        the group. Once differentiable, in the student's logits; each rank receives the gradient of its own
        shard.

    Raises:
        ConfigError: for shapes that differ, a dtype that is not floating, a temperature that is not finite
            and > 0, a vocab_size that does not fit the shards, a `divergence` that is none, or logits that
            cannot be overwritten in place (a leaf, a view that repeats elements or skips them, the teacher's own).

    Collectives: forward: 1 all-gather of fp64 records if the divergence separates (AlphaBeta: 7 floats a token,
    ToDi(detach=False): 10), else one more of 2 floats; ToDi(): 1 of 10, and 1 of 1 that backward awaits. Backward:
    none. None at all on one rank. In a group of more than `GATHER_UP_TO` ranks all-reduces in place of all-gathers:
    of the maxima, then of the sums, and one in the second round. (fp64 logits are gathered in any group.)

    Memory: references to both logits and 6 fp64 numbers a token until backward; a few chunks of
    the kernel's size while it runs; one gradient buffer in the student's dtype unless it is written in place.
    """
    _check_logits(student_logits, teacher_logits, temperature)
    width = student_logits.shape[-1]
    if vocab_size is None:
        # Global ids are of no consequence without labels, so shards of unequal width need not know theirs.
        shard = VocabShard(0, width, max(width, 1), group)
    else:
        shard = VocabShard.megatron(width, group, vocab_size)
    return _apply(student_logits, teacher_logits, divergence, None, shard, temperature, gradient_in_place)[0]


def vocab_parallel_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    divergence: Divergence,
    labels: Tensor,
    shard: VocabShard,
    temperature: float = 1.0,
    gradient_in_place: bool = False,
) -> DistillationTerms:
    """Divergence, the student's cross entropy and the metrics of every token, from one pass over both logits.

    The divergence is that of `vocab_parallel_divergence` at `temperature`, no factor T^2. All else is at
    temperature 1:

        cross_entropy = -log q_label,  d cross_entropy/ds_j = q_j - [j = label],  q = softmax(student)

    Args:
        student_logits: [..., V/TP], any floating dtype, this rank's columns.
        teacher_logits: [..., V/TP], the same columns; never receives a gradient.
        divergence: for example AlphaBeta(0.2, 0.7).
        labels: [...], int64, global token ids in 0 .. shard.size - 1. A negative id is ignored: its cross entropies
            are 0, without a gradient; an id beyond the vocabulary gives inf.
        shard: which columns these are.
        temperature: T > 0, for the divergence alone.
        gradient_in_place: as in vocab_parallel_divergence.

    Returns:
        DistillationTerms of [...], fp32 (fp64 if either input is), the same bits on every rank of the
        group. Once differentiable, in the student's logits; each rank receives the gradient of its own shard,
        of both terms in one buffer.

    Raises:
        ConfigError: as vocab_parallel_divergence, for labels of another shape or dtype, or a shard wider than
            the logits.

    Collectives: as vocab_parallel_divergence, with 7 (9 if T is not 1) floats a token more in the first.

    Memory: as vocab_parallel_divergence, and the labels.
    """
    _check_logits(student_logits, teacher_logits, temperature)
    if labels.shape != student_logits.shape[:-1] or labels.dtype != torch.int64:
        raise ConfigError(
            f"expected labels of shape {list(student_logits.shape[:-1])} and dtype torch.int64, got "
            f"{list(labels.shape)}, {labels.dtype}: give one token id for each row of logits, in their order"
        )
    divergence_per_token, cross_entropy, metrics = _apply(
        student_logits, teacher_logits, divergence, labels, shard, temperature, gradient_in_place
    )
    return DistillationTerms(divergence_per_token, cross_entropy, dict(zip(METRICS, metrics.unbind(0), strict=True)))


def _check_logits(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> None:
    if student_logits.shape != teacher_logits.shape or student_logits.dim() == 0:
        raise ConfigError(
            "expected student and teacher logits of one shape [..., V/TP], got "
            f"{list(student_logits.shape)} and {list(teacher_logits.shape)}: pad both models' vocabularies "
            "alike and pass the same tokens"
        )
    for name, logits in (("student", student_logits), ("teacher", teacher_logits)):
        if not logits.dtype.is_floating_point:
            raise ConfigError(
                f"expected {name} logits of a floating dtype, got {logits.dtype}: pass the output layer's"
            )
    if not (isinstance(temperature, int | float) and math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"expected a finite temperature > 0, got {temperature!r}: 1.0 leaves the logits as they are")


def _apply(
    student_logits: Tensor,
    teacher_logits: Tensor,
    divergence: Divergence,
    labels: Tensor | None,
    shard: VocabShard,
    temperature: float,
    gradient_in_place: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(divergence, Divergence):
        raise ConfigError(
            f"expected a Divergence such as AlphaBeta(0.2, 0.7), got {divergence!r}: build one, or derive "
            "your own from abkd_megatron.divergences.Divergence"
        )
    if shard.num_columns > student_logits.shape[-1]:
        raise ConfigError(
            f"expected logits of at least {shard.num_columns} columns (the shard's [{shard.start}, "
            f"{shard.stop})), got {student_logits.shape[-1]}: build the shard from the local logits' width"
        )
    needs_gradient = torch.is_grad_enabled() and student_logits.requires_grad
    if gradient_in_place and needs_gradient:
        _check_in_place(student_logits, teacher_logits)
    result: tuple[Tensor, Tensor, Tensor] = _Distillation.apply(
        student_logits,
        teacher_logits.detach(),
        labels,
        divergence,
        shard,
        float(temperature),
        needs_gradient,
        gradient_in_place,
    )
    return result


def _check_in_place(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if student_logits.is_leaf:
        raise ConfigError(
            "gradient_in_place: expected logits that a model computed, got a leaf, whose values are its owner's to "
            "keep: leave gradient_in_place off"
        )
    if not student_logits.is_contiguous():
        raise ConfigError(
            f"gradient_in_place: expected contiguous student logits, got shape {list(student_logits.shape)} with "
            f"strides {student_logits.stride()}: pass the output layer's own, or leave gradient_in_place off"
        )
    if student_logits.untyped_storage().data_ptr() == teacher_logits.untyped_storage().data_ptr():
        raise ConfigError(
            "gradient_in_place: expected student and teacher logits in memory of their own, got one storage for both: "
            "copy one, or leave gradient_in_place off"
        )


class _Rows:
    """The rows of [..., W] logits, flattened to [N, W] a chunk at a time, real columns only; never a copy of more.

    Contiguous unless the kernel is strided, so that equal logits give equal sums whatever their layouts.
    """

    def __init__(self, logits: Tensor, num_columns: int, strided: bool) -> None:
        self.strided = strided
        self.tokens = logits.shape[:-1]
        self.num_columns = num_columns
        self.logits = logits
        try:
            self.flat: Tensor | None = logits.view(self.tokens.numel(), logits.shape[-1])
        except RuntimeError:  # not one stride over the tokens, as after a transposition
            self.flat = None

    def __getitem__(self, chunk: slice) -> Tensor:
        if self.flat is not None:
            rows = self.flat[chunk]
        else:
            index = torch.arange(chunk.start, chunk.stop, device=self.logits.device)
            rows = self.logits[torch.unravel_index(index, self.tokens)]
        rows = rows[:, : self.num_columns]
        return rows if self.strided and rows.stride(-1) == 1 else rows.contiguous()


def _chunks(kernel: kernels.Kernel, student: _Rows, teacher: _Rows, in_place: bool = False) -> list[slice]:
    """The kernel's chunks; small ones where rows have to be copied together, disjoint ones where they are written."""
    copied = student.flat is None or teacher.flat is None
    return kernel.chunks(student.tokens.numel(), student.num_columns, small=copied, overlap=not in_place)


def _all_gather(record: Tensor, shard: VocabShard, async_op: bool = False) -> tuple[Tensor, dist.Work | None]:
    """Every rank's record, [R, fields, N], in rank order; if async, not before the work is waited for."""
    num_fields, num_tokens = record.shape
    records = record.new_empty(shard.num_ranks * num_fields, num_tokens)
    work = _all_gather_tensor(records, record, group=shard.group, async_op=async_op)
    return records.view(shard.num_ranks, num_fields, num_tokens), work


def _exchange(record: Tensor, shard: VocabShard, divergence: Divergence, layout: Layout, dtype: torch.dtype) -> Tensor:
    """The record of the whole vocabulary, the same bits on every rank."""
    if shard.num_ranks == 1 or record.numel() == 0:
        return record
    if shard.num_ranks <= GATHER_UP_TO or dtype == torch.float64:  # an id does not fit beside an fp64 maximum
        return statistics.merge(_all_gather(record, shard)[0], divergence, layout)
    packed = statistics.pack(record, layout)
    dist.all_reduce(packed, dist.ReduceOp.MAX, group=shard.group)
    whole = statistics.unpack(packed, layout)
    sums = statistics.rebase(record, whole, divergence, layout)
    dist.all_reduce(sums, group=shard.group)
    whole[layout.additive] = sums
    return whole


class _Sum:
    """Records [fields, N] on their way to being summed over the ranks, the same bits on each."""

    def __init__(self, record: Tensor, shard: VocabShard, async_op: bool) -> None:
        self.records, self.work = record.unsqueeze(0), None
        if shard.num_ranks == 1 or record.numel() == 0:
            return
        if shard.num_ranks <= GATHER_UP_TO:
            self.records, self.work = _all_gather(record, shard, async_op)
        else:
            self.work = dist.all_reduce(record, group=shard.group, async_op=async_op)

    def result(self) -> Tensor:
        """[fields, N], once it has arrived."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        return self.records.sum(dim=0)


class _Distillation(torch.autograd.Function):
    """(divergence, cross entropy, metrics [5, ...]); the last two are empty without labels."""

    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None,
        divergence: Divergence,
        shard: VocabShard,
        temperature: float,
        needs_gradient: bool,
        gradient_in_place: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.float64 if torch.float64 in (student_logits.dtype, teacher_logits.dtype) else torch.float32
        kernel = kernels.select(divergence, student_logits, teacher_logits)
        student, teacher = (
            _Rows(logits, shard.num_columns, kernel.strided) for logits in (student_logits, teacher_logits)
        )
        tokens = student_logits.shape[:-1]
        num_tokens = tokens.numel()
        has_labels = labels is not None
        flat_labels = labels.reshape(num_tokens) if labels is not None else None

        layout = Layout(divergence, has_labels, temperature)
        record = student_logits.new_empty(layout.size, num_tokens, dtype=torch.float64)
        for chunk in _chunks(kernel, student, teacher):
            chunk_labels = flat_labels[chunk] if flat_labels is not None else None
            record[:, chunk] = kernel.local_record(
                student[chunk], teacher[chunk], chunk_labels, shard.start, divergence, layout, dtype
            )
        whole = _exchange(record, shard, divergence, layout, dtype)
        q, p, value, slope_sum, metrics = statistics.conclude(whole, divergence, layout)

        # Second round, of what did not separate. Nothing needs H before backward, so it alone may still be on its way.
        pending = None
        ask_value, ask_slope = value is None, slope_sum is None and needs_gradient
        if ask_value or ask_slope:
            record = student_logits.new_empty(ask_value + ask_slope, num_tokens, dtype=torch.float64)
            scalars = torch.stack([q.maximum, q.log_z, p.maximum, p.log_z])
            for chunk in _chunks(kernel, student, teacher):
                record[:, chunk] = kernel.local_second_record(
                    student[chunk],
                    teacher[chunk],
                    divergence,
                    temperature,
                    dtype,
                    scalars[:, chunk].contiguous(),
                    ask_value,
                    ask_slope,
                )
            pending = _Sum(record, shard, async_op=not ask_value)
            if ask_value:
                value = pending.result()[0]
        assert value is not None

        ctx.set_materialize_grads(False)
        ctx.divergence, ctx.shard, ctx.temperature, ctx.dtype = divergence, shard, temperature, dtype
        if needs_gradient:
            scalars = torch.stack([q.maximum, q.log_z, q.log_z_at_1, p.maximum, p.log_z])
            ctx.save_for_backward(student_logits, teacher_logits, labels, scalars)
            ctx.slope_sum, ctx.pending = slope_sum, pending
            ctx.kernel, ctx.in_place = kernel, gradient_in_place

        result = value.to(dtype).view(tokens)
        if not has_labels:
            nothing, nothing_either = result.new_empty(0), result.new_empty(0)
            ctx.mark_non_differentiable(nothing, nothing_either)
            return result, nothing, nothing_either
        assert flat_labels is not None and p.top is not None and q.top is not None
        agreement = (p.top == q.top) & p.top.isfinite()
        ignored = flat_labels < 0
        cross_entropies = [side.cross_entropy().masked_fill_(ignored, 0.0) for side in (p, q)]
        reported = torch.stack([cross_entropies[0], *metrics, agreement.double()])
        reported = reported.to(dtype).view(len(METRICS), *tokens)
        ctx.mark_non_differentiable(reported)
        return result, cross_entropies[1].to(dtype).view(tokens), reported

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        of_divergence, of_cross_entropy, _ = gradients
        nothing = (None,) * 7
        if of_divergence is None and of_cross_entropy is None:
            return None, *nothing
        student_logits, teacher_logits, labels, scalars = ctx.saved_tensors
        slope_sum = ctx.slope_sum
        if slope_sum is None:
            slope_sum = ctx.pending.result()[-1]
        shard, temperature, dtype = ctx.shard, ctx.temperature, ctx.dtype
        kernel: kernels.Kernel = ctx.kernel
        student, teacher = (
            _Rows(logits, shard.num_columns, kernel.strided) for logits in (student_logits, teacher_logits)
        )
        num_tokens = student.tokens.numel()
        scalars = torch.cat([scalars, slope_sum.unsqueeze(0)])

        def of(gradient: Tensor | None, chunk: slice) -> Tensor | None:
            return None if gradient is None else gradient.reshape(num_tokens)[chunk]

        out = student_logits.detach() if ctx.in_place else torch.empty_like(student_logits, memory_format=_CONTIGUOUS)
        out_rows = out.view(num_tokens, student_logits.shape[-1])
        for chunk in _chunks(kernel, student, teacher, ctx.in_place):
            kernel.local_gradient(
                out_rows[chunk, : shard.num_columns],
                student[chunk],
                teacher[chunk],
                labels.reshape(num_tokens)[chunk] if labels is not None else None,
                shard.start,
                ctx.divergence,
                temperature,
                dtype,
                scalars[:, chunk].contiguous(),  # a stride that depends on N would be compiled for
                of(of_divergence, chunk),
                of(of_cross_entropy, chunk),
            )
        out_rows[:, shard.num_columns :] = 0.0  # padding
        if ctx.in_place:  # whoever saved the logits for a backward of its own, this one included, is told
            torch.autograd.graph.increment_version(student_logits)
        return out, *nothing
