"""Every divergence on one rank is what its paper defines, in value and gradient.

Proves: the reference twins and the engine reproduce 60-digit values (vectors.json); the limits are
continuous; the engine stays finite and right where probabilities vanish; temperature, padding, low precision,
layouts; the cross entropy and metrics that come with it; what autograd promises; and that bad input is
refused with a message that says the remedy. Not here: more than one rank (tests/distributed).
"""

import json
import math
from decimal import Decimal, localcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from abkd_megatron import AlphaBeta, ToDi, kernels, vocab_parallel_divergence
from abkd_megatron.config.presets import PRESETS
from abkd_megatron.errors import ConfigError
from abkd_megatron.losses import (
    Divergence,
    JensenShannon,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    WeightedSum,
    forward_kl,
    jeffreys,
    neyman_chi_square,
    pearson_chi_square,
    reference_cross_entropy,
    reference_divergence,
    reverse_kl,
    squared_hellinger,
    squared_l2,
)
from abkd_megatron.vocab_parallel import VocabShard, vocab_parallel_distillation

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())
PAIRS = {pair["name"]: (pair["student_logits"], pair["teacher_logits"]) for pair in VECTORS["pairs"]}
ROWS = [(row, AlphaBeta(row["alpha"], row["beta"])) for row in VECTORS["ab"]]
ROWS += [(row, ToDi(row["scale"], row["variant"] == "detached")) for row in VECTORS["todi"]]
OTHERS = {
    "forward_kl": forward_kl(),
    "reverse_kl": reverse_kl(),
    "jeffreys": jeffreys(),
    "gjsd_beta0.1": JensenShannon(0.1),
    "gjsd_beta0.5": JensenShannon(0.5),
    "gjsd_beta0.9": JensenShannon(0.9),
    "skew_fkl_0.1": SkewForwardKL(0.1),
    "skew_rkl_0.1": SkewReverseKL(0.1),
    "tvd": TotalVariation(),
}
ROWS += [(row, OTHERS[row["loss_name"]]) for row in VECTORS["other"] if row["loss_name"] in OTHERS]
ROW_IDS = [f"{row['pair']}-{divergence}" for row, divergence in ROWS]

POINTS = [
    AlphaBeta(1, 0),
    AlphaBeta(0, 1),
    AlphaBeta(0.5, 0.5),
    AlphaBeta(0.2, 0.7),
    AlphaBeta(0.5, -0.5),
    AlphaBeta(0, 0),
    AlphaBeta(-0.5, 1.2),
    AlphaBeta(2, -1),
    ToDi(),
    ToDi(2.0, detach=False),
    ToDi(0.0),
    JensenShannon(),
    JensenShannon(0.9),
    SkewForwardKL(),
    SkewReverseKL(),
    SkewReverseKL(0.3, detach_mixture=True),
    TotalVariation(),
    pearson_chi_square(),
    WeightedSum([(0.3, AlphaBeta(0.2, 0.7)), (2.0, SkewReverseKL(0.6)), (0.1, ToDi(detach=False))]),
]
# Those whose value and gradient stay bounded where a probability vanishes on either side.
MIXTURES = [
    JensenShannon(),
    JensenShannon(0.1),
    SkewForwardKL(),
    SkewReverseKL(),
    SkewReverseKL(detach_mixture=True),
    TotalVariation(),
]
BOUNDED = [
    AlphaBeta(0.5, 0.5),
    AlphaBeta(0.2, 0.7),
    AlphaBeta(0.8, 0.3),
    AlphaBeta(1, 1),
    squared_hellinger(),
    *MIXTURES,
]


def random_logits(*shape: int, seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return student, teacher


def fast(student: Tensor, teacher: Tensor, divergence: Divergence, **settings) -> tuple[Tensor, Tensor]:
    """Value and gradient of the engine, of the sum over tokens."""
    student = student.detach().clone().requires_grad_()
    value = vocab_parallel_divergence(student, teacher, divergence, **settings)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


def reference(student: Tensor, teacher: Tensor, divergence: Divergence, **settings) -> tuple[Tensor, Tensor]:
    student = student.detach().double().requires_grad_()
    value = reference_divergence(divergence, student, teacher, **settings)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


def assert_close(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], value: float, gradient: float) -> None:
    """Relative errors: of the value, and of the gradient against the largest of its row."""
    (value_a, gradient_a), (value_e, gradient_e) = actual, expected
    assert torch.isfinite(value_a).all() and torch.isfinite(gradient_a).all()
    torch.testing.assert_close(value_a.double(), value_e.double(), rtol=value, atol=0)
    largest = gradient_e.abs().amax(dim=-1, keepdim=True)
    assert ((gradient_a.double() - gradient_e.double()).abs() <= gradient * largest).all()


