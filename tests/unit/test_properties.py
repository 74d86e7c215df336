"""Identities that hold for every parameter, whatever the distributions; searched by hypothesis, in fp64.

Proves: duality and scaling of the alpha-beta family, symmetries, non-negativity, zero at equality alone, upper
bounds, gradient rows that sum to 0, invariance under a shift of either model's logits, agreement with the reference
twin, forward + reverse KL as the value of ToDi at scale 1, and a cross entropy that no divergence influences.
"""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abkd_megatron import AlphaBeta, ToDi, vocab_parallel_divergence
from abkd_megatron.losses import (
    JensenShannon,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    WeightedSum,
    jeffreys,
    reference_alpha_beta,
    squared_hellinger,
)
from abkd_megatron.vocab_parallel import VocabShard, vocab_parallel_distillation

few = settings(max_examples=25, deadline=None, derandomize=True)
parameters = st.one_of(
    st.sampled_from([0.0, 1.0, 0.5, -0.5, 1e-9, -1e-9]),
    st.floats(-1.5, 1.5, allow_subnormal=False),
)
seeds = st.integers(0, 2**31)
scales = st.sampled_from([0.01, 0.3, 1.0, 2.0])
todis = st.builds(ToDi, st.sampled_from([0.0, 0.5, 1.0, 4.0]), st.booleans())
alpha_betas = st.builds(AlphaBeta, parameters, parameters)
shares = st.floats(1e-3, 1 - 1e-3)
mixtures = st.one_of(
    *(st.builds(kind, shares) for kind in (JensenShannon, SkewForwardKL, SkewReverseKL)), st.just(TotalVariation())
)
sums = st.builds(
    lambda *terms: WeightedSum(terms), *[st.tuples(st.floats(0.1, 2.0), st.one_of(alpha_betas, mixtures))] * 2
)
divergences = st.one_of(alpha_betas, todis, mixtures, sums)


def logits(seed, scale, shape=(4, 9)):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(2, *shape, generator=generator, dtype=torch.float64)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=0)


@few
@given(parameters, parameters, seeds, scales)
def test_duality(alpha, beta, seed, scale):
    student, teacher = logits(seed, scale)
    forward = vocab_parallel_divergence(student, teacher, AlphaBeta(alpha, beta))
    swapped = vocab_parallel_divergence(teacher, student, AlphaBeta(beta, alpha))
    close(forward, swapped, 1e-10)


@few
@given(shares, seeds, scales)
def test_symmetry(share, seed, scale):
    student, teacher = logits(seed, scale)
    pairs = [(d, d) for d in (JensenShannon(), jeffreys(), TotalVariation(), squared_hellinger())]
    pairs += [(JensenShannon(share), JensenShannon(1 - share)), (SkewForwardKL(share), SkewReverseKL(share))]
    for one, other in pairs:
        close(
            vocab_parallel_divergence(student, teacher, one), vocab_parallel_divergence(teacher, student, other), 1e-10
        )


@few
@given(shares, seeds, st.sampled_from([0.3, 3.0, 100.0]))
def test_upper_bounds(share, seed, scale):
    student, teacher = logits(seed, scale)
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    bounds = {
        JensenShannon(share): entropy,
        SkewForwardKL(share): -math.log(share),
        SkewReverseKL(share): -math.log(share),
        TotalVariation(): 1.0,
        squared_hellinger(): 1.0,
    }
    for divergence, bound in bounds.items():
        assert (vocab_parallel_divergence(student, teacher, divergence) <= bound * (1 + 1e-12)).all()


@few
@given(parameters, parameters, seeds, st.floats(0.5, 2.0))
def test_scaling(alpha, beta, seed, w):
    # D^(a,b)(p || q) = D^(a/w, b/w)(p^w || q^w) / w^2, elementwise: powers need not be normalized.
    student, teacher = logits(seed, 1.0)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    plain = AlphaBeta(alpha, beta).value(log_p, log_q, log_p - log_q)
    powers = AlphaBeta(alpha / w, beta / w).value(w * log_p, w * log_q, w * (log_p - log_q)) / w**2
    torch.testing.assert_close(plain, powers, rtol=1e-9, atol=1e-300)


@few
@given(
    st.floats(0.05, 1.5) | st.floats(-1.5, -0.05),
    st.floats(0.05, 1.5) | st.floats(-1.5, -0.05),
    seeds,
)
def test_reference_twin(alpha, beta, seed):
    if abs(alpha + beta) < 0.05:
        return  # the plain form cancels there
    student, teacher = logits(seed, 1.0)
    value = vocab_parallel_divergence(student, teacher, AlphaBeta(alpha, beta))
    close(value, reference_alpha_beta(student, teacher, alpha, beta), 1e-10)


@few
@given(st.one_of(alpha_betas, mixtures, sums), seeds, scales)
def test_not_negative_and_zero_at_equality_alone(divergence, seed, scale):
    student, teacher = logits(seed, scale)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    assert (divergence.value(log_p, log_q, log_p - log_q) >= 0).all()  # every term, not only the sum
    assert (vocab_parallel_divergence(student, teacher, divergence) > 0).all()
    equal = vocab_parallel_divergence(student, student.clone(), divergence)
    assert torch.equal(equal, torch.zeros_like(equal))


@few
@given(divergences, seeds, scales, st.sampled_from([0.5, 1.0, 2.0]))
def test_gradient_rows_sum_to_zero(divergence, seed, scale, temperature):
    student, teacher = logits(seed, scale)
    student.requires_grad_()
    vocab_parallel_divergence(student, teacher, divergence, temperature=temperature).sum().backward()
    assert (student.grad.sum(-1).abs() <= 1e-12 * student.grad.abs().sum(-1)).all()
    assert (student.grad.abs().sum(-1) > 0).all()


@few
@given(divergences, seeds, st.integers(-(2**20), 2**20), st.integers(-(2**20), 2**20))
def test_shift_invariance(divergence, seed, of_student, of_teacher):
    # Dyadic logits: the shifted ones are exact, so the result has to be the same to the bit.
    student, teacher = (logits(seed, 2.0) * 1024).round() / 1024
    plain = vocab_parallel_divergence(student, teacher, divergence)
    shifted = vocab_parallel_divergence(student + of_student, teacher + of_teacher, divergence)
    assert torch.equal(plain, shifted)


@few
@given(seeds, scales, st.booleans())
def test_todi_at_scale_1_is_worth_forward_plus_reverse_kl(seed, scale, detach):
    student, teacher = logits(seed, scale)
    both = sum(vocab_parallel_divergence(student, teacher, AlphaBeta(*ab)) for ab in ((1, 0), (0, 1)))
    close(vocab_parallel_divergence(student, teacher, ToDi(1.0, detach)), both, 1e-9)


@few
@given(divergences, divergences, seeds, st.sampled_from([1.0, 2.0]))
def test_cross_entropy_does_not_depend_on_the_divergence(one, other, seed, temperature):
    student, teacher = logits(seed, 1.0)
    labels = torch.tensor([0, 3, 8, 3])
    results = []
    for divergence in (one, other):
        leaf = student.clone().requires_grad_()
        terms = vocab_parallel_distillation(leaf, teacher, divergence, labels, VocabShard.megatron(9), temperature)
        terms.cross_entropy.sum().backward()
        results.append((terms.cross_entropy.detach(), leaf.grad, *terms.metrics.values()))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
