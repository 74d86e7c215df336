"""A student in Megatron FSDP trains as one in Megatron's DDP does, over two data-parallel ranks, in a line of JSON.

Megatron's schedule, optimizer and FSDP are real. einops, which FSDP reshapes a list of ranks with, is a stand-in.
"""

import json
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

VOCAB, PADDED, LENGTH = 120, 128, 16
STRATEGIES = ("optim", "optim_grads", "optim_grads_params")


def main() -> None:
    from abkd_megatron import cpu_backend

    cpu_backend.install()
    cpu_backend.init_process_group(timedelta(minutes=3))

    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.distributed.fsdp import mcore_fsdp_adapter
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    sys.path.insert(0, str(Path(__file__).parents[1] / "stand_ins"))
    import einops

    mcore_fsdp_adapter.einops, mcore_fsdp_adapter.HAVE_EINOPS = einops, True
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    found = {}
    for is_tied in (False, True):
        for strategy in (None, *(STRATEGIES if not is_tied else STRATEGIES[-1:])):
            found[f"{strategy}{', tied' * is_tied}"] = train(strategy, is_tied, groups)
    found["rejected"] = [rejected(groups, **more) for more in ({"head": "fused"}, {"hidden": True})]
    if dist.get_rank() == 0:
        print("FOUND " + json.dumps(found), flush=True)
    dist.barrier()


def build(seed: int, is_tied: bool, groups: Any) -> Any:
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    torch.manual_seed(seed)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        calculate_per_token_loss=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=PADDED,
        max_sequence_length=LENGTH,
        pg_collection=groups,
        share_embeddings_and_output_weights=is_tied,
    )


def wrap(strategy: str | None, model: Any, groups: Any) -> Any:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel

    if strategy is None:
        return DistributedDataParallel(
            model.config, DistributedDataParallelConfig(use_distributed_optimizer=True), model
        )
    how = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        use_megatron_fsdp=True,
        data_parallel_sharding_strategy=strategy,
        overlap_grad_reduce=True,
        overlap_param_gather=strategy == "optim_grads_params",
    )
    return FullyShardedDataParallel(model.config, how, model, pg_collection=groups)


def train(strategy: str | None, is_tied: bool, groups: Any) -> list[list[float]]:
    """Three steps of two micro-batches: sums of losses and tokens over ranks, and gradient norms."""
    import torch
    import torch.distributed as dist
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from abkd_megatron import AlphaBeta
    from abkd_megatron.losses.objective import Objective
    from abkd_megatron.student.attach import attach
    from abkd_megatron.teacher.build import Teacher

    model = wrap(strategy, build(3, is_tied, groups), groups)
    model.config.finalize_model_grads_func, model.config.no_sync_func = finalize_model_grads, model.no_sync
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-2, use_distributed_optimizer=True, clip_grad=1.0), [model]
    )
    teacher = Teacher.of(build(7, is_tied, groups), groups)
    attachment = attach(model, teacher, Objective(AlphaBeta(0.2, 0.7)), vocab_size=VOCAB, pg_collection=groups)

    def forward_step(batches: Any, model: Any) -> Any:
        tokens, mask = next(batches), torch.ones(2, LENGTH)
        mask[0, 3 : 5 + dist.get_rank()] = 0
        positions = torch.arange(LENGTH).expand(2, LENGTH)
        output = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:], loss_mask=mask)
        return output, partial(attachment.loss_func, mask)

    found = []
    for step in range(3):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([torch.randint(VOCAB, (2, LENGTH + 1), generator=generator) for _ in range(2)]),
            model=[model],
            num_microbatches=2,
            seq_length=LENGTH,
            micro_batch_size=2,
        )
        _, norm, _ = optimizer.step()
        sums = torch.stack([sum(report[name] for report in reports) for name in ("lm loss", "kd loss")]).double()
        dist.all_reduce(sums)
        found.append([*sums.flatten().tolist(), float(norm)])
    return found


def rejected(groups: Any, head: str = "auto", hidden: bool = False) -> str:
    from abkd_megatron import AlphaBeta
    from abkd_megatron.errors import ConfigError
    from abkd_megatron.losses.hidden import HiddenLoss
    from abkd_megatron.losses.objective import Objective
    from abkd_megatron.student.attach import attach
    from abkd_megatron.teacher.build import Teacher
    from abkd_megatron.vocab_parallel.execution import Execution

    losses = (HiddenLoss(1, 1, "mse", projector=False),) if hidden else ()
    teacher, objective = Teacher.of(build(7, False, groups), groups), Objective(AlphaBeta(1, 0), hidden_losses=losses)
    model = wrap(STRATEGIES[-1], build(3, False, groups), groups)
    how = {"vocab_size": VOCAB, "pg_collection": groups, "execution": Execution(head=head)}
    try:
        attach(model, teacher, objective, **how)
    except ConfigError as error:
        return str(error)
    return "accepted"


if __name__ == "__main__":
    main()
