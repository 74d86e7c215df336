"""Records of sharded logits are those of the dense fp64 distribution, on 1, 2 and 4 ranks."""

import pytest
import torch
import torch.distributed as dist
from harness import CollectiveCounter, run_distributed

from abkd_megatron.errors import ConfigError
from abkd_megatron.vocab_parallel import VocabShard
from abkd_megatron.vocab_parallel.noise import places_in_tail
from abkd_megatron.vocab_parallel.truncate import truncate

SIZE, TOKENS = 37, 6
# (K, temperature, excluded columns), with shards of unequal width.
CASES = [(1, 1.0, 0), (8, 1.0, 0), (8, 2.0, 0), (20, 0.5, 0), (37, 1.0, 0), (37, 1.0, 3), (8, 1.0, 33)]
BOUNDS = {1: [0, 37], 2: [0, 29, 37], 4: [0, 11, 11, 30, 37]}
PADDING = 3


def logits(excluded: int, dtype: torch.dtype) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    found = 4 * torch.randn(TOKENS, SIZE, generator=draw, dtype=torch.float64)
    found[:, torch.randperm(SIZE, generator=draw)[:excluded]] = -torch.inf
    return found.to(dtype)


LABELS = torch.tensor([0, 36, 11, 29, 30, 5])
PLACES = places_in_tail(LABELS.view(2, 3), 9)
PLACES[0, 0], PLACES[1, -1] = 0.0, 1.0


def of_ranks(rank: int, world_size: int):
    start, stop = BOUNDS[world_size][rank : rank + 2]
    group = dist.group.WORLD if world_size > 1 else None
    found = []
    for k, temperature, excluded in CASES:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            shard = VocabShard(start, stop, SIZE, group)
            mine = logits(excluded, dtype)[:, start:stop]
            mine = torch.nn.functional.pad(mine, (0, PADDING), value=9.0)  # padding is not read
            with CollectiveCounter() as counter:
                records = truncate(mine, LABELS, shard, k, temperature)
            found.append((records, len(counter.collectives)))
    return found


def draws_of_ranks(rank: int, world_size: int):
    start, stop = BOUNDS[world_size][rank : rank + 2]
    shard = VocabShard(start, stop, SIZE, dist.group.WORLD if world_size > 1 else None)
    found = []
    for k, temperature, excluded in CASES:
        mine = torch.nn.functional.pad(logits(excluded, torch.float32)[:, start:stop], (0, PADDING), value=9.0)
        with CollectiveCounter() as counter:
            found.append(truncate(mine, LABELS, shard, k, temperature, PLACES))
        assert len(counter.collectives) == (0 if world_size == 1 else 3)
    return found


def check_draws(found, k: int, temperature: float, excluded: int) -> None:
    """The tokens at the draws' places in the tail, in the order of ids."""
    log_p = (logits(excluded, torch.float32).double() / temperature).log_softmax(-1)
    for row in range(TOKENS):
        tail = log_p[row].exp().scatter(-1, found.ids[row, :k].long(), 0.0)
        wanted = {}
        for place in PLACES[row] if tail.sum() > 0 else ():
            at = int(torch.searchsorted(tail.cumsum(-1), place * tail.sum(), right=True))
            at = min(at, int(tail.nonzero().max()))
            wanted[at] = wanted.get(at, 0) + 1
        drawn = found.ids[row, k:].tolist()
        got = {at: count for at, count in zip(drawn, found.draws[row].tolist(), strict=True) if at >= 0}
        assert got == wanted and found.draws[row].sum() == sum(wanted.values())
        for at, value in zip(drawn, found.log_probs[row, k:].tolist(), strict=True):
            assert at < 0 or value == pytest.approx(float(log_p[row, at]), rel=2e-6)


def check(found, k: int, temperature: float, excluded: int, dtype: torch.dtype) -> None:
    whole = logits(excluded, dtype).double()
    log_p, at_1 = (whole / temperature).log_softmax(-1), whole.log_softmax(-1)
    assert found.ids.shape == (TOKENS, k)
    wanted = log_p.sort(dim=-1, descending=True).values
    rest = wanted[:, k:].logsumexp(-1) if k < SIZE else torch.full((TOKENS,), -torch.inf, dtype=torch.float64)
    p = at_1.exp()
    close = {"rtol": 2e-6, "atol": 2e-6}
    torch.testing.assert_close(found.log_probs.double(), wanted[:, :k], **close)
    torch.testing.assert_close(log_p.gather(-1, found.ids.long()), wanted[:, :k], **close)
    assert all(len(set(row)) == k for row in found.ids.tolist())
    torch.testing.assert_close(found.log_rest.double(), rest, **close)
    torch.testing.assert_close(found.entropy.double(), -torch.where(p > 0, p * at_1, 0.0).sum(-1), **close)
    torch.testing.assert_close(found.label_log_prob.double(), at_1[range(TOKENS), LABELS], **close)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_records_are_those_of_the_whole_vocabulary(world_size: int) -> None:
    ranks = [of_ranks(0, 1)] if world_size == 1 else run_distributed(of_ranks, world_size)
    for results in zip(*ranks, strict=True):
        first = vars(results[0][0])
        assert all(
            torch.equal(of[name], first[name])
            for of in (vars(it) for it, _ in results)
            for name in first
            if first[name] is not None
        )
        assert {number for _, number in results} == {0 if world_size == 1 else 2}
    cases = [(*case, dtype) for case in CASES for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    for (records, _), case in zip(ranks[0], cases, strict=True):
        check(records, *case)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_draws_are_those_of_the_whole_vocabulary(world_size: int) -> None:
    ranks = [draws_of_ranks(0, 1)] if world_size == 1 else run_distributed(draws_of_ranks, world_size)
    for *found, case in zip(*ranks, CASES, strict=True):
        for other in found[1:]:
            assert all(torch.equal(it, vars(found[0])[name]) for name, it in vars(other).items())
        check_draws(found[0], *case)


def test_draws_of_a_tail_far_below_the_kept_tokens() -> None:
    whole = torch.tensor([[500.0, 0.0, -1.0, -30.0]])
    found = truncate(
        whole, torch.tensor([0]), VocabShard(0, 4, 4), 1, 1.0, torch.tensor([[0.0, 0.5, 0.999999]]).double()
    )
    assert found.ids[0, 1:].tolist() == [1, -1, 2] and found.draws[0].tolist() == [2, 0, 1]


def test_a_rest_too_small_for_a_difference() -> None:
    whole = torch.tensor([[50.0, 0.0, -10.0, -11.0]])
    found = truncate(whole, torch.tensor([0]), VocabShard(0, 4, 4), 2)
    wanted = whole.double().log_softmax(-1)[0, 2:].logsumexp(-1)
    torch.testing.assert_close(found.log_rest.double()[0], wanted, rtol=1e-6, atol=0.0)


def test_k_beyond_the_vocabulary() -> None:
    for k in (0, 5):
        with pytest.raises(ConfigError):
            truncate(torch.zeros(1, 4), torch.tensor([0]), VocabShard(0, 4, 4), k)
