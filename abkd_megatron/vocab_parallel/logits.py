"""Divergence, cross entropy and metrics of vocabulary-sharded logits, without gathering them.

Every rank of the group has the same tokens and its own columns of the vocabulary. It sums over its columns, and the
ranks exchange fp64 records of a few numbers per token. Every rank merges the records in the same order, so results are
bitwise identical. One exchange suffices for everything that separates (stats.py): alpha-beta, cross entropies, metrics,
and the value of ToDi at scale 1. The H that ToDi's backward needs with detached weights is summed asynchronously. All
else needs a second exchange, after the global normalizers of the first.

Backward recomputes from the saved logits. Each rank has everything for the gradient of its own columns, so backward has
no collective and no factor of the group size.

Arithmetic on logits runs over chunks of tokens, in fp32 (fp64 for fp64 logits); sums are in fp64. A token whose loss is
weighted by 0 has a gradient of exactly 0, even if its logits are NaN.

Legend: N tokens.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from abkd_megatron.errors import ConfigError
from abkd_megatron.losses.alpha_beta import AlphaBeta
from abkd_megatron.losses.base import Divergence
from abkd_megatron.tensors import Function, check_context, check_tensor, constant
from abkd_megatron.validation import flag, positive_number
from abkd_megatron.vocab_parallel.passes import Batch, Passes
from abkd_megatron.vocab_parallel.shard import VocabShard
from abkd_megatron.vocab_parallel.terms import METRICS, Terms
from abkd_megatron.vocab_parallel.transfer import to_device

_CONTIGUOUS = torch.contiguous_format

# For tokens without a teacher: a pass of the student with itself, which yields its cross entropy.
STUDENT_ONLY = AlphaBeta(1.0, 0.0)


class DistillationTerms(NamedTuple):
    """Per-token results, identical on every rank of the group."""

    divergence: Tensor
    """[...], differentiable."""
    cross_entropy: Tensor
    """[...], the student's on the labels, in nats at temperature 1; differentiable."""
    metrics: dict[str, Tensor]
    """[...] each, detached, at temperature 1: in nats, the teacher's cross entropy on the labels, KL(teacher ||
    student) and both entropies; 1.0 where both models have the same most likely token (ties: the lowest id), else 0.0;
    1.0 where the student's is the label; and the student's probability of its most likely token."""


def vocab_parallel_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    divergence: Divergence,
    *,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    gradient_in_place: bool = False,
) -> Tensor:
    """Compute D(teacher || student) per token, over a vocabulary sharded across `tp_group`.

        D = sum_k F(log p_k, log q_k),  p = softmax(teacher / T),  q = softmax(student / T)
        dD/ds_j = (h_j - q_j H) / T,    h_k = dF/dlog q_k,  H = sum_k h_k

    There is no factor T^2, so the gradient decreases as 1/T^2 with the temperature.

    Args:
        student_logits: [..., V/TP], any floating dtype, this rank's columns.
        teacher_logits: [..., V/TP], the same columns; never receives a gradient.
        divergence: for example AlphaBeta(0.2, 0.7).
        tp_group: tensor-parallel group; None for one rank with the whole vocabulary.
        vocab_size: number of real tokens; further columns, in Megatron's layout of equal shards, are padding. None if
            there is no padding; the shards may then differ in width.
        temperature: T > 0; divides both logits.
        gradient_in_place: backward overwrites the student's logits with their gradient, which saves memory. Any other
            op that saves the logits for backward must run before this one; otherwise autograd raises its in-place
            modification error. Reads outside autograd must happen before backward.

    Returns:
        [...], fp32 (fp64 if either input is), complete over the vocabulary: bitwise identical on every rank of the
        group. Once differentiable in the student's logits; each rank receives the gradient of its own shard.

    Raises:
        ConfigError: for shapes that differ, a dtype that is not floating, a temperature that is not finite and > 0, a
            vocab_size that does not fit the shards, a `divergence` that is not a Divergence, or, with
            gradient_in_place, logits that are a leaf, not contiguous, or in the teacher's storage.

    Collectives: forward: 1 all-gather of fp64 records if the divergence separates (AlphaBeta: 7 floats per token,
    ToDi(detach=False): 10), else another one of 2 floats. ToDi(): 1 of 10, and 1 of 1 that backward awaits. Backward:
    none. A single rank has none. Groups of more than 16 ranks use all-reduces (maxima, then sums, and one in the second
    exchange), except for fp64 logits, which always use all-gathers.

    Memory: references to both logits and at most 10 fp64 numbers per token until backward; a few chunks of the kernel's
    size while running; one gradient buffer in the student's dtype unless in place.
    """
    check_context("vocab_parallel_divergence")
    check_logits(student_logits, teacher_logits)
    width = student_logits.shape[-1]
    if vocab_size is None:
        # Global ids matter only with labels, so shards of unequal width need not know theirs.
        shard = VocabShard(0, width, max(width, 1), tp_group)
    else:
        shard = VocabShard.megatron(width, tp_group, vocab_size)
    return _apply(student_logits, teacher_logits, divergence, None, shard, temperature, gradient_in_place)[0]


