"""GPU kernel in Triton. Each row is read twice for the record and once for the gradient.

All rows are processed at once, and no logits are copied: temporaries are registers. Arithmetic is fp32 within a tile of
columns and fp64 across tiles. The summation order, and hence the last bits of a record, depend on the tile; `merge`
still gives all ranks the same result. Tiles are autotuned at the first launch and may differ between processes. They
are fixed under torch's deterministic algorithms, or by `use_tiles`.

With TRITON_INTERPRET=1, set before the first import of this module, the kernels run on CPU, very slowly.

Legend: n rows, C this rank's real columns.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from abkd_megatron.errors import ConfigError, HostError
from abkd_megatron.kernels import eager
from abkd_megatron.kernels.record import Layout
from abkd_megatron.losses.alpha_beta import SERIES_BELOW, SERIES_TERMS, AlphaBeta, series
from abkd_megatron.losses.base import Divergence, coefficient
from abkd_megatron.losses.todi import ToDi
from abkd_megatron.tensors import has_memory, is_traced

try:
    import triton  # type: ignore[import-untyped]
    import triton.language as tl  # type: ignore[import-untyped]
except ImportError:  # reported when a kernel is called

    class tl:  # type: ignore[no-redef]
        """Stand-in for the kernels' annotations."""

        constexpr = None

    triton = None


def _jit(function: Callable) -> Any:
    return function if triton is None else triton.jit(function)


Tiles = dict[str, int]
"""Tile sizes of a kernel by parameter name, and num_warps."""

# Launch options by kernel; the first is used where autotuning is disabled.
_choices: dict[str, list[Tiles]] = {}
_kernels: dict[str, Any] = {}
_set: dict[str, Tiles] = {}


def tiles(num_columns: int, dtype: torch.dtype) -> dict[str, Tiles | None]:
    """Return the tiles of each kernel for student logits [n, num_columns] of this dtype, by the kernel's name.

    Set by `use_tiles`, fixed under torch's deterministic algorithms, or autotuned at the first launch; None before.
    """
    return {name: _tiles_of(name, num_columns, dtype) or _found(name, num_columns, dtype) for name in _choices}


def use_tiles(chosen: Mapping[str, Tiles | None]) -> dict[str, Tiles]:
    """Set the tiles of later launches in this process; return the previous setting.

    Args:
        chosen: result of `tiles`, possibly from another process; kernels that are missing or None are not set.

    Raises:
        ConfigError: for an unknown kernel or tiles that it does not have.
    """
    global _set
    given = {name: dict(of) for name, of in chosen.items() if of is not None}
    for name, of in given.items():
        if of not in _choices.get(name, []):
            raise ConfigError(f"expected tiles of {_choices}, got {name}: {of}; pass the result of tiles()")
    before, _set = _set, given
    return before


def _tiles_of(name: str, num_columns: int, dtype: torch.dtype) -> Tiles | None:
    """Return the tiles of a kernel, or None if autotuning decides."""
    if name in _set:
        return _set[name]
    return _fixed(name, num_columns, dtype) if torch.are_deterministic_algorithms_enabled() else None


def _fixed(name: str, num_columns: int, dtype: torch.dtype) -> Tiles:
    """Return the tiles for deterministic runs; one choice for all widths and dtypes until measured on a GPU."""
    return _choices[name][0]


def _found(name: str, num_columns: int, dtype: torch.dtype) -> Tiles | None:
    """Return the autotuned tiles, or None before tuning."""
    if triton is None:
        return None
    tuner = _kernels[name]
    found = [config for key, config in tuner.cache.items() if key[0] == num_columns and str(dtype) in key]
    found += tuner.configs if len(tuner.configs) == 1 else []
    return {tile: found[0].all_kwargs()[tile] for tile in _choices[name][0]} if found else None


def _launch(name: str, grid: Any, num_columns: int, dtype: torch.dtype, *args: Any, **constants: Any) -> None:
    kernel, chosen = _kernels[name], _tiles_of(name, num_columns, dtype)
    if chosen is None:
        kernel[grid](*args, **constants)
    else:
        kernel.fn[grid](*args, **constants, **chosen)


