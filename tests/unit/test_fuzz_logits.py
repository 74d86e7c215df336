"""Logits of any size, equal ones, zeros of both signs, columns that one model or both exclude: each loss is its twin's.

Each example puts every kind of student beside every kind of teacher. Where the fp64 twin is finite, value and gradient
are, and are the twin's; where it is infinite the value is infinite; what is NaN stays NaN.
"""

import math
import shutil

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from abkd_megatron import AlphaBeta, ToDi, kernels, vocab_parallel_divergence
from abkd_megatron.losses import (
    Divergence,
    LogitCosine,
    LogitLoss,
    LogitMSE,
    LogitPearson,
    Pearson,
    TotalVariation,
    WeightedSum,
    reference_divergence,
    reference_logit_loss,
)
from abkd_megatron.losses.registry import DIVERGENCES, LOGIT_LOSSES
from abkd_megatron.vocab_parallel import VocabShard, vocab_parallel_logit_loss

COLUMNS = 12
LARGEST = 1e37  # beyond it fp32 may or may not hold what the definition gives
few = settings(max_examples=2, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)

KINDS = ["plain", "1e4", "-1e4", "equal", "zeros", "-inf", "small", "like the other"]
EXTREME = ["3e38", "masked", "subnormal", "one-hot", "other one-hot", "fp16's largest"]


def row(kind: str, generator: torch.Generator) -> Tensor:
    logits = torch.randn(COLUMNS, generator=generator, dtype=torch.float64)
    number = torch.arange(COLUMNS)
    only = torch.full_like(logits, -math.inf)
    kinds = {
        "plain": logits,
        "like the other": logits,
        "1e4": 1e4 * logits,
        "-1e4": logits.where((number < 4) | (number > 8), -1e4),
        "equal": logits[0].expand(COLUMNS),
        "zeros": torch.where(logits > 0, 0.0, -0.0).double(),
        "-inf": logits.where((number < 1) | (number > 3), -math.inf),
        "small": 1e-3 * logits,
        "3e38": torch.where(number % 3 == 0, 3e38 * logits.sign(), logits),
        "masked": logits.where((number < 2) | (number > 6), torch.finfo(torch.float32).min),
        "subnormal": 1e-40 * logits,
        "one-hot": torch.where(number == 3, logits, only),
        "other one-hot": torch.where(number == 8, logits, only),
        "fp16's largest": torch.finfo(torch.float16).max * logits.sign(),
    }
    return kinds[kind]


def pairs(kinds: list[str], seed: int) -> tuple[Tensor, Tensor]:
    """Each kind of student beside each kind of teacher, [pairs, COLUMNS] each, of numbers that fp32 has."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for of_student in kinds:
        for of_teacher in kinds:
            student = row(of_student, generator)
            rows.append((student, student if of_teacher == "like the other" else row(of_teacher, generator)))
    student, teacher = (torch.stack(side).float() for side in zip(*rows, strict=True))
    return student, teacher


def compare(
    got: tuple[Tensor, Tensor], twin: tuple[Tensor, Tensor], student: Tensor, teacher: Tensor, slack: float = 1.0
) -> None:
    """Value and gradient of each row, against the twin's."""
    (value, gradient), (wanted, grad_log_q) = got, twin
    eps = slack * torch.finfo(value.dtype).eps
    size = size_of(student, teacher)
    infinite, huge = wanted.isinf(), wanted.isfinite() & (wanted.abs() >= LARGEST)
    assert (value[infinite] == wanted[infinite]).all()
    assert (value[huge] >= LARGEST / 2).all()
    there = wanted.isfinite() & ~huge
    assert value[there].isfinite().all() and gradient[there].isfinite().all()
    tolerance = slack * (1e-9 if value.dtype == torch.float64 else 1e-5)
    allowed = tolerance * wanted.abs() + 32 * eps * size
    assert ((value.double() - wanted).abs() <= allowed)[there].all()
    known = there & grad_log_q.isfinite().all(dim=-1)  # autograd's of the twin: 0 * inf where a model excludes a column
    allowed = tolerance * grad_log_q.abs().amax(dim=-1) + 32 * eps * size
    assert ((gradient.double() - grad_log_q).abs().amax(dim=-1) <= allowed)[known].all()
    assert known.sum() > len(known) / 4


def size_of(student: Tensor, teacher: Tensor) -> Tensor:
    """What the rounding of a row's logits is proportional to."""
    both = torch.cat([student, teacher], dim=-1)
    size = both.where(both.isfinite(), 0.0).abs().amax(dim=-1).double().clamp_min(1.0)
    return size.where(size < 1e6, 1.0)  # masks: what they leave is no less exact for them


