"""The loss that replaces Megatron's own, from both models' last hidden states.

Legend: s sequence, b micro-batch, h hidden size, V/TP vocabulary columns of a rank.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from abkd_megatron.errors import ConfigError
from abkd_megatron.losses import AlphaBeta
from abkd_megatron.losses.objective import Objective
from abkd_megatron.losses.selection import TokenSelection, positions_here
from abkd_megatron.student.plan import run_pre_forward_hooks
from abkd_megatron.student.report import SELECTED
from abkd_megatron.teacher.output_layer import OutputLayer, TeacherOutput
from abkd_megatron.vocab_parallel import (
    DistillationTerms,
    VocabShard,
    vocab_parallel_distillation,
    vocab_parallel_distillation_head,
    vocab_parallel_logit_loss,
)
from abkd_megatron.vocab_parallel.diagnostics import diagnose
from abkd_megatron.vocab_parallel.head_gradients import sum_of_logits, weighted
from abkd_megatron.vocab_parallel.transfer import to_device


class Loss(NamedTuple):
    """Per token, [s, b]."""

    total: Tensor
    """kd_weight * distillation + lm_weight * cross entropy."""
    distillation: Tensor
    """The divergence, if any, plus the weighted logit losses; times T^2 with `temperature_squared`."""
    terms: DistillationTerms
    """Of forward KL if the objective has no divergence."""
    logit_losses: dict[str, Tensor]
    """Unweighted; 0 for tokens that do not count or are not selected."""
    selected: Tensor | None
    """bool, the distilled tokens; None for all. With a selection by position the other tokens only have a cross
    entropy, and zeros."""

    def numbers(self, objective: Objective) -> dict[str, Tensor]:
        """Return what is logged per token, [s, b], by name."""
        found = {"lm loss": self.terms.cross_entropy.detach(), "kd loss": self.distillation.detach()}
        if (objective.divergence is not None) + len(self.logit_losses) > 1:
            found |= {f"{name} loss": value.detach() for name, value in self.logit_losses.items()}
        found |= self.terms.metrics
        return found if self.selected is None else {**found, SELECTED: self.selected.float()}


def compute_loss(
    student: OutputLayer,
    teacher: TeacherOutput,
    objective: Objective,
    labels: Tensor,
    loss_mask: Tensor | None,
    shard: VocabShard,
    tp_group: dist.ProcessGroup,
    megatron_cross_entropy: Callable[[Tensor], Tensor],
    input_ids: Tensor | None = None,
    positions: Tensor | None = None,
    sources: Tensor | None = None,
    cp_group: dist.ProcessGroup | None = None,
    *,
    kd_weights: Tensor | None = None,
    lm_weights: Tensor | None = None,
    chunk_tokens: int | None = None,
    gradient_in_place: bool = False,
    diagnostics: bool = False,
    is_drawn: bool = False,
) -> Loss:
    """Compute the objective's loss, with or without materialized logits.

    Args:
        student: receives gradients.
        teacher: receives none.
        objective: what is trained.
        labels: [s, b].
        loss_mask: [s, b], by which the caller multiplies the loss before it sums; None if not known. Logit losses over
            several tokens leave out tokens of mask 0.
        shard: of the student's vocabulary.
        tp_group: the tensor-parallel group.
        megatron_cross_entropy: returns Megatron's own [s, b] from logits; it may overwrite them.
        input_ids: [s, b]; needed where the student has tokens beyond `objective.shared_vocab`.
        positions: [s], the tokens' positions in their sequences; needed for a selection by position. On the CPU, or the
            host waits for them.
        sources: [b] int64, dataset of each sequence; needed for weights by source, see `Objective.weights`.
        cp_group: the context-parallel group, over which sequences are split; None for whole sequences. Used by a
            selection by quantile.
        kd_weights: [s, b] floats, per token, by which `kd_weight` is multiplied; None for 1. They may be negative.
        lm_weights: the same of `lm_weight`.
        chunk_tokens: `Plan.chunk_tokens`, of the fused head; None materializes logits, as diagnostics do.
        gradient_in_place: as in `Execution`.
        diagnostics: as in `Execution`.
        is_drawn: whether the student drew the counted labels, which losses with `estimates` need.

    Raises:
        ConfigError: input ids are needed and missing, or labels that the student drew.
        RuntimeError: hooks were registered on the student's output layer after the plan was made.

    Collectives: those of `vocab_parallel_distillation`, twice if the student has tokens beyond the shared ones, and of
    `vocab_parallel_logit_loss` for each logit loss. With sequence parallelism and a selection by position, the
    teacher's hidden states are gathered once more. A selection by quantile: one all-gather over `cp_group`, and with
    chunks those of `teacher_entropy`.
    """
    tokens = objective.tokens
    selected = None
    if tokens is not None and tokens.by_position:
        assert positions is not None
        # On the CPU, so that the number of selected tokens is known without a synchronization. Positions of packed
        # sequences on a GPU are waited for here, once.
        selected = tokens.at(positions.cpu()).unsqueeze(-1).expand(labels.shape)
    by_models = tokens.of if tokens is not None and not (tokens.by_position or tokens.by_rank) else None
    counted = loss_mask != 0 if loss_mask is not None else None
    kd_weight, lm_weight = weights_of_terms(objective, sources, (kd_weights, lm_weights), labels)
    diagnosing = diagnostics and not torch.is_grad_enabled()
    if chunk_tokens is not None and not diagnosing:
        run_pre_forward_hooks(student.layer)
        operands = teacher.operands(tp_group)
        ranked = None
        if tokens is not None and tokens.by_rank:
            entropy = teacher_entropy(operands, labels, shard, chunk_tokens)
            ranked = tokens.ranked(entropy, counted, cp_group)
        (teacher_hidden, teacher_weight, teacher_scale), *more = operands
        total, terms = vocab_parallel_distillation_head(
            student.whole_hidden_states(tp_group),
            student.weight,
            teacher_hidden,
            teacher_weight,
            objective.effective_divergence,
            labels,
            shard,
            teacher_scale=teacher_scale,
            more_teachers=more,
            selected=selected,
            select=by_models,
            **fused_options(student, objective, (kd_weight, lm_weight), loss_mask, chunk_tokens, ranked),
        )
        if ranked is not None:
            terms = terms._replace(divergence=torch.where(ranked, terms.divergence, 0.0))
        distillation = scaled(terms.divergence, objective)
        trained = ranked if ranked is not None else _trained(objective.tokens, terms, selected)
        return Loss(total, distillation, terms, {}, trained)

    student_logits = student.logits()
    with torch.no_grad():
        if selected is None or diagnosing:  # diagnostics use all tokens
            teacher_logits = teacher.logits()
        else:
            rows = selected.reshape(-1).nonzero().squeeze(-1)
            teacher_logits = teacher.logits_of(to_device(rows, labels.device), tp_group)
    compared = shard
    if objective.shares_part_of(shard.size):
        compared = VocabShard.megatron(student.weight.shape[0], tp_group, objective.shared_vocab)

    def loss_of(student_logits: Tensor) -> Loss:
        return _loss(
            *(student_logits, teacher_logits, objective, (kd_weight, lm_weight), labels, counted),
            *(shard, compared, input_ids, selected, cp_group, gradient_in_place),
            drawn=labels if is_drawn else None,
        )

    watch_only = objective.only_watches
    with torch.set_grad_enabled(torch.is_grad_enabled() and not watch_only):
        loss = loss_of(student_logits)
    terms = loss.terms
    if diagnosing:
        accuracy, confidence = terms.metrics["top-1 accuracy"], terms.metrics["student confidence"]
        found = diagnose(
            student_logits, teacher_logits, lambda logits: loss_of(logits).total, accuracy, confidence, compared
        )
        terms = terms._replace(metrics={**terms.metrics, **found})
    if watch_only:
        # Last, because Megatron's cross entropy overwrites fp32 logits.
        terms = terms._replace(cross_entropy=megatron_cross_entropy(student_logits))
        loss = loss._replace(total=weighted(lm_weight, terms.cross_entropy))
    return loss._replace(terms=terms)


def positions_of(
    tokens: TokenSelection | None, length: int, packed: PackedSeqParams | None, group: dist.ProcessGroup | None
) -> Tensor | None:
    """Return [length], the positions of this rank's tokens in their sequences; None if not needed.

    Args:
        tokens: the selection that may need them.
        length: of this rank's part of a sequence, or of a packed row.
        packed: boundaries of packed sequences.
        group: ranks over which a sequence is split; None for whole sequences.
    """
    if tokens is None or not tokens.by_position:
        return None
    ends = None
    if packed is not None:
        ends = packed.cu_seqlens_q_padded if packed.cu_seqlens_q_padded is not None else packed.cu_seqlens_q
    rank, size = (group.rank(), group.size()) if group is not None else (0, 1)
    return positions_here(length, ends, rank, size)


def batch_first(per_token: Tensor) -> Tensor:
    """[s, b] -> contiguous [b, s], as Megatron's loss functions expect."""
    return per_token.transpose(0, 1).contiguous()


