"""Divergences and logit losses by name: what each name gives, one's own by dotted path, and what is refused."""

import inspect
from dataclasses import fields

import pytest
import torch

from abkd_megatron import AlphaBeta, ToDi, vocab_parallel_divergence
from abkd_megatron.config.schema import DistillationConfig
from abkd_megatron.errors import ConfigError
from abkd_megatron.losses import (
    AdaptiveKL,
    ClippedKL,
    Divergence,
    JensenShannon,
    Preference,
    SkewForwardKL,
    WeightedSum,
    reference_divergence,
)
from abkd_megatron.losses.registry import DIVERGENCES, LOGIT_LOSSES, build, parameters

OWN = """
from abkd_megatron.losses import AlphaBeta, Divergence
from abkd_megatron.losses import LogitLoss

class Cubic(Divergence):
    def __init__(self, gamma=1.0, sign=1.0):
        self.gamma, self.sign = gamma, sign
    def value(self, log_p, log_q, log_ratio):
        return self.gamma * log_q.exp() * log_ratio.square()
    def grad_log_q(self, log_p, log_q, log_ratio):
        return self.sign * self.gamma * log_q.exp() * (log_ratio.square() - 2 * log_ratio)

class Whole(Cubic):
    def value(self, log_p, log_q, log_ratio):
        return super().value(log_p, log_q, log_ratio).sum(-1)

class Gap(LogitLoss):
    num_collectives = 1
    def __call__(self, student, teacher, columns, counted):
        return columns.sums((student - teacher).abs())[0]

def maker():
    return AlphaBeta(0.3, 0.6)

def stranger():
    return print

number = 3
"""


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    (tmp_path / "own_losses.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_name_gives_a_divergence_with_a_twin(name):
    keys = {field.name for field in fields(DistillationConfig)}
    assert set(parameters(name)) <= keys  # one key of the configuration each
    divergence = DistillationConfig(divergence=name).make_divergence()
    student, teacher = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    twin = reference_divergence(divergence, student, teacher)
    torch.testing.assert_close(vocab_parallel_divergence(student, teacher, divergence), twin)


def test_parameters_reach_their_divergence():
    assert build("alpha_beta", {"alpha": 0.3, "beta": 0.6}) == AlphaBeta(0.3, 0.6)
    assert build("todi", {"scale": 2.0}) == ToDi(2.0)
    assert build("skew_forward_kl", {}) == SkewForwardKL(0.1)
    assert parameters("jensen_shannon") == ("mixture",) and parameters("forward_kl") == parameters("nothing") == ()


def test_ones_own_by_dotted_path():
    divergence = build("own_losses.Cubic", {"gamma": 2.0})
    assert isinstance(divergence, Divergence) and divergence.gamma == 2.0
    assert build("own_losses.maker", {}) == AlphaBeta(0.3, 0.6)


def test_the_self_test_leaves_the_random_numbers_alone():
    before = torch.get_rng_state()
    build("own_losses.Cubic", {})
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "jensenshannon",
            {},
            r"unknown divergence 'jensenshannon'; did you mean 'jensen_shannon'\? known: alpha_beta, ",
        ),
        ("", {}, "unknown divergence ''; known"),
        ("alpha_beta", {"alpha": 1.0}, r"alpha_beta: missing a required argument: 'beta'; it takes \(alpha"),
        ("jeffreys", {"skew": 0.1}, r"jeffreys: got an unexpected keyword argument 'skew'; it takes \(\)"),
        ("jensen_shannon", {"mixture": 1.0}, "JensenShannon: expected mixture between 0 and 1"),
        ("jensen_shannon", {"mixture": "much"}, "expected mixture to be a finite number, got 'much'"),
        ("no_such_package.Mine", {}, "no_such_package.Mine: expected a divergence there, got: No module .*PYTHONPATH"),
        ("own_losses.Missing", {}, "own_losses.Missing: expected a divergence there"),
        (".Mine", {}, "unknown divergence '.Mine'"),
        ("own_losses.number", {}, "expected a subclass of Divergence, got 3"),
        (
            "own_losses.stranger",
            {},
            "own_losses.stranger: expected a Divergence, got builtin_function_or_method; derive",
        ),
        ("own_losses.Cubic", {"delta": 1.0}, "unexpected keyword argument 'delta'"),
        ("own_losses.Cubic", {"sign": -1.0}, r"expected grad_log_q to be the derivative .* differ by 2.0e\+00"),
        ("own_losses.Cubic", {"sign": 1.001}, r"differ by 1.0e-03 of the largest \(allowed: 1e-04\)"),
        ("own_losses.Whole", {}, r"expected value to be elementwise, here \[8, 32\] torch.float64, got \[8\]"),
    ],
)
def test_refused(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        build(name, settings)


def test_losses_of_the_configuration():
    losses = [{"name": "forward_kl"}, {"name": "jensen_shannon", "weight": 0.5, "mixture": 0.3}]
    assert DistillationConfig(losses=losses).make_divergence() == WeightedSum(
        [(1.0, AlphaBeta(1, 0)), (0.5, JensenShannon(0.3))]
    )


def test_logit_losses_of_the_configuration():
    assert DistillationConfig(divergence="akl").make_divergence() is None
    assert DistillationConfig(divergence="akl").make_logit_losses() == ((1.0, AdaptiveKL()),)
    assert DistillationConfig(divergence="preference").make_logit_losses() == ((1.0, Preference(beta=0.1)),)
    losses = [
        {"name": "clipped_kl", "top_k": 5.0},
        {"name": "forward_kl", "weight": 0.5},
        {"name": "own_losses.Gap", "weight": 2.0},
        {"name": "akl", "mu": 0.7, "crossing": "head", "weight": 0.1},
    ]
    config = DistillationConfig(losses=losses)
    assert config.make_divergence() == WeightedSum([(0.5, AlphaBeta(1, 0))])
    (clipped, (weight, own), akl) = config.make_logit_losses()
    assert clipped == (1.0, ClippedKL(top_k=5)) and akl == (0.1, AdaptiveKL(0.7, "head"))
    assert weight == 2.0 and own.name == "Gap"
    with pytest.raises(ConfigError, match=r"did you mean 'sinkhorn'\? known: alpha_beta, .*preference"):
        DistillationConfig(divergence="sinkhorm").make_divergence()


def test_the_names_are_documented():
    for name, make in {**DIVERGENCES, **LOGIT_LOSSES}.items():
        assert inspect.getdoc(make), name
