"""The passes over a chunk of logits in plain PyTorch; also what `compiled` compiles.

Legend: n tokens of a chunk, C this rank's real columns.
"""

import math

import torch
from torch import Tensor

from abkd_megatron.divergences.base import Divergence, weigh
from abkd_megatron.kernels.record import Layout, Model, total, view


def local_record(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    first_column: int,
    divergence: Divergence,
    layout: Layout,
    dtype: torch.dtype,
) -> Tensor:
    """One rank's record of a chunk.

    Args:
        student: [n, C], any floating dtype.
        teacher: [n, C].
        labels: [n] global ids, or None.
        first_column: global id of column 0.
        divergence: gives the sums.
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
    fields = _of_model(student, labels, first_column, layout.temperature)
    fields += _of_model(teacher, labels, first_column, layout.temperature)
    q, p = Model.of(fields[layout.student], layout), Model.of(fields[layout.teacher], layout)
    local = None
    if divergence.num_sums:
        local = view(student, teacher, q.reference(dtype), p.reference(dtype), layout.temperature)
        fields += [local.sum(terms) for terms in divergence.sums(*local[:3])]
    if layout.has_labels:
        if local is None or layout.temperature != 1.0:
            local = view(student, teacher, q.reference(dtype, at_1=True), p.reference(dtype, at_1=True), 1.0)
        p_mass, q_mass = local.log_p.exp(), local.log_q.exp()
        fields += [local.sum(weigh(p_mass, local.log_ratio)), local.sum(weigh(p_mass, local.log_p))]
        fields.append(local.sum(weigh(q_mass, local.log_q)))
    return torch.stack(fields)


def _of_model(logits: Tensor, labels: Tensor | None, first_column: int, temperature: float) -> list[Tensor]:
    # The position costs more than the maximum, and only the metrics ask for it.
    maximum, argmax = logits.max(dim=-1) if labels is not None else (logits.amax(dim=-1), None)
    # Where every local logit is -inf the sum is 0 and any base will do, except -inf itself.
    below = logits - maximum.masked_fill(maximum == -math.inf, 0.0).unsqueeze(-1)
    fields = [maximum.double(), _sum_exp(below if temperature == 1.0 else below / temperature)]
    if labels is not None and argmax is not None:
        column = labels - first_column
        held = (column >= 0) & (column < logits.shape[-1])
        target = logits.gather(-1, column.clamp(0, logits.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
        fields += [target.masked_fill(~held, -math.inf).double(), (argmax + first_column).double()]
        if temperature != 1.0:
            fields.append(_sum_exp(below))
    return fields


def _sum_exp(logits: Tensor) -> Tensor:
    return total(logits.exp())


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
    """Write the gradient of a chunk's student logits into `out`.

        of_divergence (h_j - q_j H) / T + of_cross_entropy (q_j at T = 1 - [j = label])

    Args:
        out: [n, C], the student's dtype.
        student: [n, C], any floating dtype.
        teacher: [n, C].
        labels: [n] global ids, or None without a cross entropy; negative ones are ignored.
        first_column: global id of column 0.
        divergence: gives h.
        temperature: T.
        dtype: of the arithmetic.
        scalars: [6, n] fp64: the student's maximum, log_z and log_z at T = 1, the teacher's maximum and log_z, and H.
        of_divergence: [n], the gradient of the loss in the divergence; None for 0.
        of_cross_entropy: [n], likewise.
    """
    q_max, q_log_z, q_log_z_at_1, p_max, p_log_z, slope_sum = scalars
    student = student.to(dtype)
    gradient, q = None, None
    if of_divergence is not None:
        whole = view(student, teacher.to(dtype), (q_max, q_log_z), (p_max, p_log_z), temperature)
        gradient = divergence.slope(*whole[:3]).masked_fill(whole.outside, 0.0)
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