def weights_of_terms(
    objective: Objective, sources: Tensor | None, own: Sequence[Tensor | None], labels: Tensor
) -> tuple[float | Tensor, float | Tensor]:
    """Return the weights of divergence and cross entropy, numbers or [s, b], times the tokens' `own`."""

    def of_tokens(weight: float | Tensor, factor: Tensor | None) -> float | Tensor:
        if factor is not None and (isinstance(weight, Tensor) or weight != 0):
            return factor.double() * weight
        return weight.expand(labels.shape) if isinstance(weight, Tensor) else weight

    kd_weight, lm_weight = map(of_tokens, objective.weights(sources), own)
    return kd_weight, lm_weight


def _loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    objective: Objective,
    term_weights: tuple[float | Tensor, float | Tensor],
    labels: Tensor,
    counted: Tensor | None,
    shard: VocabShard,
    compared: VocabShard,
    input_ids: Tensor | None,
    selected: Tensor | None,
    cp_group: dist.ProcessGroup | None,
    gradient_in_place: bool,
    drawn: Tensor | None,
) -> Loss:
    """Compute the objective's loss from materialized logits.

    `term_weights` are those of divergence and cross entropy. `compared` is the shard of columns that both models know.
    The teacher's logits cover all tokens, or [n, V/TP] those `selected` by position.
    """
    if objective.shares_part_of(shard.size):
        read = _read(input_ids, shard, compared)
        terms = _terms_of_part(
            student_logits, teacher_logits, objective, labels, read, shard, compared, gradient_in_place
        )
        counted = read if counted is None else read & counted
    else:
        spared = selected if teacher_logits.dim() == 2 else None
        terms = _terms(student_logits, teacher_logits, objective, labels, shard, gradient_in_place, spared)
    if objective.tokens is not None and objective.tokens.by_rank:
        trained: Tensor | None = objective.tokens.ranked(terms.metrics["teacher entropy"], counted, cp_group)
    else:
        trained = _trained(objective.tokens, terms, selected)
    if trained is not None:
        terms = terms._replace(divergence=torch.where(trained, terms.divergence, 0.0))
        counted = trained if counted is None else trained & counted
    # After the divergence, so that their backward runs before its backward, which may overwrite the logits.
    logit_losses = _logit_losses(student_logits, teacher_logits, objective, compared, counted, drawn)
    weights = [weight for weight, _ in objective.logit_losses]
    parts = [weight * value for weight, value in zip(weights, logit_losses.values(), strict=True)]
    if objective.divergence is not None:
        parts.insert(0, terms.divergence)
    distillation = scaled(functools.reduce(torch.add, parts), objective)
    total = sum_of(term_weights, (distillation, terms.cross_entropy))
    return Loss(total, distillation, terms, logit_losses, trained)


