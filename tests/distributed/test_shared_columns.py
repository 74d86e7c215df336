"""Vocabularies that share their first tokens alone: the loss is the dense fp64 twin's, on 1, 2 and 4 gloo ranks.

The divergence and the metrics over the shared tokens, nothing but the cross entropy where the teacher could not read
the input, the cross entropy over all of the student's tokens. Logit losses beside the divergence or in its place, also
where its backward overwrites the logits. What takes part in nothing is NaN.
"""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from harness import run_distributed
from torch import Tensor

from abkd_megatron import AlphaBeta, ToDi
from abkd_megatron.errors import ConfigError
from abkd_megatron.losses import (
    AdaptiveKL,
    Divergence,
    LogitLoss,
    LogitMSE,
    Sinkhorn,
    reference_cross_entropy,
    reference_divergence,
    reference_logit_loss,
)
from abkd_megatron.losses.objective import Objective
from abkd_megatron.student.head import Loss, OutputLayer, compute_loss
from abkd_megatron.vocab_parallel import VocabShard
from abkd_megatron.vocab_parallel.execution import Execution

WORLDS = [1, 2, 4]
SEQUENCE, BATCH, VOCAB, PADDED = 6, 4, 123, 128
KD_WEIGHT, LM_WEIGHT = 0.8, 0.3


@dataclass(frozen=True)
class Case:
    divergence: Divergence | None
    dtype: torch.dtype = torch.float64
    shared: int = 100
    temperature: float = 1.0
    in_place: bool = False
    logit_losses: tuple[tuple[float, LogitLoss], ...] = ()

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        losses = "".join(f"-{weight}*{loss}" for weight, loss in self.logit_losses)
        return f"{self.divergence}-{dtype}-{self.shared}-T{self.temperature}{'-in place' * self.in_place}{losses}"


# On 4 ranks, 90 leaves the last one nothing that is shared.
CASES = [
    Case(divergence, dtype, shared)
    for divergence in (AlphaBeta(0.2, 0.7), ToDi())
    for dtype in (torch.float64, torch.float32)
    for shared in (100, 90, VOCAB)
]
CASES += [Case(AlphaBeta(1, 0), dtype, 90, 2.0, in_place=True) for dtype in (torch.float64, torch.float32)]
LOGIT_LOSSES = ((0.5, AdaptiveKL()), (2.0, Sinkhorn(group=4)))
CASES += [
    replace(Case(divergence, dtype, shared, 2.0, logit_losses=LOGIT_LOSSES), in_place=in_place)
    for divergence in (AlphaBeta(0.2, 0.7), None)
    for dtype, shared, in_place in (
        (torch.float64, 90, True),
        (torch.float32, VOCAB, True),
        (torch.float32, 100, False),
    )
]


