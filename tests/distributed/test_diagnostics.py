"""Diagnostics of sharded logits against their dense definitions.

Proves: at TP 1, 2 and 4, on uneven and padded shards, in fp32 and bf16, every number equals its definition in fp64 and
is the same on every rank; the logits are left as they were; a token without a gradient has concentrations of 0; and
the bins' gaps add up to the expected calibration error as it is usually written.
"""

from itertools import pairwise

import pytest
import torch
from harness import run_distributed

from abkd_megatron import AlphaBeta
from abkd_megatron.losses import reference_alpha_beta
from abkd_megatron.vocab_parallel import VocabShard, vocab_parallel_distillation
from abkd_megatron.vocab_parallel.diagnostics import NUM_BINS, calibration_error, diagnose, gap_name

VOCAB, WIDTH, TOKENS = 101, 28, (6, 3)  # 4 shards of 28 columns, 11 of which are padding
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def inputs(dtype: torch.dtype, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3.0 * torch.randn(2, *TOKENS, width, generator=generator)).to(dtype)
    labels = torch.randint(VOCAB, TOKENS, generator=generator)
    labels[0] = student[0, ..., :VOCAB].argmax(dim=-1)  # right, sure or not
    student[1, 0] = teacher[1, 0]  # no gradient
    return student, teacher, labels


def trained(student, teacher, labels, shard):
    return vocab_parallel_distillation(
        student, teacher, AlphaBeta(0.2, 0.7), labels, shard, temperature=2.0, gradient_in_place=True
    )


def on_rank(rank: int, world_size: int) -> dict[str, dict[str, torch.Tensor]]:
    group = torch.distributed.group.WORLD if world_size > 1 else None
    results = {}
    for name, dtype in DTYPES.items():
        width = WIDTH * 4 // world_size
        student, teacher, labels = inputs(dtype, WIDTH * 4)
        shard = VocabShard.megatron(width, group, VOCAB)
        mine = slice(rank * width, (rank + 1) * width)
        student, teacher = student[..., mine].contiguous(), teacher[..., mine].contiguous()
        before = student.clone()
        metrics = trained(student, teacher, labels, shard).metrics
        results[name] = diagnose(
            student,
            teacher,
            lambda logits, t=teacher, y=labels, s=shard: trained(logits, t, y, s).divergence,
            metrics["top-1 accuracy"],
            metrics["student confidence"],
            shard,
        )
        assert torch.equal(student, before) and not student.requires_grad
    return results


@pytest.fixture(scope="module", params=[1, 2, 4])
def ranks(request):
    return [on_rank(0, 1)] if request.param == 1 else run_distributed(on_rank, request.param)


@pytest.mark.parametrize("name", DTYPES)
def test_equal_to_their_definitions(ranks, name):
    student, teacher, labels = inputs(DTYPES[name], WIDTH * 4)
    s, t = student[..., :VOCAB].double().requires_grad_(), teacher[..., :VOCAB].double()
    (gradient,) = torch.autograd.grad(reference_alpha_beta(s, t, 0.2, 0.7, 2.0).sum(), s)
    log_q, log_p = s.detach().log_softmax(-1), t.log_softmax(-1)
    q, p, push = log_q.exp(), log_p.exp(), gradient.abs()
    push[1, 0] = 0.0  # what autograd leaves of it is rounding
    weight = torch.sigmoid(log_p - log_q)
    confidence, accuracy = q.amax(-1), (s.argmax(-1) == labels).double()
    wanted = {
        "reverse kl to teacher": (q * (log_q - log_p)).sum(-1),
        "todi weight": weight.mean(-1),
        "todi weight of teacher": (p * weight).sum(-1),
        "hardness concentration": ((push * (p - q).abs()).sum(-1) / push.sum(-1)).nan_to_num(0.0),
        "confidence concentration": ((push * q).sum(-1) / push.sum(-1)).nan_to_num(0.0),
    }
    rounding = 1e-5 if name == "fp32" else 1e-2  # of the gradient, which has the logits' dtype
    for result in ranks:
        measured = result[name]
        for of, expected in wanted.items():
            tolerance = rounding if of.endswith("concentration") else 1e-5
            torch.testing.assert_close(measured[of].double(), expected, rtol=tolerance, atol=1e-7, msg=of)
            assert torch.equal(measured[of], ranks[0][name][of]), of
        means = {gap_name(i): measured[gap_name(i)].double().mean().item() for i in range(NUM_BINS)}
        edges = torch.linspace(0, 1, NUM_BINS + 1, dtype=torch.float64)
        error = 0.0
        for low, high in pairwise(edges):
            inside = (confidence > low) & (confidence <= high)
            if inside.any():
                share = inside.double().mean()
                error += (share * (accuracy[inside].mean() - confidence[inside].mean()).abs()).item()
        assert calibration_error(means) == pytest.approx(error, rel=1e-5)
        assert error > 0.05
