"""Megatron's model configuration of its arguments, with what Megatron's own function leaves out."""

from argparse import Namespace
from typing import Any

from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelConfig

from abkd_megatron.errors import ConfigError

# Arguments that `gpt_config_from_args` of megatron-core 0.19 does not hand on, though the model has them.
_LEFT_OUT = ("rope_scaling_factor",)


def model_config(args: Namespace) -> GPTModelConfig:
    """The configuration of the model that Megatron's validated arguments describe.

    Raises:
        AssertionError, ValueError: what Megatron rejects of them.
    """
    config = gpt_config_from_args(args)
    for name in _LEFT_OUT:
        setattr(config, name, getattr(args, name))
    return config


def check_model_config(config: Any, args: Namespace) -> None:
    """Reject a student's configuration, made by somebody else, that lacks what the arguments say.

    Raises:
        ConfigError: naming the setting, both values and the line that is missing.
    """
    for name in _LEFT_OUT:
        theirs, ours = getattr(config, name, None), getattr(args, name)
        if config.rope_scaling and theirs != ours:
            raise ConfigError(
                f"student: expected {name.replace('_', '-')} {ours} in the model config, got {theirs}: Megatron's "
                f"gpt_config_from_args does not hand it on; set `model_cfg.{name} = args.{name}` before this call, or "
                f"give --{name.replace('_', '-')} {theirs} if that is what the model is to have"
            )
