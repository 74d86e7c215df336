"""Runs the command line and writes the first step's gradients: python gradients.py FOLDER ARGUMENTS OF abkd_megatron.

Each rank writes what it has of the student's gradients once Megatron has finalized them, named and placed as in a
checkpoint. `whole` puts the files of all ranks together.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor


def main() -> int:
    from megatron.training import training

    from abkd_megatron.__main__ import main as command_line

    finalize, path = training.finalize_model_grads, Path(sys.argv[1]) / f"rank-{os.environ['RANK']}.pt"

    def finalize_and_write(model: list[torch.nn.Module], *args: object, **kwargs: object) -> None:
        finalize(model, *args, **kwargs)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save([piece for chunk in model for piece in pieces(chunk)], path)

    training.finalize_model_grads = finalize_and_write
    return command_line(sys.argv[2:])


def pieces(chunk: torch.nn.Module) -> list[tuple[str, tuple[int, ...], tuple[int, ...], Tensor]]:
    """Return this rank's pieces of the gradients of a model chunk within DDP: name, shape of the whole, place, values.

    Collectives: with the distributed optimizer one all-gather per bucket, for each rank has reduced a part of it.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    if chunk.ddp_config.use_distributed_optimizer:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            for bucket in buffer.buckets:
                parts = list(bucket.grad_data.chunk(buffer.data_parallel_world_size))
                mine = parts[dist.get_rank(buffer.data_parallel_group)].clone()
                dist.all_gather(parts, mine, group=buffer.data_parallel_group)
    weights = [
        (module, name, weight)
        for module in chunk.module.modules()
        for name, weight in module._parameters.items()
        if weight is not None and weight.requires_grad
    ]
    # A checkpoint of this model is one of its gradients meanwhile.
    for module, name, weight in weights:
        module._parameters[name] = torch.nn.Parameter(weight.main_grad)
    try:
        saved = chunk.module.sharded_state_dict()
    finally:
        for module, name, weight in weights:
            module._parameters[name] = weight
    apply_factories(saved)
    return [
        (
            " ".join([it.key, *map(str, it.global_offset[: it.prepend_axis_num])]),
            it.global_shape[it.prepend_axis_num :],
            it.global_offset[it.prepend_axis_num :],
            it.data.detach().float().clone(),
        )
        for it in nested_values(saved)
        if isinstance(it, ShardedTensor)
    ]


def whole(files: Sequence[Path]) -> dict[str, Tensor]:
    """Return the gradients of all ranks: every element is on some rank, and equal where it is on several."""
    found: dict[str, Tensor] = {}
    for file in files:
        for name, shape, place, values in torch.load(file):
            gradient = found.setdefault(name, torch.full(shape, torch.nan))
            here = gradient[tuple(slice(start, start + size) for start, size in zip(place, values.shape, strict=True))]
            elsewhere = ~here.isnan()
            assert torch.equal(here[elsewhere], values[elsewhere]), f"{name}: differs between ranks"
            here.copy_(values)
    for name, gradient in found.items():
        assert not gradient.isnan().any(), f"{name}: on no rank, or NaN"
    return found


if __name__ == "__main__":
    sys.exit(main())
