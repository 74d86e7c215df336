"""A bf16 teacher with aux-loss-free routing, next to the model that its checkpoint was saved from: a line of JSON."""

import json
import sys
from argparse import Namespace
from datetime import timedelta
from pathlib import Path

EXPERTS, VOCAB, SEQUENCE = 16, 64, 12


def main(folder: Path) -> None:
    from abkd_megatron import cpu_backend

    cpu_backend.install()
    cpu_backend.init_process_group(timedelta(minutes=3))

    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.utils import unwrap_model

    from abkd_megatron.teacher.build import build_teacher
    from abkd_megatron.teacher.checkpoint import TeacherCheckpoint

    parallel_state.initialize_model_parallel()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model_parallel_cuda_manual_seed(1)
    # As Megatron trains it: in Float16Module, the biases in fp32.
    (trained,) = model_config().get_builder_cls()(model_config()).build_distributed_models(groups, wrap_with_ddp=False)
    model = unwrap_model(trained).eval()
    generator = torch.Generator().manual_seed(2)
    for router in routers(model):
        router.expert_bias.copy_(torch.rand(EXPERTS, generator=generator) * 1e-3 + 0.5)  # equal or nearly so in bf16
    folder.mkdir()
    saved = {"iteration": 1, "args": Namespace(), **model.sharded_state_dict()}
    dist_checkpointing.save(saved, str(folder))
    teacher = build_teacher(model_config(), TeacherCheckpoint.open(folder), groups)

    ours, theirs = routers(teacher.model), routers(model)
    tokens = torch.randint(VOCAB, (2, SEQUENCE), generator=generator)
    positions = torch.arange(SEQUENCE).expand(2, -1)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE).triu(1).bool()
    with torch.no_grad():
        logits = [it(tokens, positions, mask) for it in (teacher.model, model)]
    found = {
        "routers": len(ours),
        "biases": all(torch.equal(a.expert_bias, b.expert_bias) for a, b in zip(ours, theirs, strict=True)),
        "bias dtypes": sorted({str(router.expert_bias.dtype) for router in ours}),
        "parameter dtypes": sorted({str(parameter.dtype) for parameter in teacher.parameters()}),
        "logits": torch.equal(*logits),
    }
    print("FOUND " + json.dumps(found), flush=True)
    dist.barrier()


def model_config():
    import torch
    from megatron.core.transformer import TransformerConfig
    from megatron.training.models import GPTModelConfig

    transformer = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=64,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        transformer_impl="local",
        normalization="RMSNorm",
        num_moe_experts=EXPERTS,
        moe_router_topk=4,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_token_dispatcher_type="alltoall",
        gradient_accumulation_fusion=False,
    )
    config = GPTModelConfig(
        transformer=transformer, vocab_size=VOCAB, seq_length=SEQUENCE, position_embedding_type="rope"
    )
    config.finalize()
    return config


def routers(model) -> list:
    return [module for module in model.modules() if hasattr(module, "expert_bias")]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