def sums_to_zero(gradient: Tensor, there: Tensor, size: Tensor) -> None:
    """Of each row, to the rounding of its logits."""
    rest, whole = gradient.double().sum(dim=-1).abs(), gradient.double().abs().sum(dim=-1)
    assert (rest <= 64 * torch.finfo(gradient.dtype).eps * (whole + size))[there].all()


def of_divergence(divergence: Divergence, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    value = vocab_parallel_divergence(student, teacher, divergence)
    return value.detach(), torch.autograd.grad(value.sum(), student)[0]


def twin_of_divergence(divergence: Divergence, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    student = student.double().requires_grad_()
    value = reference_divergence(divergence, student, teacher.double())
    return value.detach(), torch.autograd.grad(value.sum(), student)[0]


@pytest.fixture(autouse=True)
def restored():
    before = kernels.use("auto")
    yield
    kernels.use(before)


NAMED = {name: AlphaBeta(0.2, 0.7) if name == "alpha_beta" else make() for name, make in DIVERGENCES.items()}
NAMED |= {"todi, whole": ToDi(2.0, detach=False), "alpha_beta 0.5, -0.5": AlphaBeta(0.5, -0.5)}
# Where a power below 0 is nearly infinite, value and gradient are no longer both in the range of fp32.
UNBOUNDED = ("pearson_chi_square", "neyman_chi_square", "alpha_beta 0.5, -0.5")
HAS_COMPILER = bool(shutil.which("g++") or shutil.which("c++"))
IN_CPP = [name for name, divergence in NAMED.items() if HAS_COMPILER and isinstance(divergence, AlphaBeta | ToDi)]
CASES = [*((name, "eager") for name in NAMED), *((name, "cpp") for name in IN_CPP)]


@pytest.mark.parametrize(("name", "kernel"), CASES)
@few
@given(seeds)
def test_divergences(name, kernel, seed):
    divergence = NAMED[name]
    kernels.use(kernel)
    kinds = ["plain", "equal", "zeros", "small", "like the other"] if name in UNBOUNDED else KINDS + EXTREME
    student, teacher = pairs(kinds, seed)
    twin = twin_of_divergence(divergence, student, teacher)
    there = twin[0].isfinite() & (twin[0].abs() < LARGEST)
    for dtype in (torch.float32, torch.float64) if kernel == "eager" else (torch.float32,):
        got = of_divergence(divergence, student.to(dtype), teacher.to(dtype))
        if isinstance(divergence, TotalVariation):  # |p - q| has no grad_log_q where the two differ by rounding alone
            same = (student.double().softmax(-1) - teacher.double().softmax(-1)).abs().amax(-1) < 1e-12
            got[1][same], twin[1][same] = 0.0, 0.0
        compare(got, twin, student, teacher)
        sums_to_zero(got[1], there, size_of(student, teacher))
        if not isinstance(divergence, ToDi):  # the value of which is no sum of terms of one sign at every scale
            assert (got[0][there] >= 0).all()
    for dtype in (torch.float16, torch.bfloat16):
        if kernel == "cpp" and dtype == torch.float16:
            continue
        rounded = student.to(dtype), teacher.to(dtype)
        value, gradient = of_divergence(divergence, *rounded)
        wanted, grad_log_q = twin_of_divergence(divergence, *(logits.float() for logits in rounded))
        there = wanted.isfinite() & (wanted < 1e4) & (grad_log_q.abs().amax(dim=-1) < 1e4)
        assert value[there].isfinite().all() and gradient[there].isfinite().all()
        # Computed in fp32 from these very logits; the gradient is rounded to their dtype at the end.
        rounding = 32 * torch.finfo(torch.float32).eps * size_of(*rounded).double()
        assert ((value.double() - wanted).abs() <= 1e-5 * wanted.abs() + rounding)[there].all()
        largest = grad_log_q.abs().amax(dim=-1, keepdim=True)
        allowed = (
            torch.finfo(dtype).eps * grad_log_q.abs() + 1e-5 * largest + rounding[:, None] + torch.finfo(dtype).tiny
        )
        if isinstance(divergence, TotalVariation):  # as above
            q, p = (logits.double().softmax(-1) for logits in rounded)
            there &= (q - p).abs().amax(-1) > 1e-12
        assert ((gradient.double() - grad_log_q).abs() <= allowed)[there].all()


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_nan_stays_nan(name, number):
    for side in range(2):
        logits = torch.randn(2, 3, COLUMNS, generator=torch.Generator().manual_seed(0))
        logits[side, 1, 4] = number
        logits[1 - side, 1, 5] = -math.inf
        value, gradient = of_divergence(NAMED[name], *logits)
        assert not value[1].isfinite()
        assert name == "total_variation" or not gradient[1].isfinite().all()  # torch's sign of NaN is 0
        assert number == math.inf or value[1].isnan()
        # and does not spread to other tokens
        assert value[::2].isfinite().all() and gradient[::2].isfinite().all()


@pytest.mark.parametrize("kernel", ["eager", "cpp"] if HAS_COMPILER else ["eager"])
def test_infinite_where_one_model_excludes_what_the_other_does_not(kernel):
    kernels.use(kernel)
    logits = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(0))
    less = logits.clone()
    less[:, 2] = -math.inf
    for divergence in (AlphaBeta(0, 1), ToDi(), AlphaBeta(0.5, -0.5), AlphaBeta(-0.5, 1.2)):
        assert (of_divergence(divergence, logits, less)[0] == math.inf).all()
    assert (of_divergence(AlphaBeta(1, 0), less, logits)[0] == math.inf).all()


# Where columns are as good as equal, rounding settles their order, which some of these ask for.
LOSSES = {name: make(top_k=5) if name in ("clipped_kl", "ranking") else make() for name, make in LOGIT_LOSSES.items()}


@pytest.mark.parametrize("name", LOSSES)
@few
@given(seeds)
def test_logit_losses(name, seed):
    loss = LOSSES[name]
    kinds = ["plain", "-inf", "like the other"]
    kinds += [] if name in ("clipped_kl", "preference") else ["1e4", "-1e4"]
    kinds += [] if name in ("akl", "clipped_kl", "preference", "ranking", "pearson") else ["small", "equal", "zeros"]
    student, teacher = pairs(kinds, seed)
    shard = VocabShard(0, COLUMNS, COLUMNS)
    for dtype in (torch.float32, torch.float64):
        leaf, twin_leaf = student.to(dtype).requires_grad_(), student.double().requires_grad_()
        drawn = student.nan_to_num(neginf=-1e30).argmax(-1)[:, None]
        value = vocab_parallel_logit_loss(leaf[:, None], teacher.to(dtype)[:, None], loss, shard, drawn=drawn)[:, 0]
        wanted = reference_logit_loss(loss, twin_leaf[:, None], teacher.double()[:, None], drawn=drawn)[:, 0]
        got = value.detach(), torch.autograd.grad(value.sum(), leaf)[0]
        twin = wanted.detach(), torch.autograd.grad(wanted.sum(), twin_leaf)[0]
        compare(got, twin, student, teacher, slack=64.0)  # of a student 1e-3 as steep as others, slopes are 1e3
        if not isinstance(loss, LogitMSE | LogitCosine):
            sums_to_zero(got[1], twin[0].isfinite(), size_of(student, teacher))


@pytest.mark.parametrize("loss", [LogitCosine(), LogitPearson(), Pearson()], ids=str)
@pytest.mark.parametrize("columns", [COLUMNS, 5000])
@given(seeds, st.sampled_from([1e-3, 1.0, 30.0]), st.sampled_from([1e-3, 1.0, 30.0, 1e4]))
@example(0, 1.0, 1e4)
@settings(few, max_examples=12)
def test_correlations_of_models_of_very_different_steepness(loss: LogitLoss, columns, seed, of_student, of_teacher):
    student, teacher = torch.randn(2, 4, 1, columns, generator=torch.Generator().manual_seed(seed))
    student, teacher = of_student * student, of_teacher * teacher
    value = vocab_parallel_logit_loss(student, teacher, loss, VocabShard(0, columns, columns))
    assert ((value >= -1e-6) & (value <= 2 + 1e-6)).all()
    # A softmax that is nearly uniform has few digits left once its mean is taken off.
    allowed = 1e-5 if not isinstance(loss, Pearson) else 1e-5 / min(of_student, of_teacher, 1.0)
    torch.testing.assert_close(value.double(), reference_logit_loss(loss, student, teacher), rtol=0, atol=allowed)


def test_a_sum_of_finite_and_infinite_terms_is_infinite():
    logits = torch.zeros(1, COLUMNS)
    less = logits.clone()
    less[:, 2] = -math.inf
    both = WeightedSum([(1.0, AlphaBeta(0.5, 0.5)), (1.0, AlphaBeta(0, 1))])
    assert of_divergence(both, logits, less)[0].item() == math.inf
