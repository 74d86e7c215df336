"""The fused head's autograd function: logits, losses and gradients of one chunk of tokens after another.

Legend: N tokens, h and H hidden size of student and teacher, W width of a rank's logits.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from abkd_megatron.tensors import Function, constant
from abkd_megatron.vocab_parallel.head_gradients import Gradients, Operands, factor_of, sum_of_logits, weighted
from abkd_megatron.vocab_parallel.logits import DistillationTerms
from abkd_megatron.vocab_parallel.mixed_passes import MixedTeacher
from abkd_megatron.vocab_parallel.shard import VocabShard
from abkd_megatron.vocab_parallel.teacher_records import TeacherRecords
from abkd_megatron.vocab_parallel.terms import Terms


class ChunkPasses(Protocol):
    """What the head calls of `Passes` and `RecordPasses`, whose batches and statistics differ."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic on logits."""

    @property
    def shard(self) -> VocabShard:
        """Columns of the logits."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics."""

    def batch(self, student: Tensor, teacher: Any, labels: Tensor) -> Any:
        """Build a batch."""

    def start(self, batch: Any, async_op: bool) -> Any:
        """Run the first pass and start its exchange."""

    def conclude(self, batch: Any, pending_record: Any, needs_gradient: bool, out: Terms) -> Any:
        """Write the terms; return the gradient's needs."""

    def write_gradient(
        self, out: Tensor, batch: Any, token_stats: Any, of_divergence: Tensor | None, of_cross_entropy: Tensor | None
    ) -> None:
        """Write the gradient of the student's logits."""

    def clear_padding(self, out: Tensor) -> None:
        """Write 0 into the columns beyond the vocabulary."""


def apply_head(
    head: "Head",
    student: tuple[Tensor, Tensor],
    teachers: Sequence[tuple[Tensor, Tensor]],
    labels: Tensor,
    token_weights: Tensor | None,
    order: Tensor | None = None,
) -> tuple[Tensor, DistillationTerms]:
    """Return the loss and the terms, of the labels' shape.

    Args:
        head: its weights are numbers, or [N].
        student: hidden states [..., h] and weight [W, h].
        teachers: hidden states [n, H] of the first n tokens, in order, and weight [W, H] of each, constant; none with
            records.
        labels: [...].
        token_weights: [...], or None.
        order: [N], tokens in the order of the chunks; None for 0 .. N - 1.
    """
    hidden, weight = student
    num_tokens = labels.numel()
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if not hidden.requires_grad:  # frozen layers may have run in inference mode
        hidden = constant(hidden)
    if not weight.requires_grad:
        weight = constant(weight)
    flat, of_labels = hidden.reshape(num_tokens, hidden.shape[-1]), constant(labels).reshape(num_tokens)
    # In fp16 the loss scale must be applied before rounding, and only backward has it.
    in_forward = token_weights is not None and hidden.dtype != torch.float16
    weights = constant(token_weights).reshape(num_tokens) if token_weights is not None and in_forward else None
    # Empty, but keeps the graph: a double backward must reach the hidden states, which are not saved, to be rejected.
    anchor = flat[:0].clone() if weights is not None and needs_gradient else None
    if order is not None:
        flat, of_labels = flat[order], of_labels[order]
        weights = weights[order] if weights is not None else None
        kd_weight, lm_weight = (it[order] if isinstance(it, Tensor) else it for it in (head.kd_weight, head.lm_weight))
        head = replace(head, kd_weight=kd_weight, lm_weight=lm_weight)
    loss, value, cross_entropy, metrics = _DistillationHead.apply(
        flat, weight, of_labels, weights, head, needs_gradient, anchor, *chain.from_iterable(teachers)
    )
    if order is not None:
        back = torch.empty_like(order)
        back[order] = torch.arange(num_tokens, device=order.device)
        loss, value, cross_entropy, metrics = loss[back], value[back], cross_entropy[back], metrics[:, back]
    named = dict(zip(head.passes.metrics, metrics.view(len(head.passes.metrics), *labels.shape).unbind(0), strict=True))
    terms = DistillationTerms(value.view(labels.shape), cross_entropy.view(labels.shape), named)
    return loss.view(labels.shape), terms


