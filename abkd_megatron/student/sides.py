"""The teacher's side of a micro-batch, in each of its forms, and the loss of each.

Legend: s sequence, b micro-batch.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from abkd_megatron.losses.objective import Objective
from abkd_megatron.student.cached import CachedBatch, compute_cached_loss
from abkd_megatron.student.chunked import ChunkedBatch, Sums, compute_chunked_loss
from abkd_megatron.student.head import Loss, batch_first, compute_loss
from abkd_megatron.student.partly_cached import PartlyCachedBatch, compute_partly_cached_loss
from abkd_megatron.student.report import CACHED
from abkd_megatron.teacher.output_layer import OutputLayer, TeacherOutput

type TeacherSide = TeacherOutput | CachedBatch | PartlyCachedBatch | ChunkedBatch


def compute_loss_of(
    student: OutputLayer,
    side: TeacherSide,
    objective: Objective,
    of_tokens: Mapping[str, Any],
    *,
    input_ids: Tensor | None,
    diagnostics: bool,
    is_drawn: bool,
) -> tuple[Loss, Sums]:
    """Compute the objective's loss from the teacher's side, and what is logged of it with numbers of its own.

    Args:
        student: receives gradients.
        side: of the teacher.
        objective: what is trained.
        of_tokens: arguments of `compute_loss` by name that all forms have.
        input_ids: see `compute_loss`, of which only live teachers need it, like all that follow.
        diagnostics: see there.
        is_drawn: see there.
    """
    if isinstance(side, ChunkedBatch):
        return compute_chunked_loss(student, side, objective, of_tokens)
    if isinstance(side, CachedBatch):
        return compute_cached_loss(student, side, objective, **of_tokens), {}
    if isinstance(side, PartlyCachedBatch):
        return compute_partly_cached_loss(student, side, objective, **of_tokens), {}
    live: dict[str, Any] = {"input_ids": input_ids, "diagnostics": diagnostics, "is_drawn": is_drawn}
    return compute_loss(student, side, objective, **of_tokens, **live), {}


def numbers_of(loss: Loss, side: TeacherSide, objective: Objective, labels: Tensor) -> dict[str, Tensor]:
    """Return what is logged per token, [b, s], by name.

    Args:
        loss: of the micro-batch.
        side: of the teacher.
        objective: of the step.
        labels: [s, b].
    """
    found = {name: batch_first(value) for name, value in loss.numbers(objective).items()}
    cached: Tensor | None = None
    if isinstance(side, CachedBatch):
        cached = side.cached
    elif isinstance(side, PartlyCachedBatch):
        cached = side.has_record(labels)
    return found if cached is None else {**found, CACHED: batch_first(cached).float()}