def vocab_parallel_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    divergence: Divergence,
    labels: Tensor,
    shard: VocabShard,
    temperature: float = 1.0,
    gradient_in_place: bool = False,
    selected: Tensor | None = None,
) -> DistillationTerms:
    """Compute divergence, the student's cross entropy and metrics per token, in one pass over both logits.

    The divergence is `vocab_parallel_divergence` at `temperature`, without a factor T^2. All else is at temperature 1:

        cross_entropy = -log q_label,  d cross_entropy/ds_j = q_j - [j = label],  q = softmax(student)

    Args:
        student_logits: as in `vocab_parallel_divergence`, like `teacher_logits`, `divergence` and `gradient_in_place`.
        teacher_logits: [..., V/TP].
        divergence: for example AlphaBeta(0.2, 0.7).
        labels: [...], int64, global token ids in 0 .. shard.size - 1. Negative ids are ignored: their cross entropies
            are 0, without a gradient. An id beyond the vocabulary gives inf.
        shard: columns of the logits.
        temperature: T > 0, for the divergence only.
        gradient_in_place: overwrite the student's logits with their gradient.
        selected: [...] bool, identical on every rank: tokens to compare. `teacher_logits` are then [n, V/TP], for these
            tokens only, in order; at the others all results but the cross entropy are 0. Pass it on the CPU; one on the
            GPU needs a synchronization. None selects all.

    Returns:
        DistillationTerms of [...], with dtype and gradients as in `vocab_parallel_divergence`; the gradients of both
        terms share one buffer.

    Raises:
        ConfigError: as vocab_parallel_divergence, for labels of another shape or dtype, a selection of another shape or
            number of tokens than the teacher's, or a shard wider than the logits.

    Collectives: as vocab_parallel_divergence, with 7 (9 if T is not 1) more floats per token in the first. With
    `selected`, these for the selected tokens and one of 14 floats per token for the others.

    Memory: as vocab_parallel_divergence, and the labels; with `selected` also two chunks' rows.
    """
    check_context("vocab_parallel_distillation")
    check_shard(shard)
    check_dtypes(student_logits, teacher_logits)
    check_labels(student_logits, labels)
    rows = None
    if selected is None:
        check_logits(student_logits, teacher_logits)
    else:
        rows = rows_of(selected, labels)
        if teacher_logits.dim() != 2 or teacher_logits.shape != (len(rows[0]), student_logits.shape[-1]):
            raise ConfigError(
                f"expected teacher logits [{len(rows[0])}, {student_logits.shape[-1]}] of the selected tokens, got "
                f"{list(teacher_logits.shape)}: pass one row per selected token, in order"
            )
    divergence_per_token, cross_entropy, metrics = _apply(
        student_logits, teacher_logits, divergence, labels, shard, temperature, gradient_in_place, rows
    )
    return DistillationTerms(divergence_per_token, cross_entropy, dict(zip(METRICS, metrics.unbind(0), strict=True)))


