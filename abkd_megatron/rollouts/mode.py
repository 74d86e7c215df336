"""A process that samples from a model in the middle of its training, and is afterwards what it was before."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.inference.utils import InferenceMode

from abkd_megatron.errors import ConfigError
from abkd_megatron.teacher.model import Model, pattern_of_model

# What layers do differently with sequence parallelism; a decoded token is a sequence of one.
_SEQUENCE_PARALLEL = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
# Of a model's config: timers would keep thousands of entries, and the others belong to a backward pass.
_NOT_MEANWHILE = ("timers", "no_sync_func", "grad_sync_func", "param_sync_func")
# Layers of a HybridModel's pattern that have a state of their own in place of keys and values.
_RECURRENT = "MG"


def check_can_sample(model: Model) -> None:
    """Reject a model from which this package does not sample.

    Args:
        model: any of a rank's chunks.

    Raises:
        ConfigError: with the setting.
    """
    config = model.config
    recurrent = set(pattern_of_model(model) or "") & set(_RECURRENT)
    settings = (
        ("context-parallel-size 1", config.context_parallel_size > 1, config.context_parallel_size),
        ("no fp8 or fp4", bool(config.fp8 or config.fp4), config.fp8 or config.fp4),
        ("no CUDA graphs", config.cuda_graph_impl != "none", config.cuda_graph_impl),
        ("no multi-latent-attention", config.multi_latent_attention, "it"),
        ("no multi-token prediction", bool(config.mtp_num_layers), f"mtp-num-layers {config.mtp_num_layers}"),
        ("no flash-decode", config.flash_decode, "it"),
        ("a hybrid-layer-pattern of *, - and E", bool(recurrent), ", ".join(sorted(recurrent))),
    )
    for expected, is_set, got in settings:
        if is_set:
            raise ConfigError(f"sampling from the student: expected {expected}, got {got}; train on the data alone")


@contextmanager
def sampling_mode(chunks: Sequence[Model]) -> Iterator[None]:
    """Let a model sample: evaluation, no gradient, Megatron's InferenceMode, no sequence parallelism.

    Afterwards every flag of every module is what it was, and no random generator has advanced. Tensors are ordinary
    ones, not those of `torch.inference_mode`, since Megatron's buffers and caches outlive the block.

    Args:
        chunks: this rank's, without wrappers.
    """
    modules = list(dict.fromkeys(module for chunk in chunks for module in chunk.modules()))
    flags = [(module, "training", module.training) for module in modules]
    flags += [
        (module, name, value)
        for module in modules
        for name in _SEQUENCE_PARALLEL
        if isinstance(value := getattr(module, name, None), bool)
    ]
    kept = [
        (config, name, getattr(config, name))
        for config in {id(module.config): module.config for module in modules if hasattr(module, "config")}.values()
        for name in ("sequence_parallel", *_NOT_MEANWHILE)
        if hasattr(config, name)
    ]
    try:
        for module, name, _ in flags:
            setattr(module, name, False)
        for config, name, _ in kept:
            setattr(config, name, False if name == "sequence_parallel" else None)
        with torch.no_grad(), InferenceMode.active():
            yield
    finally:
        for holder, name, value in (*flags, *kept):
            setattr(holder, name, value)
        for module in modules:
            # Rotary embeddings keep their last results, here of another length.
            if (clear := getattr(type(module).forward, "cache_clear", None)) is not None:
                clear()
