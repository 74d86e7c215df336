"""Distillation from teacher records, in place of a teacher's logits: K log-probabilities per token and the rest's.

Both distributions are compared on K + 1 buckets, the kept tokens and the rest:

    D = sum_kept F(log p_k, log q_k) + F(log p_rest, log q_rest),    q_rest = sum of q over the rest
    dD/ds_j = (h_j - q_j H) / T for kept j,  (h_rest q_j / q_rest - q_j H) / T for others,  H = sum of h over buckets

which is exact in value and gradient for these buckets. With K = V it is the live loss. q_rest comes from the rest's
own columns; 1 - sum would lose it where it is small. Cross entropy and the student's metrics are those of the whole
vocabulary. See docs/maths.md for what buckets change.

Records with R draws of the rest estimate its terms instead of comparing it as one bucket:

    D = sum_kept F_k + sum_draws w_d (F_d - c q_d) + c q_rest,    w_d = count_d p_rest / (R p_d)

    h is h_k for kept columns, w_d (h_d - c q_d) + c q_d for drawn ones, and c q_j for others

The mean over draws is the loss on logits, in value and gradient, for every c that does not depend on them. c q is the
tangent of F at p = 0 and the mean q of the rest, held constant: 1 for forward KL, whose gradient is then q minus the
kept probabilities and the draws' shares of the rest (Anshumann et al., 2025, arXiv:2503.16870).

Legend: N tokens, K kept ids per token, R draws, h hidden size, W width of a rank's logits.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from abkd_megatron.errors import ConfigError
from abkd_megatron.losses.base import Divergence
from abkd_megatron.tensors import Function, check_context, check_tensor, constant
from abkd_megatron.validation import flag, positive_number, whole_number
from abkd_megatron.vocab_parallel.fused_head import (
    automatic_chunk_tokens,
    bytes_per_token,
    checked_options,
    checked_student,
)
from abkd_megatron.vocab_parallel.head_function import Head, apply_head
from abkd_megatron.vocab_parallel.logits import (
    DistillationTerms,
    check_in_place,
    check_labels,
    check_selection,
    check_shard,
)
from abkd_megatron.vocab_parallel.record_passes import RecordPasses
from abkd_megatron.vocab_parallel.shard import VocabShard
from abkd_megatron.vocab_parallel.teacher_records import TeacherRecords, check_recorded
from abkd_megatron.vocab_parallel.terms import Terms
from abkd_megatron.vocab_parallel.transfer import to_device


def vocab_parallel_record_distillation(
    student_logits: Tensor,
    records: TeacherRecords,
    divergence: Divergence,
    labels: Tensor,
    shard: VocabShard,
    temperature: float = 1.0,
    gradient_in_place: bool = False,
    selected: Tensor | None = None,
) -> DistillationTerms:
    """Compute divergence from a teacher's records, the student's cross entropy and metrics per token.

    As `vocab_parallel_distillation`, with the divergence on K + 1 buckets, or estimated from draws. Metrics have the
    live names, except that KL(teacher || student) is ``bucketed kl to teacher``, with draws ``sampled kl to teacher``,
    at T = 1 only. Without a record's entropy or label log-probability, ``teacher entropy`` or ``teacher lm loss`` is
    left out.

    Args:
        student_logits: [..., V/TP], any floating dtype, this rank's columns.
        records: of the N tokens, in the order of the flattened labels, made at `temperature`; identical on every rank.
        divergence: any Divergence; for records with draws one that `suits_draws`.
        labels: [...], as in `vocab_parallel_distillation`.
        shard: columns of the logits.
        temperature: T > 0, for the divergence only.
        gradient_in_place: overwrite the student's logits with their gradient.
        selected: [...] bool: at the other tokens all results but the cross entropy are 0. None selects all.

    Returns:
        DistillationTerms of [...], fp32 (fp64 if the logits are): bitwise identical on every rank. Once differentiable
        in the student's logits.

    Raises:
        ConfigError: as vocab_parallel_distillation; for records of another shape, dtype or device; for a LogitLoss,
            which needs all logits; for a divergence that draws do not suit.

    Collectives: forward: 1 all-reduce of 5 fp64 numbers per rank (6 if T is not 1) and K + R more, per token, for every
    divergence. Backward: none. A single rank has none.

    Memory: a reference to the logits and 2 (K + R + 1) numbers per token of their precision until backward; copies of a
    chunk of logits, and of a chunk of [K + R + 1] fp64 numbers per token, while running; one gradient buffer unless in
    place.
    """
    owner = "vocab_parallel_record_distillation"
    check_context(owner)
    check_shard(shard)
    check_tensor("student logits", student_logits)
    check_labels(student_logits, labels)
    records = _records_of(records, labels, divergence)
    temperature = positive_number(owner, "temperature", temperature, "1.0 leaves the logits as they are")
    shard.check_width("logits", student_logits.shape[-1])
    student_logits = student_logits.resolve_neg()
    needs_gradient = torch.is_grad_enabled() and student_logits.requires_grad
    if flag(owner, "gradient_in_place", gradient_in_place) and needs_gradient:
        check_in_place(student_logits, None)
    passes = RecordPasses.of(student_logits, records, divergence, shard, temperature, disposable=False)
    value, cross_entropy, metrics = _RecordDistillation.apply(
        student_logits, constant(labels), records, passes, needs_gradient, gradient_in_place
    )
    terms = DistillationTerms(value, cross_entropy, dict(zip(passes.metrics, metrics.unbind(0), strict=True)))
    return terms if selected is None else _only(_selection(selected, labels), terms)


def vocab_parallel_record_distillation_head(
    student_hidden: Tensor,
    student_weight: Tensor,
    records: TeacherRecords,
    divergence: Divergence,
    labels: Tensor,
    shard: VocabShard,
    *,
    kd_weight: float | Tensor = 1.0,
    lm_weight: float | Tensor = 1.0,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    student_scale: float = 1.0,
    chunk_tokens: int | None = None,
    into_main_grad: bool = False,
    selected: Tensor | None = None,
    select: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
) -> tuple[Tensor, DistillationTerms]:
    """Compute kd_weight * D + lm_weight * CE per token from records, with the logits not materialized.

    Args:
        student_hidden: [..., h], identical on every rank.
        student_weight: [W, h], this rank's rows of the LM head.
        records: see `vocab_parallel_record_distillation`, also for `divergence`, `labels`, `shard`, `temperature` and
            `selected`.
        divergence: any Divergence; for records with draws one that `suits_draws`.
        labels: [...].
        shard: columns of the logits.
        kd_weight: see `vocab_parallel_distillation_head`, also for all that follows.
        lm_weight: of the student's cross entropy.
        temperature: T > 0, the records'.
        token_weights: [...], or None.
        student_scale: multiplies the logits.
        chunk_tokens: tokens per chunk.
        into_main_grad: add the weight's gradient to its `main_grad`.
        selected: [...] bool, or None.
        select: maps metrics {name: [n]} to [n] bool, or None.

    Returns:
        As `vocab_parallel_distillation_head`, with the metrics of `vocab_parallel_record_distillation`.

    Raises:
        ConfigError: as vocab_parallel_distillation_head and vocab_parallel_record_distillation.
        RuntimeError: as vocab_parallel_distillation_head.

    Collectives: per chunk, as vocab_parallel_record_distillation; they overlap with the next chunk's products.

    Memory: as vocab_parallel_distillation_head with the logits of one model, and what its records take.
    """
    owner = "vocab_parallel_record_distillation_head"
    check_context(owner)
    temperature = positive_number(owner, "temperature", temperature, "1.0 leaves the logits as they are")
    student, parameter = checked_student(owner, student_hidden, student_weight, labels, shard, into_main_grad)
    options = checked_options(owner, labels, kd_weight, lm_weight, student_scale, token_weights, select)
    records = _records_of(records, labels, divergence)
    if chunk_tokens is None:
        # Of one model.
        chunk_tokens = automatic_chunk_tokens(student_weight.device, bytes_per_token(student_weight, shard) // 2)
    if selected is not None:
        selected = _selection(selected, labels)
        options["kd_weight"] = torch.where(selected.reshape(-1), options["kd_weight"], 0.0)
    head = Head(
        **options,
        passes=RecordPasses.of(student[1], records, divergence, shard, temperature, disposable=True),
        records=records,
        chunk_tokens=whole_number(owner, "chunk_tokens", chunk_tokens, least=1),
        num_compared=labels.numel(),
        parameter=parameter,
    )
    loss, terms = apply_head(head, student, (), labels, token_weights)
    return loss, terms if selected is None else _only(selected, terms)


def _records_of(records: object, labels: Tensor, divergence: Divergence) -> TeacherRecords:
    if not isinstance(records, TeacherRecords):
        raise ConfigError(f"expected TeacherRecords, got {type(records).__name__}: build them from a teacher's cache")
    check_recorded(divergence, records.num_draws)
    return records.check(labels)


def _selection(selected: Tensor, labels: Tensor) -> Tensor:
    check_selection(selected, labels)
    return to_device(selected, labels.device)


def _only(selected: Tensor, terms: DistillationTerms) -> DistillationTerms:
    metrics = {name: torch.where(selected, it, 0.0) for name, it in terms.metrics.items()}
    return DistillationTerms(torch.where(selected, terms.divergence, 0.0), terms.cross_entropy, metrics)


class _RecordDistillation(Function):
    """Return (divergence, cross entropy, metrics [M, ...])."""

    title = "the distillation loss on records"

    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,
        labels: Tensor,
        records: TeacherRecords,
        passes: RecordPasses,
        needs_gradient: bool,
        gradient_in_place: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch = passes.batch(student_logits, records, labels)
        pending = passes.start(batch)
        out = Terms(student_logits.new_empty(2 + len(passes.metrics), labels.numel(), dtype=passes.dtype))
        stats = passes.conclude(batch, pending, needs_gradient, out)
        ctx.set_materialize_grads(False)
        ctx.passes, ctx.records, ctx.stats, ctx.in_place = passes, records, stats, gradient_in_place
        if needs_gradient:
            ctx.save_for_backward(student_logits, labels)
        terms = out.terms.view(len(out.terms), *labels.shape)
        ctx.mark_non_differentiable(metrics := terms[2:])
        return terms[0], terms[1], metrics

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        of_divergence, of_cross_entropy, _ = gradients
        nothing = (None,) * 5
        if of_divergence is None and of_cross_entropy is None:
            return None, *nothing
        student_logits, labels = ctx.saved_tensors
        passes: RecordPasses = ctx.passes
        out = student_logits.detach()
        if not ctx.in_place:
            out = torch.empty_like(student_logits, memory_format=torch.contiguous_format)
        batch = passes.batch(student_logits, ctx.records, labels)
        passes.write_gradient(out, batch, ctx.stats, of_divergence, of_cross_entropy)
        passes.clear_padding(out)
        if ctx.in_place:  # makes autograd reject a later backward that saved the logits, this one included
            torch.autograd.graph.increment_version(student_logits)
        return out, *nothing
