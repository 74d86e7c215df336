"""What follows the records on a GPU, in one launch: merge over ranks, normalizers, divergence, cross entropy, metrics.

`conclude` computes what `merge`, `conclude` and `Terms.write` of vocab_parallel do, in fp64. A sum of alpha-beta
divergences (ToDi's value at scale 1 is one) is then known. All others need a second record, which `finish` sums.

Coefficients, weights and the temperature are arguments of a launch, so that schedules do not recompile. Each is three
fp32 numbers that add up to the fp64 one, because Triton passes Python's floats as fp32.

Every token is computed by one thread in a fixed order: results are bitwise identical on all ranks and in all runs.

Legend: N tokens, R ranks.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

import struct

import torch
from torch import Tensor

from abkd_megatron.kernels.parts import weighted_parts
from abkd_megatron.kernels.record import Layout
from abkd_megatron.kernels.triton import on
from abkd_megatron.kernels.triton_math import jit, tl  # type: ignore[attr-defined]  # absent where Triton is
from abkd_megatron.losses.alpha_beta import AlphaBeta
from abkd_megatron.losses.base import Divergence, coefficient
from abkd_megatron.losses.todi import ToDi

# Tokens per program. Few, so that a micro-batch of 8192 tokens occupies a GPU.
_BLOCK, _WARPS = 64, 2
# Smaller coefficients and larger ones have no three fp32 numbers; eager computes them.
_LEAST, _MOST = 1e-30, 1e30


def can_merge(divergence: Divergence) -> bool:
    """Return True if `conclude` supports this divergence."""
    return _parts(divergence) is not None


def _parts(divergence: Divergence) -> tuple[tuple[float, AlphaBeta], ...] | None:
    """Return weights and alpha-beta parts in the order of the partial sums; None if they are not such parts."""
    if not divergence.num_partial_sums:
        return ()
    parts: list[tuple[float, AlphaBeta]] = []
    for weight, part in weighted_parts(divergence):
        if isinstance(part, ToDi):  # at scale 1: forward and reverse KL
            parts += [(weight, AlphaBeta(1.0, 0.0)), (weight, AlphaBeta(0.0, 1.0))]
        elif isinstance(part, AlphaBeta):
            parts.append((weight, part))
    numbers = [number for weight, part in parts for number in (weight, *_coefficients(part))]
    fits = all(number == 0.0 or _LEAST <= abs(number) <= _MOST for number in numbers)
    return tuple(parts) if fits and 3 * len(parts) == divergence.num_partial_sums else None


def _knows_slope(divergence: Divergence) -> bool:
    """Return True if H is a function of the partial sums."""
    parts = weighted_parts(divergence) if divergence.num_partial_sums else ()
    return bool(parts) and not any(isinstance(part, ToDi) and part.detach for _, part in parts)


def _coefficients(part: AlphaBeta) -> tuple[float, float, float]:
    return tuple(  # type: ignore[return-value]
        coefficient(number, torch.float64) for number in (part.alpha, part.beta, part.alpha + part.beta)
    )


def _in_three(number: float) -> tuple[float, float, float]:
    """Return three fp32 numbers whose sum is `number`."""
    parts = []
    for _ in range(3):
        parts.append(struct.unpack("f", struct.pack("f", number))[0])
        number -= parts[-1]
    return parts[0], parts[1], parts[2]


def conclude(
    records: Tensor,
    labels: Tensor | None,
    divergence: Divergence,
    layout: Layout,
    terms: Tensor,
    rows: Tensor | None = None,
    compared: bool = True,
    loss: Tensor | None = None,
    weights: tuple[float, float] = (0.0, 0.0),
) -> tuple[Tensor, bool, bool]:
    """Merge the records of all ranks and compute what follows per token.

    Args:
        records: [R, fields, N] fp64, contiguous, in the order of `layout`.
        labels: [N] int64 global ids, or None.
        divergence: one that `can_merge` accepts.
        layout: of the records.
        terms: fp32, as in `vocab_parallel.terms.Terms`, like the arguments after it.
        rows: [N] or None.
        compared: whether there is a teacher.
        loss: [M] or None.
        weights: of the divergence and the cross entropy in `loss`.

    Returns:
        [10, N] fp64: the student's maximum, log_z and log_z at T = 1, the teacher's maximum and log_z, and H; then the
        `scalars` of a second record. Whether the divergence (and `loss`) and H have been written: they are if the
        records determine them.
    """
    num_ranks, num_fields, num_tokens = records.shape
    parts, has_slope = _parts(divergence), _knows_slope(divergence)
    assert parts is not None and records.is_contiguous() and terms.stride(1) == 1
    numbers: list[float] = []
    for weight, part in parts:
        for number in (weight, *_coefficients(part)):
            numbers += _in_three(number)
    scalars = torch.empty(10, num_tokens, dtype=torch.float64, device=records.device)
    if num_tokens:
        with on(records.device):
            _conclude_kernel[_grid(num_tokens)](
                records,
                labels,
                rows,
                scalars,
                terms,
                loss,
                terms.stride(0),
                num_tokens,
                _in_three(layout.temperature),
                tuple(numbers),
                *weights,
                R=num_ranks,
                FIELDS=num_fields,
                OF_MODEL=layout.of_model,
                NUM_PARTS=len(parts),
                HAS_LABELS=layout.has_labels,
                AT_T=layout.temperature != 1.0,
                HAS_SLOPE=has_slope,
                COMPARED=compared,
                BLOCK=_BLOCK,
                num_warps=_WARPS,
                enable_fp_fusion=False,
            )
    return scalars, bool(parts), has_slope


def finish(
    records: Tensor,
    scalars: Tensor,
    terms: Tensor | None = None,
    rows: Tensor | None = None,
    compared: bool = True,
    loss: Tensor | None = None,
    weights: tuple[float, float] = (0.0, 0.0),
    has_value: bool = False,
    has_slope: bool = False,
) -> None:
    """Add the second records of all ranks, [R, 1 or 2, N] fp64: divergence into `terms` and `loss`, H into `scalars`.

    The other arguments are as in `conclude`, which has run before.
    """
    num_ranks, num_fields, num_tokens = records.shape
    assert records.is_contiguous() and num_fields == has_value + has_slope and compared
    if num_tokens:
        with on(records.device):
            _finish_kernel[_grid(num_tokens)](
                records,
                rows,
                scalars,
                terms,
                loss,
                terms.stride(0) if terms is not None else 0,
                num_tokens,
                *weights,
                R=num_ranks,
                HAS_VALUE=has_value,
                HAS_SLOPE=has_slope,
                BLOCK=_BLOCK,
                num_warps=_WARPS,
                enable_fp_fusion=False,
            )


def _grid(num_tokens: int) -> tuple[int]:
    return (-(-num_tokens // _BLOCK),)


@jit
def _number(numbers, FIRST: tl.constexpr):
    """Return the fp64 number that three fp32 ones add up to, largest first."""
    zero = tl.full((), 0.0, tl.float64)
    return (zero + numbers[FIRST]) + numbers[FIRST + 1] + numbers[FIRST + 2]


@jit
def _weigh(mass, amount):
    """Return mass * amount with 0 * inf = 0."""
    return tl.where(mass == 0.0, 0.0, mass * amount)


@jit
def _expm1(x):
    """Return exp(x) - 1 for |x| < 1; the remainder is below half a unit in the last place of fp64."""
    total = x * 0.0 + 1.0
    for term in tl.static_range(17):
        total = total * x * (1.0 / (18 - term)) + 1.0
    return total * x


@jit
def _exponent(a, log_p, b, log_q):
    """Return a log p + b log q without terms of coefficient 0, which would give 0 * -inf."""
    return tl.where(a == 0.0, 0.0, log_p * a) + tl.where(b == 0.0, 0.0, log_q * b)


@jit
def _difference(start, end, gap, log_ratio):
    """Return (end - start) / gap, where end = start * exp(gap * log_ratio); start * log_ratio at gap 0."""
    rise = log_ratio * gap
    change = tl.where(tl.abs(rise) < 1.0, _expm1(rise) * start, end - start) / tl.where(gap == 0.0, 1.0, gap)
    return tl.where(gap == 0.0, _weigh(start, log_ratio), change)


@jit
def _alpha_beta(log_p, log_q, log_ratio, a, b, lam):
    """Compute q^lam, h and F, `AlphaBeta.partial_sums`; and p^a q^b, p^lam and (p^lam - p^a q^b) / b."""
    zero = a * 0.0
    at_zero = tl.exp(_exponent(zero, log_p, lam, log_q))
    at_alpha = tl.exp(_exponent(a, log_p, b, log_q))
    at_lam = tl.exp(_exponent(lam, log_p, zero, log_q))
    rise = _difference(at_zero, at_alpha, a, log_ratio)
    upper = _difference(at_alpha, at_lam, b, log_ratio)
    whole = _difference(at_zero, at_lam, lam, log_ratio)
    spread = tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.abs(lam))
    # Dividing by the widest gap between two nodes cancels least.
    by_beta = tl.abs(b) == spread
    by_lam = tl.abs(lam) == spread
    gap = tl.where(by_beta, b, tl.where(by_lam, lam, a))
    far = tl.where(by_beta, whole, upper) - tl.where(by_beta | by_lam, rise, whole)
    far = far / tl.where(gap == 0.0, 1.0, gap)

    # The series of `alpha_beta.series`, from its first term on.
    scaled = log_ratio * spread
    width = tl.where(spread == 0.0, 1.0, spread)
    first = a / width
    last = lam / width
    h = zero + 1.0
    power = zero + 1.0
    inverse = zero + 0.5
    near = scaled * 0.0 + 0.5
    z = scaled * 0.0 + 1.0
    for n in tl.static_range(1, 14):
        power = power * first
        h = h * last + power
        inverse = inverse / (n + 2)
        z = z * scaled
        near = near + z * (h * inverse)
    near = near * log_ratio * log_ratio * at_zero
    value = tl.where(tl.abs(scaled) < 0.5, near, far)
    value = tl.where(spread == 0.0, log_ratio * log_ratio * 0.5, value)
    return at_zero, -rise, value, at_alpha, at_lam, upper


@jit
def _moved(mass, slope, value, log_p, log_q, log_ratio, outside, a, b, lam):
    """Compute `AlphaBeta.shift_max`."""
    by_mass, of_slope, of_value, at_alpha, at_lam, upper = _alpha_beta(log_p, log_q, log_ratio, a, b, lam)
    new_value = _weigh(mass, of_value) - _weigh(slope, upper) + _weigh(value, at_lam)
    # All terms are >= 0, so an infinite value stays infinite; the slopes are infinite there and would give NaN.
    new_value = tl.where(value == float("inf"), value, new_value)
    new_slope = _weigh(slope, at_alpha) + _weigh(mass, of_slope)
    new_mass = _weigh(mass, by_mass)
    return tl.where(outside, 0.0, new_mass), tl.where(outside, 0.0, new_slope), tl.where(outside, 0.0, new_value)


@jit
def _shift(log_q, log_p, log_ratio, no_q, no_p):
    """Return log p, log q, log p/q, and where a model's whole shard is excluded; its probability is 0."""
    log_ratio = tl.where(no_p, -float("inf"), tl.where(no_q, float("inf"), log_ratio))
    return tl.where(no_p, -float("inf"), log_p), tl.where(no_q, -float("inf"), log_q), log_ratio, no_q & no_p