def fused_options(
    student: OutputLayer,
    objective: Objective,
    term_weights: tuple[float | Tensor, float | Tensor],
    loss_mask: Tensor | None,
    chunk_tokens: int,
    distilled: Tensor | None = None,
) -> dict[str, Any]:
    """Return the arguments of a fused head that do not depend on the form of the teacher.

    Args:
        student: its output layer.
        objective: of the step.
        term_weights: see `weights_of_terms`.
        loss_mask: [s, b].
        chunk_tokens: of a chunk.
        distilled: [s, b] bool, the tokens whose divergence counts; None for all.
    """
    kd_weight, lm_weight = term_weights
    of_divergence = kd_weight * objective.distillation_scale
    return {
        "kd_weight": of_divergence if distilled is None else distilled.double() * of_divergence,
        "lm_weight": lm_weight,
        "temperature": objective.temperature,
        "token_weights": loss_mask,
        "student_scale": student.scale(),
        "chunk_tokens": chunk_tokens,
        "into_main_grad": bool(getattr(student.layer, "gradient_accumulation_fusion", False)),
    }


def scaled(divergence: Tensor, objective: Objective) -> Tensor:
    """Return the divergence times the objective's `distillation_scale`."""
    return divergence if objective.distillation_scale == 1 else divergence * objective.distillation_scale


def sum_of(term_weights: Sequence[float | Tensor], addends: Sequence[Tensor]) -> Tensor:
    """Return the weighted sum per token; a term with the number 0 as its weight is not computed."""
    pairs = zip(term_weights, addends, strict=True)
    given = [(weight, addend) for weight, addend in pairs if isinstance(weight, Tensor) or weight != 0]
    return functools.reduce(torch.add, [weighted(weight, addend) for weight, addend in given])


