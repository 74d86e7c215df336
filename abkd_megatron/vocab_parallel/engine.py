"""Divergence, cross entropy and metrics of two vocabulary-sharded distributions, without gathering a logit.

Every rank of the group holds the same tokens and its own columns of the vocabulary. Forward takes two rounds:

    1. local maxima and sums of exponentials of both models  -> one all-gather -> the global log-partitions
    2. local sums of F, h and the metrics, these known        -> one all-gather -> the per-token results

Ranks exchange fp64 records of a few numbers a token, and each merges all of them itself in the same order, so
results are equal to the bit on every rank. Backward recomputes from the saved logits: each rank knows all it
needs for the gradient on its own columns, exactly, with no collective and no factor of the group's size.

Arithmetic on logits runs over chunks of tokens, in fp32 (fp64 for fp64 logits); sums run in fp64. A maximum
and the logarithm of the sum of exponentials below it stay apart: their sum would round to a logit's
precision, and so would the log-ratio of the two models.

A token whose loss is weighted by 0 passes on a gradient of exactly 0, whatever its logits hold.

Legend: N tokens, C this rank's real columns, W the width of its logits, R ranks.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from abkd_megatron.divergences.base import Divergence, weigh
from abkd_megatron.errors import ConfigError
from abkd_megatron.vocab_parallel.shard import VocabShard

# Elements of a chunk of logits: large enough to keep a device busy, small beside the logits themselves.
CHUNK_ELEMENTS = 2**20

# torch renamed the one to the other.
_all_gather_tensor = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

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

    Returns:
        [...], fp32 (fp64 if either input is), complete over the vocabulary: the same bits on every rank of
        the group. Once differentiable, in the student's logits; each rank receives the gradient of its own
        shard.

    Raises:
        ConfigError: for shapes that differ, a dtype that is not floating, a temperature that is not finite
            and > 0, a vocab_size that does not fit the shards, or a `divergence` that is none.

    Collectives: forward: 2 all-gathers of fp64 records, 4 and 2 floats a token; backward: none; none at all
    on one rank.

    Memory: references to both logits and 6 fp64 numbers a token until backward; a few chunks of
    CHUNK_ELEMENTS elements while it runs; one gradient buffer in the student's dtype.
    """
    _check_logits(student_logits, teacher_logits, temperature)
    width = student_logits.shape[-1]
    if vocab_size is None:
        # Global ids are of no consequence without labels, so shards of unequal width need not know theirs.
        shard = VocabShard(0, width, max(width, 1), group)
    else:
        shard = VocabShard.megatron(width, group, vocab_size)
    return _apply(student_logits, teacher_logits, divergence, None, shard, temperature)[0]


