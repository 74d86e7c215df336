"""Losses that are not sums over the vocabulary, on logits sharded across a tensor-parallel group.

Tokens are processed in chunks. Forward computes the loss without a graph and keeps the results of the collectives, a
few numbers per token. Backward recomputes the chunk with a graph and reuses those results. So no graph and no temporary
of the logits' size outlives a chunk, except the gradient, and backward has no collective.

Legend: N tokens, n tokens of a chunk, C this rank's real columns.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from abkd_megatron.errors import ConfigError
from abkd_megatron.losses.base import LogitLoss
from abkd_megatron.losses.columns import Columns
from abkd_megatron.tensors import Function, check_context, check_tensor, constant
from abkd_megatron.validation import positive_number
from abkd_megatron.vocab_parallel.logits import check_labels, check_logits, check_shard
from abkd_megatron.vocab_parallel.passes import PendingSum, Rows, all_gather, unravel
from abkd_megatron.vocab_parallel.shard import VocabShard

# Logits per chunk on each rank: 32 MiB per fp32 temporary.
CHUNK_SIZE = 2**23


def vocab_parallel_logit_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    loss: LogitLoss,
    shard: VocabShard,
    temperature: float = 1.0,
    counted: Tensor | None = None,
    drawn: Tensor | None = None,
) -> Tensor:
    """Compute a logit loss per token, over a vocabulary sharded across the group of `shard`.

    Args:
        student_logits: [..., s, V/TP], any floating dtype, this rank's columns. If the loss depends on groups of
            tokens, s must be the tokens of one sequence.
        teacher_logits: [..., s, V/TP], the same columns; never receives a gradient.
        loss: for example AdaptiveKL().
        shard: columns of the logits; padding beyond them is ignored.
        temperature: T > 0; divides both logits. There is no factor T^2.
        counted: [..., s] bool; tokens that are not counted have loss 0, no gradient, and no influence on others, even
            if their logits are NaN. None counts all.
        drawn: [..., s] int64, the tokens that the student drew from softmax(student logits / T), for losses that
            estimate a divergence from them. An id outside the vocabulary gives a loss of 0. Others ignore it.

    Returns:
        [..., s], fp32 (fp64 if either input is), bitwise identical on every rank of the group. Once differentiable in
        the student's logits; each rank receives the gradient of its own shard. A token whose loss is weighted by 0 has
        a gradient of exactly 0.

    Raises:
        ConfigError: for shapes that differ, a dtype that is not floating, a temperature that is not finite and > 0, a
            shard wider than the logits, a `loss` that is not a LogitLoss, `counted` or `drawn` of another shape or
            dtype, or a loss that needs `drawn` and gets none.

    Collectives: forward: `loss.num_collectives` (for some losses more with fp64 logits) per chunk of about
    2^23 / (V/TP) tokens. Backward: none. A single rank has none.

    Memory: references to both logits and the collectives' results (5 to 100 fp64 numbers per token) until backward;
    about ten fp32 temporaries of a chunk's size while running; one gradient in the student's dtype.
    """
    check_context("vocab_parallel_logit_loss")
    check_logits(student_logits, teacher_logits)
    check_shard(shard)
    temperature = positive_number("the losses", "temperature", temperature, "1.0 leaves the logits as they are")
    if not isinstance(loss, LogitLoss):
        raise ConfigError(
            f"expected a LogitLoss such as AdaptiveKL(), got {loss!r}: build one, or derive a custom one from "
            "abkd_megatron.losses.LogitLoss"
        )
    shard.check_width("logits", student_logits.shape[-1])
    tokens = student_logits.shape[:-1]
    if counted is not None:
        check_tensor("counted", counted, dtype=torch.bool, like=student_logits)
        if counted.shape != tokens:
            raise ConfigError(
                f"expected counted of shape {list(tokens)}, got {list(counted.shape)}: give one bool per row of "
                "logits, such as loss_mask != 0"
            )
        counted = constant(counted)
    if loss.estimates is None:
        drawn = None
    elif drawn is None:
        raise ConfigError(
            f"{loss.name}: expected the tokens that the student drew, from which it estimates {loss.estimates}, got "
            "none: train it on the student's own text only, or take the divergence itself"
        )
    else:
        check_labels(student_logits, drawn)
        drawn = constant(drawn)
    if not tokens:  # one token
        rows = [it.unsqueeze(0) if it is not None else None for it in (counted, drawn)]
        student_logits, teacher_logits = student_logits.unsqueeze(0), teacher_logits.unsqueeze(0)
        return vocab_parallel_logit_loss(student_logits, teacher_logits, loss, shard, temperature, *rows).squeeze(0)
    result: Tensor = _LogitLoss.apply(
        student_logits.resolve_neg(), constant(teacher_logits), loss, shard, temperature, counted, drawn
    )
    return result


class _ShardColumns(Columns):
    """Columns of a shard, with cached results of the collectives for one chunk of tokens."""

    def __init__(self, shard: VocabShard, device: torch.device, drawn: Tensor | None) -> None:
        self.drawn = drawn
        self.ids = torch.arange(shard.start, shard.stop, device=device)
        self.size = shard.size
        self._shard = shard
        self._cached: list[Tensor] = []
        self._replayed: Iterator[Tensor] | None = None

    def total(self, local: Tensor) -> Tensor:
        if self._shard.num_ranks == 1:
            return local
        return PendingSum(local.reshape(1, -1), self._shard, async_op=False).result().view(local.shape)

    def gather(self, local: Tensor) -> Tensor:
        if self._shard.num_ranks == 1:
            return local.unsqueeze(0)
        every, _ = all_gather(local.reshape(1, -1), self._shard, async_op=False)
        return every.view(-1, *local.shape)

    def once(self, compute: Callable[[], Tensor]) -> Tensor:
        if self._replayed is not None:
            return next(self._replayed).detach()
        with torch.no_grad():
            self._cached.append(compute())
        return self._cached[-1].detach()

    def replay(self) -> "_ShardColumns":
        """Let `once` return the cached results again, in the same order."""
        self._replayed = iter(self._cached)
        return self


class _Chunks:
    """Both models' rows of [..., s, W] logits in chunks of the loss's groups."""

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor,
        loss: LogitLoss,
        shard: VocabShard,
        temperature: float,
        counted: Tensor | None,
    ) -> None:
        self.student, self.teacher = (Rows(logits, shard.num_columns, strided=False) for logits in (student, teacher))
        self.loss, self.shard, self.temperature = loss, shard, temperature
        self.dtype = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
        self.num_tokens = student.shape[:-1].numel()
        self.counted = counted.reshape(-1) if counted is not None else None

    def slices(self) -> list[slice]:
        """Return the chunks, identical on every rank whatever the width of its shard."""
        tokens, size = self.student.tokens, self.loss.group_size
        sequence = tokens[-1] if size > 1 and tokens else max(self.num_tokens, 1)
        width = math.ceil(self.shard.size / self.shard.num_ranks)
        step = max(CHUNK_SIZE // width // size, 1) * size
        return [
            slice(first, min(first + step, start + sequence))
            for start in range(0, self.num_tokens, max(sequence, 1))
            for first in range(start, start + sequence, step)
        ]

    def __getitem__(self, chunk: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return both models' logits [n, C], divided by the temperature, and which tokens are counted, [n]."""
        student, teacher = (rows[chunk].to(self.dtype) / self.temperature for rows in (self.student, self.teacher))
        if self.counted is None:
            return student, teacher, torch.ones(len(student), dtype=torch.bool, device=student.device)
        counted = self.counted[chunk]
        # Uncounted logits may be NaN, which must not spread.
        instead = -torch.arange(self.shard.start, self.shard.stop, device=student.device, dtype=self.dtype)
        student, teacher = (logits.where(counted.unsqueeze(-1), instead) for logits in (student, teacher))
        return student, teacher, counted


