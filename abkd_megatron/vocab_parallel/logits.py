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
from abkd_megatron.vocab_parallel.passes import Batch, Known, Passes
from abkd_megatron.vocab_parallel.shard import VocabShard
from abkd_megatron.vocab_parallel.transfer import to_device

_CONTIGUOUS = torch.contiguous_format

# A pass of the student with itself, where its cross entropy is all that is wanted.
ALONE = AlphaBeta(1.0, 0.0)

METRICS = (
    *("teacher lm loss", "kl to teacher", "teacher entropy", "student entropy"),
    *("top-1 agreement", "top-1 accuracy", "student confidence"),
)


class DistillationTerms(NamedTuple):
    """One number a token each, the same on every rank of the group."""

    divergence: Tensor
    """[...], differentiable."""
    cross_entropy: Tensor
    """[...], the student's on the labels, in nats at temperature 1; differentiable."""
    metrics: dict[str, Tensor]
    """[...] each, detached, at temperature 1: the teacher's cross entropy on the labels, KL(teacher ||
    student) and both entropies, in nats; 1.0 where both models have one likeliest token (of a tie, the lowest
    id); 1.0 where the student's is the label; and the probability that the student gives its own."""


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

    There is no factor T^2: the gradient falls off as 1/T^2 with the temperature unless the caller multiplies
    by it.

    Args:
        student_logits: [..., V/TP], any floating dtype, this rank's columns.
        teacher_logits: [..., V/TP], the same columns; never receives a gradient.
        divergence: for example AlphaBeta(0.2, 0.7).
        tp_group: the tensor-parallel group; None for one rank that holds the whole vocabulary.
        vocab_size: number of real tokens; columns from there on, in Megatron's layout of equal shards, are
            padding. None if there is none; then the shards may differ in width.
        temperature: T > 0; divides the logits of both.
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
    none. None at all on one rank. In a group of more than 16 ranks all-reduces in place of all-gathers:
    of the maxima, then of the sums, and one in the second round. (fp64 logits are gathered in any group.)

    Memory: references to both logits and 39 fp64 numbers a token (23 without labels) until backward; a few chunks of
    the kernel's size while it runs; one gradient buffer in the student's dtype unless it is written in place.
    """
    check_context("vocab_parallel_divergence")
    check_logits(student_logits, teacher_logits)
    width = student_logits.shape[-1]
    if vocab_size is None:
        # Global ids are of no consequence without labels, so shards of unequal width need not know theirs.
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
        selected: [...] bool, the same on every rank: the tokens that are compared. `teacher_logits` are then of these
            alone, [n, V/TP] in their order, and the others have a cross entropy and zeros. Best on the CPU: the host
            waits for one on a GPU. None for all.

    Returns:
        DistillationTerms of [...], fp32 (fp64 if either input is), the same bits on every rank of the
        group. Once differentiable, in the student's logits; each rank receives the gradient of its own shard,
        of both terms in one buffer.

    Raises:
        ConfigError: as vocab_parallel_divergence, for labels of another shape or dtype, a selection of another
            shape or of another number of tokens than the teacher's, or a shard wider than the logits.

    Collectives: as vocab_parallel_divergence, with 7 (9 if T is not 1) floats a token more in the first. With a
    selection those of the selected tokens, and one of 14 floats a token for the others.

    Memory: as vocab_parallel_divergence, and the labels; with a selection also two chunks' rows.
    """
    check_context("vocab_parallel_distillation")
    check_shard(shard)
    check_dtypes(student_logits, teacher_logits)
    check_tensor("labels", labels, dtype=torch.int64, like=student_logits)
    rows = None
    if selected is None:
        check_logits(student_logits, teacher_logits)
    else:
        rows = rows_of(selected, labels)
        if teacher_logits.dim() != 2 or teacher_logits.shape != (len(rows[0]), student_logits.shape[-1]):
            raise ConfigError(
                f"expected teacher logits [{len(rows[0])}, {student_logits.shape[-1]}] of the selected tokens, got "
                f"{list(teacher_logits.shape)}: pass a row for each of them, in their order"
            )
    if labels.shape != student_logits.shape[:-1]:
        raise ConfigError(
            f"expected labels of shape {list(student_logits.shape[:-1])}, got {list(labels.shape)}: give one token id "
            "for each row of logits, in their order"
        )
    divergence_per_token, cross_entropy, metrics = _apply(
        student_logits, teacher_logits, divergence, labels, shard, temperature, gradient_in_place, rows
    )
    return DistillationTerms(divergence_per_token, cross_entropy, dict(zip(METRICS, metrics.unbind(0), strict=True)))