def _tuned(name: str, *choices: tuple[dict[str, int], int]) -> Callable:
    """Autotune a kernel's tiles and warps over `choices`; the interpreter uses the first."""

    def tune(kernel: Any) -> Any:
        _choices[name] = [{**of, "num_warps": warps} for of, warps in choices]
        _kernels[name] = made = autotuned(kernel)
        return made

    def autotuned(kernel: Any) -> Any:
        if triton is None:
            return kernel
        tried = choices if isinstance(kernel, triton.JITFunction) else choices[:1]
        configs = [triton.Config(dict(tiles), num_warps=warps) for tiles, warps in tried]
        return triton.autotune(configs, key=["num_columns"])(kernel)

    return tune


# No contraction: for two equal models (x - m) * t - (y - m) * t must be 0; fused it is a rounding error. Kernels use
# tl.fma where fusing is safe. Passed at each launch, because Triton announced a change of its default.
_FUSION = False


# Signatures for which the gradient kernel has been tuned.
_tuned_gradients: set[tuple] = set()

# A divergence's coefficients are compile-time constants, which removes branches. For alpha-beta: alpha, beta, lam,
# spread, which of |beta|, |lam|, |alpha| is the spread, the bound of the series, its 8 terms.
_Part = tuple[float, ...]


def _part(divergence: AlphaBeta) -> _Part:
    dtype = torch.float32
    alpha, beta = coefficient(divergence.alpha, dtype), coefficient(divergence.beta, dtype)
    lam = coefficient(divergence.alpha + divergence.beta, dtype)
    spread = max(abs(alpha), abs(beta), abs(lam))
    if spread == 0.0:
        return alpha, beta, lam, spread
    widest = [abs(beta), abs(lam), abs(alpha)].index(spread)
    return alpha, beta, lam, spread, widest, SERIES_BELOW, *series(alpha / spread, lam / spread, SERIES_TERMS[dtype])


def _check(student: Tensor, teacher: Tensor, divergence: Divergence, dtype: torch.dtype) -> None:
    if triton is None:
        raise HostError(
            "the triton kernel needs Triton, which is not installed: install it (pip install triton), or choose the "
            "eager kernel"
        )
    if type(divergence) not in (AlphaBeta, ToDi):
        raise ConfigError(f"the triton kernel supports AlphaBeta and ToDi, got {divergence!r}: choose the eager kernel")
    if dtype != torch.float32:
        raise ConfigError(
            f"the triton kernel computes in torch.float32, got logits that need {dtype}: choose the eager kernel"
        )
    if not student.is_cuda and isinstance(_record_kernel.fn, triton.JITFunction):
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