class _LogitLoss(Function):
    title = "a logit loss"

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        loss: LogitLoss,
        shard: VocabShard,
        temperature: float,
        counted: Tensor | None,
        drawn: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(student, teacher, counted)
        ctx.loss, ctx.shard, ctx.temperature = loss, shard, temperature
        chunks = _Chunks(student, teacher, loss, shard, temperature, counted)
        result = student.new_empty(chunks.num_tokens, dtype=chunks.dtype)
        ctx.columns = []
        for chunk in chunks.slices():
            columns = _ShardColumns(shard, student.device, drawn.reshape(-1)[chunk] if drawn is not None else None)
            of_student, of_teacher, counts = chunks[chunk]
            result[chunk] = loss(of_student, of_teacher, columns, counts).to(chunks.dtype).masked_fill(~counts, 0.0)
            ctx.columns.append(columns)
        return result.view(student.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, counted = ctx.saved_tensors
        loss: LogitLoss = ctx.loss
        chunks = _Chunks(student, teacher, loss, ctx.shard, ctx.temperature, counted)
        of_loss = gradients[0].reshape(-1)
        out = torch.zeros_like(student)  # in the student's own layout; padding stays 0
        tokens, width = student.shape[:-1], ctx.shard.num_columns
        for chunk, columns in zip(chunks.slices(), ctx.columns, strict=True):
            of_student, of_teacher, counts = chunks[chunk]
            weights = of_loss[chunk].masked_fill(~counts, 0.0)
            with torch.enable_grad():
                of_student.requires_grad_()
                values = loss(of_student, of_teacher, columns.replay(), counts)
                (gradient,) = torch.autograd.grad(values, of_student, weights.to(values.dtype))
            gradient = (gradient / ctx.temperature).masked_fill((weights == 0).unsqueeze(-1), 0.0)
            rows = torch.arange(chunk.start, chunk.stop, device=student.device)
            out[..., :width][unravel(rows, tokens)] = gradient.to(out.dtype)
        return out, None, None, None, None, None, None
