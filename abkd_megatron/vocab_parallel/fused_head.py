"""Distillation from hidden states: LM heads and loss fused, one chunk of tokens at a time.

No [tokens, V/TP] tensor of either model is materialized. Each chunk computes both models' logits, the losses, the
student's gradient in place of its logits, and from it the gradients of hidden states and weight. The exchange of a
chunk's records overlaps with the next chunk's matrix products.

Gradients are computed in one of two ways. With known token weights they are computed in forward, up to one factor that
backward applies; the matrix products then cost the same as with materialized logits. Otherwise backward recomputes the
logits, with 1.6 times the products if student and teacher have the same width. fp16 always recomputes: the loss scale,
without which small gradients underflow, is known only in backward.

Legend: N tokens, h and H hidden size of student and teacher, W width of a rank's logits.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from abkd_megatron.errors import ConfigError
from abkd_megatron.losses.base import Divergence
from abkd_megatron.tensors import Function, check_context, check_tensor, constant
from abkd_megatron.validation import finite_number, flag, positive_number, whole_number
from abkd_megatron.vocab_parallel.head_gradients import Gradients, Operands, factor_of, token_weight_check, weighted
from abkd_megatron.vocab_parallel.logits import (
    STUDENT_ONLY,
    DistillationTerms,
    check_divergence,
    check_shard,
    rows_of,
)
from abkd_megatron.vocab_parallel.passes import Batch, Passes, PendingRecord, TokenStats
from abkd_megatron.vocab_parallel.shard import VocabShard
from abkd_megatron.vocab_parallel.terms import METRICS, NUM_TERMS, Terms


def vocab_parallel_distillation_head(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    divergence: Divergence,
    labels: Tensor,
    shard: VocabShard,
    *,
    kd_weight: float | Tensor = 1.0,
    lm_weight: float | Tensor = 1.0,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    chunk_tokens: int | None = None,
    into_main_grad: bool = False,
    selected: Tensor | None = None,
    select: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
) -> tuple[Tensor, DistillationTerms]:
    """Compute kd_weight * D + lm_weight * CE per token, with logits = scale * hidden @ weight^T not materialized.

    Args:
        student_hidden: [..., h], identical on every rank.
        student_weight: [W, h], this rank's rows of the LM head, in the hidden states' dtype.
        teacher_hidden: [..., H] of the same tokens; never receives a gradient.
        teacher_weight: [W, H], rows of the same token ids; never receives a gradient.
        divergence: see `vocab_parallel_distillation`, also for `labels`, `shard` and `temperature`.
        labels: [...].
        shard: columns of the logits.
        kd_weight: of the divergence; a number, or [...] floats. A term of weight 0 adds nothing, even if it is NaN.
        lm_weight: of the student's cross entropy; as `kd_weight`.
        temperature: T > 0, for the divergence only.
        token_weights: [...], the weight of each token's loss up to one common factor, such as a loss mask. Gradients
            are then computed in forward, unless the hidden states are fp16. None recomputes the logits in backward, for
            any weights.
        student_scale: multiplies the student's logits.
        teacher_scale: multiplies the teacher's logits.
        chunk_tokens: tokens per chunk, identical on all ranks. None for `automatic_chunk_tokens`, which requires GPUs
            of one type.
        into_main_grad: add the weight's gradient to its `main_grad`, if it has one, in that dtype, like Megatron's
            gradient accumulation fusion. Sets `grad_added_to_main_grad`; autograd's gradient is then a placeholder.
        selected: [...] bool, identical on every rank: tokens to compare. At the others all results but the cross
            entropy are 0, and no teacher logits are computed. Pass it on the CPU; one on the GPU needs a
            synchronization. None selects all.
        select: maps metrics {name: [n]} of the compared tokens to [n] bool, deterministically. The divergence of
            tokens that are not selected is 0. None selects all.

    Returns:
        The loss, [...] fp32 (fp64 if the logits are), identical on every rank, once differentiable in `student_hidden`
        and `student_weight`. The gradient of the hidden states is this rank's part: sum it over `shard.group`. And the
        DistillationTerms of vocab_parallel_distillation, detached.

    Raises:
        ConfigError: for shapes that do not match or chunk_tokens < 1, and as vocab_parallel_distillation.
        RuntimeError: in backward, if the tokens were not weighted by `token_weights`, or at a second backward through
            gradients computed in forward. On a GPU only the first call checks the weights in backward. Later, wrong
            weights make all gradients NaN, and a later call of this function raises.

    Collectives: per chunk, as vocab_parallel_distillation.

    With `selected`, chunks of the selected tokens come first, then chunks of the others. Under torch.autocast products
    are in the hidden states' dtype; if the weight has another, both are cast to autocast's.

    Memory: two [chunk_tokens, W] of logits, four in a group of several ranks; the gradients of hidden states and
    weight, from forward on with token_weights, else from backward on, the weight's in at least fp32 (on CPU, a bf16
    weight also needs a chunk's logits and hidden states in fp32); 10 fp64 numbers per token. With `selected`, a
    reordered copy of the hidden states.
    """
    owner = "vocab_parallel_distillation_head"
    check_context(owner)
    check_tensor("a student's weight", student_weight)
    check_tensor("labels", labels, dtype=torch.int64, like=student_weight)
    check_shard(shard)
    check_divergence(divergence)
    temperature = positive_number(owner, "temperature", temperature, "1.0 leaves the logits as they are")
    kd_weight, lm_weight = (
        _term_weight(owner, name, weight, labels)
        for name, weight in (("kd_weight", kd_weight), ("lm_weight", lm_weight))
    )
    student_scale = finite_number(owner, "student_scale", student_scale)
    teacher_scale = finite_number(owner, "teacher_scale", teacher_scale)
    into_main_grad = flag(owner, "into_main_grad", into_main_grad)
    num_tokens, width = labels.numel(), student_weight.shape[0]
    parameter = student_weight if into_main_grad and hasattr(student_weight, "main_grad") else None
    student_hidden, student_weight = _as_under_autocast(student_hidden, student_weight)
    teacher_hidden, teacher_weight = _as_under_autocast(teacher_hidden, teacher_weight)
    for name, hidden, weight in (
        ("student", student_hidden, student_weight),
        ("teacher", teacher_hidden, teacher_weight),
    ):
        check_tensor(f"{name} hidden states", hidden, like=student_weight)
        check_tensor(f"a {name}'s weight", weight, like=student_weight)
        fits = hidden.dim() > 0 and hidden.shape[:-1] == labels.shape and weight.shape == (width, hidden.shape[-1])
        if not (fits and hidden.dtype == weight.dtype):
            raise ConfigError(
                f"expected {name} hidden states [{', '.join(map(str, labels.shape))}, h] and a weight [{width}, h] of "
                f"one dtype, got {list(hidden.shape)} {hidden.dtype} and {list(weight.shape)} {weight.dtype}: pass the "
                "decoder's output and the output layer's weight"
            )
    shard.check_width("logits of the weights", width)
    if token_weights is not None:
        is_mask = isinstance(token_weights, Tensor) and not (
            token_weights.is_floating_point() or token_weights.is_complex()
        )
        dtype = token_weights.dtype if is_mask else None
        check_tensor("token weights", token_weights, dtype=dtype, like=student_weight)
        if token_weights.shape != labels.shape:
            raise ConfigError(
                f"expected token weights of the labels' shape {list(labels.shape)}, got {list(token_weights.shape)}: "
                "give one number per token, or None"
            )
    if chunk_tokens is None:
        chunk_tokens = automatic_chunk_tokens(student_weight.device, bytes_per_token(student_weight, shard))
    chunk_tokens = whole_number(owner, "chunk_tokens", chunk_tokens, least=1)
    token_weight_check.raise_if_known()
    head = _Head(
        Passes.of(student_weight, teacher_weight, divergence, shard, temperature, has_labels=True),
        kd_weight,
        lm_weight,
        student_scale,
        teacher_scale,
        chunk_tokens,
        num_tokens,
        None,
        select,
        parameter,
    )
    needs_gradient = torch.is_grad_enabled() and (student_hidden.requires_grad or student_weight.requires_grad)
    if not student_hidden.requires_grad:  # frozen layers may have run in inference mode
        student_hidden = constant(student_hidden)
    if not student_weight.requires_grad:
        student_weight = constant(student_weight)
    of_student = student_hidden.reshape(num_tokens, student_hidden.shape[-1])
    of_teacher = constant(teacher_hidden).reshape(num_tokens, teacher_hidden.shape[-1])
    of_labels = constant(labels).reshape(num_tokens)
    # In fp16 the loss scale must be applied before rounding, and only backward has it.
    in_forward = token_weights is not None and student_hidden.dtype != torch.float16
    weights = constant(token_weights).reshape(num_tokens) if token_weights is not None and in_forward else None
    # Empty, but keeps the graph: a double backward must reach the hidden states, which are not saved, to be rejected.
    anchor = of_student[:0].clone() if weights is not None and needs_gradient else None
    back = None
    if selected is not None:
        chosen, others = rows_of(selected, labels)
        order = torch.cat([chosen, others])
        back = torch.empty_like(order)
        back[order] = torch.arange(num_tokens, device=order.device)
        of_student, of_teacher, of_labels = of_student[order], of_teacher[chosen], of_labels[order]
        weights = weights[order] if weights is not None else None
        student_only = Passes.of(student_weight, student_weight, STUDENT_ONLY, shard, 1.0, has_labels=True)
        kd_weight, lm_weight = (it[order] if isinstance(it, Tensor) else it for it in (kd_weight, lm_weight))
        head = replace(head, kd_weight=kd_weight, lm_weight=lm_weight, student_only=student_only)
        head = replace(head, num_compared=len(chosen))
    loss, value, cross_entropy, metrics = _DistillationHead.apply(
        of_student,
        student_weight,
        of_teacher,
        constant(teacher_weight),
        of_labels,
        weights,
        head,
        needs_gradient,
        anchor,
    )
    if back is not None:
        loss, value, cross_entropy, metrics = loss[back], value[back], cross_entropy[back], metrics[:, back]
    metrics = metrics.view(len(METRICS), *labels.shape)
    named = dict(zip(METRICS, metrics.unbind(0), strict=True))
    return loss.view(labels.shape), DistillationTerms(value.view(labels.shape), cross_entropy.view(labels.shape), named)


def _term_weight(owner: str, name: str, weight: float | Tensor, labels: Tensor) -> float | Tensor:
    """Check the weight of a term; one per token becomes [N]."""
    if not isinstance(weight, Tensor):
        return finite_number(owner, name, weight)
    check_tensor(f"a {name}", weight, like=labels)
    if weight.shape != labels.shape:
        raise ConfigError(
            f"expected a {name} of the labels' shape {list(labels.shape)}, got {list(weight.shape)}: give a number, or "
            "one per token"
        )
    return constant(weight).reshape(-1)


def _as_under_autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Cast both to autocast's dtype if it is enabled and their dtypes differ, like torch's linear layers."""
    if not (isinstance(hidden, Tensor) and isinstance(weight, Tensor)) or hidden.dtype == weight.dtype:
        return hidden, weight
    device = weight.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return hidden, weight
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype)


