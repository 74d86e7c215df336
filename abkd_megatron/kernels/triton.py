"""GPU kernels in Triton. Each row is read once for the record, once for a second record, once for the gradient.

All rows are processed in one launch, and no logits are copied: temporaries are registers. Arithmetic is fp32 within
8 columns and fp64 across them. The summation order, and hence the last bits of a record, depend on the tile, which is
pinned (`kernels/tiles.py`): equal inputs give equal bits in every process on the same kind of GPU.

Every coefficient is an argument of a launch: another alpha, beta, scale, share, weight or temperature compiles nothing.
Compiled in are the parts of a sum and their kinds, which limits of alpha-beta apply and which of |alpha|, |beta|,
|alpha + beta| is largest, labels, and whether the temperature is 1.

Launches: the record takes 2 where alpha, beta >= 0 and alpha + beta > 0 in all its partial sums. The second one redoes
rows with logits that are not finite, reading them twice, and ends at once for others. Without partial sums it takes 1,
and elsewhere 1, which reads each row twice. A second record and the gradient take 1 each.

With TRITON_INTERPRET=1, set before the first import of this module, the kernels run on CPU, very slowly.

Legend: n rows, C this rank's real columns.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from abkd_megatron.errors import ConfigError, HostError
from abkd_megatron.kernels import eager
from abkd_megatron.kernels.parts import MAX_PARTS
from abkd_megatron.kernels.record import Layout
from abkd_megatron.kernels.tiles import tile
from abkd_megatron.kernels.triton_math import (
    INSTALLED,
    has_infinite_slopes,
    is_in_quadrant,
    needs_gpu,
    parts_of,
    separating_parts_of,
)
from abkd_megatron.kernels.triton_passes import (
    exact_record_kernel,
    gradient_kernel,
    record_kernel,
    second_record_kernel,
)
from abkd_megatron.losses.base import Divergence
from abkd_megatron.tensors import has_memory, is_traced


def supports(divergence: Divergence) -> bool:
    """Return whether the kernels compute this divergence: a built-in one, or a sum of at most `MAX_PARTS`."""
    return parts_of(divergence) is not None


def _check(student: Tensor, teacher: Tensor, divergence: Divergence, dtype: torch.dtype) -> None:
    if not INSTALLED:
        raise HostError(
            "the triton kernel needs Triton, which is not installed: install it (pip install triton), or choose the "
            "eager kernel"
        )
    if not supports(divergence):
        raise ConfigError(
            f"the triton kernel supports the built-in divergences and weighted sums of at most {MAX_PARTS} of them, "
            f"got {divergence!r}: choose the eager kernel"
        )
    if dtype != torch.float32:
        raise ConfigError(
            f"the triton kernel computes in torch.float32, got logits that need {dtype}: choose the eager kernel"
        )
    if not student.is_cuda and needs_gpu(record_kernel):
        raise HostError(f"the triton kernel needs logits on a GPU, got {student.device}: choose the eager kernel")
    for name, logits in (("student", student), ("teacher", teacher)):
        if not has_memory(logits) or is_traced():
            raise HostError(
                f"the triton kernel needs {name} logits with memory, got a {type(logits).__name__} on "
                f"{logits.device} without memory, or under tracing: choose the eager kernel"
            )
        if logits.stride(-1) != 1 and logits.shape[-1] > 1:
            raise ConfigError(
                f"the triton kernel needs {name} logits whose last dimension is contiguous, got strides "
                f"{logits.stride()}: pass the output layer's logits, or choose the eager kernel"
            )


@functools.cache
def _architecture(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _tile_of(kernel: str, student: Tensor, teacher: Tensor) -> dict[str, int]:
    """Return the launch options of a kernel."""
    itemsize = max(student.element_size(), teacher.element_size())
    found = tile(kernel, student.shape[1], itemsize, _architecture(student.device))
    if kernel == "gradient":
        return {"BLOCK": found.columns, "num_warps": found.warps}
    each = min(8, 16 // itemsize)  # 16 bytes, the widest access, or what fp32 arithmetic should sum at most
    return {"LANES": found.columns // each, "EACH": each, "num_warps": found.warps}


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Make `device` current, because Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def local_record(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    first_column: int,
    divergence: Divergence,
    layout: Layout,
    dtype: torch.dtype,
    rows: Tensor | None = None,
    teacher_rows: Tensor | None = None,
) -> Tensor:
    """Compute `eager.local_record` for all rows at once; any row stride. A NaN logit makes its row's sums NaN.

    With `rows`, [n] int64, it is computed for these rows of `student` and `labels`, in that order, without a copy, and
    with `teacher_rows` for these of `teacher`.

    Raises:
        ConfigError: for a divergence that it does not support (`supports`), arithmetic other than fp32, or columns that
            are not contiguous.
        HostError: without Triton, or for logits that are not on a GPU.
    """
    _check(student, teacher, divergence, dtype)
    num_rows, num_columns = student.shape if rows is None else (len(rows), student.shape[1])
    if num_rows == 0 or num_columns == 0:
        if rows is not None:
            student = teacher = student[rows]
        return eager.local_record(student, teacher, labels, first_column, divergence, layout, dtype)
    parts = separating_parts_of(divergence)
    record = torch.empty(layout.size, num_rows, dtype=torch.float64, device=student.device)
    args = (
        record,
        student,
        teacher,
        labels,
        rows,
        teacher_rows,
        student.stride(0),
        teacher.stride(0),
        labels.stride(0) if labels is not None else 0,
        num_rows,
        num_columns,
        first_column,
        1.0 / layout.temperature,
        parts.numbers,
    )
    options: dict[str, Any] = {
        "KINDS": parts.kinds,
        "HAS_LABELS": labels is not None,
        "AT_T": layout.temperature != 1.0,
        "OF_MODEL": layout.of_model,
        **_tile_of("record", student, teacher),
    }
    once = is_in_quadrant(parts)
    with on(student.device):
        if once:
            # With one part the compiler would take up to 170 for a little less arithmetic. More parts need them.
            registers = {"maxnreg": 128} if len(parts.kinds) == 1 else {}
            record_kernel[(num_rows,)](*args, **options, **registers)
        if not once or parts.kinds:
            exact_record_kernel[(num_rows,)](*args, REDO=once, **options)
    return record


def local_second_record(
    student: Tensor,
    teacher: Tensor,
    divergence: Divergence,
    temperature: float,
    dtype: torch.dtype,
    scalars: Tensor,
    value: bool,
    grad_log_q: bool,
    rows: Tensor | None = None,
    teacher_rows: Tensor | None = None,
) -> Tensor:
    """Compute `eager.local_second_record` for all rows at once; any row stride. `rows` as in `local_record`.

    Raises:
        ConfigError: as `local_record`.
        HostError: as `local_record`.
    """
    _check(student, teacher, divergence, dtype)
    num_rows, num_columns = student.shape if rows is None else (len(rows), student.shape[1])
    if num_rows == 0 or num_columns == 0:
        return torch.zeros(value + grad_log_q, num_rows, dtype=torch.float64, device=student.device)
    record = torch.empty(value + grad_log_q, num_rows, dtype=torch.float64, device=student.device)
    parts = parts_of(divergence)
    assert parts is not None
    with on(student.device):
        second_record_kernel[(num_rows,)](
            record[0] if value else None,
            record[-1] if grad_log_q else None,
            student,
            teacher,
            scalars,
            rows,
            teacher_rows,
            student.stride(0),
            teacher.stride(0),
            scalars.stride(0),
            scalars.stride(1),
            num_columns,
            1.0 / temperature,
            parts.numbers,
            KINDS=parts.kinds,
            VALUE=value,
            SLOPE=grad_log_q,
            AT_T=temperature != 1.0,
            **_tile_of("record", student, teacher),
        )
    return record


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
    rows: Tensor | None = None,
    teacher_rows: Tensor | None = None,
) -> None:
    """Compute `eager.local_gradient` for all rows at once; any row stride, also of `out`, which may be the student.

    With `rows`, [n] int64, it is computed for these rows of all arguments but `scalars` and the teacher, of which it
    takes `teacher_rows`. Other rows of `out` are left as they are.

    Raises:
        ConfigError: as `local_record`.
        HostError: as `local_record`.
    """
    _check(student, teacher, divergence, dtype)
    num_rows, num_columns = student.shape if rows is None else (len(rows), student.shape[1])
    if labels is None:
        of_cross_entropy = None
    assert of_divergence is not None or of_cross_entropy is not None
    assert out.stride(-1) == 1 or num_columns <= 1
    if num_rows == 0 or num_columns == 0:
        return
    parts = parts_of(divergence)
    assert parts is not None
    options = _tile_of("gradient", student, teacher)
    with on(student.device):
        gradient_kernel[(num_rows * -(-num_columns // options["BLOCK"]),)](
            out,
            student,
            teacher,
            labels if of_cross_entropy is not None else None,
            scalars,
            of_divergence,
            of_cross_entropy,
            rows,
            teacher_rows,
            out.stride(0),
            student.stride(0),
            teacher.stride(0),
            labels.stride(0) if labels is not None else 0,
            scalars.stride(0),
            scalars.stride(1),
            of_divergence.stride(0) if of_divergence is not None else 0,
            of_cross_entropy.stride(0) if of_cross_entropy is not None else 0,
            num_columns,
            first_column,
            1.0 / temperature,
            parts.numbers,
            KINDS=parts.kinds,
            HAS_DIVERGENCE=of_divergence is not None,
            HAS_CROSS_ENTROPY=of_cross_entropy is not None,
            AT_T=temperature != 1.0,
            EXACT=has_infinite_slopes(parts),
            **options,
        )