class Given(torch.nn.Module):
    """An output layer whose logits are its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.zeros(width, 1)

    def forward(self, logits: Tensor, weight: Tensor | None) -> tuple[Tensor, None]:
        assert weight is None
        return logits, None


def dense_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Student and teacher logits [s, b, PADDED], labels, input ids and each token's weight [s, b]."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = 1.5 * torch.randn(2, SEQUENCE, BATCH, PADDED, generator=generator, dtype=torch.float64)
    student[..., VOCAB:] = teacher[..., case.shared :] = torch.nan
    labels = torch.randint(case.shared, (SEQUENCE, BATCH), generator=generator)
    labels[1, 0] = labels[5, 3] = VOCAB - 1
    inputs = torch.randint(case.shared, (SEQUENCE, BATCH), generator=generator)
    if case.shared < VOCAB:
        inputs[0, 1] = case.shared  # the teacher reads nothing of the second sequence
        inputs[3, 2] = VOCAB - 1  # and no more than three tokens of the third
        inputs[4, 2] = case.shared - 1
        teacher[:, 1] = teacher[3:, 2] = torch.nan
    weights = torch.rand(SEQUENCE, BATCH, generator=generator, dtype=torch.float64)
    return student.to(case.dtype), teacher.to(case.dtype), labels, inputs, weights


def compute(case: Case, rank: int, world_size: int, group: dist.ProcessGroup | None, **changes) -> tuple[Loss, Tensor]:
    student, teacher, labels, inputs, _ = dense_inputs(case)
    width = PADDED // world_size
    mine = slice(rank * width, (rank + 1) * width)
    leaf = student[..., mine].clone().requires_grad_()
    how = {
        "kd_weight": KD_WEIGHT,
        "lm_weight": LM_WEIGHT,
        "temperature": case.temperature,
        "shared_vocab": case.shared,
        "logit_losses": case.logit_losses,
    }
    arguments = {
        "student": OutputLayer(leaf * 1, Given(width), None, lambda logits: logits),
        "teacher": OutputLayer(teacher[..., mine], Given(width), None, lambda logits: logits),
        "objective": Objective(case.divergence, **{**how, **changes.pop("objective", {})}),
        "labels": labels,
        "loss_mask": None,
        "shard": VocabShard.megatron(width, group, VOCAB),
        "tp_group": group,
        "megatron_cross_entropy": lambda logits: logits.sum(-1),
        "input_ids": inputs,
        "gradient_in_place": case.in_place,
        **changes,
    }
    return compute_loss(**arguments), leaf


def run_cases(rank: int, world_size: int, group: dist.ProcessGroup | None) -> list[dict[str, Tensor]]:
    results = []
    for case in CASES:
        loss, leaf = compute(case, rank, world_size, group)
        (gradient,) = torch.autograd.grad((dense_inputs(case)[-1] * loss.total).sum(), leaf)
        terms = loss.terms
        found = {"loss": loss.total, "distillation": loss.distillation, "cross entropy": terms.cross_entropy}
        found |= {"gradient": gradient, **terms.metrics, **loss.logit_losses}
        results.append({name: value.detach() for name, value in found.items()})
    return results


def rank_main(rank: int, world_size: int) -> dict[int, list[dict[str, Tensor]]]:
    """By number of ranks; one launch for all, for Megatron takes long to import."""
    groups = {1: None, 2: dist.new_group([0, 1]), 4: dist.group.WORLD}
    return {size: run_cases(rank, size, group) for size, group in groups.items() if rank < size}


@pytest.fixture(scope="module")
def results() -> list[dict[int, list[dict[str, Tensor]]]]:
    return run_distributed(rank_main, max(WORLDS))


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(case) for case in CASES])
def test_equals_the_dense_twin(results, index, world_size):
    case, ranks = CASES[index], [result[world_size] for result in results[:world_size]]
    student, teacher, labels, inputs, weights = dense_inputs(case)
    read = torch.ones(SEQUENCE, BATCH, dtype=torch.bool)
    for position in range(SEQUENCE):
        for sequence in range(BATCH):
            read[position, sequence] = all(token < case.shared for token in inputs[: position + 1, sequence])
    assert read.sum() == (SEQUENCE * BATCH if case.shared == VOCAB else SEQUENCE * BATCH - 6 - 3)

    dense = student.double().requires_grad_()
    ours, theirs = dense[..., : case.shared], teacher.double()[..., : case.shared].nan_to_num()
    distillation = torch.zeros_like(read, dtype=torch.float64)
    if case.divergence is not None:
        distillation = torch.where(read, reference_divergence(case.divergence, ours, theirs, case.temperature), 0.0)
    # The tokens of a group are of one sequence.
    sequences = ours.transpose(0, 1), theirs.transpose(0, 1)
    logit_losses = {
        loss.name: reference_logit_loss(loss, *sequences, case.temperature, counted=read.T).T
        for _, loss in case.logit_losses
    }
    for weight, loss in case.logit_losses:
        distillation = distillation + weight * logit_losses[loss.name]
    cross_entropy = reference_cross_entropy(dense[..., :VOCAB], labels)
    total = KD_WEIGHT * distillation + LM_WEIGHT * cross_entropy
    (of_logits,) = torch.autograd.grad((weights * total).sum(), dense)
    log_q, log_p = ours.detach().log_softmax(-1), theirs.log_softmax(-1)
    of_teacher = reference_cross_entropy(theirs, labels.clamp_max(case.shared - 1))
    wanted = {
        "loss": total.detach(),
        "distillation": distillation.detach(),
        "cross entropy": cross_entropy.detach(),
        "teacher lm loss": torch.where(read & (labels < case.shared), of_teacher, 0.0),
        "kl to teacher": torch.where(read, (log_p.exp() * (log_p - log_q)).sum(-1), 0.0),
        "teacher entropy": torch.where(read, -(log_p.exp() * log_p).sum(-1), 0.0),
        "student entropy": torch.where(read, -(log_q.exp() * log_q).sum(-1), 0.0),
        "top-1 agreement": torch.where(read, (ours.argmax(-1) == theirs.argmax(-1)).double(), 0.0),
        "top-1 accuracy": torch.where(read, (ours.argmax(-1) == labels).double(), 0.0),
        "student confidence": torch.where(read, log_q.exp().amax(-1), 0.0),
        **{name: value.detach() for name, value in logit_losses.items()},
    }
    tolerance = 1e-10 if case.dtype == torch.float64 else 1e-5
    for result in (rank[index] for rank in ranks):
        assert set(result) == {*wanted, "gradient"}
        for name, expected in wanted.items():
            torch.testing.assert_close(result[name].double(), expected, rtol=tolerance, atol=1e-12, msg=name)
    gradient = torch.cat([rank[index]["gradient"] for rank in ranks], dim=-1).double()
    assert torch.equal(gradient[..., VOCAB:], torch.zeros_like(gradient[..., VOCAB:]))
    largest = of_logits[..., :VOCAB].abs().amax(dim=-1, keepdim=True)
    assert ((gradient - of_logits)[..., :VOCAB].abs() <= tolerance * largest).all()


def test_watching_trains_on_megatrons_own_cross_entropy():
    case = Case(AlphaBeta(0.2, 0.7), shared=90)
    wanted = compute(case, 0, 1, None)[0]
    own = torch.rand(SEQUENCE, BATCH)
    loss = compute(case, 0, 1, None, objective={"kd_weight": 0.0}, megatron_cross_entropy=lambda logits: own)[0]
    assert torch.equal(loss.total, LM_WEIGHT * own)
    assert torch.equal(loss.distillation, wanted.distillation.detach())


def test_tokens_that_do_not_count_take_no_part_in_logit_losses():
    case = Case(None, logit_losses=LOGIT_LOSSES)
    mask = torch.ones(SEQUENCE, BATCH)
    mask[2, 0] = mask[0, 3] = 0.0
    loss, leaf = compute(case, 0, 1, None, loss_mask=mask, objective={"lm_weight": 0.0})
    (gradient,) = torch.autograd.grad(loss.total.sum(), leaf)
    assert (loss.total[mask == 0] == 0).all() and (gradient[mask == 0] == 0).all()
    with_all, _ = compute(case, 0, 1, None, objective={"lm_weight": 0.0})
    changed = loss.logit_losses["sinkhorn"] != with_all.logit_losses["sinkhorn"]
    assert changed[:4, [0, 3]].all() and not changed[:, [1, 2]].any() and not changed[4:].any()
    assert torch.equal(loss.logit_losses["akl"][mask != 0], with_all.logit_losses["akl"][mask != 0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": None}, "expected a divergence or logit_losses, got neither"),
        (
            {"logit_losses": ((0.0, AdaptiveKL()),)},
            "AdaptiveKL.*: expected weight to be a finite number above 0, got 0.0",
        ),
        ({"logit_losses": ((1.0, AlphaBeta(1, 0)),)}, "expected pairs of a weight and a LogitLoss, got AlphaBeta"),
    ],
)
def test_objectives_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        Objective(**{"divergence": AlphaBeta(1, 0), **settings})


def test_logit_losses_need_logits():
    objective = Objective(AlphaBeta(1, 0), logit_losses=LOGIT_LOSSES)
    with pytest.raises(ConfigError, match=r"head: fused .*akl, sinkhorn"):
        Execution(head="fused").resolve(objective)
    assert Execution().resolve(objective) == Execution()


def test_two_logit_losses_of_one_name_are_told_apart():
    losses = ((1.0, LogitMSE()), (1.0, AdaptiveKL()), (0.5, LogitMSE(centered=True)))
    assert Objective(None, logit_losses=losses).names_of_logit_losses == ("logit_mse", "akl", "logit_mse 2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": None}, "shared_vocab 100 of the student's 123 tokens needs the input ids"),
        ({"objective": {"shared_vocab": 0}}, "shared_vocab .* at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        compute(Case(AlphaBeta(0.2, 0.7)), 0, 1, None, **changes)