def _on(device: torch.device) -> contextlib.AbstractContextManager:
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
) -> Tensor:
    """Compute `eager.local_record` for all rows at once; any row stride. A NaN logit makes its row's sums NaN.

    Raises:
        ConfigError: for a divergence other than AlphaBeta and ToDi, arithmetic other than fp32, or columns that are
            not contiguous.
        HostError: without Triton, or for logits that are not on a GPU.
    """
    _check(student, teacher, divergence, dtype)
    num_rows, num_columns = student.shape
    if num_rows == 0 or num_columns == 0:
        return eager.local_record(student, teacher, labels, first_column, divergence, layout, dtype)
    parts: tuple[_Part, ...] = ()
    if isinstance(divergence, AlphaBeta):
        parts = (_part(divergence),)
    elif divergence.num_partial_sums:  # as forward and reverse KL
        parts = (_part(AlphaBeta(1.0, 0.0)), _part(AlphaBeta(0.0, 1.0)))
    record = torch.empty(layout.size, num_rows, dtype=torch.float64, device=student.device)
    with _on(student.device):
        _launch(
            "record",
            (num_rows,),
            num_columns,
            student.dtype,
            record,
            student,
            teacher,
            labels,
            student.stride(0),
            teacher.stride(0),
            labels.stride(0) if labels is not None else 0,
            num_rows,
            num_columns,
            first_column,
            1.0 / layout.temperature,
            HAS_LABELS=labels is not None,
            AT_T=layout.temperature != 1.0,
            OF_MODEL=layout.of_model,
            PART=parts[0] if parts else (),
            SECOND_PART=parts[1] if len(parts) > 1 else (),
            NUM_PARTS=len(parts),
            enable_fp_fusion=_FUSION,
        )
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
) -> Tensor:
    """Compute `eager.local_second_record` for all rows at once; any row stride.

    Raises:
        ConfigError: for a divergence other than ToDi, and as `local_record`.
        HostError: as `local_record`.
    """
    _check(student, teacher, divergence, dtype)
    assert isinstance(divergence, ToDi)  # alpha-beta separates
    num_rows, num_columns = student.shape
    record = torch.zeros(value + grad_log_q, num_rows, dtype=torch.float64, device=student.device)
    if num_rows == 0 or num_columns == 0:
        return record
    with _on(student.device):
        _launch(
            "second record",
            (num_rows,),
            num_columns,
            student.dtype,
            record[0] if value else None,
            record[-1] if grad_log_q else None,
            student,
            teacher,
            scalars,
            student.stride(0),
            teacher.stride(0),
            scalars.stride(0),
            scalars.stride(1),
            num_columns,
            1.0 / temperature,
            VALUE=value,
            SLOPE=grad_log_q,
            AT_T=temperature != 1.0,
            SCALE=coefficient(divergence.scale, dtype),
            DETACH=divergence.detach,
            enable_fp_fusion=_FUSION,
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
) -> None:
    """Compute `eager.local_gradient` for all rows at once; any row stride, also of `out`.

    `out` may be the student. It is then tuned on a copy, because tuning writes it several times.

    Raises:
        ConfigError: as `local_record`.
        HostError: as `local_record`.
    """
    _check(student, teacher, divergence, dtype)
    num_rows, num_columns = student.shape
    if labels is None:
        of_cross_entropy = None
    assert of_divergence is not None or of_cross_entropy is not None
    assert out.stride(-1) == 1 or num_columns <= 1
    if num_rows == 0 or num_columns == 0:
        return
    tuned = num_columns, out.dtype, teacher.dtype, labels is None, of_divergence is None, of_cross_entropy is None
    is_chosen = _tiles_of("gradient", num_columns, student.dtype) is not None
    if out.data_ptr() == student.data_ptr() and not is_chosen and tuned not in _tuned_gradients:
        few = slice(0, 64)
        local_gradient(
            torch.empty_like(out[few]),
            student[few],
            teacher[few],
            labels[few] if labels is not None else None,
            first_column,
            divergence,
            temperature,
            dtype,
            scalars[:, few],
            of_divergence[few] if of_divergence is not None else None,
            of_cross_entropy[few] if of_cross_entropy is not None else None,
        )
    if not is_chosen:
        _tuned_gradients.add(tuned)
    todi = isinstance(divergence, ToDi)

    def grid(choice: dict[str, int]) -> tuple[int]:
        return (num_rows * triton.cdiv(num_columns, choice["BLOCK"]),)

    with _on(student.device):
        _launch(
            "gradient",
            grid,
            num_columns,
            student.dtype,
            out,
            student,
            teacher,
            labels if of_cross_entropy is not None else None,
            scalars,
            of_divergence,
            of_cross_entropy,
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
            HAS_DIVERGENCE=of_divergence is not None,
            HAS_CROSS_ENTROPY=of_cross_entropy is not None,
            AT_T=temperature != 1.0,
            TODI=todi,
            PART=() if todi else _part(divergence),  # type: ignore[arg-type]
            SCALE=coefficient(divergence.scale, dtype) if isinstance(divergence, ToDi) else 0.0,
            DETACH=divergence.detach if isinstance(divergence, ToDi) else True,
            enable_fp_fusion=_FUSION,
        )


@_jit
def _weigh(mass, amount):
    """Return mass * amount with 0 * inf = 0."""
    return tl.where(mass == 0.0, 0.0, mass * amount)


@_jit
def _expm1(x):
    """Return exp(x) - 1 for |x| < 1, which Triton lacks.

    The remainder of the Taylor polynomial of degree 10 is below half a unit in the last place.
    """
    total = tl.fma(x, 1.0 / 3628800.0, 1.0 / 362880.0)
    total = tl.fma(total, x, 1.0 / 40320.0)
    total = tl.fma(total, x, 1.0 / 5040.0)
    total = tl.fma(total, x, 1.0 / 720.0)
    total = tl.fma(total, x, 1.0 / 120.0)
    total = tl.fma(total, x, 1.0 / 24.0)
    total = tl.fma(total, x, 1.0 / 6.0)
    total = tl.fma(total, x, 0.5)
    return tl.fma(total * x, x, x)


