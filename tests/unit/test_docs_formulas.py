"""docs/maths.md: each formula's Python twin is the reference divergence, value and gradient."""

import re

import pytest
import torch
from pages import DOCS

from abkd_megatron import losses, vocab_parallel_divergence
from abkd_megatron.config.schema import DistillationConfig
from abkd_megatron.losses import (
    AlphaBeta,
    Divergence,
    ToDi,
    WeightedSum,
    reference_divergence,
    reference_logit_loss,
    registry,
)

MATHS = (DOCS / "maths.md").read_text()
NUMBERS = {"a": 0.7, "b": 0.4, "c": 1.7, "m": 0.3, "s": 0.2}
FUNCTIONS = {
    "sum": lambda terms: terms.sum(-1),
    "log": torch.log,
    "abs": torch.abs,
    "sign": torch.sign,
    "sigmoid": torch.sigmoid,
}
ROWS = re.findall(r"^\| `(\w+\(.*?\))` \| `(.+?)` \| `(.+?)` \|$", MATHS, re.MULTILINE)


def made(expression: str) -> Divergence:
    return eval(expression, {**vars(losses), **NUMBERS})


def distributions() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of both models, and p and q."""
    teacher, student = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return student.requires_grad_(), teacher, teacher.softmax(-1), student.detach().softmax(-1)


@pytest.mark.parametrize(("divergence", "value", "grad_log_q"), ROWS, ids=[row[0] for row in ROWS])
def test_the_formulas_are_the_references(divergence: str, value: str, grad_log_q: str) -> None:
    student, teacher, p, q = distributions()
    names = {**FUNCTIONS, **NUMBERS, "p": p, "q": q}
    wanted = reference_divergence(made(divergence), student, teacher)
    torch.testing.assert_close(eval(value, names), wanted, rtol=1e-10, atol=1e-12)
    (gradient,) = torch.autograd.grad(wanted.sum(), student)
    h = eval(grad_log_q, names)
    torch.testing.assert_close(h - q * h.sum(-1, keepdim=True), gradient, rtol=1e-10, atol=1e-12)


ESTIMATORS = re.findall(r"^\| `(k\d)` \| `(.+?)` \| `(.+?)` \| (.+?) \| (.+?) \|$", MATHS, re.MULTILINE)
MEASURED = re.findall(r"^\| (\d\S*) \| (\S+) \| `(k\d)` \|(.*)\|$", MATHS, re.MULTILINE)


@pytest.mark.parametrize(("name", "value", "slope", "mean", "of_gradient"), ESTIMATORS)
def test_the_formulas_of_the_estimators(name: str, value: str, slope: str, mean: str, of_gradient: str) -> None:
    student, teacher, p, q = distributions()
    drawn = torch.tensor([0, 3, 10, 7, 7])
    wanted = reference_logit_loss(registry.build(name, {}), student, teacher, drawn=drawn)
    names = {**FUNCTIONS, "p": p.gather(-1, drawn[:, None])[:, 0], "q": q.gather(-1, drawn[:, None])[:, 0]}
    torch.testing.assert_close(eval(value, names), wanted.detach(), rtol=1e-10, atol=1e-12)
    (gradient,) = torch.autograd.grad(wanted.sum(), student)
    hit = torch.nn.functional.one_hot(drawn, 11)
    torch.testing.assert_close(eval(slope, names) * (hit - q).T, gradient.T, rtol=1e-10, atol=1e-12)
    names = {**FUNCTIONS, "p": p, "q": q, "k": eval(value, {**FUNCTIONS, "p": p, "q": q})}
    of = {"reverse KL": AlphaBeta(0, 1), "reverse KL's": AlphaBeta(0, 1), "forward KL's": AlphaBeta(1, 0)}
    exact = reference_divergence(of[mean], student, teacher) if mean in of else eval(mean.strip("`"), names)
    torch.testing.assert_close((q * names["k"]).sum(-1), exact.detach(), rtol=1e-10, atol=1e-12)
    h = q * eval(slope, names)
    got, slopes = h - q * h.sum(-1, keepdim=True), torch.zeros_like(q)
    if of_gradient != "0":
        (slopes,) = torch.autograd.grad(reference_divergence(of[of_gradient], student, teacher).sum(), student)
    torch.testing.assert_close(got, slopes, rtol=1e-10, atol=1e-12)


def test_the_measured_table_of_the_estimators() -> None:
    assert [row[2] for row in MEASURED] == 3 * [row[0] for row in ESTIMATORS] == 3 * list(registry.ESTIMATORS)
    student, noise = torch.randn(2, 64, 2048, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    student = 3 * student
    for apart, exact, name, cells in MEASURED:
        log_p, log_q = (student + float(apart) * noise).log_softmax(-1), student.log_softmax(-1)
        q, names = log_q.exp(), {**FUNCTIONS, "p": log_p.exp(), "q": log_q.exp()}
        (value, slope), *_ = [row[1:3] for row in ESTIMATORS if row[0] == name]
        k, of_k = eval(value, names), eval(slope, names) * torch.ones_like(q)
        reverse = (q * (log_q - log_p)).sum(-1, keepdim=True)
        wanted = q * (log_q - log_p - reverse)
        mean = q * of_k - q * (q * of_k).sum(-1, keepdim=True)
        squares = (q * of_k**2 * (1 - 2 * q + (q**2).sum(-1, keepdim=True))).sum()
        found = [
            (q * k).sum(-1).mean(),
            ((q * k**2).sum(-1) - (q * k).sum(-1) ** 2).mean().sqrt(),
            (mean - wanted).norm() / wanted.norm(),
            (squares - (mean**2).sum()).sqrt() / wanted.norm(),
        ]
        assert float(exact) == pytest.approx(reverse.mean().item(), rel=0.02)
        numbers = [float(it) for it in cells.split("|")]
        assert numbers == pytest.approx([it.item() for it in found], rel=0.05, abs=1e-3)


def test_every_family_is_there() -> None:
    """All that a name can mean, so that a divergence that is added has to be written down."""
    shown = [divergence for divergence, *_ in ROWS]
    assert len(shown) == len(set(shown))
    assert {"AlphaBeta(a, 0)", "AlphaBeta(0, b)", "AlphaBeta(a, -a)", "AlphaBeta(0, 0)"} <= set(shown)
    there = [made(divergence) for divergence in shown]
    kinds = {type(divergence) for divergence in there} - {WeightedSum}
    for name in registry.DIVERGENCES:
        divergence = DistillationConfig(divergence=name).make_divergence()
        assert type(divergence) in kinds or divergence in there, name


def test_one_formula_serves_all_limits() -> None:
    """0 and 1e-9 agree to 8 digits, as the page says."""
    student, teacher, *_ = distributions()
    for alpha, beta in ((0.0, 0.7), (0.7, 0.0), (0.7, -0.7), (0.0, 0.0)):
        at, near = (
            vocab_parallel_divergence(student, teacher, AlphaBeta(alpha + by, beta + by / 2)) for by in (0.0, 1e-9)
        )
        torch.testing.assert_close(near, at, rtol=1e-8, atol=0.0)


def test_near_agreement() -> None:
    """The second-order term, and the share of ToDi's detached gradient in the full one."""
    student, _, _, q = distributions()
    step = 1e-5 * torch.randn(5, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    teacher = student.detach() + step
    rho = teacher.log_softmax(-1) - student.detach().log_softmax(-1)
    value = reference_divergence(AlphaBeta(0.7, 0.4), student, teacher)
    # The textbook form has few digits left here.
    torch.testing.assert_close(value, (q**1.1 * rho**2).sum(-1) / 2, rtol=1e-3, atol=0.0)
    for scale in (1.0, 0.4):
        detached, full = (
            torch.autograd.grad(reference_divergence(ToDi(scale, detach), student, teacher).sum(), student)[0].norm()
            for detach in (True, False)
        )
        assert detached / full == pytest.approx((1 + scale / 2) / (1 + scale), rel=1e-3)