def vocab_parallel_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    divergence: Divergence,
    labels: Tensor,
    shard: VocabShard,
    temperature: float = 1.0,
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

    Returns:
        DistillationTerms of [...], fp32 (fp64 if either input is), the same bits on every rank of the
        group. Once differentiable, in the student's logits; each rank receives the gradient of its own shard,
        of both terms in one buffer.

    Raises:
        ConfigError: as vocab_parallel_divergence, for labels of another shape or dtype, or a shard wider than
            the logits.

    Collectives: forward: 2 all-gathers of fp64 records, 8 (10 if T is not 1) and 5 floats a token; backward:
    none; none at all on one rank.

    Memory: as vocab_parallel_divergence, and the labels.
    """
    _check_logits(student_logits, teacher_logits, temperature)
    if labels.shape != student_logits.shape[:-1] or labels.dtype != torch.int64:
        raise ConfigError(
            f"expected labels of shape {list(student_logits.shape[:-1])} and dtype torch.int64, got "
            f"{list(labels.shape)}, {labels.dtype}: give one token id for each row of logits, in their order"
        )
    divergence_per_token, cross_entropy, metrics = _apply(
        student_logits, teacher_logits, divergence, labels, shard, temperature
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
    result: tuple[Tensor, Tensor, Tensor] = _Distillation.apply(
        student_logits, teacher_logits.detach(), labels, divergence, shard, float(temperature), needs_gradient
    )
    return result


class _Rows:
    """The rows of [..., W] logits, flattened, a chunk at a time: real columns only, contiguous, cast.

    Contiguous, so that equal logits give equal sums whatever their layouts; never a copy of more than a
    chunk.
    """

    def __init__(self, logits: Tensor, num_columns: int, dtype: torch.dtype) -> None:
        self.tokens = logits.shape[:-1]
        self.num_columns = num_columns
        self.dtype = dtype
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
        return rows[:, : self.num_columns].to(self.dtype).contiguous()


def _chunks(num_tokens: int, width: int) -> list[slice]:
    rows = max(1, CHUNK_ELEMENTS // max(width, 1))
    return [slice(first, min(first + rows, num_tokens)) for first in range(0, num_tokens, rows)]


class _Statistics(NamedTuple):
    """One model's distribution over the whole vocabulary, [N] fp64 each."""

    maximum: Tensor  # of the raw logits
    log_z: Tensor  # log sum_k exp((logit_k - maximum) / T)
    log_z_at_1: Tensor  # the same at T = 1
    target: Tensor | None = None  # the label's raw logit
    top: Tensor | None = None  # the lowest id of the maximum

    def cross_entropy(self) -> Tensor:
        assert self.target is not None
        return self.log_z_at_1 - (self.target - self.maximum)


class _View(NamedTuple):
    """The arguments of a divergence for a chunk, [n, C] each."""

    log_p: Tensor
    log_q: Tensor
    log_ratio: Tensor
    outside: Tensor  # where both models exclude the token

    def sum(self, terms: Tensor) -> Tensor:
        """Over the local columns, in fp64; the terms are overwritten where the token is outside."""
        return terms.masked_fill_(self.outside, 0.0).sum(dim=-1, dtype=torch.float64)


def _local_record(logits: Tensor, labels: Tensor | None, first_column: int, temperature: float) -> Tensor:
    """One model's part of the first round's record: [fields, n] from [n, C].

    Fields: maximum, sum of exponentials; with labels also the label's logit (-inf if another rank holds it)
    and the id of the maximum; and, if T is not 1, the sum of exponentials at T = 1.
    """
    num_rows, num_columns = logits.shape
    if num_columns == 0:  # an all-padding shard
        record = logits.new_zeros(_num_fields(labels is not None, temperature), num_rows, dtype=torch.float64)
        record[0] = -math.inf
        if labels is not None:
            record[2] = -math.inf
        return record
    maximum, argmax = logits.max(dim=-1)
    # Where every local logit is -inf the sum is 0 and any base will do, except -inf itself.
    below = logits - maximum.masked_fill(maximum == -math.inf, 0.0).unsqueeze(-1)
    fields = [maximum, _sum_exp(below if temperature == 1.0 else below / temperature)]
    if labels is not None:
        column = labels - first_column
        held = (column >= 0) & (column < num_columns)
        target = logits.gather(-1, column.clamp(0, num_columns - 1).unsqueeze(-1)).squeeze(-1)
        fields += [target.masked_fill(~held, -math.inf), argmax + first_column]
        if temperature != 1.0:
            fields.append(_sum_exp(below))
    return torch.stack([field.double() for field in fields])


def _num_fields(has_labels: bool, temperature: float) -> int:
    return 2 + has_labels * (2 + (temperature != 1.0))


def _sum_exp(logits: Tensor) -> Tensor:
    return logits.exp().sum(dim=-1, dtype=torch.float64)