@_jit
def _exponent(A: tl.constexpr, log_p, B: tl.constexpr, log_q):
    """Return A log p + B log q without terms of coefficient 0, which would give 0 * -inf."""
    if A == 0.0:
        return log_q * B if B != 0.0 else tl.zeros_like(log_q)
    else:
        return log_p * A if B == 0.0 else tl.fma(log_q, B, log_p * A)


@_jit
def _difference(start, high, GAP: tl.constexpr, log_ratio):
    """Return (exp(high) - start) / GAP, where exp(high) = start * exp(GAP * log_ratio); start * log_ratio at GAP 0."""
    if GAP == 0.0:
        return _weigh(start, log_ratio)
    else:
        rise = log_ratio * GAP
        far = tl.exp(high) - start
        near = _expm1(rise) * start
        return tl.where(tl.abs(rise) < 1.0, near, far) * (1.0 / GAP)


@_jit
def _alpha_beta_slope(log_p, log_q, log_ratio, PART: tl.constexpr):
    """Compute `AlphaBeta.grad_log_q`."""
    at_zero = tl.exp(_exponent(0.0, log_p, PART[2], log_q))
    at_alpha = _exponent(PART[0], log_p, PART[1], log_q)
    return -_difference(at_zero, at_alpha, PART[0], log_ratio)


@_jit
def _alpha_beta_sums(log_p, log_q, log_ratio, PART: tl.constexpr):
    """Compute `AlphaBeta.partial_sums`: q^lam, h, F."""
    A: tl.constexpr = PART[0]
    B: tl.constexpr = PART[1]
    LAM: tl.constexpr = PART[2]
    SPREAD: tl.constexpr = PART[3]
    at_zero = tl.exp(_exponent(0.0, log_p, LAM, log_q))
    at_alpha = _exponent(A, log_p, B, log_q)
    rise = _difference(at_zero, at_alpha, A, log_ratio)
    if SPREAD == 0.0:
        return at_zero, -rise, log_ratio * log_ratio * 0.5
    else:
        at_lam = _exponent(LAM, log_p, 0.0, log_q)
        # Dividing by the widest gap between two nodes cancels least.
        if PART[4] == 0:
            far = (_difference(at_zero, at_lam, LAM, log_ratio) - rise) * (1.0 / B)
        elif PART[4] == 1:
            far = (_difference(tl.exp(at_alpha), at_lam, B, log_ratio) - rise) * (1.0 / LAM)
        else:
            far = _difference(tl.exp(at_alpha), at_lam, B, log_ratio)
            far = (far - _difference(at_zero, at_lam, LAM, log_ratio)) * (1.0 / A)
        scaled = log_ratio * SPREAD
        near = tl.fma(scaled, PART[13], PART[12])
        for term in tl.static_range(6):
            near = tl.fma(near, scaled, PART[11 - term])
        near = near * log_ratio * log_ratio * at_zero
        return at_zero, -rise, tl.where(tl.abs(scaled) < PART[5], near, far)


@_jit
def _todi(log_p, log_q, log_ratio, SCALE: tl.constexpr, DETACH: tl.constexpr):
    """Compute `ToDi.value` and `ToDi.grad_log_q`."""
    w = tl.full(log_ratio.shape, 0.5, tl.float32)
    if SCALE != 0.0:
        w = tl.sigmoid(log_ratio * SCALE)
    p = tl.exp(log_p)
    reverse = (1.0 - w) * tl.exp(log_q)
    rise = log_ratio * (1.0 + SCALE)
    excess = tl.where(tl.abs(rise) < 1.0, _expm1(rise) * reverse, w * p - reverse)
    slope = -excess - _weigh(reverse, log_ratio)
    if SCALE != 0.0 and not DETACH:
        slope -= _weigh((p * (1.0 - w) + reverse) * w, log_ratio) * SCALE
    return _weigh(excess, log_ratio), slope


@_jit
def _view(student, teacher, q_max, q_log, p_max, p_log, log_shift, inverse_temperature, AT_T: tl.constexpr):
    """Compute `record.view`: log p, log q, log p/q and where both models are -inf."""
    y = student - q_max
    x = teacher - p_max
    if AT_T:
        y = y * inverse_temperature
        x = x * inverse_temperature
    log_ratio = (x - y) - log_shift
    log_q = y - q_log
    log_p = x - p_log
    outside = (log_p == -float("inf")) & (log_q == -float("inf"))
    return log_p, log_q, log_ratio, outside