def check_labels(student_logits: Tensor, labels: Tensor) -> None:
    """Raise ConfigError unless there is one int64 label per row of logits."""
    check_tensor("labels", labels, dtype=torch.int64, like=student_logits)
    if labels.shape != student_logits.shape[:-1]:
        raise ConfigError(
            f"expected labels of shape {list(student_logits.shape[:-1])}, got {list(labels.shape)}: give one token id "
            "per row of logits, in order"
        )


def check_selection(selected: Tensor, labels: Tensor) -> None:
    """Raise ConfigError unless `selected` has a bool per token, on the CPU or the labels' device."""
    on_cpu = isinstance(selected, Tensor) and selected.device.type == "cpu"
    check_tensor("a selection", selected, dtype=torch.bool, like=None if on_cpu else labels)
    if selected.shape != labels.shape:
        raise ConfigError(
            f"expected a selection of shape {list(labels.shape)}, got {list(selected.shape)}: give one bool per token"
        )


def rows_of(selected: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices of the selected tokens, [n], and of the others, [N - n], on the labels' device.

    Later shapes depend on their number, so a selection on a GPU needs a synchronization.
    """
    check_selection(selected, labels)
    flat = selected.reshape(-1).cpu()
    chosen, others = (to_device(which.nonzero().squeeze(-1), labels.device) for which in (flat, ~flat))
    return chosen, others


def check_dtypes(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Reject inputs that are not logits.

    Raises:
        ConfigError: for a non-tensor, a dtype that is not floating, or different devices.
    """
    check_tensor("student logits", student_logits)
    check_tensor("teacher logits", teacher_logits, like=student_logits)


def check_shard(shard: object) -> None:
    """Raise ConfigError unless `shard` is a VocabShard."""
    if not isinstance(shard, VocabShard):
        raise ConfigError(f"expected a VocabShard, got {shard!r}: build one, VocabShard.megatron(width, group, size)")


def check_logits(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Reject logits that cannot be compared.

    Raises:
        ConfigError: as `check_dtypes`, and for shapes that differ.
    """
    check_dtypes(student_logits, teacher_logits)
    if student_logits.shape != teacher_logits.shape or student_logits.dim() == 0:
        raise ConfigError(
            "expected student and teacher logits of one shape [..., V/TP], got "
            f"{list(student_logits.shape)} and {list(teacher_logits.shape)}: pad both vocabularies to one "
            "size and pass the same tokens"
        )


def _apply(
    student_logits: Tensor,
    teacher_logits: Tensor,
    divergence: Divergence,
    labels: Tensor | None,
    shard: VocabShard,
    temperature: float,
    gradient_in_place: bool,
    rows: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_divergence(divergence)
    temperature = positive_number("the losses", "temperature", temperature, "1.0 leaves the logits as they are")
    shard.check_width("logits", student_logits.shape[-1])
    needs_gradient = torch.is_grad_enabled() and student_logits.requires_grad
    student_logits = student_logits.resolve_neg()
    if flag("the losses", "gradient_in_place", gradient_in_place) and needs_gradient:
        check_in_place(student_logits, teacher_logits)
    result: tuple[Tensor, Tensor, Tensor] = _Distillation.apply(
        student_logits,
        constant(teacher_logits),
        constant(labels) if labels is not None else None,
        divergence,
        shard,
        temperature,
        needs_gradient,
        gradient_in_place,
        rows,
    )
    return result


def check_divergence(divergence: object) -> None:
    """Raise ConfigError unless `divergence` is a Divergence."""
    if not isinstance(divergence, Divergence):
        raise ConfigError(
            f"expected a Divergence such as AlphaBeta(0.2, 0.7), got {divergence!r}: build one, or derive "
            "a custom one from abkd_megatron.losses.Divergence"
        )


def check_in_place(student_logits: Tensor, teacher_logits: Tensor | None) -> None:
    """Raise ConfigError unless the student's logits may be overwritten with their gradient."""
    if student_logits.is_leaf:
        raise ConfigError(
            "gradient_in_place: expected logits that a model computed, got a leaf, whose values would be lost: "
            "set gradient_in_place to False"
        )
    if not student_logits.is_contiguous():
        raise ConfigError(
            f"gradient_in_place: expected contiguous student logits, got shape {list(student_logits.shape)} with "
            f"strides {student_logits.stride()}: pass the output layer's, or set gradient_in_place to False"
        )
    if teacher_logits is None:
        return
    if student_logits.untyped_storage().data_ptr() == teacher_logits.untyped_storage().data_ptr():
        raise ConfigError(
            "gradient_in_place: expected student and teacher logits in separate memory, got one storage for both: "
            "copy one, or set gradient_in_place to False"
        )


class _Part(NamedTuple):
    """Subset of the tokens, with its passes."""

    passes: Passes
    rows: Tensor | None
    """[n]; None for all tokens."""
    has_teacher: bool

    def batch(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None) -> Batch:
        teacher = teacher_logits if self.has_teacher else student_logits
        return self.passes.batch(student_logits, teacher, labels, self.rows)


class _Distillation(Function):
    """Return (divergence, cross entropy, metrics [len(METRICS), ...]); the last two are empty without labels."""

    title = "the distillation loss"

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
        rows: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        passes = Passes.of(student_logits, teacher_logits, divergence, shard, temperature, labels is not None)
        parts = [_Part(passes, None, True)]
        if rows is not None:
            student_only = Passes.of(student_logits, student_logits, STUDENT_ONLY, shard, 1.0, labels is not None)
            parts = [_Part(passes, rows[0], True), _Part(student_only, rows[1], False)]
        batches = [part.batch(student_logits, teacher_logits, labels) for part in parts]
        pending_records = [part.passes.start(batch) for part, batch in zip(parts, batches, strict=True)]
        tokens, has_labels = student_logits.shape[:-1], labels is not None
        outs = [Terms.empty(tokens.numel(), has_labels, student_logits, passes.dtype)]
        if rows is not None:
            whole = outs[0].terms
            outs = [Terms(whole, rows[0]), Terms(whole, rows[1], compared=False)]
        stats_of_parts = [
            part.passes.conclude(batch, pending_record, needs_gradient, out)
            for part, batch, pending_record, out in zip(parts, batches, pending_records, outs, strict=True)
        ]

        ctx.set_materialize_grads(False)
        ctx.parts, ctx.in_place = parts, gradient_in_place
        if needs_gradient:
            ctx.save_for_backward(student_logits, teacher_logits, labels)
            ctx.stats_of_parts = stats_of_parts

        terms = outs[0].terms.view(len(outs[0].terms), *tokens)
        if not has_labels:
            nothing, nothing_either = terms.new_empty(0), terms.new_empty(0)
            ctx.mark_non_differentiable(nothing, nothing_either)
            return terms[0], nothing, nothing_either
        metrics = terms[2:]
        ctx.mark_non_differentiable(metrics)
        return terms[0], terms[1], metrics

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        of_divergence, of_cross_entropy, _ = gradients
        nothing = (None,) * 8
        if of_divergence is None and of_cross_entropy is None:
            return None, *nothing
        student_logits, teacher_logits, labels = ctx.saved_tensors
        out = student_logits.detach() if ctx.in_place else torch.empty_like(student_logits, memory_format=_CONTIGUOUS)
        for part, token_stats in zip(ctx.parts, ctx.stats_of_parts, strict=True):
            batch = part.batch(student_logits, teacher_logits, labels)
            of_value, of_own = of_divergence, of_cross_entropy
            if not part.has_teacher:
                of_value = None
                if of_own is None:
                    of_own = out.new_zeros((), dtype=part.passes.dtype).expand(student_logits.shape[:-1])
            part.passes.write_gradient(out, batch, token_stats, of_value, of_own)
        ctx.parts[0].passes.clear_padding(out)
        if ctx.in_place:  # makes autograd reject a later backward that saved the logits, this one included
            torch.autograd.graph.increment_version(student_logits)
        return out, *nothing