@dataclass(frozen=True, kw_only=True)
class Head:
    """Parameters that all chunks share; the weights are numbers, or [N]."""

    passes: ChunkPasses
    kd_weight: float | Tensor
    lm_weight: float | Tensor
    student_scale: float
    teacher_scales: tuple[float, ...] = ()
    """Of each teacher's logits."""
    chunk_tokens: int
    num_compared: int
    """Number of leading tokens, for which there are teacher hidden states."""
    student_only: ChunkPasses | None = None
    """Passes of the student with itself, for the remaining tokens, if any."""
    select: Callable[[Mapping[str, Tensor]], Tensor] | None
    parameter: Any
    """The weight if its gradient goes to its `main_grad`, else None."""

    records: TeacherRecords | None = None
    """Of all tokens, in place of the teacher's hidden states and weight."""
    recorded: Tensor | None = None
    """[N] bool, the tokens that `records` are used for, next to the teacher's hidden states of the others."""

    def chunks(self, num_tokens: int) -> list[slice]:
        """Return the chunks; none mixes compared tokens and others."""
        return [
            slice(first, min(first + self.chunk_tokens, end))
            for begin, end in ((0, self.num_compared), (self.num_compared, num_tokens))
            for first in range(begin, end, self.chunk_tokens)
        ]

    def passes_of(self, chunk: slice) -> ChunkPasses:
        """Return the passes of a chunk."""
        if chunk.start < self.num_compared:
            return self.passes
        assert self.student_only is not None
        return self.student_only

    def batch(self, operands: Operands, chunk: slice) -> Any:
        """Compute a chunk's logits."""
        student = operands.student_hidden[chunk] @ operands.student_weight.t()
        if self.student_scale != 1.0:
            student.mul_(self.student_scale)
        teacher: Tensor | TeacherRecords | MixedTeacher = student
        if self.teacher_scales and chunk.start < self.num_compared:
            hidden, weights = operands.teachers[::2], operands.teachers[1::2]
            teacher = sum_of_logits([of_tokens[chunk] for of_tokens in hidden], weights, self.teacher_scales)
        if self.records is not None:
            records = self.records[chunk]
            assert isinstance(teacher, Tensor)
            teacher = records if self.recorded is None else MixedTeacher(teacher, records, self.recorded[chunk])
        return self.passes_of(chunk).batch(student, teacher, operands.labels[chunk])

    def conclude(self, chunk: slice, batch: Any, pending_record: Any, needs_gradient: bool, result: Tensor) -> Any:
        """Write a chunk's columns of `result`: the loss, then the terms, with the divergence after selection."""
        loss, terms = result[0, chunk], result[1:, chunk]
        kd_weight, lm_weight, compared = self.kd_weight, self.lm_weight, chunk.start < self.num_compared
        out = Terms(terms, None, compared)
        select = self.select if compared else None
        if select is None and not isinstance(kd_weight, Tensor) and not isinstance(lm_weight, Tensor):
            out = replace(out, loss=loss, weights=(kd_weight, lm_weight))
        token_stats = self.passes_of(chunk).conclude(batch, pending_record, needs_gradient, out)
        if select is not None:
            terms[0] = torch.where(self._selected(terms[2:]), terms[0], 0.0)
        if out.loss is None:
            loss.copy_(weighted(kd_weight, terms[0], chunk) + weighted(lm_weight, terms[1], chunk))
        return token_stats

    def gradient(
        self, chunk: slice, batch: Any, token_stats: Any, of_terms: tuple[Tensor, Tensor], result: Tensor
    ) -> Tensor:
        """Compute the gradient of hidden @ weight^T in place of the student's logits, given all tokens' `of_terms`."""
        of_divergence: Tensor | None = None
        if chunk.start < self.num_compared:
            of_divergence = of_terms[0][chunk]
            if self.select is not None:
                of_divergence = torch.where(self._selected(result[3:, chunk]), of_divergence, 0.0)
        logits: Tensor = batch.student.logits
        passes = self.passes_of(chunk)
        passes.write_gradient(logits, batch, token_stats, of_divergence, of_terms[1][chunk])
        passes.clear_padding(logits)
        return logits

    def of_terms(self, of_loss: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of divergence and cross entropy for that of the loss, [N], with the student's scale."""
        of_loss = of_loss.to(self.passes.dtype) * self.student_scale
        return weighted(self.kd_weight, of_loss), weighted(self.lm_weight, of_loss)

    def _selected(self, metrics: Tensor) -> Tensor:
        assert self.select is not None
        return self.select(dict(zip(self.passes.metrics, metrics.unbind(0), strict=True)))


def _without_autocast[F: Callable[..., Any]](function: F) -> F:
    """Decorate a forward or backward, (ctx, tensor, ...), to compute products in their operands' dtype."""

    @functools.wraps(function)
    def call(ctx: Any, first: Tensor, *others: Any) -> Any:
        device = first.device.type
        if not torch.amp.is_autocast_available(device):
            return function(ctx, first, *others)
        with torch.autocast(device, enabled=False):
            return function(ctx, first, *others)

    return cast(F, call)


class _DistillationHead(Function):
    """Return (loss, divergence, cross entropy, metrics [M, N]); only the loss is differentiable."""

    title = "the fused head"

    @staticmethod
    @_without_autocast
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        labels: Tensor,
        token_weights: Tensor | None,
        head: Head,
        needs_gradient: bool,
        anchor: Tensor | None,
        *teachers: Tensor,
    ) -> tuple[Tensor, ...]:
        operands = Operands(student_hidden, student_weight, labels, teachers)
        in_forward = needs_gradient and token_weights is not None
        gradients = Gradients(operands, *ctx.needs_input_grad[:2]) if in_forward else None
        of_terms = head.of_terms(token_weights) if in_forward and token_weights is not None else None
        result = student_hidden.new_empty(3 + len(head.passes.metrics), labels.numel(), dtype=head.passes.dtype)
        stats_of_chunks: list[Any] = []

        def finish(chunk: slice, batch: Any, pending_record: Any) -> None:
            token_stats = head.conclude(chunk, batch, pending_record, needs_gradient, result)
            if gradients is not None and of_terms is not None:
                gradients.add(chunk, head.gradient(chunk, batch, token_stats, of_terms, result))
            elif needs_gradient:
                stats_of_chunks.append(token_stats)

        before: tuple[slice, Any, Any] | None = None
        for chunk in head.chunks(labels.numel()):
            batch = head.batch(operands, chunk)
            started = chunk, batch, head.passes_of(chunk).start(batch, async_op=True)
            if before is not None:
                finish(*before)
            before = started
            if head.passes.shard.num_ranks == 1:  # no exchange to overlap
                finish(*before)
                before = None
            del batch, started
        if before is not None:
            finish(*before)

        ctx.head, ctx.gradients, ctx.stats_of_chunks = head, gradients, stats_of_chunks
        ctx.result = result.detach() if head.select is not None and gradients is None else None
        if gradients is not None:
            gradients.operands = None  # type: ignore[assignment]  # frees memory; only the results are needed
            ctx.save_for_backward(student_weight, token_weights, anchor)
        elif needs_gradient:
            ctx.save_for_backward(student_hidden, student_weight, labels, *teachers)
        loss, value, cross_entropy, metrics = result[0], result[1], result[2], result[3:]
        ctx.mark_non_differentiable(value, cross_entropy, metrics)
        return loss, value, cross_entropy, metrics

    @staticmethod
    @_without_autocast
    def backward(ctx: Any, of_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (len(ctx.needs_input_grad) - 2)
        head: Head = ctx.head
        if ctx.gradients is None:
            student_hidden, student_weight, labels, *teachers = ctx.saved_tensors
            operands = Operands(student_hidden, student_weight, labels, tuple(teachers))
            gradients = Gradients(operands, *ctx.needs_input_grad[:2])
            of_terms = head.of_terms(of_loss)
            for chunk, token_stats in zip(head.chunks(of_loss.numel()), ctx.stats_of_chunks, strict=True):
                batch = head.batch(operands, chunk)
                gradients.add(chunk, head.gradient(chunk, batch, token_stats, of_terms, ctx.result))
            of_hidden, of_weight = gradients.of_hidden, gradients.of_weight
            dtype = operands.student_weight.dtype
        else:
            weight, token_weights, _ = ctx.saved_tensors
            of_hidden, of_weight, dtype = ctx.gradients.of_hidden, ctx.gradients.of_weight, weight.dtype
            if of_hidden is None and of_weight is None:
                raise RuntimeError("the gradients computed in forward are used up: call backward only once")
            ctx.gradients.of_hidden = ctx.gradients.of_weight = None
            factor = factor_of(of_loss, token_weights)
            for gradient in (of_hidden, of_weight):
                if gradient is not None:
                    gradient.mul_(factor)
        if of_weight is None:
            return of_hidden, None, *nothing
        parameter = head.parameter
        if parameter is None:
            return of_hidden, of_weight.to(dtype), *nothing
        parameter.main_grad.add_(of_weight)
        parameter.grad_added_to_main_grad = True
        # Megatron's hooks run only if autograd receives a gradient; they read it only with zero_out_wgrad.
        like = torch.zeros_like if getattr(parameter, "zero_out_wgrad", False) else torch.empty_like
        return of_hidden, like(of_weight, dtype=dtype), *nothing
