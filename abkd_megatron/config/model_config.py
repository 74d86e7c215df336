"""Megatron's model configuration from its arguments, including fields that Megatron's function omits."""

from argparse import Namespace
from typing import Any, TypeAlias

from megatron.core.extensions import transformer_engine
from megatron.core.ssm import gated_delta_net, mamba_mixer
from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args
from megatron.training.models import GPTModelConfig, HybridModelConfig

from abkd_megatron.errors import ConfigError, HostError
from abkd_megatron.local_hybrid_spec import local_hybrid_stack_spec

ModelConfig: TypeAlias = GPTModelConfig | HybridModelConfig  # noqa: UP040 (isinstance takes no `type`)

# Arguments of the model that `gpt_config_from_args` of megatron-core 0.19 does not pass on.
_LEFT_OUT = ("rope_scaling_factor",)


def model_config(args: Namespace) -> ModelConfig:
    """Return the model configuration of Megatron's validated arguments.

    With a layer pattern it is a HybridModel. Its layers are TransformerEngine's, unless `spec` names others; with
    ``transformer-impl local``, which HybridModel itself ignores, they are Megatron's own.

    Raises:
        AssertionError, ValueError: Megatron rejects the arguments.
    """
    if args.hybrid_layer_pattern is not None:
        config = hybrid_config_from_args(args)
        if config.hybrid_stack_spec is None and config.transformer_impl == "local":
            config.hybrid_stack_spec = local_hybrid_stack_spec
        return config
    config = gpt_config_from_args(args)
    for name in _LEFT_OUT:
        setattr(config, name, getattr(args, name))
    return config


def check_model_config(config: Any, args: Namespace) -> None:
    """Reject a student's configuration, built by the caller, that lacks one of these arguments.

    Raises:
        ConfigError: with the setting, both values and the missing line of code.
    """
    for name in _LEFT_OUT:
        theirs, ours = getattr(config, name, None), getattr(args, name)
        if getattr(config, "rope_scaling", False) and theirs != ours:  # not a field of hybrid models
            raise ConfigError(
                f"student: expected {name.replace('_', '-')} {ours} in the model config, got {theirs}, because "
                f"Megatron's gpt_config_from_args omits it; set `model_cfg.{name} = args.{name}` before this call, or "
                f"pass --{name.replace('_', '-')} {theirs}"
            )


def check_layers_here(config: Any, who: str) -> None:
    """Reject a HybridModel with layers that cannot be built in this environment.

    Args:
        config: a model configuration. Other models, and a custom layer spec, are not looked at.
        who: "student" or "teacher".

    Raises:
        HostError: naming the layers, the missing package and what to change.
    """
    pattern, spec = getattr(config, "hybrid_layer_pattern", None), getattr(config, "hybrid_stack_spec", None)
    if pattern is None or (spec is not None and spec is not local_hybrid_stack_spec):
        return
    if spec is None and not transformer_engine.HAVE_TE:
        raise HostError(
            f"{who}: the layers of a HybridModel are TransformerEngine's, which is not installed; install it, or give "
            "transformer-impl=local (a script: --spec abkd_megatron.local_hybrid_spec local_hybrid_stack_spec)"
        )
    if spec is not None and (others := sorted(set(pattern) & set("+D"))):
        raise HostError(
            f"{who}: the layers {', '.join(others)} of hybrid-layer-pattern {pattern} are only in TransformerEngine's "
            "layer spec; install it and remove transformer-impl local, or give another hybrid-layer-pattern"
        )
    for layer, name, package, is_here in (
        ("M", "Mamba", "mamba-ssm", mamba_mixer.HAVE_MAMBA_SSM),
        ("M", "Mamba", "einops", mamba_mixer.HAVE_EINOPS),
        ("G", "gated delta net", "flash-linear-attention", gated_delta_net.HAVE_FLA),
    ):
        if layer in pattern and not is_here:
            raise HostError(
                f"{who}: the layers {layer} ({name}) of hybrid-layer-pattern {pattern} need the package {package}, "
                "which cannot be imported here; install it, or give another hybrid-layer-pattern"
            )
