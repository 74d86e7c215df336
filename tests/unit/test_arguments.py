"""Numbers and tensors of every public function are judged by one rule each."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from abkd_megatron import AlphaBeta, ToDi, vocab_parallel_divergence
from abkd_megatron.errors import ConfigError
from abkd_megatron.losses import (
    AdaptiveKL,
    ClippedKL,
    JensenShannon,
    LogitMSE,
    Pearson,
    Preference,
    Ranking,
    Sinkhorn,
    SkewForwardKL,
    SkewReverseKL,
    WeightedSum,
)
from abkd_megatron.losses.hidden import HiddenLoss
from abkd_megatron.losses.schedule import Schedule
from abkd_megatron.losses.selection import TokenSelection
from abkd_megatron.vocab_parallel import (
    VocabShard,
    vocab_parallel_distillation,
    vocab_parallel_distillation_head,
    vocab_parallel_logit_loss,
)
from abkd_megatron.vocab_parallel.execution import Execution

V = 8
STUDENT, TEACHER = torch.randn(2, 3, V, generator=torch.Generator().manual_seed(0))
LABELS, SHARD = torch.arange(3), VocabShard.megatron(V)
HIDDEN, WEIGHT = torch.randn(3, 4), torch.randn(V, 4)


def divergence(student=STUDENT, teacher=TEACHER, **options):
    return vocab_parallel_divergence(student, teacher, ToDi(), **options)


def distillation(student=STUDENT, teacher=TEACHER, labels=LABELS, shard=SHARD, **options):
    return vocab_parallel_distillation(student, teacher, ToDi(), labels, shard, **options).divergence


def logit_loss(student=STUDENT, teacher=TEACHER, shard=SHARD, **options):
    return vocab_parallel_logit_loss(student, teacher, Pearson(), shard, **options)


def head(hidden=HIDDEN, weight=WEIGHT, teacher=HIDDEN, teacher_weight=WEIGHT, labels=LABELS, shard=SHARD, **options):
    loss, _ = vocab_parallel_distillation_head(
        hidden, weight, teacher, teacher_weight, ToDi(), labels, shard, **options
    )
    return loss


def objective(**options):
    distillation = pytest.importorskip("abkd_megatron.losses.objective", exc_type=ImportError)
    return distillation.Objective(AlphaBeta(0.2, 0.7), **options)


# What takes a number, by how it is named; each is right at 0.5.
REAL = {
    "divergence temperature": lambda it: divergence(temperature=it),
    "distillation temperature": lambda it: distillation(temperature=it),
    "logit loss temperature": lambda it: logit_loss(temperature=it),
    "head temperature": lambda it: head(temperature=it),
    "head kd_weight": lambda it: head(kd_weight=it),
    "head lm_weight": lambda it: head(lm_weight=it),
    "head student_scale": lambda it: head(student_scale=it),
    "head teacher_scale": lambda it: head(teacher_scale=it),
    "alpha": lambda it: AlphaBeta(it, 1.0),
    "beta": lambda it: AlphaBeta(1.0, it),
    "scale": ToDi,
    "mixture": JensenShannon,
    "skew forward": SkewForwardKL,
    "skew reverse": SkewReverseKL,
    "term": lambda it: WeightedSum([(it, ToDi())]),
    "mu": AdaptiveKL,
    "mass": lambda it: ClippedKL(mass=it),
    "preference": Preference,
    "steepness": lambda it: Ranking(3, it, it),
    "epsilon": lambda it: Sinkhorn(epsilon=it),
    "hidden loss": lambda it: HiddenLoss(1, 2, "mse", it),
    "schedule": Schedule.of,
    "linear schedule": lambda it: Schedule.linear(1.0, it, end=3),
    "entropy": lambda it: TokenSelection("teacher_entropy", at_least=it),
    "kl": lambda it: TokenSelection("disagreement", kl_at_least=it),
    "objective temperature": lambda it: objective(temperature=it),
    "objective kd_weight": lambda it: objective(kd_weight=it),
    "objective lm_weight": lambda it: objective(lm_weight=it),
    "objective logit loss": lambda it: objective(logit_losses=((it, Pearson()),)),
}

# Each is right at 4.
WHOLE = {
    "vocab_size": lambda it: divergence(vocab_size=it),
    "shard width": VocabShard.megatron,
    "shard vocab_size": lambda it: VocabShard.megatron(V, None, it),
    "shard": lambda it: VocabShard(0, it, it),
    "shard start": lambda it: VocabShard(it, 5, 5),
    "chunk_tokens": lambda it: head(chunk_tokens=it),
    "top_k": lambda it: ClippedKL(top_k=it),
    "ranking": Ranking,
    "group": Sinkhorn,
    "iterations": lambda it: Sinkhorn(iterations=it),
    "every": lambda it: TokenSelection("every", n=it),
    "count": lambda it: Schedule.piecewise([(it, 1.0)]),
    "student layer": lambda it: HiddenLoss(it, 1, "mse"),
    "teacher layer": lambda it: HiddenLoss(1, it, "mse"),
    "execution chunk_tokens": lambda it: Execution(chunk_tokens=it),
    "objective shared_vocab": lambda it: objective(shared_vocab=it),
}

FLAGS = {
    "divergence in place": lambda it: divergence(gradient_in_place=it),
    "distillation in place": lambda it: distillation(gradient_in_place=it),
    "into_main_grad": lambda it: head(into_main_grad=it),
    "detach": lambda it: ToDi(detach=it),
    "centered": LogitMSE,
    "projector": lambda it: HiddenLoss(1, 2, "mse", projector=it),
    "execution in place": lambda it: Execution(gradient_in_place=it),
    "execution diagnostics": lambda it: Execution(diagnostics=it),
    "objective temperature_squared": lambda it: objective(temperature_squared=it),
}

NO_NUMBERS = [True, np.bool_(True), None, "1", [1.0], 1j, math.nan, math.inf, -math.inf, torch.ones(()), np.ones(1)]


def same(one, other) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("make", REAL.values(), ids=REAL)
def test_a_number_is_of_any_kind(make):
    wanted = make(0.5)
    for number in (np.float32(0.5), np.float64(0.5), np.float16(0.5), Fraction(1, 2)):
        assert same(make(number), wanted)
    for bad in NO_NUMBERS:
        if bad is None and make is REAL["mass"]:
            continue
        if bad is None and make in (REAL["entropy"], REAL["kl"]):
            continue
        with pytest.raises(ConfigError, match="got"):
            make(bad)
    with pytest.raises(ConfigError, match="got"):
        make(10**400)


@pytest.mark.parametrize("make", WHOLE.values(), ids=WHOLE)
def test_a_whole_number_is_of_any_kind(make):
    wanted = make(4)
    for number in (4.0, np.int64(4), np.uint8(4), np.float32(4), Fraction(4)):
        assert same(make(number), wanted)
    for bad in (*NO_NUMBERS, 4.5, -1, np.int64(-1)):
        if bad is None and make in (WHOLE["vocab_size"], WHOLE["shard vocab_size"], WHOLE["chunk_tokens"]):
            continue
        if bad is None and make in (WHOLE["execution chunk_tokens"], WHOLE["objective shared_vocab"], WHOLE["top_k"]):
            continue
        with pytest.raises(ConfigError, match="got"):
            make(bad)


@pytest.mark.parametrize("make", FLAGS.values(), ids=FLAGS)
def test_a_flag_is_a_bool(make):
    assert same(make(np.bool_(False)), make(False))
    for bad in (0, 1, 1.0, "true", None, torch.tensor(True)):
        with pytest.raises(ConfigError, match="true or false"):
            make(bad)


SELECTED = torch.tensor([True, False, True])

# What takes a tensor: the call, and one that is right.
TENSORS = {
    "student logits": (lambda it: divergence(student=it), STUDENT),
    "teacher logits": (lambda it: divergence(teacher=it), TEACHER),
    "distilled student logits": (lambda it: distillation(student=it), STUDENT),
    "distilled teacher logits": (lambda it: distillation(teacher=it), TEACHER),
    "labels": (lambda it: distillation(labels=it), LABELS),
    "selected": (lambda it: distillation(teacher=TEACHER[SELECTED], selected=it), SELECTED),
    "logit loss student": (lambda it: logit_loss(student=it), STUDENT),
    "logit loss teacher": (lambda it: logit_loss(teacher=it), TEACHER),
    "counted": (lambda it: logit_loss(counted=it), SELECTED),
    "head hidden": (lambda it: head(hidden=it), HIDDEN),
    "head weight": (lambda it: head(weight=it), WEIGHT),
    "head teacher": (lambda it: head(teacher=it), HIDDEN),
    "head teacher weight": (lambda it: head(teacher_weight=it), WEIGHT),
    "head labels": (lambda it: head(labels=it), LABELS),
    "head token weights": (lambda it: head(token_weights=it), torch.ones(3)),
    "head selected": (lambda it: head(selected=it), SELECTED),
}


@pytest.mark.parametrize("call, right", TENSORS.values(), ids=TENSORS)
def test_a_tensor_is_a_tensor(call, right):
    call(right)
    for bad in (
        right.numpy(),
        right.tolist(),
        "logits",
        right.to("meta"),
        right.to_sparse(),
        right.to(torch.complex64),
    ):
        with pytest.raises(ConfigError, match="expected"):
            call(bad)


@pytest.mark.parametrize("call", [distillation, logit_loss, head])
def test_a_shard_is_a_shard(call):
    for bad in (None, V, (0, V, V)):
        with pytest.raises(ConfigError, match="expected a VocabShard"):
            call(shard=bad)
