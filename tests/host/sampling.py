"""Texts sampled from one model in several layouts of two ranks, as a line of JSON: `sampling.py FOLDER`.

The first layout also has the same texts from whole forward passes without a cache, sorted and unsharded.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

VOCAB, NEW, END = 61, 12, 7
PROMPTS = [[3, 5, 8, 11, 2], [9, 1, 4], [50, 60, 0, 33], [3, 5, 8], [12, 13, 14, 15], [21, 34, 55, 1, 1]]
DRAWS = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 1.0, "seed": 3},
    "top-k": {"temperature": 1.5, "top_k": 5, "seed": 4},
    "top-p": {"temperature": 1.0, "top_p": 0.7, "seed": 5},
    "both": {"temperature": 2.0, "top_k": 20, "top_p": 0.8, "seed": -6},
}
LAYOUTS = {"data": (1, 1, None), "tensor": (2, 1, None), "pipeline": (1, 2, None), "interleaved": (1, 2, 2)}

KINDS = {"gpt": tuple(LAYOUTS), "hybrid": ("data", "tensor", "pipeline"), "experts": ("data", "tensor")}


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

    from abkd_megatron.config.rollouts import Sampling
    from abkd_megatron.rollouts.sampler import Prompts, Sampler

    lengths = [len(prompt) for prompt in PROMPTS]
    prompts = torch.tensor([prompt + [0] * (max(lengths) - len(prompt)) for prompt in PROMPTS])
    found: dict[str, dict] = {}
    for kind, names in KINDS.items():
        draws = DRAWS if kind == "gpt" else {draw: DRAWS[draw] for draw in ("greedy", "both")}
        for name in names:
            tensor, pipeline, virtual = LAYOUTS[name]
            experts = 2 if kind == "experts" and name == "data" else 1
            parallel_state.initialize_model_parallel(
                tensor,
                pipeline,
                virtual_pipeline_model_parallel_size=virtual,
                expert_model_parallel_size=experts,
            )
            groups = ProcessGroupCollection.use_mpu_process_groups()
            model_parallel_cuda_manual_seed(1)
            config = model_config(kind, tensor, pipeline, virtual, experts)
            built = config.get_builder_cls()(config).build_distributed_models(groups, wrap_with_ddp=False)
            chunks = unwrap_model(built)
            path = folder / kind
            if name == "data":
                for index, parameter in enumerate(chunks[0].parameters()):
                    own = 0 if getattr(parameter, "allreduce", True) else 1000 * dist.get_rank()  # experts
                    generator = torch.Generator().manual_seed(own + index)
                    if parameter.dim() > 1:
                        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.35)
                if dist.get_rank() == 0:
                    path.mkdir(parents=True)
                dist.barrier()
                dist_checkpointing.save({"model": chunks[0].sharded_state_dict()}, str(path))
            else:
                wanted = {f"model{index}": chunk.sharded_state_dict() for index, chunk in enumerate(chunks)}
                loaded = dist_checkpointing.load(wanted, str(path))
                for index, chunk in enumerate(chunks):
                    chunk.load_state_dict(loaded[f"model{index}"])
            sampler = Sampler(chunks, groups, VOCAB, new_tokens=NEW, end=END)
            rows = torch.arange(len(PROMPTS))
            if name == "data":
                rows = rows.chunk(2)[dist.get_rank()]
            given = Prompts(prompts[rows], torch.tensor(lengths)[rows], min(lengths), 100 + rows)
            before = state(chunks)
            of_layout = {}
            for draw, settings in draws.items():
                rollouts = sampler.sample(given, Sampling(**settings))
                texts = texts_of(rollouts)
                if name == "data":
                    both: list = [None, None]
                    dist.all_gather_object(both, texts)
                    texts = both[0] + both[1]
                of_layout[draw] = texts
                assert same(before, state(chunks)), (name, draw)
            if name == "data":
                chunks[0].eval()
                found[f"{kind} reference"] = {
                    draw: [
                        written_whole(chunks[0], prompt, 100 + row, Sampling(**settings))
                        for row, prompt in enumerate(PROMPTS)
                    ]
                    for draw, settings in draws.items()
                }
            found[f"{kind} {name}"] = of_layout
            parallel_state.destroy_model_parallel()
    print("FOUND " + json.dumps(found), flush=True)
    dist.barrier()


def texts_of(rollouts) -> list[list[int]]:
    rows = zip(rollouts.tokens.tolist(), rollouts.ends.tolist(), strict=True)
    return [row[:end] for row, end in rows]


def state(chunks) -> dict:
    """What sampling must leave alone."""
    import torch
    from megatron.core.inference.utils import InferenceMode
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    modules = [module for chunk in chunks for module in chunk.modules()]
    return {
        "flags": [
            {name: value for name, value in vars(module).items() if isinstance(value, bool)} for module in modules
        ],
        "configs": [dict(vars(chunk.config)) for chunk in chunks],
        "hooks": [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in modules],
        "random": torch.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
        "weights": [parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()],
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), InferenceMode.is_active()),
    }


def same(one, other) -> bool:
    import torch

    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one is other or one == other


def written_whole(model, prompt: list[int], number: int, sampling) -> list[int]:
    """The text of one prompt from whole forward passes, each token chosen from sorted probabilities."""
    import torch

    from abkd_megatron.rollouts.choice import gumbel

    text = list(prompt)
    with torch.no_grad():
        while len(text) < len(prompt) + NEW:
            tokens = torch.tensor([text])
            mask = torch.ones(1, 1, len(text), len(text)).triu(1).bool()
            logits = model(tokens, torch.arange(len(text)).expand(1, -1), mask)[0, -1, :VOCAB].double()
            if sampling.temperature == 0:
                token = int(logits.argmax())
            else:
                logits = logits / sampling.temperature
                if sampling.top_k is not None:
                    logits[logits < logits.sort(descending=True).values[sampling.top_k - 1]] = -torch.inf
                if sampling.top_p is not None:
                    probabilities, order = logits.softmax(-1).sort(descending=True)
                    before = probabilities.cumsum(-1) - probabilities
                    logits[order[before >= sampling.top_p]] = -torch.inf
                noise = gumbel(torch.tensor([number]), len(text), torch.arange(VOCAB), sampling.seed)[0]
                token = int((logits + noise).argmax())
            text.append(token)
            if token == END:
                break
    return text


def model_config(kind: str, tensor: int, pipeline: int, virtual: int | None, experts: int):
    import torch
    from megatron.core.transformer import TransformerConfig
    from megatron.training.models import GPTModelConfig, HybridModelConfig

    from abkd_megatron.local_hybrid_spec import local_hybrid_stack_spec

    transformer = TransformerConfig(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=64,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        attention_dropout=0.1,
        hidden_dropout=0.1,
        transformer_impl="local",
        normalization="RMSNorm",
        gated_linear_unit=True,
        add_bias_linear=False,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        sequence_parallel=tensor > 1,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        num_moe_experts=4 if kind == "experts" else None,
        moe_router_topk=2,
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=experts,
    )
    common = {
        "transformer": transformer,
        "vocab_size": VOCAB,
        "make_vocab_size_divisible_by": 8,
        "should_pad_vocab": True,
        "seq_length": 32,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": True,
    }
    if kind != "hybrid":
        config = GPTModelConfig(**common)
    else:
        config = HybridModelConfig(**common, hybrid_layer_pattern="*-*-", hybrid_stack_spec=local_hybrid_stack_spec)
    config.finalize()
    return config


if __name__ == "__main__":
    main(Path(sys.argv[1]))
