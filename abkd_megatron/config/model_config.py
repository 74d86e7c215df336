"""Megatron's model configuration from its arguments, including fields that Megatron's function omits."""

from argparse import Namespace
from typing import Any

from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelConfig

from abkd_megatron.errors import ConfigError

# Arguments of the model that `gpt_config_from_args` of megatron-core 0.19 does not pass on.
_LEFT_OUT = ("rope_scaling_factor",)


def model_config(args: Namespace) -> GPTModelConfig:
    """Return the model configuration of Megatron's validated arguments.

    Raises:
        AssertionError, ValueError: Megatron rejects the arguments.
    """
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
        if config.rope_scaling and theirs != ours:
            raise ConfigError(
                f"student: expected {name.replace('_', '-')} {ours} in the model config, got {theirs}, because "
                f"Megatron's gpt_config_from_args omits it; set `model_cfg.{name} = args.{name}` before this call, or "
                f"pass --{name.replace('_', '-')} {theirs}"
            )
