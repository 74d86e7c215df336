"""Divergences per column, as Triton functions, and the numbers that they take.

Only the structure of a divergence is compiled in: its kinds of parts, and which limits of alpha-beta apply. All
coefficients are arguments of a launch, so a schedule never recompiles.

Logarithms of probabilities, and logits relative to a base, are to base 2, because the hardware's exponential is. The
log-ratio is natural. With EXACT they may be infinite, and NaN where both models exclude a column, which the caller has
to mask. Otherwise they are finite, below -1e20 for an excluded column, and 0 * inf cannot occur.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from abkd_megatron.kernels.parts import MAX_PARTS, weighted_parts
from abkd_megatron.losses.alpha_beta import AlphaBeta, series
from abkd_megatron.losses.base import Divergence, coefficient
from abkd_megatron.losses.mixture import JensenShannon, SkewForwardKL, SkewReverseKL
from abkd_megatron.losses.todi import ToDi

try:
    import triton  # type: ignore[import-untyped]
    import triton.language as tl  # type: ignore[import-untyped]
except ImportError:  # reported when a kernel is called

    class tl:  # type: ignore[no-redef]
        """Stand-in for the kernels' annotations."""

        constexpr = None

    triton = None


INSTALLED = triton is not None


def needs_gpu(kernel: Any) -> bool:
    """Return whether a kernel is compiled, and not interpreted."""
    return isinstance(kernel, triton.JITFunction)


def jit(function: Callable | None = None, **options: Any) -> Any:
    """Apply triton.jit, or nothing where Triton is not installed."""
    if function is None:
        return functools.partial(jit, **options)
    return function if triton is None else triton.jit(function, **options)


_ALPHA_BETA, _TODI, _SKEW_FORWARD, _SKEW_REVERSE, _JENSEN_SHANNON, _TOTAL_VARIATION = range(6)
_LOG2_E = 1.4426950408889634
_NEAR_TERMS = 8


class Parts(NamedTuple):
    """Structure and numbers of a divergence's parts."""

    kinds: tuple[tuple[int, ...], ...]
    """Compiled in, per part: the kind, then its structure."""
    numbers: tuple[tuple[float, ...], ...]
    """Arguments of a launch, per part: the weight, then its coefficients."""


@functools.lru_cache(64)
def parts_of(divergence: Divergence) -> Parts | None:
    """Return a divergence's parts; None for a custom one and for more than `MAX_PARTS`."""
    parts = weighted_parts(divergence)
    if not 0 < len(parts) <= MAX_PARTS:
        return None
    return _parts([_part(weight, part) for weight, part in parts])


@functools.lru_cache(64)
def separating_parts_of(divergence: Divergence) -> Parts:
    """Return the alpha-beta divergences whose partial sums a record contains, in its order; none if it has none."""
    if divergence.num_partial_sums == 0:
        return Parts((), ())
    found: list[AlphaBeta] = []
    for _, part in weighted_parts(divergence):
        found += [part] if isinstance(part, AlphaBeta) else [AlphaBeta(1.0, 0.0), AlphaBeta(0.0, 1.0)]
    return _parts([_alpha_beta_part(1.0, part) for part in found])


def is_in_quadrant(parts: Parts) -> bool:
    """Return whether alpha, beta >= 0 and alpha + beta > 0 in every part, all alpha-beta."""
    return all(alpha >= 0.0 and beta >= 0.0 and alpha + beta > 0.0 for _, alpha, beta, *_ in parts.numbers)


def has_infinite_slopes(parts: Parts) -> bool:
    """Return whether grad_log_q may be infinite at finite coefficients: it contains the log-ratio as a factor."""
    return any(kind == _TODI or (kind == _ALPHA_BETA and not structure[0]) for kind, *structure in parts.kinds)


def _parts(parts: list[tuple[tuple[int, ...], tuple[float, ...]]]) -> Parts:
    kinds, numbers = zip(*parts, strict=True)
    return Parts(kinds, numbers)