def rows_of(selected: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the selected tokens and the others: indices [n] and [N - n] of the flattened ones, on the labels' device.

    How many there are decides the shapes of what follows, so the host has to know: of a selection on a GPU it waits for
    a copy, of one on the CPU for nothing.
    """
    on_cpu = isinstance(selected, Tensor) and selected.device.type == "cpu"
    check_tensor("a selection", selected, dtype=torch.bool, like=None if on_cpu else labels)
    if selected.shape != labels.shape:
        raise ConfigError(
            f"expected a selection of shape {list(labels.shape)}, got {list(selected.shape)}: give one for each token"
        )
    flat = selected.reshape(-1).cpu()
    chosen, others = (to_device(which.nonzero().squeeze(-1), labels.device) for which in (flat, ~flat))
    return chosen, others


def check_dtypes(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Reject what is not two models' logits.

    Raises:
        ConfigError: for what is not a tensor, a dtype that is not floating, or two devices.
    """
    check_tensor("student logits", student_logits)
    check_tensor("teacher logits", teacher_logits, like=student_logits)


def check_shard(shard: object) -> None:
    """Reject what is not a shard.

    Raises:
        ConfigError: unless it is a VocabShard.
    """
    if not isinstance(shard, VocabShard):
        raise ConfigError(f"expected a VocabShard, got {shard!r}: build one, VocabShard.megatron(width, group, size)")


def check_logits(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Reject two models' logits that cannot be compared.

    Raises:
        ConfigError: as `check_dtypes`, and for shapes that differ.
    """
    check_dtypes(student_logits, teacher_logits)
    if student_logits.shape != teacher_logits.shape or student_logits.dim() == 0:
        raise ConfigError(
            "expected student and teacher logits of one shape [..., V/TP], got "
            f"{list(student_logits.shape)} and {list(teacher_logits.shape)}: pad both models' vocabularies "
            "alike and pass the same tokens"
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
        _check_in_place(student_logits, teacher_logits)
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
    """Reject what is not a divergence.

    Raises:
        ConfigError: unless it is a Divergence.
    """
    if not isinstance(divergence, Divergence):
        raise ConfigError(
            f"expected a Divergence such as AlphaBeta(0.2, 0.7), got {divergence!r}: build one, or derive "
            "your own from abkd_megatron.losses.Divergence"
        )


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


def token_terms(known: Known, labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The student's cross entropy, [N], and the metrics, [len(METRICS), N], of labels [N]; both in `dtype`."""
    whole = known.whole
    assert whole.p.top is not None and whole.q.top is not None
    agreement = (whole.p.top == whole.q.top) & whole.p.top.isfinite()
    accuracy, confidence = whole.q.top == labels, (-whole.q.log_z_at_1).exp()
    of_teacher, of_student = (side.cross_entropy().masked_fill_(labels < 0, 0.0) for side in (whole.p, whole.q))
    metrics = [of_teacher, *whole.metrics, agreement.double(), accuracy.double(), confidence]
    return of_student.to(dtype), torch.stack(metrics).to(dtype)


class _Part(NamedTuple):
    """Some of the tokens, and what is done with them."""

    passes: Passes
    rows: Tensor | None
    """[n]; None for all tokens."""
    has_teacher: bool

    def batch(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None) -> Batch:
        teacher = teacher_logits if self.has_teacher else student_logits
        return self.passes.batch(student_logits, teacher, labels, self.rows)

    def of(self, per_token: Tensor | None) -> Tensor | None:
        """[n] of [...]."""
        return per_token.reshape(-1)[self.rows] if per_token is not None and self.rows is not None else per_token


class _Distillation(Function):
    """(divergence, cross entropy, metrics [len(METRICS), ...]); the last two are empty without labels."""

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
            alone = Passes.of(student_logits, student_logits, ALONE, shard, 1.0, labels is not None)
            parts = [_Part(passes, rows[0], True), _Part(alone, rows[1], False)]
        batches = [part.batch(student_logits, teacher_logits, labels) for part in parts]
        exchanges = [part.passes.start(batch) for part, batch in zip(parts, batches, strict=True)]
        knowns = [
            part.passes.conclude(batch, exchange, needs_gradient)
            for part, batch, exchange in zip(parts, batches, exchanges, strict=True)
        ]

        ctx.set_materialize_grads(False)
        ctx.parts, ctx.in_place = parts, gradient_in_place
        if needs_gradient:
            ctx.save_for_backward(student_logits, teacher_logits, labels)
            ctx.knowns = knowns

        tokens = student_logits.shape[:-1]
        known, batch = knowns[0], batches[0]
        result = known.value.to(passes.dtype)
        if batch.labels is None:
            nothing, nothing_either = result.new_empty(0), result.new_empty(0)
            ctx.mark_non_differentiable(nothing, nothing_either)
            return result.view(tokens), nothing, nothing_either
        cross_entropy, metrics = token_terms(known, batch.labels, passes.dtype)
        if rows is not None:
            assert batches[1].labels is not None
            whole = result.new_zeros(2 + len(METRICS), tokens.numel())
            whole[:, rows[0]] = torch.cat([torch.stack([result, cross_entropy]), metrics])
            whole[1, rows[1]] = token_terms(knowns[1], batches[1].labels, passes.dtype)[0]
            result, cross_entropy, metrics = whole[0], whole[1], whole[2:]
        metrics = metrics.view(len(METRICS), *tokens)
        ctx.mark_non_differentiable(metrics)
        return result.view(tokens), cross_entropy.view(tokens), metrics

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        of_divergence, of_cross_entropy, _ = gradients
        nothing = (None,) * 8
        if of_divergence is None and of_cross_entropy is None:
            return None, *nothing
        student_logits, teacher_logits, labels = ctx.saved_tensors
        out = student_logits.detach() if ctx.in_place else torch.empty_like(student_logits, memory_format=_CONTIGUOUS)
        for part, known in zip(ctx.parts, ctx.knowns, strict=True):
            batch = part.batch(student_logits, teacher_logits, labels)
            of_value, of_own = part.of(of_divergence), part.of(of_cross_entropy)
            if not part.has_teacher:
                of_value = None
                of_own = out.new_zeros(batch.num_tokens, dtype=part.passes.dtype) if of_own is None else of_own
            part.passes.write_gradient(out, batch, known, of_value, of_own)
        if ctx.in_place:  # whoever saved the logits for a backward of its own, this one included, is told
            torch.autograd.graph.increment_version(student_logits)
        return out, *nothing
