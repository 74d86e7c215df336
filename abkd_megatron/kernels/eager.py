"""The passes over a chunk of logits in plain PyTorch.

Legend: n tokens of a chunk, C this rank's real columns.
"""

import math

import torch
from torch import Tensor

from abkd_megatron.kernels.record import Layout, base, total, view
from abkd_megatron.losses.base import Divergence, weigh


def local_record(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    first_column: int,
    divergence: Divergence,
    layout: Layout,
    dtype: torch.dtype,
) -> Tensor:
    """Compute this rank's record of a chunk.

    Args:
        student: [n, C], any floating dtype.
        teacher: [n, C].
        labels: [n] global ids, or None.
        first_column: global id of column 0.
        divergence: supplies the partial sums.
        layout: of the record.
        dtype: of the arithmetic.

    Returns:
        [fields, n] fp64, in the order of `layout`.
    """
    student, teacher = student.to(dtype), teacher.to(dtype)
    num_rows, num_columns = student.shape
    if num_columns == 0:  # an all-padding shard
        record = student.new_zeros(layout.size, num_rows, dtype=torch.float64)
        for model in (layout.student, layout.teacher):
            record[model.start : model.stop : 2][:2] = -math.inf  # the maximum and, with labels, the target
        return record
    q_max, q_top = _maximum(student, layout.has_labels)
    p_max, p_top = _maximum(teacher, layout.has_labels)
    bases = (base(q_max), None), (base(p_max), None)
    local = view(student, teacher, *bases, layout.temperature)
    sums = [local.sum(terms) for terms in divergence.partial_sums(*local[:3])]
    p, q = local.log_p.exp(), local.log_q.exp()
    if not layout.has_labels:
        return torch.stack([q_max.double(), total(q), p_max.double(), total(p), *sums])
    q_sums, p_sums = [total(q)], [total(p)]
    if layout.temperature != 1.0:
        local = view(student, teacher, *bases, 1.0)
        p, q = local.log_p.exp(), local.log_q.exp()
        q_sums.append(total(q))
        p_sums.append(total(p))
    assert labels is not None
    column = labels - first_column
    fields = []
    for logits, maximum, top, of_model in ((student, q_max, q_top, q_sums), (teacher, p_max, p_top, p_sums)):
        target = logits.gather(-1, column.clamp(0, num_columns - 1).unsqueeze(-1)).squeeze(-1)
        target = target.masked_fill((column < 0) | (column >= num_columns), -math.inf)
        fields += [maximum.double(), of_model[0], target.double(), top.double() + first_column, *of_model[1:]]
    fields += sums
    fields += [local.sum(weigh(p, local.log_ratio)), local.sum(weigh(p, local.log_p)), local.sum(weigh(q, local.log_q))]
    return torch.stack(fields)


def _maximum(logits: Tensor, position: bool) -> tuple[Tensor, Tensor]:
    # argmax costs more than the maximum, and only the metrics need it.
    if not position:
        maximum = logits.amax(dim=-1)
        return maximum, maximum
    maximum, top = logits.max(dim=-1)
    return maximum, top


def local_second_record(
    student: Tensor,
    teacher: Tensor,
    divergence: Divergence,
    temperature: float,
    dtype: torch.dtype,
    scalars: Tensor,
    value: bool,
    grad_log_q: bool,
) -> Tensor:
    """Compute this rank's sums of a chunk for a divergence that does not separate.

    Args:
        student: [n, C], any floating dtype.
        teacher: [n, C].
        divergence: supplies F and h.
        temperature: T.
        dtype: of the arithmetic.
        scalars: [4, n] fp64 over the whole vocabulary: the student's maximum and log_z, the teacher's maximum and
            log_z.
        value: return sum F.
        grad_log_q: return sum h.

    Returns:
        [1 or 2, n] fp64: the requested ones of (sum F, sum h).
    """
    if student.shape[-1] == 0:
        return scalars.new_zeros(value + grad_log_q, student.shape[0])
    q_max, q_log_z, p_max, p_log_z = scalars
    whole = view(student.to(dtype), teacher.to(dtype), (q_max, q_log_z), (p_max, p_log_z), temperature)
    asked = [divergence.value] * value + [divergence.grad_log_q] * grad_log_q
    return torch.stack([whole.sum(function(*whole[:3])) for function in asked])


def local_gradient(
    out: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    first_column: int,
    divergence: Divergence,
    temperature: float,
    dtype: torch.dtype,
    scalars: Tensor,
    of_divergence: Tensor | None,
    of_cross_entropy: Tensor | None,
) -> None:
    """Write the gradient with respect to a chunk's student logits into `out`.

        of_divergence (h_j - q_j H) / T + of_cross_entropy (q_j at T = 1 - [j = label])

    Args:
        out: [n, C], the student's dtype.
        student: [n, C], any floating dtype.
        teacher: [n, C].
        labels: [n] global ids, or None without cross entropy; negative labels are ignored.
        first_column: global id of column 0.
        divergence: supplies h.
        temperature: T.
        dtype: of the arithmetic.
        scalars: [6, n] fp64: the student's maximum, log_z and log_z at T = 1, the teacher's maximum and log_z, and H.
        of_divergence: [n], gradient of the loss with respect to the divergence; None for 0.
        of_cross_entropy: [n], gradient of the loss with respect to the cross entropy; None for 0.
    """
    q_max, q_log_z, q_log_z_at_1, p_max, p_log_z, slope_sum = scalars
    student = student.to(dtype)
    gradient, q = None, None
    if of_divergence is not None:
        whole = view(student, teacher.to(dtype), (q_max, q_log_z), (p_max, p_log_z), temperature)
        gradient = divergence.grad_log_q(*whole[:3]).masked_fill(whole.outside, 0.0)
        q = whole.log_q.exp()
        gradient = gradient - q * slope_sum.to(dtype).unsqueeze(-1)
        gradient = weigh((of_divergence.to(dtype) / temperature).unsqueeze(-1), gradient)
    if of_cross_entropy is not None and labels is not None:
        if q is None or temperature != 1.0:
            q = student - q_max.to(dtype).unsqueeze(-1)
            q = (q - q_log_z_at_1.to(dtype).unsqueeze(-1)).exp()
        columns = torch.arange(student.shape[-1], device=student.device)
        q = q - (columns == (labels - first_column).unsqueeze(-1)).to(dtype)
        weight = of_cross_entropy.to(dtype).masked_fill(labels < 0, 0.0)
        q = weigh(weight.unsqueeze(-1), q)
        gradient = q if gradient is None else gradient + q
    assert gradient is not None
    out.copy_(gradient)
