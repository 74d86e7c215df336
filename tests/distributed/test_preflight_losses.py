"""No loss of ours is refused before a job's first step, on 1 and 2 gloo ranks."""

import pytest
import torch
import torch.distributed as dist
from harness import run_distributed

pytest.importorskip("megatron.core")

from abkd_megatron.config.schema import DistillationConfig
from abkd_megatron.losses import registry
from abkd_megatron.losses.objective import Objective
from abkd_megatron.preflight.models import wrong_losses
from abkd_megatron.vocab_parallel import VocabShard

NEEDED = {"clipped_kl": {"top_k": 5}}
PADDED = 320

# (dtype, temperature, true size of the vocabulary): of the last one the second of two ranks holds padding alone.
CASES = [(torch.float32, 1.0, 301), (torch.bfloat16, 1.0, 301), (torch.float32, 3.0, 320), (torch.float32, 1.0, 150)]


def run_cases(rank: int, world_size: int) -> list[str]:
    group = dist.group.WORLD if world_size > 1 else None
    width, device = PADDED // world_size, torch.device("cpu")
    losses = tuple((1.0, registry.build(name, NEEDED.get(name, {}))) for name in registry.LOGIT_LOSSES)
    wrong = []
    for dtype, temperature, size in CASES:
        shard = VocabShard.megatron(width, group, size)
        objectives = [
            Objective(DistillationConfig(divergence=name).make_divergence(), temperature=temperature)
            for name in registry.DIVERGENCES
        ]
        objectives.append(Objective(None, temperature=temperature, logit_losses=losses))
        for objective in objectives:
            wrong += [
                f"{dtype} {temperature} {size}: {it}" for it in wrong_losses(objective, shard, width, dtype, device)
            ]
    return wrong


@pytest.mark.parametrize("world_size", [1, 2])
def test_no_loss_of_ours_is_refused(world_size: int) -> None:
    ranks = [run_cases(0, 1)] if world_size == 1 else run_distributed(run_cases, world_size)
    assert ranks == [[]] * world_size