def _merge(records: Tensor, has_labels: bool, temperature: float) -> _Statistics:
    """Global statistics from every rank's record, [R, fields, N]."""
    maximum = records[:, 0].amax(dim=0)
    below = records[:, 0] - maximum.masked_fill(maximum == -math.inf, 0.0)
    log_z = (records[:, 1] * (below / temperature).exp()).sum(dim=0).log()
    if not has_labels:
        return _Statistics(maximum, log_z, log_z)
    # The smallest id among the ranks that hold the maximum, whatever their order.
    top = records[:, 3].masked_fill(records[:, 0] != maximum, math.inf).amin(dim=0)
    log_z_at_1 = log_z if temperature == 1.0 else (records[:, 4] * below.exp()).sum(dim=0).log()
    return _Statistics(maximum, log_z, log_z_at_1, records[:, 2].amax(dim=0), top)


def _all_gather(record: Tensor, shard: VocabShard) -> Tensor:
    """Every rank's record, [R, ...], in rank order."""
    if shard.num_ranks == 1 or record.numel() == 0:
        return record.unsqueeze(0)
    num_fields = record.shape[:-1].numel()
    records = record.new_empty(shard.num_ranks * num_fields, record.shape[-1])
    _all_gather_tensor(records, record.view(num_fields, -1), group=shard.group)
    return records.view(shard.num_ranks, *record.shape)


