"""k1, k2 and k3 of reverse KL: exact means over all draws, dense twins, what needs draws, and what is rejected.

Proves: the means of k1 and k3 are reverse KL, k2's gradient has reverse KL's as its mean, k3's forward KL's, and k1's
none, by a sum over the whole vocabulary and over the draws of this package's sampler; value and gradient are those of
the formulas; on text that the student did not draw the exact divergence takes their place; and a configuration with
which labels are no draws of the student is refused by name.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from abkd_megatron.config.load import load_config
from abkd_megatron.config.rollouts import Sampling
from abkd_megatron.errors import ConfigError
from abkd_megatron.losses import (
    K1,
    K2,
    K3,
    AdaptiveKL,
    AlphaBeta,
    LogitLoss,
    WeightedSum,
    reference_divergence,
    reference_logit_loss,
)
from abkd_megatron.losses.objective import Objective
from abkd_megatron.rollouts.choice import next_tokens
from abkd_megatron.student.supported import check_text
from abkd_megatron.vocab_parallel import VocabShard, vocab_parallel_logit_loss

LOSSES = [K1(), K2(), K3()]
FORWARD, REVERSE = AlphaBeta(1.0, 0.0), AlphaBeta(0.0, 1.0)
TOKENS, VOCAB, T = 3, 17, 1.5


def logits(seed: int = 0) -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(2, TOKENS, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return student.requires_grad_(), 2 * teacher


def at_draws(loss: LogitLoss, student: Tensor, teacher: Tensor, drawn: Tensor, **how) -> Tensor:
    """The loss [n, TOKENS] at `drawn` [n, TOKENS]."""
    wide = (len(drawn), TOKENS, VOCAB)
    shard = VocabShard(0, VOCAB, VOCAB)
    return vocab_parallel_logit_loss(student.expand(wide), teacher.expand(wide), loss, shard, T, drawn=drawn, **how)


def exact(divergence: AlphaBeta, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    value = reference_divergence(divergence, student, teacher, temperature=T)
    return value.detach(), torch.autograd.grad(value.sum(), student)[0]


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_the_mean_over_all_draws(loss: LogitLoss) -> None:
    student, teacher = logits()
    every = torch.arange(VOCAB).unsqueeze(-1).expand(-1, TOKENS)
    values = at_draws(loss, student, teacher, every)
    q = (student.detach() / T).softmax(-1)
    mean = (q.T * values).sum(0)
    (slope,) = torch.autograd.grad(mean.sum(), student)
    (reverse, of_reverse), (_, of_forward) = (exact(it, student, teacher) for it in (REVERSE, FORWARD))
    if loss != K2():
        torch.testing.assert_close(mean.detach(), reverse, rtol=1e-12, atol=0)
    else:  # no estimate of the value
        assert ((mean - reverse).abs() > 0.1 * reverse).any()
    wanted = {"k1": torch.zeros_like(slope), "k2": of_reverse, "k3": of_forward}[loss.name]
    torch.testing.assert_close(slope, wanted, rtol=1e-11, atol=1e-14)


def test_k2_agrees_with_reverse_kl_to_second_order() -> None:
    student, noise = logits()
    teacher = student.detach() + 1e-4 * noise
    every = torch.arange(VOCAB).unsqueeze(-1).expand(-1, TOKENS)
    mean = ((student.detach() / T).softmax(-1).T * at_draws(K2(), student, teacher, every)).sum(0)
    torch.testing.assert_close(mean.detach(), exact(REVERSE, student, teacher)[0], rtol=1e-3, atol=0)


def test_the_mean_over_the_samplers_draws() -> None:
    """Within four standard errors of the exact value, with the noise that picks own text."""
    student, teacher = logits(seed=1)
    number = 20_000
    sampling, samples, shard = Sampling(temperature=T, seed=3), torch.arange(number), VocabShard(0, VOCAB, VOCAB)
    rows = student.detach().unsqueeze(1).expand(-1, number, -1)
    drawn = torch.stack([next_tokens(rows[at], shard, sampling, samples, at) for at in range(TOKENS)], 1)
    (value, _) = exact(REVERSE, student, teacher)
    for loss in (K1(), K3()):
        found = at_draws(loss, student, teacher, drawn).detach()
        error = found.std(0) / math.sqrt(number)
        assert ((found.mean(0) - value).abs() <= 4 * error).all()
        assert (error < 0.05 * value).all()
    for loss, of in ((K2(), REVERSE), (K3(), FORWARD), (K1(), None)):
        wide = student.detach().expand(number, -1, -1).clone().requires_grad_()
        (slopes,) = torch.autograd.grad(at_draws(loss, wide, teacher, drawn).sum(), wide)
        wanted = exact(of, student, teacher)[1] if of is not None else torch.zeros(())
        assert ((slopes.mean(0) - wanted).abs() <= 5 * slopes.std(0) / math.sqrt(number)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("apart", [2.0, 1e-2])
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_equals_the_twin(loss: LogitLoss, apart: float, dtype: torch.dtype) -> None:
    student, noise = (it.detach() for it in logits(seed=2))
    teacher = (student + apart * noise).to(dtype)
    student = student.to(dtype).requires_grad_()
    drawn = torch.tensor([[0, 16, 5]])
    value = at_draws(loss, student, teacher, drawn)[0]
    (slope,) = torch.autograd.grad(value.sum(), student)
    wide = student.detach().double().requires_grad_()
    wanted = reference_logit_loss(loss, wide, teacher, T, drawn=drawn[0])
    (of_wanted,) = torch.autograd.grad(wanted.sum(), wide)
    # fp32 has the log-ratio within 1e-7, near agreement a thousandth of it.
    tolerance = 1e-11 if dtype == torch.float64 else 3e-5 if apart > 1 else 3e-4
    torch.testing.assert_close(value.double(), wanted.detach(), rtol=tolerance, atol=1e-16)
    rounded = 2**-8 if dtype == torch.bfloat16 else tolerance
    torch.testing.assert_close(slope.double(), of_wanted, rtol=rounded, atol=rounded * of_wanted.abs().max().item())


def test_a_token_that_is_not_counted_or_not_in_the_vocabulary_has_no_loss() -> None:
    student, teacher = logits()
    for drawn, counted in (([-1, VOCAB, 3], [True, True, True]), ([1, 2, 3], [False, False, True])):
        value = at_draws(K3(), student, teacher, torch.tensor([drawn]), counted=torch.tensor([counted]))[0]
        (slope,) = torch.autograd.grad(value.sum(), student)
        assert (value[:2] == 0).all() and (slope[:2] == 0).all() and value[2] > 0


def test_they_are_infinite_where_the_teacher_excludes_what_was_drawn() -> None:
    student, teacher = logits()
    teacher[:, 4] = -math.inf
    for loss in LOSSES:
        assert (at_draws(loss, student, teacher, torch.full((1, TOKENS), 4)) == math.inf).all()


def test_without_draws_they_are_rejected() -> None:
    student, teacher = logits()
    shard = VocabShard(0, VOCAB, VOCAB)
    with pytest.raises(ConfigError, match="k3: expected the tokens that the student drew"):
        vocab_parallel_logit_loss(student, teacher, K3(), shard)
    with pytest.raises(ConfigError, match="labels of shape"):
        vocab_parallel_logit_loss(student, teacher, K3(), shard, drawn=torch.zeros(2, dtype=torch.int64))
    objective = Objective(None, logit_losses=((1.0, AdaptiveKL()), (1.0, K3())))
    check_text(objective, is_own=True)
    with pytest.raises(ConfigError, match="k3: expected training steps on text that the student drew"):
        check_text(objective, is_own=False)
    with pytest.raises(ConfigError, match="shared_vocab"):
        Objective(None, logit_losses=((1.0, K3()),), shared_vocab=9)


def test_on_data_they_are_the_exact_divergence() -> None:
    given = Objective(FORWARD, logit_losses=((0.5, K3()), (2.0, AdaptiveKL()), (0.25, K2())), kd_weight=0.3)
    wanted = WeightedSum([(1.0, FORWARD), (0.5, REVERSE), (0.25, REVERSE)])
    assert given.on_data() == replace(given, divergence=wanted, logit_losses=((2.0, AdaptiveKL()),))
    plain = Objective(FORWARD, logit_losses=((2.0, AdaptiveKL()),))
    assert plain.on_data() is plain


BASE = ["device=cpu", "teacher.load=somewhere", "data.dir=data"]
FITTING = ["distillation.on_policy={share: 1, prompt_tokens: 8, new_tokens: 8}"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distillation.divergence=k3"], "expected share 1 at every step with k3, .* got none; set"),
        (
            ["distillation.divergence=k3", "distillation.on_policy={share: 0.5, prompt_tokens: 8, new_tokens: 8}"],
            "expected share 1 at every step with k3, .* got share 0.5; set",
        ),
        (["distillation.divergence=k1", *FITTING], "got k1 only, whose gradient has mean 0"),
        (["distillation.losses=[{name: k2}, {name: k3}]", *FITTING, "distillation.temperature=2"], "got temperature"),
        *(
            (
                ["distillation.losses=[{name: k2}]", FITTING[0].replace("{", f"{{{key}: {value}, ")],
                f"draws from the student's whole distribution .* with k2, got {key} {value}",
            )
            for key, value in (("top_k", 5), ("top_p", 0.5), ("source", "a:b"), ("temperature", 0.5))
        ),
        (["distillation.divergence=k3", *FITTING, "distillation.shared_vocab=300"], "shared_vocab"),
    ],
)
def test_settings_with_which_labels_are_no_draws(words: list[str], message: str) -> None:
    config = load_config(None, [*BASE, *words], {})
    with pytest.raises(ConfigError, match=message):
        config.check("distill")


def test_settings_that_fit() -> None:
    temperature = "distillation.on_policy={share: 1, prompt_tokens: 8, new_tokens: 8, temperature: 2}"
    for words in (
        ["distillation.divergence=k2", *FITTING],
        ["distillation.losses=[{name: reverse_kl}, {name: k1}]", *FITTING],
        ["distillation.divergence=k3", temperature, "distillation.temperature=2"],
    ):
        load_config(None, [*BASE, *words], {}).check("distill")
    load_config(None, [*BASE, "distillation.divergence=k3"], {}).check("pretrain")  # which trains nothing