def _part(weight: float, part: Divergence) -> tuple[tuple[int, ...], tuple[float, ...]]:
    if isinstance(part, AlphaBeta):
        return _alpha_beta_part(weight, part)
    if isinstance(part, ToDi):
        scale = coefficient(part.scale, torch.float32)
        return (_TODI, int(scale != 0.0), int(part.detach)), (weight, scale)
    if isinstance(part, SkewForwardKL):
        return (_SKEW_FORWARD,), (weight, 1.0 - part.skew, part.skew)
    if isinstance(part, SkewReverseKL):
        return (_SKEW_REVERSE, int(part.detach_mixture)), (weight, 1.0 - part.skew, part.skew)
    if isinstance(part, JensenShannon):
        return (_JENSEN_SHANNON,), (weight, part.mixture, 1.0 - part.mixture)
    return (_TOTAL_VARIATION,), (weight,)


def _alpha_beta_part(weight: float, part: AlphaBeta) -> tuple[tuple[int, ...], tuple[float, ...]]:
    alpha, beta, lam = (
        coefficient(number, torch.float32) for number in (part.alpha, part.beta, part.alpha + part.beta)
    )
    spread = max(abs(alpha), abs(beta), abs(lam))
    # Of the gaps between the nodes {0, alpha, lam}. Lam comes first, so that it is the widest in the whole quadrant.
    widest = [abs(lam), abs(beta), abs(alpha)].index(spread)
    kind = (_ALPHA_BETA, int(alpha != 0.0), int(beta != 0.0), (lam > 0.0) - (lam < 0.0), widest)
    alpha_is_narrow = abs(alpha) <= abs(beta)
    narrow, wide = (alpha, beta) if alpha_is_narrow else (beta, alpha)
    numbers = (alpha, beta, lam, _inverse(alpha), _inverse(beta), _inverse(lam), spread)
    ordered = (-alpha if alpha_is_narrow else beta, _inverse(narrow), _inverse(wide), float(alpha_is_narrow))
    # Of the second divided difference at the nodes {0, alpha, lam}; inside the quadrant at {-alpha, 0, beta}.
    nodes = (-alpha, beta) if alpha and beta and not widest else (alpha, lam)
    near = [0.5] + [0.0] * (_NEAR_TERMS - 1)
    if spread:
        near = _economized(series(nodes[0] / spread, nodes[1] / spread, 20), _NEAR_TERMS)
    return kind, tuple(map(float, (weight, *numbers, *ordered, *near)))


def _inverse(number: float) -> float:
    return 1.0 / number if number else 0.0


def _economized(polynomial: list[float], num_terms: int) -> list[float]:
    """Return a polynomial of `num_terms` terms that approximates a longer one on [-1, 1].

    The highest term is replaced by the best approximation of lower degree, x^n - T_n / 2^(n - 1), until it fits.
    """
    chebyshev = [[1.0], [0.0, 1.0]]
    while len(chebyshev) < len(polynomial):
        doubled = [0.0] + [2.0 * number for number in chebyshev[-1]]
        chebyshev.append([a - b for a, b in zip(doubled, chebyshev[-2] + [0.0, 0.0], strict=True)])
    terms = list(polynomial)
    while len(terms) > num_terms:
        top = chebyshev[len(terms) - 1]
        factor = terms[-1] / top[-1]
        terms = [a - factor * b for a, b in zip(terms, top, strict=True)][:-1]
    return terms


@jit
def weigh(mass, amount, EXACT: tl.constexpr):
    """Return mass * amount, with 0 * inf = 0 where it can occur."""
    return tl.where(mass == 0.0, 0.0, mass * amount) if EXACT else mass * amount


@jit
def growth(x):
    """Return (exp(x) - 1) / x for |x| < 1; Triton lacks expm1.

    Of degree 7: a longer Taylor polynomial, economized on [-1, 1]. The relative error is below 7e-8.
    """
    total = x * 2.5358644892211e-05 + 0.00020329201268708588
    total = total * x + 0.001388539492254819
    total = total * x + 0.008330884177506433
    total = total * x + 0.04166673666980626
    total = total * x + 0.16666697340612036
    total = total * x + 0.4999999978100773
    return total * x + 1.0


