"""A script's model configuration has what the arguments say, or the script is told the line that it lacks.

And layers of a pattern that cannot be built here are named.
"""

from argparse import Namespace
from types import SimpleNamespace

import pytest

pytest.importorskip("megatron.training")
from megatron.core.transformer import TransformerConfig
from megatron.training.models.gpt import GPTModelConfig

from abkd_megatron.config.model_config import check_layers_here, check_model_config
from abkd_megatron.errors import ConfigError, HostError
from abkd_megatron.local_hybrid_spec import local_hybrid_stack_spec


def made(*, scaled: bool, factor: float) -> GPTModelConfig:
    transformer = TransformerConfig(num_layers=2, hidden_size=8, num_attention_heads=2)
    return GPTModelConfig(transformer=transformer, rope_scaling=scaled, rope_scaling_factor=factor)


def test_a_factor_that_was_left_out_is_named() -> None:
    with pytest.raises(ConfigError, match=r"rope-scaling-factor 32\.0 .*8\.0.*model_cfg\.rope_scaling_factor"):
        check_model_config(made(scaled=True, factor=8.0), Namespace(rope_scaling_factor=32.0))


@pytest.mark.parametrize(("scaled", "factor"), [(True, 32.0), (False, 8.0)])
def test_one_that_is_there_or_does_not_matter_passes(scaled: bool, factor: float) -> None:
    check_model_config(made(scaled=scaled, factor=factor), Namespace(rope_scaling_factor=32.0))


@pytest.mark.parametrize("pattern", ["+-", "D-|+E"])
def test_latent_attention_is_not_in_the_local_layers(pattern: str) -> None:
    config = SimpleNamespace(hybrid_layer_pattern=pattern, hybrid_stack_spec=local_hybrid_stack_spec)
    with pytest.raises(HostError, match=r"teacher.*layers [+D].*TransformerEngine"):
        check_layers_here(config, "teacher")
    config.hybrid_stack_spec = object()  # a custom spec may have them
    check_layers_here(config, "teacher")
    check_layers_here(SimpleNamespace(hybrid_layer_pattern="*-", hybrid_stack_spec=local_hybrid_stack_spec), "teacher")