@_jit
def _add(total, terms, outside):
    """Add a tile's terms, summed in fp32, to `total` in fp64."""
    return total + tl.sum(tl.where(outside, 0.0, terms), axis=0).to(tl.float64)


@_jit
def _extend(logits, first, maximum, top, HAS_LABELS: tl.constexpr):
    """Update the maximum and its column with a tile."""
    tile_maximum = tl.max(logits, axis=0)
    # A branch, because after the first tiles the maximum rarely changes, and argmax is another reduction.
    if tile_maximum > maximum:
        if HAS_LABELS:
            top = first + tl.argmax(logits, axis=0, tie_break_left=True)
        maximum = tile_maximum
    return maximum, top


@_jit
def _store_model(
    field,
    num_rows,
    logits,
    label_column,
    num_columns,
    first_column,
    maximum,
    sum_exp,
    sum_exp_at_1,
    top,
    HAS_LABELS: tl.constexpr,
    AT_T: tl.constexpr,
):
    """Write a model's fields, in the order of `Layout`."""
    # tl.max ignores NaN, eager's maximum does not. The sum is NaN only if a logit is NaN or the maximum is inf.
    maximum = tl.where((sum_exp != sum_exp) & (maximum != float("inf")), float("nan"), maximum)
    tl.store(field, maximum.to(tl.float64))
    tl.store(field + num_rows, sum_exp)
    if HAS_LABELS:
        held = (label_column >= 0) & (label_column < num_columns)
        target = tl.load(logits + label_column, mask=held, other=-float("inf"))
        tl.store(field + 2 * num_rows, target.to(tl.float64))
        tl.store(field + 3 * num_rows, (top + first_column).to(tl.float64))
        if AT_T:
            tl.store(field + 4 * num_rows, sum_exp_at_1)


