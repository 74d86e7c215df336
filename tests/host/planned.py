"""A student trained by Megatron's combined 1F1B has the losses and gradients of the plain schedule, in a line of JSON.

Two expert-parallel ranks in bf16, as Megatron asks for it. Its plans, nodes and schedule are real; streams are idle.
"""

import json
from datetime import timedelta
from functools import partial
from typing import Any

VOCAB, PADDED, LENGTH = 120, 128, 16


def main() -> None:
    from abkd_megatron import cpu_backend

    cpu_backend.install()
    cpu_backend.init_process_group(timedelta(minutes=3))

    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    model_parallel_cuda_manual_seed(1)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    found: dict[str, Any] = {}
    for head in ("materialized", "fused"):
        for is_planned in (False, True):
            found[f"{head} {is_planned}"] = train(is_planned, head, groups)
    found["rejected"] = [rejected(groups, **more) for more in ({"hidden": True}, {"of_teacher": True})]
    if dist.get_rank() == 0:
        print("FOUND " + json.dumps(found), flush=True)
    dist.barrier()


def build(seed: int, is_planned: bool, groups: Any) -> Any:
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    torch.manual_seed(seed)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_moe_experts=4,
        expert_model_parallel_size=2,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none",
        overlap_moe_expert_parallel_comm=is_planned,
        add_bias_linear=False,
        bf16=True,
        params_dtype=torch.bfloat16,
        calculate_per_token_loss=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )
    spec = get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=False)
    return GPTModel(config, spec, vocab_size=PADDED, max_sequence_length=LENGTH, pg_collection=groups).bfloat16()


def train(is_planned: bool, head: str, groups: Any) -> dict[str, Any]:
    """Sums of losses of three micro-batches on this rank, and the norm of each gradient."""
    import torch
    import torch.distributed as dist
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_attr_wrapped_model

    from abkd_megatron import AlphaBeta
    from abkd_megatron.losses.objective import Objective
    from abkd_megatron.student.attach import attach
    from abkd_megatron.teacher.build import Teacher
    from abkd_megatron.vocab_parallel.execution import Execution

    student = build(3, is_planned, groups)
    model = DistributedDataParallel(student.config, DistributedDataParallelConfig(), student)
    student.config.finalize_model_grads_func = finalize_model_grads
    before = sorted(vars(student))
    attachment = attach(
        model,
        Teacher.of(build(7, False, groups), groups),
        Objective(AlphaBeta(0.2, 0.7)),
        vocab_size=VOCAB,
        pg_collection=groups,
        execution=Execution(head=head, chunk_tokens=7 if head == "fused" else None),
    )
    plans = []

    def forward_step(batches: Any, model: Any, return_schedule_plan: bool = False) -> Any:
        tokens, mask = next(batches), torch.ones(2, LENGTH)
        mask[0, 3 : 5 + dist.get_rank()] = 0
        plans.append(return_schedule_plan)
        run = get_attr_wrapped_model(model, "build_schedule_plan") if return_schedule_plan else model
        positions = torch.arange(LENGTH).expand(2, LENGTH)
        output = run(tokens[:, :-1], positions, None, labels=tokens[:, 1:], loss_mask=mask)
        return output, partial(attachment.loss_func, mask)

    model.zero_grad_buffer()
    generator = torch.Generator().manual_seed(dist.get_rank())
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter([torch.randint(VOCAB, (2, LENGTH + 1), generator=generator) for _ in range(3)]),
        model=[model],
        num_microbatches=3,
        seq_length=LENGTH,
        micro_batch_size=2,
    )
    attachment.detach()
    assert sorted(vars(student)) == before, "detached, the student is what it was"
    assert plans == [is_planned] * 3
    names = reports[0].keys() - {"teacher seconds"}
    return {
        "losses": {name: [report[name].tolist() for report in reports] for name in sorted(names)},
        "gradients": {name: weight.main_grad.float().norm().item() for name, weight in student.named_parameters()},
    }


def rejected(groups: Any, hidden: bool = False, of_teacher: bool = False) -> str:
    from abkd_megatron import AlphaBeta
    from abkd_megatron.errors import ConfigError
    from abkd_megatron.losses.hidden import HiddenLoss
    from abkd_megatron.losses.objective import Objective
    from abkd_megatron.student.attach import attach
    from abkd_megatron.teacher.build import Teacher

    losses = (HiddenLoss(1, 1, "mse", projector=False),) if hidden else ()
    objective = Objective(AlphaBeta(1, 0), hidden_losses=losses)
    teacher = Teacher.of(build(7, of_teacher, groups), groups)
    try:
        attach(build(3, True, groups), teacher, objective, vocab_size=VOCAB, pg_collection=groups)
    except ConfigError as error:
        return str(error)
    return "accepted"


if __name__ == "__main__":
    main()
