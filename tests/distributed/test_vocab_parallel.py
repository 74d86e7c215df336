"""The engine on a sharded vocabulary is the dense fp64 twin, on 1, 2 and 4 gloo ranks.

Proves, for alpha-beta at its interior and every limit, ToDi, mixtures, total variation and weighted sums: value,
gradient of each shard, cross entropy and metrics, in fp64, fp32 and bf16; shards of unequal width, padded, wholly
padding, wholly excluded, in another order than the ranks'; temperature; results equal to the bit on all ranks; 2
collectives forward, 0 backward, 0 on one rank. Also that the harness reports the rank that failed and ends a hang. One
launch a world size runs all cases; the tests then read its results.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from harness import CollectiveCounter, RankFailed, chosen, run_distributed
from torch import Tensor

from abkd_megatron import AlphaBeta, ToDi, kernels, vocab_parallel_divergence
from abkd_megatron.errors import ConfigError
from abkd_megatron.losses import (
    Divergence,
    JensenShannon,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    WeightedSum,
    reference_cross_entropy,
    reference_divergence,
)
from abkd_megatron.vocab_parallel import VocabShard, passes, vocab_parallel_distillation

WEIGHTED_JEFFREYS = WeightedSum([(0.5, AlphaBeta(1, 0)), (2.0, AlphaBeta(0, 1))])
WORLDS = [1, 2, 4]
TOKENS = (2, 3)
DIVERGENCES = [
    AlphaBeta(1, 0),
    AlphaBeta(0, 1),
    AlphaBeta(0.5, 0.5),
    AlphaBeta(0.2, 0.7),
    AlphaBeta(0.8, 0.3),
    AlphaBeta(1, 1),
    AlphaBeta(0.5, 0),
    AlphaBeta(0, 0.5),
    AlphaBeta(0.5, -0.5),
    AlphaBeta(0, 0),
    AlphaBeta(-0.5, 1.2),
    ToDi(1.0),
    ToDi(1.0, detach=False),
    ToDi(2.0),
    ToDi(0.0, detach=False),
    JensenShannon(0.3),
    SkewForwardKL(),
    SkewReverseKL(),
    SkewReverseKL(detach_mixture=True),
    TotalVariation(),
    WEIGHTED_JEFFREYS,
    WeightedSum([(1.0, ToDi()), (0.5, AlphaBeta(2, -1))]),
    WeightedSum([(1.0, JensenShannon()), (0.5, AlphaBeta(0.2, 0.7))]),
]


@dataclass(frozen=True)
class Case:
    divergence: Divergence
    dtype: torch.dtype = torch.float64
    layout: str = "padded"
    temperature: float = 1.0
    equal: bool = False
    kernel: str = "auto"
    reduced: bool = False
    """As in a group too large to gather its records."""

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        others = f"{'-equal' * self.equal}-{self.kernel}{'-reduced' * self.reduced}"
        return f"{self.divergence}-{dtype}-{self.layout}-T{self.temperature}{others}"


LAYOUTS = ["even", "uneven", "padded", "last shard all padding", "shard excluded", "reversed"]
CASES = [Case(d, dtype) for d in DIVERGENCES for dtype in (torch.float64, torch.float32, torch.bfloat16)]
CASES += [
    Case(d, layout=layout, temperature=temperature)
    for d in (AlphaBeta(0.2, 0.7), ToDi(), JensenShannon(0.3))
    for layout in LAYOUTS
    for temperature in (1.0, 2.0)
    if (layout, temperature) != ("padded", 1.0)
]
CASES += [Case(d, torch.float32, "uneven", 2.0, equal=True) for d in (AlphaBeta(0.2, 0.7), AlphaBeta(0, 0), ToDi())]
CASES += [Case(d, torch.float32, kernel="eager") for d in DIVERGENCES]
CASES += [Case(d, dtype, reduced=True) for d in DIVERGENCES for dtype in (torch.float32, torch.bfloat16)]
CASES += [
    Case(d, torch.float32, layout, temperature, reduced=True)
    for d in (AlphaBeta(0.2, 0.7), ToDi())
    for layout in LAYOUTS
    for temperature in (1.0, 2.0)
    if (layout, temperature) != ("padded", 1.0)
]
CASES += [Case(d, torch.float32, "uneven", 2.0, equal=True, reduced=True) for d in (AlphaBeta(0.2, 0.7), ToDi())]


def bounds(case: Case, world_size: int) -> list[tuple[int, int, int]]:
    """(start, stop, width) of every rank's shard."""
    ranks = range(world_size)
    if case.layout == "uneven":
        edges = [507 * rank // world_size for rank in range(world_size + 1)]
        return [(edges[rank], edges[rank + 1], edges[rank + 1] - edges[rank]) for rank in ranks]
    width = 512 // world_size
    size = {"padded": 500, "last shard all padding": max(width * (world_size - 1) - 5, 7)}.get(case.layout, 512)
    shards = [(min(rank * width, size), min((rank + 1) * width, size), width) for rank in ranks]
    return shards[::-1] if case.layout == "reversed" else shards


def dense_inputs(case: Case, world_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student and teacher logits over the real vocabulary, labels, each token's weights of both losses."""
    shards = bounds(case, world_size)
    size = max(stop for _, stop, _ in shards)
    generator = torch.Generator().manual_seed(7)
    student, teacher = 1.5 * torch.randn(2, *TOKENS, size, generator=generator, dtype=torch.float64)
    student[0, 0, [2, -2]] = 7.0  # a tie of tokens on the first and on the last rank
    teacher[0, 0, [2, -2]] = 7.0
    student[0, 1, [2, -2]] = 7.0
    teacher[0, 1, -2] = 7.0
    # Different tokens that stand in the same column of two shards are no agreement.
    student[1, 0, shards[0][0] + 3] = 7.0
    teacher[1, 0, shards[1][0] + 3 if world_size > 1 and shards[1][0] < shards[1][1] else 6] = 7.0
    if case.layout == "shard excluded" and world_size > 1:
        start, stop, _ = shards[1]
        student[0, :, start:stop] = teacher[0, :, start:stop] = -torch.inf
    if case.equal:
        teacher = student.clone()
    labels = torch.tensor([[2, size - 2, 0], [size // 2, size - 1, 5]])
    weights = torch.rand(2, *TOKENS, generator=generator, dtype=torch.float64)
    return student.to(case.dtype), teacher.to(case.dtype), labels, weights


def run_case(case: Case, rank: int, world_size: int, group: dist.ProcessGroup | None) -> dict:
    kernels.use(case.kernel)
    passes.GATHER_UP_TO = 1 if case.reduced else 16
    student, teacher, labels, weights = dense_inputs(case, world_size)
    start, stop, width = bounds(case, world_size)[rank]

    def local(logits: Tensor) -> Tensor:
        shard = logits.new_full((*TOKENS, width), torch.nan)  # padding is not read
        shard[..., : stop - start] = logits[..., start:stop]
        return shard

    student_shard, teacher_shard = local(student).requires_grad_(), local(teacher)
    shard = VocabShard(start, stop, student.shape[-1], group)
    if case.layout not in ("uneven", "reversed"):
        assert VocabShard.megatron(width, group, shard.size) == shard
    with CollectiveCounter() as forward:
        terms = vocab_parallel_distillation(
            student_shard, teacher_shard, case.divergence, labels, shard, case.temperature
        )
    losses = (terms.divergence, terms.cross_entropy)
    loss = sum((weight * term).sum() for weight, term in zip(weights, losses, strict=True))
    with CollectiveCounter() as backward:
        (gradient,) = torch.autograd.grad(loss, student_shard, retain_graph=True)
    of_divergence, of_cross_entropy = (
        torch.autograd.grad(term.sum(), student_shard, retain_graph=True)[0] for term in losses
    )

    with CollectiveCounter() as alone_forward:
        vocab_size = shard.size if case.layout in ("padded", "last shard all padding") else None
        alone = vocab_parallel_divergence(
            *(student_shard, teacher_shard, case.divergence),
            tp_group=group,
            vocab_size=vocab_size,
            temperature=case.temperature,
        )
    (alone_gradient,) = torch.autograd.grad(alone.sum(), student_shard)
    assert torch.equal(alone, terms.divergence)
    assert torch.equal(alone_gradient, of_divergence)
    assert backward.operations > 0

    logits = student_shard.clone()
    in_place = vocab_parallel_distillation(
        logits, teacher_shard, case.divergence, labels, shard, case.temperature, gradient_in_place=True
    )
    loss = sum((weight * term).sum() for weight, term in zip(weights, in_place[:2], strict=True))
    (same,) = torch.autograd.grad(loss, student_shard, retain_graph=True)
    assert torch.equal(same, gradient)
    assert torch.equal(logits.detach(), gradient)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, student_shard)
    return {
        "terms": terms,
        "gradient": gradient,
        "of_divergence": of_divergence,
        "of_cross_entropy": of_cross_entropy,
        "forward": forward.collectives,
        "alone_forward": alone_forward.collectives,
        "backward": backward.collectives,
    }


def run_cases(rank: int, world_size: int, indices: Sequence[int]) -> dict:
    group = dist.group.WORLD if world_size > 1 else None
    results = {"cases": {index: run_case(CASES[index], rank, world_size, group) for index in indices}}
    if world_size == 1:
        return results
    # Groups of one rank, and a group that is not the world.
    own = [dist.new_group([other]) for other in range(world_size)][rank]
    results["group of one"] = {index: run_case(CASES[index], 0, 1, own) for index in range(3)}
    last_two = dist.new_group([world_size - 2, world_size - 1])
    if rank >= world_size - 2:
        here = dist.get_rank(last_two)
        results["last two"] = {index: run_case(CASES[index], here, 2, last_two) for index in range(3)}
    else:
        with pytest.raises(ConfigError, match="contains this rank"):
            VocabShard.megatron(8, last_two)
    with pytest.raises(ConfigError, match=rf"vocab_size .*{8 * world_size} \({world_size} "):
        VocabShard.megatron(8, group, 8 * world_size + 1)
    return results


def detached(results: dict) -> dict:
    """Results as plain tensors, for a graph cannot travel between processes."""
    for cases in results.values():
        for result in cases.values():
            terms = result["terms"]
            result["terms"] = (terms.divergence.detach(), terms.cross_entropy.detach(), terms.metrics)
    return results


def rank_main(rank: int, world_size: int, indices: Sequence[int]) -> dict:
    return detached(run_cases(rank, world_size, indices))


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world_size: f"ranks{world_size}")
def ranks(request) -> list[dict]:
    if request.param == 1:
        return [rank_main(0, 1, chosen(request))]
    return run_distributed(rank_main, request.param, chosen(request))


def check(case: Case, results: list[dict]) -> None:
    """Results of all ranks for one case against the dense twin."""
    world_size = len(results)
    student, teacher, labels, weights = dense_inputs(case, world_size)
    dense = student.double().requires_grad_()
    divergence = reference_divergence(case.divergence, dense, teacher, case.temperature)
    cross_entropy = reference_cross_entropy(dense, labels)
    tolerance = 1e-10 if case.dtype == torch.float64 else 1e-5

    log_q, log_p = dense.detach().log_softmax(-1), teacher.double().log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    metrics = {
        "teacher lm loss": reference_cross_entropy(teacher, labels),
        "kl to teacher": (p * (log_p - log_q)).nansum(-1),
        "teacher entropy": -(p * log_p).nansum(-1),
        "student entropy": -(q * log_q).nansum(-1),
        "top-1 agreement": (student.argmax(-1) == teacher.argmax(-1)).double(),
        "top-1 accuracy": (student.argmax(-1) == labels).double(),
        "student confidence": q.amax(-1),
    }
    if not case.equal:
        assert metrics["top-1 agreement"].flatten()[[0, 1, 3]].tolist() == [1, 0, 0]
    for result in results:
        of_divergence, of_cross_entropy, of_metrics = result["terms"]
        assert of_divergence.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(of_divergence.double(), divergence.detach(), rtol=tolerance, atol=0)
        torch.testing.assert_close(of_cross_entropy.double(), cross_entropy.detach(), rtol=tolerance, atol=0)
        assert list(of_metrics) == list(metrics)
        for name, expected in metrics.items():
            torch.testing.assert_close(
                of_metrics[name].double(),
                expected,
                rtol=tolerance,
                atol=1e-15,
                msg=lambda m, n=name: f"{n}: {m}",
            )

    wanted = {
        "of_divergence": divergence.sum(),
        "of_cross_entropy": cross_entropy.sum(),
        "gradient": (weights[0] * divergence + weights[1] * cross_entropy).sum(),
    }
    for name, loss in wanted.items():
        (expected,) = torch.autograd.grad(loss, dense, retain_graph=True)
        largest = expected.abs().amax(dim=-1, keepdim=True)
        for (start, stop, _), result in zip(bounds(case, world_size), results, strict=True):
            shard = result[name]
            assert shard.dtype == case.dtype
            got, padding = shard[..., : stop - start].double(), shard[..., stop - start :]
            assert torch.equal(padding, torch.zeros_like(padding)), name
            allowed = tolerance * largest
            if case.dtype == torch.bfloat16:  # rounded once, when it is written
                allowed = allowed + expected[..., start:stop].abs() * 2**-8
            assert ((got - expected[..., start:stop]).abs() <= allowed).all(), name


@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(case) for case in CASES])
def test_equals_the_dense_twin(ranks, index):
    case, results = CASES[index], [result["cases"][index] for result in ranks]
    if case.equal:
        for result in results:
            for zero in (result["terms"][0], result["of_divergence"]):
                # A reduction may add the two models' sums up in different orders.
                assert zero.abs().max() <= (1e-15 if case.reduced else 0.0)
        return
    check(case, results)


def test_losses_are_bit_equal_on_all_ranks(ranks):
    for first, *others in zip(*(result["cases"].values() for result in ranks), strict=True):
        for other in others:
            for mine, theirs in zip(first["terms"][:2], other["terms"][:2], strict=True):
                assert torch.equal(mine, theirs)
            for name, metric in first["terms"][2].items():
                assert torch.equal(metric, other["terms"][2][name]), name


def test_collectives(ranks):
    for result in ranks:
        for index, found in result["cases"].items():
            case = CASES[index]
            # The value of ToDi at scale 1 separates too; its slope with detached weights follows on its own.
            separates = isinstance(case.divergence, AlphaBeta)
            separates |= case.divergence in (ToDi(1.0, detach=False), WEIGHTED_JEFFREYS)
            first, second = ["allgather"], ["allgather"]
            if case.reduced:  # the maxima, then the sums
                first, second = ["allreduce"] * 2, ["allreduce"]
            wanted = [] if len(ranks) == 1 else first if separates else first + second
            assert found["forward"] == found["alone_forward"] == wanted
            assert found["backward"] == []
        for found in result.get("group of one", {}).values():
            assert found["forward"] == found["alone_forward"] == found["backward"] == []


def test_groups_other_than_the_world(ranks):
    if len(ranks) == 1:
        pytest.skip("one rank has no group")
    for index, case in enumerate(CASES[:3]):
        for result in ranks:
            check(case, [result["group of one"][index]])
        check(case, [result["last two"][index] for result in ranks[-2:]])


def fail_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("the cause")
    dist.barrier()


def hang_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(3600)
    dist.barrier()


def test_harness_reports_the_rank_that_failed_first():
    started = time.monotonic()
    with pytest.raises(RankFailed, match=r"rank 1 of 2 failed:\n(?s:.*)ValueError: the cause"):
        run_distributed(fail_on_rank_1, 2, timeout_seconds=100)
    assert time.monotonic() - started < 60


def test_harness_ends_a_hang():
    with pytest.raises(RankFailed, match=r"of 2 not done after 10 s"):
        run_distributed(hang_on_rank_1, 2, timeout_seconds=10)