def bytes_per_token(weight: Tensor, shard: VocabShard) -> int:
    """Return the bytes of both models' logits per token of a chunk, for an LM head weight [W, h].

    In a group of several ranks two chunks are alive at a time.
    """
    return 2 * weight.shape[0] * weight.dtype.itemsize * (2 if shard.num_ranks > 1 else 1)


def automatic_chunk_tokens(device: torch.device, of_token: int) -> int:
    """Return the tokens per chunk: a power of 2 whose logits, `of_token` bytes per token, fit a share of the memory.

    On GPU at most 2048 tokens, which saturate the tensor cores, and a 64th of the memory. On CPU at most 512 tokens and
    64 MiB, for the caches. Free memory is not considered: it differs between ranks, which must agree on the chunk size,
    and between a run and its resume.
    """
    most, least, room = 512, 16, 2**26
    if device.type == "cuda":
        most, least, room = 2048, 128, torch.cuda.mem_get_info(device)[1] // 64
    fitting = room // max(of_token, 1)
    return max(least, min(most, 2 ** (fitting.bit_length() - 1) if fitting else least))


@dataclass(frozen=True)
class _Head:
    """Parameters that all chunks share; the weights are numbers, or [N]."""

    passes: Passes
    kd_weight: float | Tensor
    lm_weight: float | Tensor
    student_scale: float
    teacher_scale: float
    chunk_tokens: int
    num_compared: int
    """Number of leading tokens, for which there are teacher hidden states."""
    student_only: Passes | None
    """Passes of the student with itself, for the remaining tokens, if any."""
    select: Callable[[Mapping[str, Tensor]], Tensor] | None
    parameter: Any
    """The weight if its gradient goes to its `main_grad`, else None."""

    def chunks(self, num_tokens: int) -> list[slice]:
        """Return the chunks; none mixes compared tokens and others."""
        return [
            slice(first, min(first + self.chunk_tokens, end))
            for begin, end in ((0, self.num_compared), (self.num_compared, num_tokens))
            for first in range(begin, end, self.chunk_tokens)
        ]

    def passes_of(self, chunk: slice) -> Passes:
        """Return the passes of a chunk."""
        if chunk.start < self.num_compared:
            return self.passes
        assert self.student_only is not None
        return self.student_only

    def batch(self, operands: "Operands", chunk: slice) -> Batch:
        """Compute a chunk's logits."""
        student = operands.student_hidden[chunk] @ operands.student_weight.t()
        if self.student_scale != 1.0:
            student.mul_(self.student_scale)
        teacher = student
        if chunk.start < self.num_compared:
            teacher = operands.teacher_hidden[chunk] @ operands.teacher_weight.t()
            if self.teacher_scale != 1.0:
                teacher.mul_(self.teacher_scale)
        return self.passes_of(chunk).batch(student, teacher, operands.labels[chunk])

    def conclude(
        self, chunk: slice, batch: Batch, pending_record: PendingRecord, needs_gradient: bool, result: Tensor
    ) -> TokenStats:
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
        self, chunk: slice, batch: Batch, token_stats: TokenStats, of_terms: tuple[Tensor, Tensor], result: Tensor
    ) -> Tensor:
        """Compute the gradient of hidden @ weight^T in place of the student's logits, given all tokens' `of_terms`."""
        of_divergence: Tensor | None = None
        if chunk.start < self.num_compared:
            of_divergence = of_terms[0][chunk]
            if self.select is not None:
                of_divergence = torch.where(self._selected(result[3:, chunk]), of_divergence, 0.0)
        logits = batch.student.logits
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
        return self.select(dict(zip(METRICS, metrics.unbind(0), strict=True)))


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
    """Return (loss, divergence, cross entropy, metrics [len(METRICS), N]); only the loss is differentiable."""

    title = "the fused head"

    @staticmethod
    @_without_autocast
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor,
        token_weights: Tensor | None,
        head: _Head,
        needs_gradient: bool,
        anchor: Tensor | None,
    ) -> tuple[Tensor, ...]:
        operands = Operands(student_hidden, student_weight, teacher_hidden, teacher_weight, labels)
        in_forward = needs_gradient and token_weights is not None
        gradients = Gradients(operands, *ctx.needs_input_grad[:2]) if in_forward else None
        of_terms = head.of_terms(token_weights) if in_forward and token_weights is not None else None
        result = student_hidden.new_empty(1 + NUM_TERMS, labels.numel(), dtype=head.passes.dtype)
        stats_of_chunks: list[TokenStats] = []

        def finish(chunk: slice, batch: Batch, pending_record: PendingRecord) -> None:
            token_stats = head.conclude(chunk, batch, pending_record, needs_gradient, result)
            if gradients is not None and of_terms is not None:
                gradients.add(chunk, head.gradient(chunk, batch, token_stats, of_terms, result))
            elif needs_gradient:
                stats_of_chunks.append(token_stats)

        before: tuple[slice, Batch, PendingRecord] | None = None
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
            ctx.save_for_backward(*vars(operands).values())
        loss, value, cross_entropy, metrics = result[0], result[1], result[2], result[3:]
        ctx.mark_non_differentiable(value, cross_entropy, metrics)
        return loss, value, cross_entropy, metrics

    @staticmethod
    @_without_autocast
    def backward(ctx: Any, of_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 7
        head: _Head = ctx.head
        if ctx.gradients is None:
            operands = Operands(*ctx.saved_tensors)
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
