"""A logit loss on a sharded vocabulary is its dense fp64 twin, on 1, 2 and 4 gloo ranks.

Proves, for every loss at hand: value and the gradient of each shard, in fp64, fp32 and bf16 (whose ties go to the
lowest global id, across shards too); shards of unequal width, padded, wholly padding, wholly excluded, in another order
than the ranks'; temperature; chunks; sequences of strided logits; tokens that do not count, whatever they hold; results
equal to the bit on all ranks; as many collectives forward as the loss says, none backward,
none on one rank. One launch a world size runs all cases; the tests then read its results.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from harness import CollectiveCounter, chosen, run_distributed
from torch import Tensor

from abkd_megatron.losses import (
    K1,
    K2,
    K3,
    AdaptiveKL,
    ClippedKL,
    LogitCosine,
    LogitLoss,
    LogitMSE,
    LogitPearson,
    Pearson,
    Preference,
    Ranking,
    Sinkhorn,
    reference_logit_loss,
)
from abkd_megatron.vocab_parallel import VocabShard, logit_loss, vocab_parallel_logit_loss

WORLDS = [1, 2, 4]
TOKENS = (2, 7)
LOSSES = [
    AdaptiveKL(),
    AdaptiveKL(0.7, "head"),
    Pearson(),
    LogitPearson(),
    LogitCosine(),
    LogitMSE(),
    LogitMSE(centered=True),
    ClippedKL(top_k=40),
    ClippedKL(mass=0.6),
    Ranking(top_k=6, teacher_steepness=0.7, student_steepness=0.4),
    Sinkhorn(group=3),
    Preference(),
    K1(),
    K2(),
    K3(),
]
LAYOUTS = ["even", "uneven", "padded", "last shard all padding", "shard excluded", "reversed"]


@dataclass(frozen=True)
class Case:
    loss: LogitLoss
    dtype: torch.dtype = torch.float64
    layout: str = "padded"
    temperature: float = 1.0
    masked: bool = False
    chunk: int = 2**23
    """Numbers of a chunk on each rank."""
    strided: bool = False

    def __str__(self) -> str:
        how = f"{'-masked' * self.masked}{'-strided' * self.strided}{'-chunks' * (self.chunk < 2**23)}"
        return f"{self.loss}-{str(self.dtype).removeprefix('torch.')}-{self.layout}-T{self.temperature}{how}"


CASES = [Case(loss, dtype) for loss in LOSSES for dtype in (torch.float64, torch.float32, torch.bfloat16)]
CASES += [Case(loss, layout=layout, temperature=2.0) for loss in LOSSES for layout in LAYOUTS]
CASES += [Case(loss, torch.bfloat16, "uneven", 1.5, masked=True, chunk=2**8, strided=True) for loss in LOSSES]
CASES += [Case(loss, torch.float32, masked=True) for loss in LOSSES]


def bounds(case: Case, world_size: int) -> list[tuple[int, int, int]]:
    """(start, stop, width) of every rank's shard."""
    ranks = range(world_size)
    if case.layout == "uneven":
        edges = [203 * rank // world_size for rank in range(world_size + 1)]
        return [(edges[rank], edges[rank + 1], edges[rank + 1] - edges[rank]) for rank in ranks]
    width = 208 // world_size
    size = {"padded": 196, "last shard all padding": max(width * (world_size - 1) - 5, 7)}.get(case.layout, 208)
    shards = [(min(rank * width, size), min((rank + 1) * width, size), width) for rank in ranks]
    return shards[::-1] if case.layout == "reversed" else shards


def dense_inputs(case: Case, world_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student and teacher logits over the real vocabulary, which tokens count, and each token's weight."""
    shards = bounds(case, world_size)
    size = max(stop for _, stop, _ in shards)
    generator = torch.Generator().manual_seed(5)
    student, teacher = 1.5 * torch.randn(2, *TOKENS, size, generator=generator, dtype=torch.float64)
    student, teacher = student.to(case.dtype), teacher.to(case.dtype)
    teacher[1, 3] *= 0.1  # a large head
    teacher[0, 0, [2, -2]] = student[0, 0, [3, -3]] = 7.0  # ties of columns on the first and on the last rank
    if case.layout == "shard excluded" and world_size > 1:
        start, stop, _ = shards[1]
        student[0, :, start:stop] = teacher[0, :, start:stop] = -torch.inf
    counted = torch.ones(TOKENS, dtype=torch.bool)
    if case.masked:
        counted[0, [1, 4, 5, 6]] = False
        student[0, 1], teacher[0, 4], student[0, 5], teacher[0, 6] = torch.nan, torch.nan, torch.inf, -torch.inf
    weights = torch.rand(TOKENS, generator=generator, dtype=torch.float64)
    weights[1, 2] = 0.0
    return student, teacher, counted, weights


def drawn_tokens(size: int) -> Tensor:
    """A token per position, of every rank, and one beyond the vocabulary."""
    drawn = torch.linspace(0, size - 1, TOKENS[0] * TOKENS[1]).long().view(TOKENS)
    drawn[1, 5] = size
    return drawn


def run_case(case: Case, rank: int, world_size: int, group: dist.ProcessGroup | None) -> dict:
    logit_loss.CHUNK_SIZE = case.chunk
    student, teacher, counted, weights = dense_inputs(case, world_size)
    start, stop, width = bounds(case, world_size)[rank]

    def local(logits: Tensor) -> Tensor:
        shape = TOKENS[::-1] if case.strided else TOKENS
        shard = logits.new_full((*shape, width), torch.nan)  # padding is not read
        shard = shard.transpose(0, 1) if case.strided else shard
        shard[..., : stop - start] = logits[..., start:stop]
        return shard

    student_shard, teacher_shard = local(student).requires_grad_(), local(teacher)
    shard = VocabShard(start, stop, student.shape[-1], group)
    with CollectiveCounter() as forward:
        value = vocab_parallel_logit_loss(
            *(student_shard, teacher_shard, case.loss, shard, case.temperature, counted if case.masked else None),
            drawn=drawn_tokens(shard.size),
        )
    total = (weights * value).sum()
    with CollectiveCounter() as backward:
        (gradient,) = torch.autograd.grad(total, student_shard, retain_graph=True)
    (again,) = torch.autograd.grad(total, student_shard)
    assert torch.equal(again, gradient)
    assert gradient.stride() == student_shard.stride()
    assert backward.operations > 0
    return {
        "value": value.detach(),
        "gradient": gradient,
        "forward": forward.collectives,
        "backward": backward.collectives,
    }


def rank_main(rank: int, world_size: int, indices: Sequence[int]) -> dict[int, dict]:
    group = dist.group.WORLD if world_size > 1 else None
    return {index: run_case(CASES[index], rank, world_size, group) for index in indices}


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world_size: f"ranks{world_size}")
def ranks(request) -> list[dict[int, dict]]:
    if request.param == 1:
        return [rank_main(0, 1, chosen(request))]
    return run_distributed(rank_main, request.param, chosen(request))


@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(case) for case in CASES])
def test_equals_the_dense_twin(ranks, index):
    case, results = CASES[index], [result[index] for result in ranks]
    student, teacher, counted, weights = dense_inputs(case, len(ranks))
    # The twin knows nothing of tokens that hold no numbers.
    held = counted.unsqueeze(-1)
    dense = student.double().where(held, 0.0).requires_grad_()
    drawn = drawn_tokens(student.shape[-1])
    which = counted & (drawn < student.shape[-1]) if case.loss.estimates is not None else counted
    value = reference_logit_loss(
        *(case.loss, dense, teacher.where(held, 0.0), case.temperature),
        counted=which if case.masked or case.loss.estimates is not None else None,
        drawn=drawn.clamp_max(student.shape[-1] - 1),
    )
    (expected,) = torch.autograd.grad((weights * value).sum(), dense)
    assert (expected.abs().amax(dim=-1) > 0).sum() >= 5
    tolerance = 1e-12 if case.dtype == torch.float64 else 5e-6
    largest = expected.abs().amax(dim=-1, keepdim=True)
    for (start, stop, _), result in zip(bounds(case, len(ranks)), results, strict=True):
        assert result["value"].dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(result["value"].double(), value.detach(), rtol=tolerance, atol=0)
        assert result["gradient"].dtype == case.dtype
        got, padding = result["gradient"][..., : stop - start].double(), result["gradient"][..., stop - start :]
        assert torch.equal(padding, torch.zeros_like(padding))
        assert torch.equal(got[weights * counted == 0], torch.zeros_like(got[weights * counted == 0]))
        allowed = tolerance * largest
        if case.dtype == torch.bfloat16:  # rounded once, when it is written
            allowed = allowed + expected[..., start:stop].abs() * 2**-8
        assert ((got - expected[..., start:stop]).abs() <= allowed).all()


def test_bit_equal_on_all_ranks(ranks):
    for first, *others in zip(*(result.values() for result in ranks), strict=True):
        for other in others:
            assert torch.equal(first["value"], other["value"])


def test_collectives(ranks):
    for result in ranks:
        for index, found in result.items():
            case = CASES[index]
            assert found["backward"] == []
            if len(ranks) == 1:
                assert found["forward"] == []
                continue
            size = max(stop for _, stop, _ in bounds(case, len(ranks)))
            step = max(case.chunk // -(-size // len(ranks)) // case.loss.group_size, 1) * case.loss.group_size
            rows = [TOKENS[0] * TOKENS[1]] if case.loss.group_size == 1 else [TOKENS[1]] * TOKENS[0]
            chunks = sum(-(-row // step) for row in rows)
            if case.chunk < 2**23:
                assert chunks >= 3
            has_head = isinstance(case.loss, AdaptiveKL) or getattr(case.loss, "mass", None) is not None
            more = 4 * (has_head and case.dtype == torch.float64)  # twice as many bits to search
            assert len(found["forward"]) == chunks * (case.loss.num_collectives + more), case
            assert set(found["forward"]) == {"allgather"}
