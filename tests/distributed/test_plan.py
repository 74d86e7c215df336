"""One plan on all ranks, whatever each of them would choose."""

from datetime import timedelta

import pytest
import strict
import torch
import torch.distributed as dist
from harness import run_distributed

from abkd_megatron import AlphaBeta
from abkd_megatron.errors import ConfigError
from abkd_megatron.student.plan import Plan, agree
from abkd_megatron.vocab_parallel import VocabShard, vocab_parallel_distillation_head


def proposals(rank: int) -> dict[str, Plan | None]:
    """Of rank 0, which is on another stage, and of two that differ."""
    of_rank = {
        "chunks": (None, Plan("auto", "eager", 512, "large"), Plan("auto", "eager", 256, "small")),
        "heads": (None, Plan("auto", "eager", 512, "large"), Plan("auto", "eager", None, "no room")),
        "kernels": (None, Plan("auto", "eager", 512, "large"), Plan("auto", "cpp", 512, "large")),
        "nobody": (None, None, None),
    }
    return {name: plans[rank] for name, plans in of_rank.items()}


def agreed(rank: int, world_size: int) -> dict[str, Plan | str | None]:
    found: dict[str, Plan | str | None] = {}
    for name, proposed in proposals(rank).items():
        try:
            found[name] = agree(proposed)
        except ConfigError as error:
            found[name] = str(error)
    return found


def test_all_ranks_have_one_plan() -> None:
    ranks = run_distributed(agreed, 3)
    assert ranks[0] == ranks[1] == ranks[2]
    assert ranks[0]["chunks"] == Plan("auto", "eager", 256, "small")
    assert ranks[0]["heads"] == Plan("auto", "eager", None, "no room")
    assert ranks[0]["nobody"] is None
    assert str(ranks[0]["kernels"]).startswith(
        "expected one kernel on all ranks of the last pipeline stage, got cpp, eager"
    )


def with_own_chunks(rank: int, world_size: int) -> str:
    """What comes of ranks that choose by themselves: the reason for a plan."""
    hidden, weight = torch.randn(256, 4), torch.randn(8, 4, requires_grad=True)
    # In a group of its own, whose second exchange then waits in vain in the background.
    group = dist.new_group(timeout=timedelta(seconds=2))
    shard, labels = VocabShard.megatron(8, group), torch.zeros(256, dtype=torch.int64)
    with pytest.raises(strict.StrictError) as raised:
        vocab_parallel_distillation_head(
            hidden, weight, hidden, weight, AlphaBeta(0.2, 0.7), labels, shard, chunk_tokens=(128, 256)[rank]
        )
    return str(raised.value)


def test_ranks_that_choose_by_themselves_are_found() -> None:
    for message in run_distributed(with_own_chunks, 2):
        assert "different collectives" in message
