"""Weights per token of divergence and cross entropy: value and gradient equal the dense form in fp64."""

import pytest
import torch
import torch.distributed as dist
from harness import run_distributed

from abkd_megatron import AlphaBeta
from abkd_megatron.losses.objective import Objective
from abkd_megatron.student.head import compute_loss
from abkd_megatron.teacher.output_layer import OutputLayer
from abkd_megatron.vocab_parallel import VocabShard

SEQUENCE, BATCH, HIDDEN, VOCAB, PADDED = 5, 3, 8, 29, 32
KD, LM = 0.7, 0.4


class Layer(torch.nn.Module):
    """An output layer of some columns."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, hidden: torch.Tensor, weight: torch.Tensor | None = None) -> tuple[torch.Tensor, None]:
        return hidden @ self.weight.t(), None


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    kd_weights, lm_weights = normal(SEQUENCE, BATCH), normal(SEQUENCE, BATCH)
    kd_weights[1, 1] = lm_weights[2] = 0.0
    return {
        "hidden": normal(SEQUENCE, BATCH, HIDDEN),
        "teacher": normal(SEQUENCE, BATCH, HIDDEN),
        "weight": normal(PADDED, HIDDEN),
        "teacher weight": normal(PADDED, HIDDEN),
        "labels": torch.randint(VOCAB, (SEQUENCE, BATCH), generator=generator),
        "kd_weights": kd_weights,
        "lm_weights": lm_weights,
    }


def dense(given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss per token, and the gradient of its sum by the student's output layer."""
    weight = given["weight"].clone().requires_grad_()
    log_q = (given["hidden"] @ weight[:VOCAB].t()).log_softmax(-1)
    log_p = (given["teacher"] @ given["teacher weight"][:VOCAB].t()).log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    cross_entropy = -log_q.gather(-1, given["labels"].unsqueeze(-1)).squeeze(-1)
    total = KD * given["kd_weights"] * divergence + LM * given["lm_weights"] * cross_entropy
    total.sum().backward()
    assert weight.grad is not None
    return total.detach(), weight.grad


def run(rank: int, world_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found = []
    for dtype, chunk_tokens in ((torch.float64, None), (torch.float32, None), (torch.float64, 4), (torch.float32, 4)):
        given = {name: it.to(dtype) if it.is_floating_point() else it for name, it in inputs().items()}
        width = PADDED // world_size
        mine = slice(rank * width, (rank + 1) * width)
        layers = [Layer(given[name][mine].clone()) for name in ("weight", "teacher weight")]
        loss = compute_loss(
            OutputLayer(given["hidden"].requires_grad_(), layers[0], None, lambda logits: logits),
            OutputLayer(given["teacher"], layers[1], None, lambda logits: logits),
            Objective(AlphaBeta(1.0, 0.0), kd_weight=KD, lm_weight=LM),
            given["labels"],
            None,
            VocabShard.megatron(width, dist.group.WORLD, VOCAB),
            dist.group.WORLD,
            lambda logits: logits.sum(-1),
            kd_weights=given["kd_weights"].float(),
            lm_weights=given["lm_weights"].float(),
            chunk_tokens=chunk_tokens,
        )
        loss.total.sum().backward()
        found.append((loss.total.detach(), layers[0].weight.grad))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_weighted_terms_equal_the_dense_form(world_size: int) -> None:
    given = inputs()
    for name in ("kd_weights", "lm_weights"):
        given[name] = given[name].float().double()
    total, gradient = dense(given)
    ranks = run_distributed(run, world_size)
    for index, tolerance in enumerate((1e-9, 1e-4, 1e-9, 1e-4)):
        columns = torch.cat([rank[index][1] for rank in ranks]).double()
        torch.testing.assert_close(columns, gradient, rtol=tolerance, atol=tolerance)
        for rank in ranks:
            torch.testing.assert_close(rank[index][0].double(), total, rtol=tolerance, atol=tolerance)
