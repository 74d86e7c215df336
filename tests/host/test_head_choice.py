"""Which heads there are, and when `head: auto` does without logits: where it takes less memory."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear

from abkd_megatron import AlphaBeta
from abkd_megatron.config import schema
from abkd_megatron.errors import ConfigError
from abkd_megatron.losses.objective import Objective
from abkd_megatron.student.plan import check_fused, nothing_to_gain, obstacle, obstacles_of
from abkd_megatron.vocab_parallel.execution import HEADS, Execution


def test_the_configuration_knows_every_head():
    assert schema.HEADS == HEADS


@pytest.mark.parametrize(
    ("dtype", "num_tokens", "in_place", "reason"),
    [
        # 64 MiB of chunks and a weight of 64 MiB in fp32 against 768 MiB of logits
        (torch.float32, 2048, False, None),
        (torch.float32, 256, False, "a chunk would be 256 tokens"),
        (torch.float32, 300, False, "fused would take 64 MiB and 64 MiB"),
        # in bf16 32 MiB of chunks, 96 MiB with a chunk's part of the gradient, against 64 KiB a token a tensor
        (torch.bfloat16, 684, False, None),
        (torch.bfloat16, 682, False, "fused would take 32 MiB and 96 MiB"),
        (torch.bfloat16, 684, True, "fused would take 32 MiB and 96 MiB"),
        (torch.bfloat16, 1026, True, None),
    ],
)
def test_auto_saves_memory_or_leaves_it(dtype, num_tokens, in_place, reason):
    weight = torch.empty(32768, 512, dtype=dtype, device="meta")
    of_chunks = 2 * 256 * 32768 * dtype.itemsize
    found = nothing_to_gain(weight, num_tokens, 256, of_chunks, in_place)
    assert [reason in why for why in found] == ([True] if reason else [])


def test_a_teacher_of_some_tokens_takes_less_with_logits():
    weight = torch.empty(32768, 512, device="meta")
    # 64 MiB of chunks and 64 MiB of gradient against 2 and 1/4 times 56 MiB of logits, where the teacher's are of every
    # fourth token; with 57.5 MiB there is something to gain.
    for num_tokens, gains in ((448, False), (460, True)):
        found = nothing_to_gain(weight, num_tokens, 256, 2 * 256 * 32768 * 4, False, num_tokens // 4)
        assert bool(found) is not gains
        assert not nothing_to_gain(weight, num_tokens, 256, 2 * 256 * 32768 * 4, False)


def test_a_fused_head_that_cannot_be_is_refused():
    fused, objective = Execution(head="fused"), Objective(AlphaBeta(0.2, 0.7), shared_vocab=100)
    with pytest.raises(ConfigError, match="head: fused"):
        check_fused(fused, obstacles_of(objective, 123))
    check_fused(fused, obstacles_of(objective, 100))


def test_logits_of_another_type_are_materialized() -> None:
    """As megatron-core 0.20 makes them with `logit_dtype`; before, an output layer has no such attribute."""
    layer = ColumnParallelLinear.__new__(ColumnParallelLinear)
    torch.nn.Module.__init__(layer)
    layer.weight = layer.bias = None  # tied
    layer.gather_output, layer.gtp_remat_size = False, 1
    layer.config = SimpleNamespace(
        defer_embedding_wgrad_compute=False, _cpu_offloading_context=None, params_dtype=torch.bfloat16
    )
    assert obstacle(layer) is None
    layer.output_dtype = torch.float32
    assert obstacle(layer) is not None