@pytest.mark.parametrize("compute", [reference, fast])
@pytest.mark.parametrize(("row", "divergence"), ROWS, ids=ROW_IDS)
def test_vectors_in_fp64(row, divergence, compute):
    student, teacher = (torch.tensor(logits, dtype=torch.float64) for logits in PAIRS[row["pair"]])
    expected = torch.tensor(row["loss"], dtype=torch.float64), torch.tensor(row["grad"], dtype=torch.float64)
    assert_close(compute(student, teacher, divergence), expected, 1e-10, 1e-10)


@pytest.mark.parametrize(("row", "divergence"), ROWS, ids=ROW_IDS)
def test_vectors_in_fp32(row, divergence):
    student, teacher = (torch.tensor(logits, dtype=torch.float32) for logits in PAIRS[row["pair"]])
    expected = torch.tensor(row["loss"], dtype=torch.float64), torch.tensor(row["grad"], dtype=torch.float64)
    value, gradient = fast(student, teacher, divergence)
    assert value.dtype == gradient.dtype == torch.float32
    assert_close((value, gradient), expected, 1e-5, 1e-5)


def plain_term(a: float, b: float, log_q: float, log_ratio: float) -> tuple[float, float]:
    """F and h of the general case in 60 digits."""
    with localcontext(prec=60):
        a, b, q, p = Decimal(a), Decimal(b), Decimal(log_q), Decimal(log_q) + Decimal(log_ratio)
        lam = a + b
        mixed, p_lam, q_lam = (a * p + b * q).exp(), (lam * p).exp(), (lam * q).exp()
        return float(-(mixed - a / lam * p_lam - b / lam * q_lam) / (a * b)), float((q_lam - mixed) / a)


@pytest.mark.parametrize("alpha", [-0.75, 1e-5, 0.25, 1.0, 1.5])
@pytest.mark.parametrize("beta", [-0.5, 1e-5, 0.6875, 1.0])
def test_every_term_is_exact_at_every_log_ratio(alpha, beta):
    # Term by term, so that a large one cannot hide the loss of a small one.
    log_ratios = [sign * size for size in torch.logspace(-8, 1, 60).tolist() for sign in (1, -1)]
    expected = torch.tensor([plain_term(alpha, beta, -0.5, r) for r in log_ratios], dtype=torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 5e-6)):
        log_ratio = torch.tensor(log_ratios, dtype=dtype)
        log_q = torch.full_like(log_ratio, -0.5)
        arguments = (log_q + log_ratio, log_q, log_ratio)
        divergence = AlphaBeta(alpha, beta)
        torch.testing.assert_close(divergence.value(*arguments).double(), expected[:, 0], rtol=tolerance, atol=0)
        torch.testing.assert_close(divergence.grad_log_q(*arguments).double(), expected[:, 1], rtol=tolerance, atol=0)


def plain_mixed_term(of_p: str, of_q: str, share: str, log_q: float, log_ratio: float) -> tuple[float, float]:
    """of_p (p log(p/M) - p + M) + of_q (q log(q/M) - q + M) and its grad_log_q in log q, in 60 digits."""
    with localcontext(prec=60):
        of_p, of_q, share = Decimal(of_p), Decimal(of_q), Decimal(share)
        log_p, log_q = Decimal(log_q) + Decimal(log_ratio), Decimal(log_q)
        p, q = log_p.exp(), log_q.exp()
        m = share * p + (1 - share) * q
        value = of_p * (p * (log_p - m.ln()) - p + m) + of_q * (q * (log_q - m.ln()) - q + m)
        rest = (1 - share) * q
        return float(value), float(of_p * rest * (1 - p / m) + of_q * (q * (log_q - m.ln()) + rest * (1 - q / m)))


@pytest.mark.parametrize(
    ("divergence", "of_p", "of_q", "share"),
    [
        (JensenShannon(0.5), "0.5", "0.5", "0.5"),
        (JensenShannon(0.01), "0.01", "0.99", "0.01"),
        (JensenShannon(0.9), "0.9", "0.1", "0.9"),
        (SkewForwardKL(0.1), "1", "0", "0.1"),
        (SkewForwardKL(0.7), "1", "0", "0.7"),
        (SkewReverseKL(0.1), "0", "1", "0.9"),
        (SkewReverseKL(0.7), "0", "1", "0.3"),
    ],
    ids=str,
)
def test_every_term_of_a_mixture_is_exact_at_every_log_ratio(divergence, of_p, of_q, share):
    log_ratios = [sign * size for size in torch.logspace(-8, 1, 60).tolist() for sign in (1, -1)]
    for dtype, tolerance in ((torch.float64, 3e-14), (torch.float32, 1e-5)):
        log_ratio = torch.tensor(log_ratios, dtype=dtype)
        terms = [plain_mixed_term(of_p, of_q, share, -0.5, r) for r in log_ratio.tolist()]
        expected = torch.tensor(terms, dtype=torch.float64)
        log_q = torch.full_like(log_ratio, -0.5)
        arguments = (log_q + log_ratio, log_q, log_ratio)
        torch.testing.assert_close(divergence.value(*arguments).double(), expected[:, 0], rtol=tolerance, atol=0)
        torch.testing.assert_close(divergence.grad_log_q(*arguments).double(), expected[:, 1], rtol=tolerance, atol=0)