@jit
def exp2(x):
    """Return 2^x in the dtype of x, finite in fp64.

    In fp32 the hardware's, to 2 units in the last place. In fp64 to 2e-11, from few instructions, because it is
    compiled in where registers are scarce. The Taylor polynomial is of degree 8 on |x log 2| <= 0.35.
    """
    if x.dtype == tl.float64:
        whole = tl.floor(x + 0.5)
        rest = (x - whole) * 0.6931471805599453
        total = rest * (1.0 / 40320.0) + 1.0 / 5040.0
        total = total * rest + 1.0 / 720.0
        total = total * rest + 1.0 / 120.0
        total = total * rest + 1.0 / 24.0
        total = total * rest + 1.0 / 6.0
        total = total * rest + 0.5
        total = total * rest + 1.0
        total = total * rest + 1.0
        exponent = tl.minimum(tl.maximum(whole, -1022.0), 1023.0).to(tl.int64)
        return total * ((exponent + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        return tl.exp2(x)


@jit
def _exponent(a, A: tl.constexpr, log_p, b, B: tl.constexpr, log_q):
    """Return a log p + b log q without terms of coefficient 0, which would give 0 * -inf."""
    if A == 0:
        return log_q * b if B != 0 else tl.zeros_like(log_q)
    else:
        return log_p * a if B == 0 else log_p * a + log_q * b


@jit
def _difference(start, end, gap, inverse, GAP: tl.constexpr, log_ratio, EXACT: tl.constexpr):
    """Return (end - start) / gap, where end = start * exp(gap * log_ratio); start * log_ratio at gap 0."""
    if GAP == 0:
        return weigh(start, log_ratio, EXACT)
    else:
        rise = log_ratio * gap
        return tl.where(tl.abs(rise) < 1.0, start * log_ratio * growth(rise), (end - start) * inverse)


@jit
def alpha_beta_sums(log_p, log_q, log_ratio, numbers, KIND: tl.constexpr, EXACT: tl.constexpr):
    """Compute `AlphaBeta.partial_sums`: q^lam, h, F."""
    A: tl.constexpr = KIND[1]
    B: tl.constexpr = KIND[2]
    LAM: tl.constexpr = KIND[3]
    WIDEST: tl.constexpr = KIND[4]
    at_zero = exp2(_exponent(0.0, 0, log_p, numbers[3], LAM, log_q))
    if A == 0 and B == 0:
        return at_zero, -log_ratio, log_ratio * log_ratio * 0.5
    else:
        at_alpha = exp2(_exponent(numbers[1], A, log_p, numbers[2], B, log_q))
        at_lam = exp2(_exponent(numbers[3], LAM, log_p, 0.0, 0, log_q))
        # In the quadrant relative to the middle node.
        IN_QUADRANT: tl.constexpr = WIDEST == 0 and A != 0 and B != 0
        scaled = log_ratio * numbers[7]
        near = scaled * numbers[19] + numbers[18]
        for term in tl.static_range(6):
            near = near * scaled + numbers[17 - term]
        start = log_ratio * (at_alpha if IN_QUADRANT else at_zero)
        near = near * log_ratio * start
        is_near = tl.abs(scaled) < 1.0
        if IN_QUADRANT:
            # A difference over the wider gap cancels nothing where scaled is not near 0. One polynomial is enough: of
            # alpha for the slope where scaled is near 0, and of the narrower gap elsewhere.
            alpha_is_narrow = numbers[11] != 0.0
            x = log_ratio * tl.where(is_near, -numbers[1], numbers[8])
            rise = start * growth(x)
            low, high = at_alpha - at_zero, at_lam - at_alpha
            narrow = tl.where(tl.abs(x) < 1.0, rise, tl.where(alpha_is_narrow, low, high) * numbers[9])
            wide = tl.where(alpha_is_narrow, high, low) * numbers[10]
            far = (wide - narrow) * tl.where(alpha_is_narrow, numbers[6], -numbers[6])
            slope = tl.where(is_near, rise, tl.where(alpha_is_narrow, narrow, wide))
        else:
            slope = _difference(at_zero, at_alpha, numbers[1], numbers[4], A, log_ratio, EXACT)
            # Dividing by the widest gap between two nodes cancels least.
            if WIDEST == 0:
                far = _difference(at_alpha, at_lam, numbers[2], numbers[5], B, log_ratio, EXACT)
                far = (far - slope) * numbers[6]
            elif WIDEST == 1:
                far = _difference(at_zero, at_lam, numbers[3], numbers[6], LAM, log_ratio, EXACT)
                far = (far - slope) * numbers[5]
            else:
                far = _difference(at_alpha, at_lam, numbers[2], numbers[5], B, log_ratio, EXACT)
                far -= _difference(at_zero, at_lam, numbers[3], numbers[6], LAM, log_ratio, EXACT)
                far = far * numbers[4]
        return at_zero, -slope, tl.where(is_near, near, far)


@jit
def alpha_beta_slope(log_p, log_q, log_ratio, numbers, KIND: tl.constexpr, EXACT: tl.constexpr):
    """Compute `AlphaBeta.grad_log_q`."""
    at_zero = exp2(_exponent(0.0, 0, log_p, numbers[3], KIND[3], log_q))
    at_alpha = exp2(_exponent(numbers[1], KIND[1], log_p, numbers[2], KIND[2], log_q))
    slope = -_difference(at_zero, at_alpha, numbers[1], numbers[4], KIND[1], log_ratio, EXACT)
    if EXACT or KIND[3] > 0:
        return slope
    else:  # q^lam is not 0 at q = 0
        return tl.where((log_p < -1e20) & (log_q < -1e20), 0.0, slope)


@jit
def alpha_beta_shifted(mass, slope, value, log_p, log_q, log_ratio, numbers, KIND: tl.constexpr):
    """Compute `AlphaBeta.shift_max` of finite sums for finite shifts, in fp64."""
    new_mass, new_slope, new_value = alpha_beta_sums(log_p, log_q, log_ratio, numbers, KIND, False)
    at_alpha = exp2(_exponent(numbers[1], KIND[1], log_p, numbers[2], KIND[2], log_q))
    at_lam = exp2(_exponent(numbers[3], KIND[3], log_p, 0.0, 0, log_q))
    rise = _difference(at_alpha, at_lam, numbers[2], numbers[5], KIND[2], log_ratio, False)
    value = mass * new_value - slope * rise + value * at_lam
    return mass * new_mass, slope * at_alpha + mass * new_slope, value


@jit
def _ratios(p, q, log_ratio):
    """Return the ratio r of the smaller of p and q to the larger, 1 - r, and the larger."""
    near = -tl.abs(log_ratio)
    ratio = exp2(near * 1.4426950408889634)
    fall = tl.where(near > -1.0, -near * growth(near), 1.0 - ratio)
    return ratio, fall, tl.where(log_ratio > 0.0, p, q)


@jit
def _mixture(ratio, is_larger, own, other):
    """Return M relative to the larger of x and y, for M = own x + other y; `is_larger` for x."""
    return tl.where(is_larger, own, other) + tl.where(is_larger, other, own) * ratio


@jit
def _log_mixture(ratio, fall, is_larger, log_ratio, own, other):
    """Return log M/x, z = (M - x)/(M + x), and (atanh(z)/z - 1)/z^2 near z = 0.

    The log is 2 atanh(z), which has all digits also where x and y are close.

    Args:
        ratio: of the smaller of x and y to the larger.
        fall: 1 - ratio.
        is_larger: x is the larger.
        log_ratio: log x/y or log y/x.
        own: weight of x in M = own x + other y.
        other: weight of y.
    """
    rise = other * fall
    z = tl.where(is_larger, -rise, rise) / _mixture(ratio, is_larger, 1.0 + own, other)
    square = z * z
    tail = square * (1.0 / 11.0) + (1.0 / 9.0)
    tail = tail * square + (1.0 / 7.0)
    tail = tail * square + (1.0 / 5.0)
    tail = tail * square + (1.0 / 3.0)
    near = 2.0 * z * (square * tail + 1.0)
    far = tl.log2(_mixture(ratio, is_larger, own, other)) * 0.6931471805599453
    far += tl.where(is_larger, 0.0, tl.abs(log_ratio))
    return tl.where(square < 0.0625, near, far), z, tail


@jit
def _to_mixture(x, larger, ratio, fall, is_larger, log_ratio, own, other, EXACT: tl.constexpr):
    """Return x log(x/M) - x + M; `larger` of x and y, other arguments as of `_log_mixture`."""
    log_mixture, z, tail = _log_mixture(ratio, fall, is_larger, log_ratio, own, other)
    excess = other * fall * larger
    excess = tl.where(is_larger, -excess, excess)  # M - x
    # With u = M/x - 1 = 2 z/(1 - z): u - log(1 + u) = u z - 2 z^3 tail.
    near = z * (excess - 2.0 * x * z * z * tail)
    return tl.where(z * z < 0.0625, near, excess - weigh(x, log_mixture, EXACT))


@jit
def _over_mixture(q, ratio, fall, q_is_larger, of_student, of_teacher):
    """Return (p - q) q/M for M = of_teacher p + of_student q."""
    amount = fall * q / _mixture(ratio, q_is_larger, of_student, of_teacher)
    return tl.where(q_is_larger, -amount, amount)


@jit
def _todi(p, q, log_ratio, numbers, KIND: tl.constexpr, EXACT: tl.constexpr):
    """Compute `ToDi.value` and `ToDi.grad_log_q`."""
    scale = numbers[1]
    if KIND[1] == 0:
        w = tl.zeros_like(log_ratio) + 0.5
    else:
        w = 1.0 / (1.0 + exp2(log_ratio * (scale * -1.4426950408889634)))
    reverse = (1.0 - w) * q
    rise = log_ratio * (1.0 + scale)
    excess = tl.where(tl.abs(rise) < 1.0, rise * growth(rise) * reverse, w * p - reverse)
    slope = -excess - weigh(reverse, log_ratio, EXACT)
    if KIND[1] != 0 and KIND[2] == 0:
        slope -= weigh((p * (1.0 - w) + reverse) * w, log_ratio, EXACT) * scale
    return weigh(excess, log_ratio, EXACT), slope


@jit
def value_and_slope(log_p, log_q, log_ratio, p, q, numbers, KIND: tl.constexpr, EXACT: tl.constexpr):
    """Compute `value` and `grad_log_q` of one part; what the caller drops is not compiled."""
    if KIND[0] == 0:
        _, _, value = alpha_beta_sums(log_p, log_q, log_ratio, numbers, KIND, EXACT)
        return value, alpha_beta_slope(log_p, log_q, log_ratio, numbers, KIND, EXACT)
    elif KIND[0] == 1:
        return _todi(p, q, log_ratio, numbers, KIND, EXACT)
    else:
        ratio, fall, larger = _ratios(p, q, log_ratio)
        p_is_larger = log_ratio > 0.0
        q_is_larger = ~p_is_larger
        if KIND[0] == 5:
            sign = tl.where(p_is_larger, 0.5, tl.where(log_ratio < 0.0, -0.5, 0.0))
            return fall * larger * 0.5, -q * sign
        else:
            one, other = numbers[1], numbers[2]
            if KIND[0] == 2:  # M = other p + one q
                value = _to_mixture(p, larger, ratio, fall, p_is_larger, log_ratio, other, one, EXACT)
                slope = _over_mixture(q, ratio, fall, q_is_larger, one, other) * (-one * one)
                return value, slope
            elif KIND[0] == 3:  # M = one p + other q
                value = _to_mixture(q, larger, ratio, fall, q_is_larger, log_ratio, other, one, EXACT)
                log_mixture, _, _ = _log_mixture(ratio, fall, q_is_larger, log_ratio, other, one)
                slope = -weigh(q, log_mixture, EXACT)
                if KIND[1] == 0:
                    slope += _over_mixture(q, ratio, fall, q_is_larger, other, one) * (one * other)
                return value, slope
            else:  # M = one p + other q
                value = _to_mixture(p, larger, ratio, fall, p_is_larger, log_ratio, one, other, EXACT) * one
                value += _to_mixture(q, larger, ratio, fall, q_is_larger, log_ratio, other, one, EXACT) * other
                log_mixture, _, _ = _log_mixture(ratio, fall, q_is_larger, log_ratio, other, one)
                return value, weigh(q, log_mixture, EXACT) * -other
