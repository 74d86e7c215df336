"""CPU time per sampled token with a KV cache, and with whole forward passes in its place, on one CPU rank.

    python benchmarks/sampling.py

The student of configs/tiny_cpu.yaml, and one of its teacher's size: 16 prompts of 64 tokens, 64 new ones.
"""

import time
from datetime import timedelta
from typing import Any

import torch

from abkd_megatron import cpu_backend

ROWS, PROMPT, NEW, VOCAB = 16, 64, 64, 2048
SIZES = {"student": (2, 128, 256, 4), "teacher's size": (4, 256, 512, 8)}
REPETITIONS = 3


def main() -> None:
    """Print a line per size."""
    cpu_backend.install()
    cpu_backend.init_process_group(timedelta(minutes=1))
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.utils import unwrap_model

    from abkd_megatron.config.rollouts import Sampling
    from abkd_megatron.rollouts.sampler import Prompts, Sampler

    torch.set_num_threads(1)
    parallel_state.initialize_model_parallel()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model_parallel_cuda_manual_seed(1)
    tokens = torch.randint(VOCAB, (ROWS, PROMPT))
    rows = torch.arange(ROWS)
    prompts = Prompts(tokens, torch.full((ROWS,), PROMPT), PROMPT, rows)
    for name, size in SIZES.items():
        config = model_config(*size)
        (model,) = unwrap_model(config.get_builder_cls()(config).build_distributed_models(groups, wrap_with_ddp=False))
        sampler = Sampler([model], groups, VOCAB, new_tokens=NEW, end=None)
        draws = {
            "greedy": Sampling(temperature=0.0),
            "temperature 1": Sampling(),
            "top-k 50": Sampling(top_k=50),
            "top-p 0.9": Sampling(top_p=0.9),
        }
        found = {draw: best(sampler.sample, prompts, how) for draw, how in draws.items()}
        found["greedy, whole passes"] = best(whole_passes, model, tokens)
        print(name, {draw: f"{seconds * 1e3 / NEW:.2f} ms/step" for draw, seconds in found.items()}, flush=True)


def best(run: Any, *given: Any) -> float:
    """Return the least CPU seconds of several runs."""
    seconds = []
    for _ in range(REPETITIONS):
        begin = time.process_time()
        run(*given)
        seconds.append(time.process_time() - begin)
    return min(seconds)


@torch.no_grad()
def whole_passes(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Continue greedily without a cache."""
    for _ in range(NEW):
        length = tokens.shape[1]
        positions = torch.arange(length).expand(ROWS, -1)
        logits = model(tokens, positions, None)
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    return tokens


def model_config(layers: int, hidden: int, ffn: int, heads: int) -> Any:
    """Return the config of a GPTModel as in configs/tiny_cpu.yaml."""
    from megatron.core.transformer import TransformerConfig
    from megatron.training.models import GPTModelConfig

    transformer = TransformerConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        ffn_hidden_size=ffn,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        transformer_impl="local",
        normalization="RMSNorm",
        gated_linear_unit=True,
        add_bias_linear=False,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
    )
    config = GPTModelConfig(
        transformer=transformer, vocab_size=VOCAB, seq_length=PROMPT + NEW, position_embedding_type="rope"
    )
    config.finalize()
    return config


if __name__ == "__main__":
    main()