def test_mixtures_tend_to_both_kls():
    student, teacher = random_logits(16, 50, scale=1.0)
    forward, reverse = (reference(student, teacher, kl) for kl in (forward_kl(), reverse_kl()))
    assert_close(fast(student, teacher, SkewForwardKL(1e-9)), forward, 1e-6, 1e-6)
    assert_close(fast(student, teacher, SkewReverseKL(1e-9)), reverse, 1e-6, 1e-6)
    assert_close(fast(student, teacher, WeightedSum([(1e9, JensenShannon(1e-9))])), forward, 1e-6, 1e-6)
    assert_close(fast(student, teacher, WeightedSum([(1e9, JensenShannon(1 - 1e-9))])), reverse, 1e-6, 1e-6)


def test_named_points_are_the_usual_definitions():
    student, teacher = random_logits(6, 30, scale=1.0)
    p, q = teacher.softmax(-1), student.softmax(-1)
    usual = {
        forward_kl(): p * (p / q).log(),
        reverse_kl(): q * (q / p).log(),
        jeffreys(): (p - q) * (p / q).log(),
        squared_hellinger(): 0.5 * (p.sqrt() - q.sqrt()) ** 2,
        pearson_chi_square(): (p - q) ** 2 / q,
        neyman_chi_square(): (p - q) ** 2 / p,
        squared_l2(): (p - q) ** 2,
    }
    for divergence, terms in usual.items():
        torch.testing.assert_close(fast(student, teacher, divergence)[0], terms.sum(-1), rtol=1e-12, atol=0)


def test_a_sum_is_its_terms_and_separates_as_they_do():
    student, teacher = random_logits(5, 40)
    jeffreys_of_two = WeightedSum([(1, forward_kl()), (1, reverse_kl())])
    assert_close(fast(student, teacher, jeffreys_of_two), fast(student, teacher, jeffreys()), 1e-12, 1e-12)
    assert jeffreys_of_two.num_partial_sums == 6
    assert WeightedSum([(0.5, jeffreys_of_two), (2.0, squared_l2())]).num_partial_sums == 9
    assert WeightedSum([(1.0, forward_kl()), (1.0, JensenShannon())]).num_partial_sums == 0
    assert WeightedSum([[1, forward_kl()]]) == WeightedSum(((1.0, forward_kl()),))


def test_equal_probabilities_have_no_slope_in_total_variation():
    log_q = torch.tensor([-1.0, -1.0, -1.0, -math.inf])
    log_p = torch.tensor([-1.0, -2.0, -0.5, -1.0])
    grad_log_q = TotalVariation().grad_log_q(log_p, log_q, log_p - log_q)
    torch.testing.assert_close(grad_log_q, torch.tensor([0.0, 0.5, -0.5, 0.0]) * math.exp(-1.0))


@pytest.mark.parametrize("kernel", ["eager", "cpp"])
@pytest.mark.parametrize("spread", [0.1, 3.0, 10.0])
def test_an_annealed_alpha_beta_is_exact_from_its_limit_on(kernel, spread):
    """Forward KL first, (0.2, 0.7) last, in fp32: next to the limit, and where probabilities vanish."""
    generator = torch.Generator().manual_seed(0)
    logits = spread * torch.randn(2, 40, 300, generator=generator, dtype=torch.float64)
    alpha, beta = PRESETS["annealed"]["alpha"], PRESETS["annealed"]["beta"]
    for done in (0.0, 0.5, 0.5 + 1e-15, 0.5 + 1e-9, 0.5 + 1e-6, 0.501, 0.75, 0.999, 1.0):
        divergence = AlphaBeta(alpha.value(done), beta.value(done))
        student, teacher = logits.float().double()
        student.requires_grad_()
        # The dense form cancels this near to the limit, from which the divergence differs by less than fp32 can tell.
        dense = divergence if done > 0.5 + 1e-8 else AlphaBeta(1, 0)
        expected = reference_divergence(dense, student, teacher)
        (of_expected,) = torch.autograd.grad(expected.sum(), student)
        ours = student.detach().float().requires_grad_()
        with kernels.using(kernel):
            value = vocab_parallel_divergence(ours, teacher.float(), divergence)
        (gradient,) = torch.autograd.grad(value.sum(), ours)
        assert value.isfinite().all() and gradient.isfinite().all()
        torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=1e-8)
        assert (gradient - of_expected).abs().amax() <= 1e-5 * of_expected.abs().amax()


