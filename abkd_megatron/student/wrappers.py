"""Wrappers of a student that Megatron or torch has put around it: which are supported, and the model inside."""

import itertools
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from megatron.core.distributed import TorchFullyShardedDataParallel
from megatron.core.distributed.fsdp import mcore_fsdp_adapter
from megatron.core.distributed.fsdp.src.megatron_fsdp.megatron_fsdp import MegatronFSDP
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from torch.distributed.fsdp import FSDPModule

from abkd_megatron.config.unsupported import MODEL, check_features
from abkd_megatron.errors import ConfigError, HostError
from abkd_megatron.losses.objective import Objective
from abkd_megatron.student.planned import check_planned
from abkd_megatron.teacher.model import Model

# Megatron FSDP is a class; from megatron-core 0.20 on it is a function that returns one of two.
_MEGATRON_FSDP = [
    kind
    for name, kind in vars(mcore_fsdp_adapter).items()
    if name.startswith("FullyShardedDataParallel") and isinstance(kind, type)
]
# Wrapper classes that are not supported, by the option that creates them.
_WRAPPERS = {TorchFullyShardedDataParallel: "use_torch_fsdp2", FSDPModule: "use_torch_fsdp2"}


def unwrapped(chunks: Sequence[torch.nn.Module]) -> list[Model]:
    """Return the models inside; Megatron's `unwrap_model` stops at Megatron FSDP's second wrapper.

    Raises:
        HostError: for another class than GPTModel and HybridModel.
    """
    found = []
    for chunk in chunks:
        (model,) = unwrap_model([chunk])
        if isinstance(model, MegatronFSDP):
            (model,) = unwrap_model([model.module])
        if not isinstance(model, Model):
            raise HostError(
                f"expected a GPTModel or a HybridModel of megatron-core >= 0.19, got {type(model).__name__}; build the "
                "student with a GPTModelConfig or a HybridModelConfig"
            )
        found.append(model)
    return found


def check_wrappers(
    student: Sequence[torch.nn.Module],
    objective: Objective,
    pg_collection: ProcessGroupCollection,
    num_teachers: int,
) -> None:
    """Reject a model that is compiled as a whole, or sharded over data-parallel ranks in a way that is not supported.

    Megatron FSDP gathers a module's weights in hooks before it runs, so the output layer has to run as a module, with
    materialized logits. It is supported with data parallelism only.

    Args:
        student: this rank's chunks, wrapped.
        objective: of the job.
        pg_collection: the student's process groups; `tp`, `pp`, `cp` and `ep` are used.
        num_teachers: different ones.

    Raises:
        ConfigError: naming the feature, the reason and what to change.
    """
    for module in itertools.chain.from_iterable(chunk.modules() for chunk in student):
        compiled = isinstance(module, Model) and module._compiled_call_impl is not None
        if compiled or isinstance(module, torch._dynamo.OptimizedModule):
            raise ConfigError(
                "student: torch.compile of the whole model is not supported: hooks on its forward run the teacher and "
                "send its messages; compile its layers"
            )
        for wrapper, name in _WRAPPERS.items():
            if isinstance(module, wrapper):
                check_features(SimpleNamespace(**{name: True}), "student", MODEL)
        if isinstance(module, tuple(_MEGATRON_FSDP)):
            _check_megatron_fsdp(module, objective, pg_collection, num_teachers)
    check_planned(unwrapped(student), objective, pg_collection, num_teachers)


def _check_megatron_fsdp(
    wrapper: torch.nn.Module, objective: Objective, pg_collection: ProcessGroupCollection, num_teachers: int
) -> None:
    if not isinstance(getattr(wrapper, "module", None), MegatronFSDP):
        raise ConfigError(
            f"student: expected Megatron FSDP of megatron-core 0.19, got {type(wrapper).__name__} of another release; "
            "remove use-megatron-fsdp"
        )
    sizes = {
        name: getattr(pg_collection, name).size()
        for name in ("tp", "pp", "cp", "ep")
        if getattr(pg_collection, name, None) is not None
    }
    found = {
        **{f"{name.upper()} {size}": size > 1 for name, size in sizes.items()},
        "hidden_losses": bool(objective.hidden_losses),
        "mtp_weight": objective.mtp_weight > 0,
        "mix": objective.mix is not None,
        "cross_tokenizer": objective.cross_tokenizer is not None,
        "several teachers": num_teachers > 1,
    }
    for name, is_on in found.items():
        if is_on:
            raise ConfigError(
                f"student: Megatron FSDP is supported with data parallelism only and losses on logits, got {name}; "
                "remove it, or use-megatron-fsdp"
            )