@jit
def _rise(at, stride, real, q_max, p_max, temperature, OF_MODEL: tl.constexpr, AT_T: tl.constexpr):
    """Return the shift of a rank's sums to the maxima of all ranks, from its record `at`."""
    own_q = tl.load(at, mask=real, other=0.0)
    own_p = tl.load(at + OF_MODEL * stride, mask=real, other=0.0)
    no_q = own_q == -float("inf")
    no_p = own_p == -float("inf")
    log_q = tl.where(no_q, 0.0, own_q) - tl.where(q_max == -float("inf"), 0.0, q_max)
    log_p = tl.where(no_p, 0.0, own_p) - tl.where(p_max == -float("inf"), 0.0, p_max)
    log_ratio = log_p - log_q
    if AT_T:
        log_q = log_q / temperature
        log_p = log_p / temperature
        log_ratio = log_ratio / temperature
    return _shift(log_q, log_p, log_ratio, no_q, no_p)


@jit(do_not_specialize=["labels", "rows", "terms", "loss", "terms_stride", "num_tokens"])
def _conclude_kernel(
    records,
    labels,
    rows,
    scalars,
    terms,
    loss,
    terms_stride,
    num_tokens,
    temperature_numbers,
    numbers,
    kd_weight,
    lm_weight,
    R: tl.constexpr,
    FIELDS: tl.constexpr,
    OF_MODEL: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    AT_T: tl.constexpr,
    HAS_SLOPE: tl.constexpr,
    COMPARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Process BLOCK tokens, one per lane."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = token < num_tokens
    stride = tl.cast(num_tokens, tl.int64)
    to_rank = stride * FIELDS
    temperature = _number(temperature_numbers, 0)
    zero = tl.zeros([BLOCK], tl.float64)
    first = records + token

    q_max = tl.load(first, mask=real, other=0.0)
    p_max = tl.load(first + OF_MODEL * stride, mask=real, other=0.0)
    q_target = zero
    p_target = zero
    q_top = zero
    p_top = zero
    if HAS_LABELS:
        q_target = tl.load(first + 2 * stride, mask=real, other=0.0)
        p_target = tl.load(first + (OF_MODEL + 2) * stride, mask=real, other=0.0)
        q_top = tl.load(first + 3 * stride, mask=real, other=0.0)
        p_top = tl.load(first + (OF_MODEL + 3) * stride, mask=real, other=0.0)
    if R > 1:
        at = first
        for _ in range(1, R):
            at += to_rank
            q_max = tl.maximum(q_max, tl.load(at, mask=real, other=0.0), propagate_nan=tl.PropagateNan.ALL)
            own = tl.load(at + OF_MODEL * stride, mask=real, other=0.0)
            p_max = tl.maximum(p_max, own, propagate_nan=tl.PropagateNan.ALL)
            if HAS_LABELS:
                own = tl.load(at + 2 * stride, mask=real, other=0.0)
                q_target = tl.maximum(q_target, own, propagate_nan=tl.PropagateNan.ALL)
                own = tl.load(at + (OF_MODEL + 2) * stride, mask=real, other=0.0)
                p_target = tl.maximum(p_target, own, propagate_nan=tl.PropagateNan.ALL)
        if HAS_LABELS:
            # The smallest id among the ranks that hold the maximum.
            q_top = zero + float("inf")
            p_top = zero + float("inf")
            at = first
            for _ in range(R):
                own = tl.load(at + 3 * stride, mask=real, other=0.0)
                q_top = tl.minimum(q_top, tl.where(tl.load(at, mask=real, other=0.0) == q_max, own, float("inf")))
                own = tl.load(at + (OF_MODEL + 3) * stride, mask=real, other=0.0)
                held = tl.load(at + OF_MODEL * stride, mask=real, other=0.0) == p_max
                p_top = tl.minimum(p_top, tl.where(held, own, float("inf")))
                at += to_rank

    q_sum = zero
    p_sum = zero
    q_sum_at_1 = zero
    p_sum_at_1 = zero
    kl = zero
    negative_p = zero
    negative_q = zero
    METRICS: tl.constexpr = 2 * OF_MODEL + 3 * NUM_PARTS
    at = first
    for _ in range(R):
        own_q = tl.load(at + stride, mask=real, other=1.0)
        own_p = tl.load(at + (OF_MODEL + 1) * stride, mask=real, other=1.0)
        log_p, log_q, log_ratio, outside = _rise(at, stride, real, q_max, p_max, temperature, OF_MODEL, AT_T)
        if R > 1:
            q_sum += _weigh(own_q, tl.exp(log_q))
            p_sum += _weigh(own_p, tl.exp(log_p))
        else:
            q_sum = own_q
            p_sum = own_p
        if HAS_LABELS:
            if AT_T:
                own_q = tl.load(at + 4 * stride, mask=real, other=1.0)
                own_p = tl.load(at + (OF_MODEL + 4) * stride, mask=real, other=1.0)
                log_p, log_q, log_ratio, outside = _rise(at, stride, real, q_max, p_max, temperature, OF_MODEL, False)
            own_kl = tl.load(at + METRICS * stride, mask=real, other=0.0)
            own_negative_p = tl.load(at + (METRICS + 1) * stride, mask=real, other=0.0)
            own_negative_q = tl.load(at + (METRICS + 2) * stride, mask=real, other=0.0)
            if R > 1:
                p = tl.exp(log_p)
                q = tl.exp(log_q)
                if AT_T:
                    q_sum_at_1 += _weigh(own_q, q)
                    p_sum_at_1 += _weigh(own_p, p)
                kl += tl.where(outside, 0.0, _weigh(p, own_kl + _weigh(own_p, log_ratio)))
                negative_p += tl.where(outside, 0.0, _weigh(p, own_negative_p + _weigh(own_p, log_p)))
                negative_q += tl.where(outside, 0.0, _weigh(q, own_negative_q + _weigh(own_q, log_q)))
            else:
                q_sum_at_1 = own_q
                p_sum_at_1 = own_p
                kl = own_kl
                negative_p = own_negative_p
                negative_q = own_negative_q
        at += to_rank
    if not (HAS_LABELS and AT_T):
        q_sum_at_1 = q_sum
        p_sum_at_1 = p_sum

    no_q = q_max == -float("inf")
    no_p = p_max == -float("inf")
    q_log_z = tl.log(q_sum)
    p_log_z = tl.log(p_sum)
    q_log_z_at_1 = q_log_z
    p_log_z_at_1 = p_log_z
    if HAS_LABELS and AT_T:
        q_log_z_at_1 = tl.log(q_sum_at_1)
        p_log_z_at_1 = tl.log(p_sum_at_1)
    tl.store(scalars + token, q_max, mask=real)
    tl.store(scalars + token + stride, q_log_z, mask=real)
    tl.store(scalars + token + 2 * stride, q_log_z_at_1, mask=real)
    tl.store(scalars + token + 3 * stride, p_max, mask=real)
    tl.store(scalars + token + 4 * stride, p_log_z, mask=real)
    tl.store(scalars + token + 6 * stride, q_max, mask=real)
    tl.store(scalars + token + 7 * stride, q_log_z, mask=real)
    tl.store(scalars + token + 8 * stride, p_max, mask=real)
    tl.store(scalars + token + 9 * stride, p_log_z, mask=real)

    value = zero
    slope = zero
    for part in tl.static_range(NUM_PARTS):
        weight = _number(numbers, 12 * part)
        a = _number(numbers, 12 * part + 3)
        b = _number(numbers, 12 * part + 6)
        lam = _number(numbers, 12 * part + 9)
        part_mass = zero
        part_slope = zero
        part_value = zero
        at = first
        for _ in range(R):
            own = at + (2 * OF_MODEL + 3 * part) * stride
            own_mass = tl.load(own, mask=real, other=0.0)
            own_slope = tl.load(own + stride, mask=real, other=0.0)
            own_value = tl.load(own + 2 * stride, mask=real, other=0.0)
            if R > 1:
                log_p, log_q, log_ratio, outside = _rise(at, stride, real, q_max, p_max, temperature, OF_MODEL, AT_T)
                own_mass, own_slope, own_value = _moved(
                    own_mass, own_slope, own_value, log_p, log_q, log_ratio, outside, a, b, lam
                )
                part_mass += own_mass
                part_slope += own_slope
                part_value += own_value
            else:
                part_mass = own_mass
                part_slope = own_slope
                part_value = own_value
            at += to_rank
        log_p, log_q, log_ratio, outside = _shift(-q_log_z, -p_log_z, -(p_log_z - q_log_z), no_q, no_p)
        part_mass, part_slope, part_value = _moved(
            part_mass, part_slope, part_value, log_p, log_q, log_ratio, outside, a, b, lam
        )
        value += part_value * weight
        slope += part_slope * weight
    if HAS_SLOPE:
        tl.store(scalars + token + 5 * stride, slope, mask=real)

    column = token
    if rows is not None:
        column = tl.load(rows + token, mask=real, other=0)
    written = terms + column
    in_fp32 = value.to(tl.float32)
    if not COMPARED:
        in_fp32 = tl.zeros([BLOCK], tl.float32)
    if NUM_PARTS > 0:
        tl.store(written, in_fp32, mask=real)
    if HAS_LABELS:
        label = tl.load(labels + column, mask=real, other=-1)
        cross_entropy = tl.where(label < 0, 0.0, q_log_z_at_1 - (q_target - q_max)).to(tl.float32)
        tl.store(written + terms_stride, cross_entropy, mask=real)
        if loss is not None and NUM_PARTS > 0:
            tl.store(loss + column, in_fp32 * kd_weight + cross_entropy * lm_weight, mask=real)
        of_teacher = tl.where(label < 0, 0.0, p_log_z_at_1 - (p_target - p_max))
        log_p, log_q, log_ratio, outside = _shift(
            -q_log_z_at_1, -p_log_z_at_1, -(p_log_z_at_1 - q_log_z_at_1), no_q, no_p
        )
        p = tl.exp(log_p)
        q = tl.exp(log_q)
        kl = tl.where(outside, 0.0, _weigh(p, kl + _weigh(p_sum_at_1, log_ratio)))
        negative_p = tl.where(outside, 0.0, _weigh(p, negative_p + _weigh(p_sum_at_1, log_p)))
        negative_q = tl.where(outside, 0.0, _weigh(q, negative_q + _weigh(q_sum_at_1, log_q)))
        agree = tl.where((p_top == q_top) & (tl.abs(p_top) < float("inf")), zero + 1.0, zero)
        hit = tl.where(q_top == label.to(tl.float64), zero + 1.0, zero)
        confidence = tl.exp(-q_log_z_at_1)
        if not COMPARED:
            of_teacher = zero
            kl = zero
            negative_p = zero
            negative_q = zero
            agree = zero
            hit = zero
            confidence = zero
        tl.store(written + 2 * terms_stride, of_teacher.to(tl.float32), mask=real)
        tl.store(written + 3 * terms_stride, kl.to(tl.float32), mask=real)
        tl.store(written + 4 * terms_stride, (-negative_p).to(tl.float32), mask=real)
        tl.store(written + 5 * terms_stride, (-negative_q).to(tl.float32), mask=real)
        tl.store(written + 6 * terms_stride, agree.to(tl.float32), mask=real)
        tl.store(written + 7 * terms_stride, hit.to(tl.float32), mask=real)
        tl.store(written + 8 * terms_stride, confidence.to(tl.float32), mask=real)


@jit(do_not_specialize=["rows", "terms", "loss", "terms_stride", "num_tokens"])
def _finish_kernel(
    records,
    rows,
    scalars,
    terms,
    loss,
    terms_stride,
    num_tokens,
    kd_weight,
    lm_weight,
    R: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    HAS_SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Process BLOCK tokens, one per lane."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = token < num_tokens
    stride = tl.cast(num_tokens, tl.int64)
    FIELDS: tl.constexpr = HAS_VALUE + HAS_SLOPE
    value = tl.zeros([BLOCK], tl.float64)
    slope = tl.zeros([BLOCK], tl.float64)
    at = records + token
    for _ in range(R):
        if HAS_VALUE:
            value += tl.load(at, mask=real, other=0.0)
        if HAS_SLOPE:
            slope += tl.load(at + (FIELDS - 1) * stride, mask=real, other=0.0)
        at += stride * FIELDS
    if HAS_SLOPE:
        tl.store(scalars + token + 5 * stride, slope, mask=real)
    if HAS_VALUE:
        column = token
        if rows is not None:
            column = tl.load(rows + token, mask=real, other=0)
        in_fp32 = value.to(tl.float32)
        tl.store(terms + column, in_fp32, mask=real)
        if loss is not None:
            cross_entropy = tl.load(terms + terms_stride + column, mask=real, other=0.0)
            tl.store(loss + column, in_fp32 * kd_weight + cross_entropy * lm_weight, mask=real)