# 2 or 4 columns per thread in the second pass; 8 need up to 170 registers. The first pass needs fewer, and wide tiles
# save it reductions.
@_tuned(
    "record",
    ({"WIDE": 1024, "BLOCK": 1024}, 8),
    ({"WIDE": 1024, "BLOCK": 512}, 4),
    ({"WIDE": 2048, "BLOCK": 512}, 8),
    ({"WIDE": 4096, "BLOCK": 2048}, 16),
)
@_jit
def _record_kernel(
    record,
    student,
    teacher,
    labels,
    student_stride,
    teacher_stride,
    labels_stride,
    num_rows,
    num_columns,
    first_column,
    inverse_temperature,
    HAS_LABELS: tl.constexpr,
    AT_T: tl.constexpr,
    OF_MODEL: tl.constexpr,
    PART: tl.constexpr,
    SECOND_PART: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Process one row: both maxima in tiles of WIDE columns, then the sums relative to them in tiles of BLOCK.

    `record` is [fields, num_rows].
    """
    # 64-bit, because a tensor may have more than 2^31 logits.
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    columns = tl.arange(0, BLOCK)

    q_max = tl.full((), -float("inf"), tl.float32)
    p_max = tl.full((), -float("inf"), tl.float32)
    q_top = tl.full((), 0, tl.int32)
    p_top = tl.full((), 0, tl.int32)
    wide_columns = tl.arange(0, WIDE)
    for first in range(0, num_columns, WIDE):
        real = first + wide_columns < num_columns
        s = tl.load(student + first + wide_columns, mask=real, other=-float("inf")).to(tl.float32)
        t = tl.load(teacher + first + wide_columns, mask=real, other=-float("inf")).to(tl.float32)
        q_max, q_top = _extend(s, first, q_max, q_top, HAS_LABELS)
        p_max, p_top = _extend(t, first, p_max, p_top, HAS_LABELS)

    # Where every logit is -inf, any finite base will do.
    q_base = tl.where(q_max == -float("inf"), 0.0, q_max)
    p_base = tl.where(p_max == -float("inf"), 0.0, p_max)
    zero = tl.full((), 0.0, tl.float64)
    q_sum = zero
    p_sum = zero
    q_sum_at_1 = zero
    p_sum_at_1 = zero
    mass = zero
    slope = zero
    value = zero
    second_mass = zero
    second_slope = zero
    second_value = zero
    kl = zero
    negative_p = zero
    negative_q = zero
    for first in range(0, num_columns, BLOCK):
        real = first + columns < num_columns
        s = tl.load(student + first + columns, mask=real, other=-float("inf")).to(tl.float32)
        t = tl.load(teacher + first + columns, mask=real, other=-float("inf")).to(tl.float32)
        log_p, log_q, log_ratio, outside = _view(s, t, q_base, 0.0, p_base, 0.0, 0.0, inverse_temperature, AT_T)
        p = tl.exp(log_p)
        q = tl.exp(log_q)
        p_sum += tl.sum(p, axis=0).to(tl.float64)
        q_sum += tl.sum(q, axis=0).to(tl.float64)
        if NUM_PARTS > 0:
            mass_terms, slope_terms, value_terms = _alpha_beta_sums(log_p, log_q, log_ratio, PART)
            mass = _add(mass, mass_terms, outside)
            slope = _add(slope, slope_terms, outside)
            value = _add(value, value_terms, outside)
        if NUM_PARTS > 1:
            mass_terms, slope_terms, value_terms = _alpha_beta_sums(log_p, log_q, log_ratio, SECOND_PART)
            second_mass = _add(second_mass, mass_terms, outside)
            second_slope = _add(second_slope, slope_terms, outside)
            second_value = _add(second_value, value_terms, outside)
        if HAS_LABELS:
            if AT_T:
                log_p, log_q, log_ratio, outside = _view(s, t, q_base, 0.0, p_base, 0.0, 0.0, 1.0, False)
                p = tl.exp(log_p)
                q = tl.exp(log_q)
                p_sum_at_1 += tl.sum(p, axis=0).to(tl.float64)
                q_sum_at_1 += tl.sum(q, axis=0).to(tl.float64)
            kl = _add(kl, _weigh(p, log_ratio), outside)
            negative_p = _add(negative_p, _weigh(p, log_p), outside)
            negative_q = _add(negative_q, _weigh(q, log_q), outside)

    label_column = tl.full((), -1, tl.int64)
    if HAS_LABELS:
        label_column = tl.load(labels + row * labels_stride) - first_column
    stride = tl.cast(num_rows, tl.int64)
    _store_model(
        record + row, stride, student, label_column, num_columns, first_column,
        q_max, q_sum, q_sum_at_1, q_top, HAS_LABELS, AT_T,
    )  # fmt: skip
    _store_model(
        record + row + OF_MODEL * stride, stride, teacher, label_column, num_columns, first_column,
        p_max, p_sum, p_sum_at_1, p_top, HAS_LABELS, AT_T,
    )  # fmt: skip
    field = record + row + 2 * OF_MODEL * stride
    if NUM_PARTS > 0:
        tl.store(field, mass)
        tl.store(field + stride, slope)
        tl.store(field + 2 * stride, value)
        field += 3 * stride
    if NUM_PARTS > 1:
        tl.store(field, second_mass)
        tl.store(field + stride, second_slope)
        tl.store(field + 2 * stride, second_value)
        field += 3 * stride
    if HAS_LABELS:
        tl.store(field, kl)
        tl.store(field + stride, negative_p)
        tl.store(field + 2 * stride, negative_q)


@_tuned("second record", ({"BLOCK": 1024}, 4), ({"BLOCK": 2048}, 8), ({"BLOCK": 1024}, 8))
@_jit
def _second_record_kernel(
    values,
    slopes,
    student,
    teacher,
    scalars,
    student_stride,
    teacher_stride,
    scalar_stride,
    scalar_row_stride,
    num_columns,
    inverse_temperature,
    VALUE: tl.constexpr,
    SLOPE: tl.constexpr,
    AT_T: tl.constexpr,
    SCALE: tl.constexpr,
    DETACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum ToDi's value and grad_log_q over one row."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    scalars += row * scalar_row_stride
    q_max = tl.load(scalars).to(tl.float32)
    q_log_z = tl.load(scalars + scalar_stride)
    p_max = tl.load(scalars + 2 * scalar_stride).to(tl.float32)
    p_log_z = tl.load(scalars + 3 * scalar_stride)
    log_shift = (p_log_z - q_log_z).to(tl.float32)
    value_sum = tl.full((), 0.0, tl.float64)
    slope_sum = tl.full((), 0.0, tl.float64)
    columns = tl.arange(0, BLOCK)
    for first in range(0, num_columns, BLOCK):
        real = first + columns < num_columns
        s = tl.load(student + first + columns, mask=real, other=-float("inf")).to(tl.float32)
        t = tl.load(teacher + first + columns, mask=real, other=-float("inf")).to(tl.float32)
        log_p, log_q, log_ratio, outside = _view(
            s, t, q_max, q_log_z.to(tl.float32), p_max, p_log_z.to(tl.float32), log_shift, inverse_temperature, AT_T
        )
        value, slope = _todi(log_p, log_q, log_ratio, SCALE, DETACH)
        if VALUE:
            value_sum = _add(value_sum, value, outside)
        if SLOPE:
            slope_sum = _add(slope_sum, slope, outside)
    if VALUE:
        tl.store(values + row, value_sum)
    if SLOPE:
        tl.store(slopes + row, slope_sum)


@_tuned("gradient", ({"BLOCK": 2048}, 8), ({"BLOCK": 1024}, 4), ({"BLOCK": 1024}, 8), ({"BLOCK": 4096}, 8))
@_jit
def _gradient_kernel(
    out,
    student,
    teacher,
    labels,
    scalars,
    of_divergence,
    of_cross_entropy,
    out_stride,
    student_stride,
    teacher_stride,
    labels_stride,
    scalar_stride,
    scalar_row_stride,
    of_divergence_stride,
    of_cross_entropy_stride,
    num_columns,
    first_column,
    inverse_temperature,
    HAS_DIVERGENCE: tl.constexpr,
    HAS_CROSS_ENTROPY: tl.constexpr,
    AT_T: tl.constexpr,
    TODI: tl.constexpr,
    PART: tl.constexpr,
    SCALE: tl.constexpr,
    DETACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Process one tile of one row."""
    # In the first grid dimension, because the others are limited to 65535. 64-bit: a tensor may exceed 2^31 elements.
    program = tl.program_id(0)
    tiles = tl.cdiv(num_columns, BLOCK)
    row = (program // tiles).to(tl.int64)
    columns = program % tiles * BLOCK + tl.arange(0, BLOCK)
    real = columns < num_columns
    scalars += row * scalar_row_stride
    s = tl.load(student + row * student_stride + columns, mask=real, other=-float("inf")).to(tl.float32)
    q_max = tl.load(scalars).to(tl.float32)
    gradient = tl.zeros([BLOCK], tl.float32)
    q = tl.zeros([BLOCK], tl.float32)
    if HAS_DIVERGENCE:
        t = tl.load(teacher + row * teacher_stride + columns, mask=real, other=-float("inf")).to(tl.float32)
        q_log_z = tl.load(scalars + scalar_stride)
        p_max = tl.load(scalars + 3 * scalar_stride).to(tl.float32)
        p_log_z = tl.load(scalars + 4 * scalar_stride)
        slope_sum = tl.load(scalars + 5 * scalar_stride).to(tl.float32)
        log_shift = (p_log_z - q_log_z).to(tl.float32)
        log_p, log_q, log_ratio, outside = _view(
            s, t, q_max, q_log_z.to(tl.float32), p_max, p_log_z.to(tl.float32), log_shift, inverse_temperature, AT_T
        )
        if TODI:
            _, slope = _todi(log_p, log_q, log_ratio, SCALE, DETACH)
        else:
            slope = _alpha_beta_slope(log_p, log_q, log_ratio, PART)
        q = tl.exp(log_q)
        weight = tl.load(of_divergence + row * of_divergence_stride).to(tl.float32)
        if AT_T:
            weight = weight * inverse_temperature
        gradient = _weigh(weight, tl.where(outside, 0.0, slope) - q * slope_sum)
    if HAS_CROSS_ENTROPY:
        if AT_T or not HAS_DIVERGENCE:
            q_log_z_at_1 = tl.load(scalars + 2 * scalar_stride).to(tl.float32)
            q = tl.exp((s - q_max) - q_log_z_at_1)
        label = tl.load(labels + row * labels_stride)
        weight = tl.load(of_cross_entropy + row * of_cross_entropy_stride).to(tl.float32)
        weight = tl.where(label < 0, 0.0, weight)
        gradient += _weigh(weight, tl.where(columns == label - first_column, q - 1.0, q))
    tl.store(out + row * out_stride + columns, gradient.to(out.dtype.element_ty), mask=real)