def _trained(tokens: TokenSelection | None, terms: DistillationTerms, by_position: Tensor | None) -> Tensor | None:
    """Return the mask of distilled tokens on their device; None for all."""
    if tokens is not None and not tokens.by_position:
        return tokens.of(terms.metrics)
    return to_device(by_position, terms.divergence.device) if by_position is not None else None


def teacher_entropy(
    operands: Sequence[tuple[Tensor, Tensor, float]], labels: Tensor, shard: VocabShard, chunk_tokens: int
) -> Tensor:
    """Return the teacher's entropy per token, [s, b] in nats, from a further pass of its output layer over all chunks.

    Args:
        operands: hidden states [s, b, H], weight and scale of each teacher.
        labels: [s, b].
        shard: of the vocabulary.
        chunk_tokens: tokens per chunk.

    Collectives: per chunk, that of `vocab_parallel_distillation`.
    """
    found = []
    hidden_states, weights, scales = zip(*operands, strict=True)
    with torch.no_grad():
        for first in range(0, labels.numel(), chunk_tokens):
            chunk = slice(first, first + chunk_tokens)
            logits = sum_of_logits([hidden.flatten(0, 1)[chunk] for hidden in hidden_states], weights, scales)
            of = labels.flatten()[chunk]
            terms = vocab_parallel_distillation(logits, logits, AlphaBeta(1.0, 0.0), of, shard)
            found.append(terms.metrics["teacher entropy"])
    return torch.cat(found).view(labels.shape)


def _logit_losses(
    student_logits: Tensor,
    teacher_logits: Tensor,
    objective: Objective,
    shard: VocabShard,
    counted: Tensor | None,
    drawn: Tensor | None,
) -> dict[str, Tensor]:
    """[s, b] each, by name."""
    found = {}
    for name, (_, loss) in zip(objective.names_of_logit_losses, objective.logit_losses, strict=True):
        together = loss.group_size > 1
        # A group's tokens belong to one sequence.
        student, teacher = (
            logits.transpose(0, 1) if together else logits for logits in (student_logits, teacher_logits)
        )
        counts, tokens = (it.transpose(0, 1) if together and it is not None else it for it in (counted, drawn))
        value = vocab_parallel_logit_loss(student, teacher, loss, shard, objective.temperature, counts, tokens)
        found[name] = value.transpose(0, 1) if together else value
    return found


def _terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    objective: Objective,
    labels: Tensor,
    shard: VocabShard,
    gradient_in_place: bool,
    selected: Tensor | None = None,
) -> DistillationTerms:
    return vocab_parallel_distillation(
        student_logits,
        teacher_logits,
        objective.effective_divergence,
        labels,
        shard,
        temperature=objective.temperature,
        gradient_in_place=gradient_in_place,
        selected=selected,
    )


def _read(input_ids: Tensor | None, shard: VocabShard, shared: VocabShard) -> Tensor:
    """Return [s, b] bool: tokens before the first one that the teacher does not know."""
    if input_ids is None:
        raise ConfigError(
            f"shared_vocab {shared.size} of the student's {shard.size} tokens needs the input ids on the last pipeline "
            "stage too; pass input_ids= to the model there"
        )
    # From the first unknown token on, teacher and student have read different text.
    return (input_ids >= shared.size).cumsum(0) == 0


def _terms_of_part(
    student_logits: Tensor,
    teacher_logits: Tensor,
    objective: Objective,
    labels: Tensor,
    read: Tensor,
    shard: VocabShard,
    shared: VocabShard,
    gradient_in_place: bool,
) -> DistillationTerms:
    """The cross entropy over the student's whole vocabulary, everything else over the part that is shared."""
    known = labels.masked_fill(labels >= shared.size, -1)
    terms = _terms(student_logits, teacher_logits, objective, known, shared, gradient_in_place)
    # A pass for the cross entropy only, so the student is compared with itself. It comes second so that its backward
    # runs first: the divergence's backward may overwrite the logits.
    whole = vocab_parallel_distillation(student_logits, student_logits, AlphaBeta(1.0, 0.0), labels, shard)
    return DistillationTerms(
        terms.divergence.masked_fill(~read, 0.0),
        whole.cross_entropy,
        {name: value.masked_fill(~read, 0.0) for name, value in terms.metrics.items()},
    )
