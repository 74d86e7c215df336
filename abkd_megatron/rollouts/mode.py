"""A process that samples from a model in the middle of its training, and is afterwards what it was before."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.inference.utils import InferenceMode

from abkd_megatron.teacher.model import Model

# What layers do differently with sequence parallelism; a decoded token is a sequence of one.
_SEQUENCE_PARALLEL = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
# Of a model's config: timers would keep thousands of entries, and the others belong to a backward pass.
_NOT_MEANWHILE = ("timers", "no_sync_func", "grad_sync_func", "param_sync_func")


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
