"""Features of Megatron that go around the hooks, whoever builds the models."""

from collections.abc import Mapping
from typing import Any

from abkd_megatron.errors import ConfigError

_SHARDED = "it shards the student's weights over data-parallel ranks; the loss reads the output layer's as one"
_HYBRID = "HybridModel", "its forward takes no output_processor"
_KEEPS_NONE = "a teacher keeps no activations for a backward pass"
# What goes around the hooks, whoever builds the models: (feature, reason), by the name of Megatron's setting.
UNSUPPORTED = {
    "overlap_moe_expert_parallel_comm": (
        "combined 1F1B, which overlaps expert communication,",
        "it runs a schedule plan in place of the model's forward, past the teacher",
    ),
    "delay_wgrad_compute": (
        "delaying weight gradients",
        "it belongs to combined 1F1B, which runs a schedule plan in place of the model's forward",
    ),
    "cuda_graph_impl": (
        "a CUDA graph",
        "it would not replay the teacher's messages and its queue, and it was never run",
    ),
    "mtp_standalone": (
        "a pipeline stage of its own for multi-token prediction",
        "stages then exchange shapes first, and synchronize the device while the teacher's messages are open",
    ),
    "hybrid_override_pattern": _HYBRID,
    "hybrid_layer_pattern": _HYBRID,
    "use_megatron_fsdp": ("Megatron FSDP", _SHARDED),
    "use_torch_fsdp2": ("torch FSDP2", _SHARDED),
}
# Of these a process has one, made for the student's sizes or its backward pass.
_UNSUPPORTED_OF_TEACHER = {
    "tp_comm_overlap": ("overlapped tensor-parallel communication", "its buffers have the student's sizes"),
    "cpu_offloading_num_layers": ("offloading activations", _KEEPS_NONE),
    "fine_grained_activation_offloading": ("offloading activations", _KEEPS_NONE),
}


def check_config(config: Any, who: str, unsupported: Mapping[str, tuple[str, str]] = UNSUPPORTED) -> None:
    """Refuse what is set of some features, by name.

    Args:
        config: Megatron's arguments or its TransformerConfig.
        who: "student" or "teacher".
        unsupported: {setting: (feature, reason)}, or setting=value for one value of it; by default what goes around
            the teacher.

    Raises:
        ConfigError: naming the feature, the reason and what to change.
    """
    if who == "teacher":
        unsupported = {**unsupported, **_UNSUPPORTED_OF_TEACHER}
    for setting, (feature, reason) in unsupported.items():
        name, _, rejected = setting.partition("=")
        value = getattr(config, name, None)
        if str(value) == rejected or (value and value != "none" and not rejected):
            raise ConfigError(f"{who}: {feature} is not supported: {reason}; remove {name.replace('_', '-')}")
    if who == "teacher" and config.mtp_num_layers:
        raise ConfigError(
            "teacher: multi-token-prediction layers predict what no loss here compares; remove mtp-num-layers from "
            "`teacher:` (the checkpoint may have them)"
        )