def _view(
    student: Tensor,
    teacher: Tensor,
    student_statistics: tuple[Tensor, Tensor],
    teacher_statistics: tuple[Tensor, Tensor],
    temperature: float,
) -> _View:
    """Log-probabilities of [n, C] logits from each model's (maximum, log_z), [n] fp64."""
    (student_max, student_log_z), (teacher_max, teacher_log_z) = student_statistics, teacher_statistics

    def column(numbers: Tensor) -> Tensor:
        return numbers.to(student.dtype).unsqueeze(-1)

    y, x = student - column(student_max), teacher - column(teacher_max)
    if temperature != 1.0:
        y.div_(temperature)
        x.div_(temperature)
    log_ratio = (x - y).sub_(column(teacher_log_z - student_log_z))
    log_q, log_p = y.sub_(column(student_log_z)), x.sub_(column(teacher_log_z))
    return _View(log_p, log_q, log_ratio, (log_p == -math.inf) & (log_q == -math.inf))


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
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.float64 if torch.float64 in (student_logits.dtype, teacher_logits.dtype) else torch.float32
        student = _Rows(student_logits, shard.num_columns, dtype)
        teacher = _Rows(teacher_logits, shard.num_columns, dtype)
        tokens = student_logits.shape[:-1]
        num_tokens = tokens.numel()
        chunks = _chunks(num_tokens, shard.num_columns)
        has_labels = labels is not None
        flat_labels = labels.reshape(num_tokens) if labels is not None else None

        # First round: the global log-partitions.
        fields = _num_fields(has_labels, temperature)
        record = student_logits.new_empty(2, fields, num_tokens, dtype=torch.float64)
        for chunk in chunks:
            chunk_labels = flat_labels[chunk] if flat_labels is not None else None
            for model, rows in enumerate((student, teacher)):
                record[model, :, chunk] = _local_record(rows[chunk], chunk_labels, shard.start, temperature)
        records = _all_gather(record, shard)
        q = _merge(records[:, 0], has_labels, temperature)
        p = _merge(records[:, 1], has_labels, temperature)

        # Second round: the sums that need them.
        record = student_logits.new_zeros(5 if has_labels else 2, num_tokens, dtype=torch.float64)
        for chunk in chunks:
            s, t = student[chunk], teacher[chunk]
            view = _view(s, t, (q.maximum[chunk], q.log_z[chunk]), (p.maximum[chunk], p.log_z[chunk]), temperature)
            record[0, chunk] = view.sum(divergence.value(*view[:3]))
            if needs_gradient:
                record[1, chunk] = view.sum(divergence.slope(*view[:3]))
            if has_labels:
                if temperature != 1.0:
                    view = _view(
                        s,
                        t,
                        (q.maximum[chunk], q.log_z_at_1[chunk]),
                        (p.maximum[chunk], p.log_z_at_1[chunk]),
                        1.0,
                    )
                teacher_mass = view.log_p.exp()
                record[2, chunk] = view.sum(weigh(teacher_mass, view.log_ratio))
                record[3, chunk] = view.sum(weigh(teacher_mass, view.log_p))
                record[4, chunk] = view.sum(weigh(view.log_q.exp(), view.log_q))
        total = _all_gather(record, shard).sum(dim=0)

        ctx.set_materialize_grads(False)
        ctx.divergence, ctx.shard, ctx.temperature, ctx.dtype = divergence, shard, temperature, dtype
        if needs_gradient:
            scalars = torch.stack([q.maximum, q.log_z, q.log_z_at_1, p.maximum, p.log_z, total[1]])
            ctx.save_for_backward(student_logits, teacher_logits, labels, scalars)

        result = total[0].to(dtype).view(tokens)
        if not has_labels:
            cross_entropy, metrics = result.new_empty(0), result.new_empty(0)
            ctx.mark_non_differentiable(cross_entropy, metrics)
            return result, cross_entropy, metrics
        assert flat_labels is not None and p.top is not None and q.top is not None
        agreement = (p.top == q.top) & p.top.isfinite()
        ignored = flat_labels < 0
        cross_entropies = [side.cross_entropy().masked_fill_(ignored, 0.0) for side in (p, q)]
        metrics = torch.stack([cross_entropies[0], total[2], -total[3], -total[4], agreement.double()])
        metrics = metrics.to(dtype).view(len(METRICS), *tokens)
        ctx.mark_non_differentiable(metrics)
        return result, cross_entropies[1].to(dtype).view(tokens), metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        of_divergence, of_cross_entropy, _ = gradients
        nothing = (None,) * 6
        if of_divergence is None and of_cross_entropy is None:
            return None, *nothing
        student_logits, teacher_logits, labels, scalars = ctx.saved_tensors
        shard, temperature, dtype = ctx.shard, ctx.temperature, ctx.dtype
        student = _Rows(student_logits, shard.num_columns, dtype)
        teacher = _Rows(teacher_logits, shard.num_columns, dtype)
        num_tokens = student.tokens.numel()
        width = student_logits.shape[-1]

        def per_token(numbers: Tensor) -> Tensor:
            return numbers.reshape(num_tokens, 1).to(dtype)

        out = torch.empty(student_logits.shape, dtype=student_logits.dtype, device=student_logits.device)
        out_rows = out.view(num_tokens, width)
        out_rows[:, shard.num_columns :] = 0.0  # padding
        for chunk in _chunks(num_tokens, shard.num_columns):
            q_max, q_log_z, q_log_z_at_1, p_max, p_log_z, slope_sum = scalars[:, chunk]
            s = student[chunk]
            gradient, q = None, None
            if of_divergence is not None:
                view = _view(s, teacher[chunk], (q_max, q_log_z), (p_max, p_log_z), temperature)
                gradient = ctx.divergence.slope(*view[:3]).masked_fill_(view.outside, 0.0)
                q = view.log_q.exp_()
                gradient.sub_(q * slope_sum.to(dtype).unsqueeze(-1))
                gradient = weigh(per_token(of_divergence)[chunk] / temperature, gradient)
            if of_cross_entropy is not None:
                if q is None or temperature != 1.0:
                    q = s - q_max.to(dtype).unsqueeze(-1)
                    q.sub_(q_log_z_at_1.to(dtype).unsqueeze(-1)).exp_()
                column = labels.reshape(num_tokens, 1)[chunk] - shard.start
                held = (column >= 0) & (column < shard.num_columns)
                if shard.num_columns:
                    q.scatter_add_(-1, column.clamp(0, shard.num_columns - 1), -held.to(dtype))
                weight = per_token(of_cross_entropy)[chunk].masked_fill(column + shard.start < 0, 0.0)
                q = weigh(weight, q)
                gradient = q if gradient is None else gradient.add_(q)
            assert gradient is not None
            out_rows[chunk, : shard.num_columns] = gradient
        return out, *nothing