@pytest.mark.parametrize(
    ("near", "limit"),
    [
        ((1e-9, 1), (0, 1)),
        ((1, 1e-9), (1, 0)),
        ((-1e-9, 0.5), (0, 0.5)),
        ((0.5, -1e-9), (0.5, 0)),
        ((0.3, -0.3 + 1e-9), (0.3, -0.3)),
        ((-0.3, 0.3 + 1e-9), (-0.3, 0.3)),
        ((0.1 + 0.2, -0.3), (0.3, -0.3)),
        ((1e-9, 1e-9), (0, 0)),
        ((1e-9, -1e-9), (0, 0)),
        ((1e-300, 1), (0, 1)),
        ((1e-300, -1e-300), (0, 0)),
    ],
)
def test_limits_are_continuous(near, limit):
    student, teacher = random_logits(16, 50)
    expected = reference(student, teacher, AlphaBeta(*limit))
    assert_close(fast(student, teacher, AlphaBeta(*limit)), expected, 1e-12, 1e-12)
    # The true grad_log_q in the parameter times 1e-9 is what may remain; a jump would be of order 1.
    assert_close(fast(student, teacher, AlphaBeta(*near)), expected, 3e-8, 3e-8)
    assert_close(fast(student.float(), teacher.float(), AlphaBeta(*near)), expected, 1e-5, 1e-5)


@pytest.mark.parametrize("divergence", POINTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_models_give_exactly_zero(divergence, dtype):
    logits = random_logits(5, 301)[0].to(dtype)
    transposed = logits.t().contiguous().t()  # equal numbers in another layout
    for teacher in (logits, transposed):
        value, gradient = fast(logits, teacher, divergence, temperature=1.7)
        assert torch.equal(value, torch.zeros_like(value))
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("divergence", POINTS, ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_random_logits_and_temperature(divergence, temperature):
    student, teacher = random_logits(4, 3, 40, scale=1.0)
    expected = reference(student, teacher, divergence, temperature=temperature)
    assert_close(fast(student, teacher, divergence, temperature=temperature), expected, 1e-10, 1e-10)


@pytest.mark.parametrize("divergence", [AlphaBeta(1, 0), AlphaBeta(0.2, 0.7), AlphaBeta(1, 1), ToDi()], ids=str)
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3])
def test_fp32_keeps_its_digits_near_convergence(divergence, distance):
    student, noise = random_logits(8, 1000)
    student = student.float()
    teacher = (student + distance * noise.float()).float()
    value, gradient = fast(student, teacher, divergence)
    expected_value, expected_gradient = fast(student.double(), teacher.double(), divergence)
    # The logits themselves are rounded below their maximum: about 1e-6 on log-ratios of size `distance`.
    torch.testing.assert_close(value.double(), expected_value, rtol=1e-6 / distance, atol=0)
    largest = expected_gradient.abs().amax(dim=-1, keepdim=True)
    assert ((gradient - expected_gradient).abs() <= 1e-6 / distance * largest).all()


