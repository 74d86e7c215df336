"""A loss on teacher records over a sharded vocabulary is its dense fp64 form, on 1, 2 and 4 gloo ranks.

Proves: value, gradient of each shard, cross entropy and metrics; shards of unequal width, padded, wholly padding,
wholly excluded, in another order than the ranks'; ids of one rank only; all tokens kept, which is the live loss;
results equal to the bit on all ranks; one collective forward for every divergence, none backward, none on one rank; and
that the fused head gives the same. One launch a world size runs all cases.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from harness import CollectiveCounter, chosen, run_distributed
from record_cases import records_of, sampled_divergence, with_draws
from test_vocab_parallel import LAYOUTS, TOKENS, bounds, dense_inputs
from torch import Tensor

from abkd_megatron import AlphaBeta, ToDi, kernels
from abkd_megatron.losses import (
    Divergence,
    JensenShannon,
    SkewReverseKL,
    TotalVariation,
    WeightedSum,
    reference_bucketed_divergence,
    reference_cross_entropy,
    reference_divergence,
)
from abkd_megatron.vocab_parallel import (
    VocabShard,
    vocab_parallel_distillation,
    vocab_parallel_record_distillation,
    vocab_parallel_record_distillation_head,
)
from abkd_megatron.vocab_parallel.teacher_records import BUCKETED_KL, SAMPLED_KL

WORLDS = [1, 2, 4]
HIDDEN = 12


@dataclass(frozen=True)
class Case:
    divergence: Divergence
    dtype: torch.dtype = torch.float64
    layout: str = "padded"
    temperature: float = 1.0
    num_kept: int = 16
    """0 for all tokens; no more than there are."""
    kernel: str = "auto"
    num_draws: int = 0
    equal = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        form = f"K{self.num_kept}" + (f"-R{self.num_draws}" if self.num_draws else "")
        return f"{self.divergence}-{dtype}-{self.layout}-T{self.temperature}-{form}-{self.kernel}"


DIVERGENCES = [
    AlphaBeta(1, 0),
    AlphaBeta(0.2, 0.7),
    AlphaBeta(0.8, 0.3),
    AlphaBeta(0, 0),
    ToDi(),
    ToDi(2.0, detach=False),
    JensenShannon(0.3),
    SkewReverseKL(detach_mixture=True),
    TotalVariation(),
    WeightedSum([(1.0, JensenShannon()), (0.5, AlphaBeta(0.2, 0.7))]),
]
CASES = [Case(d, dtype) for d in DIVERGENCES for dtype in (torch.float64, torch.float32, torch.bfloat16)]
CASES += [
    Case(d, dtype, layout, temperature, num_kept)
    for d in (AlphaBeta(0.2, 0.7), ToDi())
    for layout in LAYOUTS
    for temperature, num_kept, dtype in ((2.0, 16, torch.float64), (1.0, 1, torch.float32), (1.0, 0, torch.float32))
]
CASES += [Case(d, torch.float32, "uneven", 2.0, kernel="eager") for d in DIVERGENCES[:5]]
SAMPLED = [AlphaBeta(1, 0), AlphaBeta(0.8, 0.3), WeightedSum([(1.0, AlphaBeta(1, 0)), (0.5, AlphaBeta(0.9, 0.1))])]
CASES += [
    Case(d, dtype, "uneven", temperature, 8, num_draws=12)
    for d in SAMPLED
    for dtype in (torch.float64, torch.float32, torch.bfloat16)
    for temperature in (1.0, 2.0)
]
CASES += [Case(SAMPLED[1], torch.float32, layout, 2.0, 8, num_draws=12) for layout in LAYOUTS if layout != "excluded"]
CASES += [Case(d, torch.float32, "uneven", 1.0, 1, "eager", num_draws=3) for d in SAMPLED]


def inputs(case: Case, world_size: int) -> tuple[Tensor, ...]:
    student, teacher, labels, weights = dense_inputs(case, world_size)  # type: ignore[arg-type]
    records = records_of(
        teacher,
        min(case.num_kept or student.shape[-1], student.shape[-1]),
        labels,
        case.temperature,
        torch.promote_types(case.dtype, torch.float32),
    )
    if case.num_draws:
        records = with_draws(records, teacher, case.num_draws, case.temperature)
    return student, teacher, records, labels, weights


def run_case(case: Case, rank: int, world_size: int, group: dist.ProcessGroup | None) -> dict:
    student, _, records, labels, weights = inputs(case, world_size)
    start, stop, width = bounds(case, world_size)[rank]  # type: ignore[arg-type]
    leaf = student.new_full((*TOKENS, width), torch.nan)  # padding is not read
    leaf[..., : stop - start] = student[..., start:stop]
    leaf.requires_grad_()
    shard = VocabShard(start, stop, student.shape[-1], group)
    with kernels.using(case.kernel):
        with CollectiveCounter() as forward:
            terms = vocab_parallel_record_distillation(leaf, records, case.divergence, labels, shard, case.temperature)
        loss = sum((weight * term).sum() for weight, term in zip(weights, terms[:2], strict=True))
        with CollectiveCounter() as backward:
            (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        of_divergence, of_cross_entropy = (
            torch.autograd.grad(term.sum(), leaf, retain_graph=True)[0] for term in terms[:2]
        )
    return {
        "terms": (terms.divergence.detach(), terms.cross_entropy.detach(), terms.metrics),
        "gradient": gradient,
        "of_divergence": of_divergence,
        "of_cross_entropy": of_cross_entropy,
        "forward": forward.collectives,
        "backward": backward.collectives,
        "head": head_errors(case, shard, width, records, labels, weights),
    }


def head_errors(case: Case, shard: VocabShard, width: int, records, labels: Tensor, weights: Tensor) -> dict:
    """Errors of the fused head against logits that exist, in units of what is allowed."""
    generator = torch.Generator().manual_seed(3)
    whole = torch.randn(shard.size, HIDDEN, generator=generator, dtype=torch.float64)
    hidden = torch.randn(*TOKENS, HIDDEN, generator=generator, dtype=torch.float64).to(case.dtype).requires_grad_()
    weight = torch.zeros(width, HIDDEN, dtype=torch.float64)
    weight[: shard.num_columns] = whole[shard.start : shard.stop]
    weight = weight.to(case.dtype).requires_grad_()
    arguments = (records, case.divergence, labels, shard)
    with kernels.using(case.kernel):
        terms = vocab_parallel_record_distillation(hidden @ weight.t(), *arguments, case.temperature)
        wanted = 0.8 * terms.divergence + 0.3 * terms.cross_entropy
        expected = [wanted, *torch.autograd.grad((wanted * weights[0]).sum(), (hidden, weight))]
        worst = {}
        for token_weights in (weights[0], None):
            with CollectiveCounter() as counter:
                loss, _ = vocab_parallel_record_distillation_head(
                    *(hidden, weight, *arguments),
                    kd_weight=0.8,
                    lm_weight=0.3,
                    temperature=case.temperature,
                    token_weights=token_weights,
                    chunk_tokens=4,
                )
                got = [loss, *torch.autograd.grad((loss * weights[0]).sum(), (hidden, weight))]
            assert counter.collectives == ["allreduce"] * (2 if shard.num_ranks > 1 else 0)
            relative = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}[case.dtype]
            for name, one, other in zip(("loss", "of hidden", "of weight"), got, expected, strict=True):
                scale = other.detach().abs().amax().item() or 1.0
                error = (one.detach() - other.detach()).abs().amax().item() / scale / relative
                worst[name] = max(worst.get(name, 0.0), error)
    return worst


def rank_main(rank: int, world_size: int, indices: Sequence[int]) -> dict:
    group = dist.group.WORLD if world_size > 1 else None
    return {index: run_case(CASES[index], rank, world_size, group) for index in indices}


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world_size: f"ranks{world_size}")
def ranks(request) -> list[dict]:
    if request.param == 1:
        return [rank_main(0, 1, chosen(request))]
    return run_distributed(rank_main, request.param, chosen(request))


@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(case) for case in CASES])
def test_equals_the_dense_form(ranks, index):
    case, results = CASES[index], [result[index] for result in ranks]
    student, teacher, records, labels, weights = inputs(case, len(ranks))
    dense = student.double().requires_grad_()
    in_shape = [it.view(*TOKENS, *it.shape[1:]).double() for it in (records.ids, records.log_probs, records.log_rest)]
    if case.num_draws:
        flat = sampled_divergence(case.divergence, dense.flatten(0, -2), records, case.temperature)
        divergence = flat.view(TOKENS)
        estimate = sampled_divergence(AlphaBeta(1, 0), dense.detach().flatten(0, -2), records).view(TOKENS)
        assert torch.equal((records.draws > 1).any(-1), records.log_rest > -torch.inf)
    else:
        divergence = reference_bucketed_divergence(case.divergence, dense, *in_shape, case.temperature)
    if not case.num_kept:
        live = reference_divergence(case.divergence, dense.detach(), teacher, case.temperature)
        torch.testing.assert_close(divergence.detach(), live, rtol=1e-5, atol=1e-6)
    cross_entropy = reference_cross_entropy(dense, labels)
    tolerance = 1e-10 if case.dtype == torch.float64 else 1e-5
    shard = VocabShard(0, student.shape[-1], student.shape[-1])
    metrics = vocab_parallel_distillation(student.double(), teacher.double(), ToDi(), labels, shard).metrics
    kl = metrics.pop("kl to teacher")
    for result in results:
        of_divergence, of_cross_entropy, of_metrics = *result["terms"][:2], dict(result["terms"][2])
        torch.testing.assert_close(of_divergence.double(), divergence.detach(), rtol=tolerance, atol=0)
        torch.testing.assert_close(of_cross_entropy.double(), cross_entropy.detach(), rtol=tolerance, atol=0)
        assert (BUCKETED_KL in of_metrics) == (case.temperature == 1.0 and not case.num_draws)
        assert (SAMPLED_KL in of_metrics) == (case.temperature == 1.0 and bool(case.num_draws))
        if SAMPLED_KL in of_metrics:
            torch.testing.assert_close(of_metrics.pop(SAMPLED_KL).double(), estimate, rtol=tolerance, atol=tolerance)
        if BUCKETED_KL in of_metrics:
            bucketed = of_metrics.pop(BUCKETED_KL).double()
            assert (bucketed <= kl * (1 + tolerance)).all()
            if not case.num_kept:
                torch.testing.assert_close(bucketed, kl, rtol=tolerance, atol=0)
        assert list(of_metrics) == list(metrics)
        for name, wanted in metrics.items():
            torch.testing.assert_close(of_metrics[name].double(), wanted, rtol=tolerance, atol=1e-12, msg=name)

    wanted = {
        "of_divergence": divergence.sum(),
        "of_cross_entropy": cross_entropy.sum(),
        "gradient": (weights[0] * divergence + weights[1] * cross_entropy).sum(),
    }
    for name, loss in wanted.items():
        (expected,) = torch.autograd.grad(loss, dense, retain_graph=True)
        largest = expected.abs().amax(dim=-1, keepdim=True)
        for (start, stop, _), result in zip(bounds(case, len(ranks)), results, strict=True):
            got, padding = result[name][..., : stop - start].double(), result[name][..., stop - start :]
            assert torch.equal(padding, torch.zeros_like(padding)), name
            allowed = tolerance * largest
            if case.dtype == torch.bfloat16:  # rounded once, when it is written
                allowed = allowed + expected[..., start:stop].abs() * 2**-8
            assert ((got - expected[..., start:stop]).abs() <= allowed).all(), name


def test_the_fused_head_equals_logits_that_exist(ranks):
    for result in ranks:
        for index, found in result.items():
            assert all(error <= 1.0 for error in found["head"].values()), (str(CASES[index]), found["head"])


def test_losses_are_bit_equal_on_all_ranks(ranks):
    for first, *others in zip(*(result.values() for result in ranks), strict=True):
        for other in others:
            for mine, theirs in zip(first["terms"][:2], other["terms"][:2], strict=True):
                assert torch.equal(mine, theirs)
            for name, metric in first["terms"][2].items():
                assert torch.equal(metric, other["terms"][2][name]), name


def test_collectives(ranks):
    for result in ranks:
        for found in result.values():
            assert found["forward"] == (["allreduce"] if len(ranks) > 1 else [])
            assert found["backward"] == []
