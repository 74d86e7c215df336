"""Choice of a token from the whole vocabulary on one rank: padding, ties, noise, nucleus."""

import pytest
import torch

from abkd_megatron.config.rollouts import Sampling
from abkd_megatron.errors import ConfigError
from abkd_megatron.rollouts.choice import coin, gumbel, next_tokens
from abkd_megatron.vocab_parallel import VocabShard


def test_padding_is_never_chosen_and_ties_go_to_the_smallest_id() -> None:
    logits = torch.zeros(3, 12)
    logits[:, 10:] = 50.0
    logits[1, [4, 7]] = 2.0
    logits[2] = -100.0
    shard = VocabShard.megatron(12, vocab_size=10)
    samples = torch.arange(3)
    assert next_tokens(logits, shard, Sampling(temperature=0.0), samples, 5).tolist() == [0, 4, 0]
    for seed in range(20):
        assert next_tokens(logits, shard, Sampling(seed=seed, top_k=12, top_p=1.0), samples, 5).max() < 10


def test_frequencies_are_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, -torch.inf]).expand(20000, -1)
    found = next_tokens(logits, VocabShard.megatron(5), Sampling(temperature=2.0), torch.arange(20000), 3)
    counts = torch.bincount(found, minlength=5) / 20000
    torch.testing.assert_close(counts, (logits[0] / 2).softmax(-1), rtol=0, atol=0.015)


@pytest.mark.parametrize("top_p, kept", [(0.1, {2}), (0.6, {2}), (0.7, {2, 1}), (0.95, {2, 1, 0}), (1.0, {0, 1, 2, 3})])
def test_nucleus_is_the_smallest_set_with_the_mass(top_p: float, kept: set[int]) -> None:
    probabilities = torch.tensor([0.1, 0.27, 0.61, 0.02])
    logits = probabilities.log().expand(3000, -1)
    found = next_tokens(logits, VocabShard.megatron(4), Sampling(top_p=top_p), torch.arange(3000), 0)
    assert set(found.tolist()) == kept


def test_an_id_is_in_the_vocabulary_even_of_logits_that_are_not_numbers() -> None:
    logits = torch.full((4, 12), torch.nan)
    for sampling in (Sampling(temperature=0.0), Sampling(), Sampling(top_k=3), Sampling(top_p=0.5)):
        found = next_tokens(logits, VocabShard.megatron(12, vocab_size=10), sampling, torch.arange(4), 0)
        assert ((found >= 0) & (found < 10)).all()


def test_top_k_comes_before_top_p() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(2000, -1)
    found = next_tokens(logits, VocabShard.megatron(4), Sampling(top_k=2, top_p=0.5), torch.arange(2000), 0)
    assert set(found.tolist()) == {0}  # 0.4 of 0.7


def test_noise_depends_on_each_of_its_arguments() -> None:
    samples, ids = torch.tensor([0, 1]), torch.arange(50)
    first = gumbel(samples, 3, ids, 0)
    assert torch.equal(first, gumbel(samples, 3, ids, 0))
    assert torch.equal(first[:, 7:9], gumbel(samples, 3, ids[7:9], 0))
    others = [first.flip(0), gumbel(samples, 4, ids, 0), gumbel(samples, 3, ids, 1), gumbel(samples, 3, ids + 1, 0)]
    assert not any((other == first).any() for other in others)
    many = gumbel(torch.arange(2000), 0, ids, -5)
    assert many.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert many.var().item() == pytest.approx(1.6449, abs=0.05)


def test_coins_are_uniform_and_repeat() -> None:
    tosses = [coin(3, number) for number in range(4000)]
    assert tosses[:10] == [coin(3, number) for number in range(10)]
    assert all(0 <= toss < 1 for toss in tosses)
    assert sum(toss < 0.25 for toss in tosses) / 4000 == pytest.approx(0.25, abs=0.03)
    assert tosses[:10] != [coin(4, number) for number in range(10)]


@pytest.mark.parametrize("given", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_numbers_out_of_range_are_rejected(given: dict) -> None:
    with pytest.raises(ConfigError):
        Sampling(**given)