@pytest.mark.parametrize("divergence", [*BOUNDED, AlphaBeta(1, 0), AlphaBeta(0, 1), ToDi(), ToDi(2.0, False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extreme_logits(divergence, dtype):
    student, teacher = random_logits(3, 12)
    student[0, ::2] += 1e4
    student[1] -= 1e4
    teacher[1, 3] += 1e4  # one-hot
    teacher[2, 5], student[2, 5] = 1e4, -1e4
    student, teacher = student.to(dtype), teacher.to(dtype)
    value, gradient = fast(student, teacher, divergence)
    expected_value, expected_gradient = reference(student, teacher, divergence)
    assert torch.isfinite(value).all() and torch.isfinite(gradient).all()
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(value.double(), expected_value, rtol=tolerance, atol=0)
    allowed = tolerance * expected_gradient.abs().amax(dim=-1, keepdim=True) + 1e-15
    if divergence not in BOUNDED and divergence != AlphaBeta(1, 0):
        # q * rho with rho near 2e4: that is known to its rounding, and so is the gradient.
        allowed += 2e4 * torch.finfo(dtype).eps
    if divergence in MIXTURES:  # saturated where the two have no token in common: h is q times a constant, h - q H is 0
        allowed += torch.finfo(dtype).eps
    assert ((gradient - expected_gradient).abs() <= allowed).all()


@pytest.mark.parametrize("divergence", POINTS, ids=str)
def test_padding_and_columns_outside_both_vocabularies(divergence):
    student, teacher = random_logits(4, 30)
    expected_value, expected_gradient = reference(student[:, :25], teacher[:, :25], divergence)
    for junk in (-math.inf, math.inf, math.nan, 1e4):  # beyond vocab_size nothing is read
        student[:, 25:] = junk
        teacher[:, 25:] = -junk
        value, gradient = fast(student, teacher, divergence, vocab_size=25)
        assert_close((value, gradient[:, :25]), (expected_value, expected_gradient), 1e-10, 1e-10)
        assert torch.equal(gradient[:, 25:], torch.zeros(4, 5, dtype=torch.float64))

    kept = torch.ones(30, dtype=torch.bool)
    kept[[0, 7, 29]] = False
    student, teacher = random_logits(4, 30)
    expected_value, expected_gradient = reference(student[:, kept], teacher[:, kept], divergence)
    student[:, ~kept] = teacher[:, ~kept] = -math.inf
    for compute in (fast, reference):
        value, gradient = compute(student, teacher, divergence)
        assert_close((value, gradient[:, kept]), (expected_value, expected_gradient), 1e-10, 1e-10)
        assert (gradient[:, ~kept] == 0).all()


@pytest.mark.parametrize("divergence", [*BOUNDED, AlphaBeta(1, 0), AlphaBeta(2, -1), AlphaBeta(1.5, -0.3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_teacher_with_zero_probabilities(divergence, dtype):
    student, teacher = random_logits(6, 9, scale=1.0)
    teacher[:, 1:4] = -math.inf
    teacher[0] = -math.inf
    teacher[0, 2] = 0.0  # one-hot
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    expected = reference(student.to(dtype), teacher.to(dtype), divergence)
    assert_close(fast(student.to(dtype), teacher.to(dtype), divergence), expected, tolerance, tolerance)
    # One-hot teacher, beta = 0: the divergence is the cross entropy, and so is its gradient.
    if divergence == AlphaBeta(1, 0):
        label = torch.tensor([2])
        torch.testing.assert_close(expected[0][:1], F.cross_entropy(student[:1].to(dtype).double(), label)[None])


def test_small_alpha_on_a_teacher_with_zero_probabilities():
    student, teacher = random_logits(6, 9, scale=1.0)
    teacher[:, 1:4] = -math.inf
    value, gradient = fast(student, teacher, AlphaBeta(1e-9, 1.0))
    # p^alpha falls from 1 to 0 at p = 0 itself, so 1/alpha is the truth there.
    torch.testing.assert_close(value, student.softmax(-1)[:, 1:4].sum(-1) / 1e-9, rtol=1e-7, atol=0)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("divergence", [d for d in BOUNDED if d != AlphaBeta(0.8, 0.3)], ids=str)
def test_student_with_zero_probabilities(divergence):
    student, teacher = random_logits(6, 9, scale=1.0)
    student[:, 1:4] = -math.inf
    value, gradient = fast(student, teacher, divergence)
    expected_value, _ = reference(student, teacher, divergence)
    torch.testing.assert_close(value, expected_value, rtol=1e-12, atol=0)
    finite_gradient = fast(student.clamp_min(-1e4), teacher, divergence)[1]
    torch.testing.assert_close(gradient, finite_gradient, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("detach", [False, True])
def test_todi_is_infinite_only_where_it_must_be(scale, detach):
    zero, half = torch.tensor([-math.inf]).double(), torch.tensor([0.5]).double().log()
    todi = ToDi(scale, detach)
    assert todi.value(zero, half, zero - half).item() == math.inf  # the reverse KL term
    assert todi.value(half, zero, half - zero).item() == math.inf  # the forward one
    # A student that excludes a token: its grad_log_q there is -w p, or -p at w = 1.
    expected = -0.5 * (0.5 if scale == 0 else 1.0)
    assert todi.grad_log_q(half, zero, half - zero).item() == pytest.approx(expected, rel=1e-15)
    far = torch.tensor([-800.0]).double()  # exp underflows to 0, its logarithm is still finite
    assert todi.value(far, half, far - half).item() == pytest.approx(
        (0.5 if scale == 0 else 1.0) * 0.5 * (800 + half.item())
    )


def test_todi_at_a_large_scale_in_fp32():
    log_ratio = torch.linspace(-4e-3, 4e-3, 401)
    log_q = torch.full_like(log_ratio, -1.0)
    todi = ToDi(1e4, detach=False)
    expected = todi.grad_log_q(log_q.double() + log_ratio.double(), log_q.double(), log_ratio.double())
    actual = todi.grad_log_q(log_q + log_ratio, log_q, log_ratio)
    torch.testing.assert_close(actual.double(), expected, rtol=5e-6, atol=5e-7)


@pytest.mark.parametrize("divergence", POINTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input(divergence, dtype):
    student, teacher = (logits.to(dtype) for logits in random_logits(8, 200, scale=1.0))
    value, gradient = fast(student, teacher, divergence)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    expected_value, expected_gradient = reference(student, teacher, divergence)
    torch.testing.assert_close(value.double(), expected_value, rtol=1e-5, atol=0)
    largest = expected_gradient.abs().amax(dim=-1, keepdim=True)
    rounding = expected_gradient.abs() * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).tiny
    assert ((gradient.double() - expected_gradient).abs() <= 1.001 * rounding + 1e-5 * largest).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_cross_entropy_and_metrics(temperature):
    student, teacher = random_logits(3, 5, 64)
    labels = torch.randint(60, (3, 5), generator=torch.Generator().manual_seed(1))
    teacher[0, 0], student[0, 1] = student[0, 0], teacher[0, 1] + 1.0  # agreement on some
    student[0, 2, [4, 9]] = teacher[0, 2, [4, 9]] = 50.0  # a tie
    student[1, 0, 9] = student[1, 0, 30] = teacher[1, 0, 30] = 50.0  # a tie whose lowest id differs
    labels[0, 2], labels[1, 0] = 4, 30  # right, and wrong since the lower id comes first
    shard = VocabShard.megatron(64, vocab_size=60)
    leaf = student.clone().requires_grad_()
    terms = vocab_parallel_distillation(leaf, teacher, AlphaBeta(0.2, 0.7), labels, shard, temperature)
    s, t = student[..., :60], teacher[..., :60]
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
    expected = {
        "teacher lm loss": reference_cross_entropy(teacher, labels, 60),
        "kl to teacher": (log_p.exp() * (log_p - log_q)).sum(-1),
        "teacher entropy": -(log_p.exp() * log_p).sum(-1),
        "student entropy": -(log_q.exp() * log_q).sum(-1),
        "top-1 agreement": (s.argmax(-1) == t.argmax(-1)).double(),
        "top-1 accuracy": (s.argmax(-1) == labels).double(),
        "student confidence": log_q.exp().amax(-1),
    }
    assert list(terms.metrics) == list(expected)
    assert expected["top-1 agreement"][0, :3].tolist() == [1, 1, 1] and expected["top-1 agreement"][1, 0] == 0
    assert expected["top-1 accuracy"][0, 2] == 1 and expected["top-1 accuracy"][1, 0] == 0
    for name, tensor in expected.items():
        assert not terms.metrics[name].requires_grad
        torch.testing.assert_close(terms.metrics[name], tensor, rtol=1e-12, atol=1e-14, msg=name)
    torch.testing.assert_close(terms.cross_entropy, reference_cross_entropy(student, labels, 60), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        terms.cross_entropy, F.cross_entropy(s.flatten(0, 1), labels.flatten(), reduction="none").view(3, 5)
    )
    alone = vocab_parallel_divergence(student, teacher, AlphaBeta(0.2, 0.7), temperature=temperature, vocab_size=60)
    assert torch.equal(alone, terms.divergence)

    # The gradient of a mix, and of either term alone, against autograd through the dense definition.
    for of_divergence, of_cross_entropy in ((0.3, 0.7), (1.0, 0.0), (0.0, 1.0)):
        weights = torch.rand(3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        dense = student.clone().requires_grad_()
        loss = of_divergence * reference_divergence(AlphaBeta(0.2, 0.7), dense, teacher, temperature, 60)
        loss = loss + of_cross_entropy * reference_cross_entropy(dense, labels, 60)
        (wanted,) = torch.autograd.grad((weights * loss).sum(), dense)
        loss = torch.zeros(())
        if of_divergence:
            loss = of_divergence * terms.divergence
        if of_cross_entropy:
            loss = loss + of_cross_entropy * terms.cross_entropy
        (got,) = torch.autograd.grad((weights * loss).sum(), leaf, retain_graph=True)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12 * wanted.abs().max().item())


def test_label_that_no_rank_holds_is_loud():
    student, teacher = random_logits(2, 10)
    labels = torch.tensor([3, 9])
    terms = vocab_parallel_distillation(student, teacher, ToDi(), labels, VocabShard.megatron(10, vocab_size=9))
    assert terms.cross_entropy[0].isfinite() and terms.cross_entropy[1] == math.inf


def test_negative_labels_are_ignored():
    student, teacher = random_logits(3, 8)
    student.requires_grad_()
    labels = torch.tensor([2, -100, -1])
    terms = vocab_parallel_distillation(student, teacher, AlphaBeta(0.2, 0.7), labels, VocabShard(0, 8, 8))
    assert terms.cross_entropy[1:].tolist() == terms.metrics["teacher lm loss"][1:].tolist() == [0.0, 0.0]
    torch.testing.assert_close(terms.cross_entropy[:1], reference_cross_entropy(student[:1], labels[:1]))
    (gradient,) = torch.autograd.grad(terms.cross_entropy.sum(), student)
    assert gradient[0].abs().max() > 0
    assert torch.equal(gradient[1:], torch.zeros(2, 8, dtype=gradient.dtype))


@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_a_token_of_no_weight_passes_no_gradient_on(fault):
    student, teacher = random_logits(3, 8)
    clean = student.clone().requires_grad_()
    student[1, 4] = fault
    student.requires_grad_()
    weight = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)

    def gradient(of):
        labels = torch.tensor([0, 1, 2])
        terms = vocab_parallel_distillation(of, teacher, AlphaBeta(0.2, 0.7), labels, VocabShard(0, 8, 8))
        (terms.divergence + terms.cross_entropy).backward(weight)
        return of.grad

    got = gradient(student)
    assert torch.equal(got, gradient(clean))
    assert torch.equal(got[1], torch.zeros(8, dtype=got.dtype))


def test_nan_logits_are_not_hidden():
    student, teacher = random_logits(3, 10)
    student[0, 4] = math.nan
    teacher[1, 4] = math.nan
    value, gradient = fast(student, teacher, AlphaBeta(0.2, 0.7))
    assert value.isnan().tolist() == [True, True, False]
    assert gradient.isnan().any(-1).tolist() == [True, True, False]


class FrozenWeights(Divergence):
    """Detached ToDi with its weights fixed at one point: the function whose gradient detached ToDi is."""

    def __init__(self, at: ToDi, student: Tensor, teacher: Tensor) -> None:
        self.at = at
        self.w = torch.sigmoid(at.scale * (teacher.log_softmax(-1) - student.log_softmax(-1)))

    def value(self, log_p, log_q, log_ratio):
        return (self.w * log_p.exp() - (1 - self.w) * log_q.exp()) * log_ratio

    def grad_log_q(self, log_p, log_q, log_ratio):
        return self.at.grad_log_q(log_p, log_q, log_ratio)


@pytest.mark.parametrize("divergence", [it for it in POINTS if not getattr(it, "detach_mixture", False)], ids=str)
def test_gradcheck(divergence):
    student, teacher = random_logits(2, 6, scale=0.7)
    if isinstance(divergence, ToDi) and divergence.detach:
        divergence = FrozenWeights(divergence, student / 1.3, teacher / 1.3)
    torch.autograd.gradcheck(
        lambda s: vocab_parallel_divergence(s, teacher, divergence, temperature=1.3), student.requires_grad_()
    )


def test_layouts_and_chunks_do_not_matter(monkeypatch):
    student, teacher = random_logits(4, 6, 20)
    divergence = AlphaBeta(0.2, 0.7)
    value, gradient = fast(student, teacher, divergence)
    monkeypatch.setattr(kernels.get("eager"), "chunk_elements", 60)  # of fp64
    layouts = {
        "chunked": lambda x: x,
        "transposed tokens": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "vocabulary not last": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "slice": lambda x: torch.cat([x, x], dim=-1)[..., :20],
        "one token dimension": lambda x: x.flatten(0, 1),
    }
    for name, layout in layouts.items():
        leaf = layout(student.clone()).detach().requires_grad_()
        loss = vocab_parallel_divergence(leaf, layout(teacher), divergence)
        loss.sum().backward()
        assert torch.equal(loss.view(4, 6), value), name
        assert torch.equal(leaf.grad.reshape(4, 6, 20), gradient), name
    assert vocab_parallel_divergence(student[0, 0], teacher[0, 0], divergence).shape == ()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_no_tokens(shape):
    student = torch.empty(shape, requires_grad=True)
    labels = torch.empty(shape[:-1], dtype=torch.int64)
    terms = vocab_parallel_distillation(student, torch.empty(shape), ToDi(), labels, VocabShard.megatron(8))
    assert terms.divergence.shape == terms.cross_entropy.shape == shape[:-1]
    assert all(metric.shape == shape[:-1] for metric in terms.metrics.values())
    (terms.divergence + terms.cross_entropy).sum().backward()
    assert student.grad.shape == shape


class NewStorage(TorchDispatchMode):
    """Records the largest storage that any operation under it makes."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("transposed", [False, True])
def test_memory_of_forward_is_a_chunk_and_of_backward_one_gradient(monkeypatch, transposed):
    student, teacher = (logits.bfloat16() for logits in random_logits(8, 8, 128))
    if transposed:
        student, teacher = student.transpose(0, 1), teacher.transpose(0, 1)
    student.requires_grad_()
    labels = torch.zeros(8, 8, dtype=torch.int64)
    monkeypatch.setattr(kernels, "_choice", "eager")
    monkeypatch.setattr(kernels.get("eager"), "chunk_elements", 4 * 128)
    with NewStorage([student, teacher]) as forward:
        terms = vocab_parallel_distillation(student, teacher, ToDi(), labels, VocabShard.megatron(128), 2.0)
    # A chunk in fp64 (a sum's cast) or the record of 19 numbers a token; one model's logits are 16 KiB in bf16.
    assert forward.largest <= max(4 * 128 * 8, 64 * 19 * 8)
    loss = (terms.divergence + terms.cross_entropy).sum()
    with NewStorage([student, teacher]) as backward:
        loss.backward()
    assert backward.largest == student.numel() * 2


def test_autograd_contract():
    student, teacher = (logits.requires_grad_() for logits in random_logits(3, 7))
    before = student.detach().clone(), teacher.detach().clone()
    loss = vocab_parallel_divergence(student, teacher, AlphaBeta(0.5, 0.5))
    loss.sum().backward()
    assert student.grad is not None and teacher.grad is None
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])

    loss = vocab_parallel_divergence(student, teacher, AlphaBeta(0.5, 0.5))
    weights = torch.ones(3, dtype=torch.float64, requires_grad=True)  # so that the gradient is part of a graph at all
    (gradient,) = torch.autograd.grad((weights * loss).sum(), student, create_graph=True)
    with pytest.raises(ConfigError, match="differentiated once"):
        gradient.sum().backward()
    with torch.no_grad():
        assert not vocab_parallel_divergence(student, teacher, AlphaBeta(0.5, 0.5)).requires_grad


@pytest.mark.parametrize("edited", ["student", "teacher"])
def test_edit_in_place_before_backward_raises(edited):
    student, teacher = random_logits(3, 7)
    student.requires_grad_()
    loss = vocab_parallel_divergence(student, teacher, ToDi())
    with torch.no_grad():
        {"student": student, "teacher": teacher}[edited].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, True, None, "0.5", [0.5], 1j])
def test_parameters_that_are_no_finite_number_are_refused(bad):
    for build in (
        lambda: AlphaBeta(bad, 1.0),
        lambda: AlphaBeta(1.0, bad),
        lambda: ToDi(bad),
        lambda: JensenShannon(bad),
    ):
        with pytest.raises(ConfigError, match=r"finite number, got "):
            build()


def test_other_parameters_are_refused():
    with pytest.raises(ConfigError, match=r"finite alpha \+ beta"):
        AlphaBeta(1.7e308, 1.7e308)
    with pytest.raises(ConfigError, match="scale >= 0, got -1"):
        ToDi(-1.0)
    with pytest.raises(ConfigError, match=r"detach .*got 1"):
        ToDi(1.0, 1)
    assert AlphaBeta(1, -2) == AlphaBeta(1.0, -2.0)
    for bad in (0, 1, -0.1, 1.1, 1e-400):
        for build in (JensenShannon, SkewForwardKL, SkewReverseKL):
            with pytest.raises(ConfigError, match=r"between 0 and 1.*got .*kl"):
                build(bad)
    for terms, message in (
        ([], "at least one term"),
        ([(0.0, ToDi())], "weight above 0, got 0.0"),
        ([(math.nan, ToDi())], "weight to be a finite number"),
        ([(1.0, "todi")], "expected a Divergence, got 'todi'"),
    ):
        with pytest.raises(ConfigError, match=message):
            WeightedSum(terms)


def test_input_that_cannot_be_right_is_refused():
    student, teacher = random_logits(3, 8)
    labels = torch.zeros(3, dtype=torch.int64)
    ab, shard = AlphaBeta(0.5, 0.5), VocabShard.megatron(8)
    with pytest.raises(ConfigError, match=r"\[3, 8\] and \[3, 7\]"):
        vocab_parallel_divergence(student, teacher[:, :7], ab)
    with pytest.raises(ConfigError, match=r"teacher .*torch\.int64"):
        vocab_parallel_divergence(student, teacher.long(), ab)
    for bad in (0.0, -1.0, math.nan, math.inf, "2"):
        with pytest.raises(ConfigError, match=r"temperature .*above 0, got"):
            vocab_parallel_divergence(student, teacher, ab, temperature=bad)
    for bad in (0, 9, -1, 7.5, True, "8"):
        with pytest.raises(ConfigError, match=r"vocab_size .*got"):
            vocab_parallel_divergence(student, teacher, ab, vocab_size=bad)
    with pytest.raises(ConfigError, match="expected a Divergence"):
        vocab_parallel_divergence(student, teacher, "alpha_beta")
    for bad in (labels[:2], labels[:, None], labels.int()):
        with pytest.raises(ConfigError, match=r"labels of (shape|dtype)"):
            vocab_parallel_distillation(student, teacher, ab, bad, shard)
    with pytest.raises(ConfigError, match="at least 9 columns"):
        vocab_parallel_distillation(student, teacher, ab, labels, VocabShard(0, 9, 9))
    for start, stop, size in ((-1, 3, 8), (4, 3, 8), (0, 9, 8), (0, 0, 0)):
        with pytest.raises(ConfigError, match="VocabShard: expected"):
            VocabShard(start, stop, size)
    with pytest.raises(ConfigError, match="with a reference"):
        reference_divergence(FrozenWeights(ToDi(), student, teacher), student, teacher)


def test_logits_that_cannot_be_overwritten_are_refused():
    student, teacher = random_logits(3, 8)
    divergence = AlphaBeta(0.2, 0.7)

    def in_place(student, teacher=teacher):
        return vocab_parallel_divergence(student, teacher, divergence, gradient_in_place=True)

    leaf = student.requires_grad_()
    with pytest.raises(ConfigError, match="got a leaf"):
        in_place(leaf)
    with pytest.raises(ConfigError, match=r"student .*\[3, 4\].*\(8, 2\)"):
        in_place((leaf * 1)[:, ::2], teacher[:, ::2])
    both = (leaf * 1).expand(2, 3, 8).contiguous()
    with pytest.raises(ConfigError, match="one storage for both"):
        in_place(both[0], both[1])
    with torch.no_grad():  # nothing will be overwritten
        assert torch.equal(in_place(leaf), vocab_parallel_divergence(leaf, teacher, divergence))


def test_a_second_reader_of_overwritten_logits_is_told():
    student, teacher = random_logits(3, 8)
    logits = student.requires_grad_() * 1
    other = logits.square().sum()  # saves the logits
    vocab_parallel_divergence(logits, teacher, ToDi(), gradient_in_place=True).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()
