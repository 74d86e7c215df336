"""Distribution of a model's layers over pipeline stages, as Megatron does it."""

import itertools
from collections.abc import Sequence

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from abkd_megatron.config.pattern import layers_and_pipes
from abkd_megatron.errors import ConfigError


def layers_of_stages(config: TransformerConfig, pattern: str | None = None) -> list[tuple[int, ...]]:
    """Return the layer numbers, from 1, that Megatron builds on each pipeline stage.

    Args:
        config: of the whole model.
        pattern: of a HybridModel, see `layers_of_pattern`; None for a GPTModel.
    """
    if pattern is not None and "|" in layers_and_pipes(pattern):
        return _layers_of_segments(layers_and_pipes(pattern).split("|"), config.pipeline_model_parallel_size)
    stages: list[list[int]] = [[] for _ in range(config.pipeline_model_parallel_size)]
    virtual = config.virtual_pipeline_model_parallel_size
    if (layout := config.pipeline_model_parallel_layout) is not None:
        # With a layout, Megatron's functions below ask for the current rank.
        numbers = itertools.count(1)
        for chunk, stage in itertools.product(range(virtual or 1), range(len(stages))):
            stages[stage] += itertools.islice(numbers, layout.layout[stage][chunk].count(LayerType.decoder))
    else:
        for stage, built in enumerate(stages):
            for vp_stage in range(virtual) if virtual else [None]:
                first = get_transformer_layer_offset(config, vp_stage, stage) + 1
                built += range(first, first + get_num_layers_to_build(config, vp_stage, stage))
    return [tuple(stage) for stage in stages]


def _layers_of_segments(segments: Sequence[str], num_stages: int) -> list[tuple[int, ...]]:
    """Return the layers of each stage, whose virtual stages are every `num_stages`-th segment."""
    ends = list(itertools.accumulate(map(len, segments), initial=0))
    numbers = [range(first + 1, end + 1) for first, end in itertools.pairwise(ends)]
    return [tuple(itertools.chain(*numbers[stage::num_stages])) for stage in range(num_stages)]


def check_stages(config: TransformerConfig, who: str, pattern: str | None = None) -> None:
    """Reject a distribution over pipeline stages that does not build every layer exactly once.

    Args:
        config: of the complete model.
        who: "student" or "teacher".
        pattern: as `layers_of_stages` takes it.

    Raises:
        ConfigError: with the layers of each stage.
    """
    try:
        stages = layers_of_stages(config, pattern)
    except (AssertionError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(
            f"{who}: Megatron cannot distribute {config.num_layers} layers over "
            f"{config.pipeline_model_parallel_size} pipeline stages ({type(error).__name__}: {error}); change "
            "num-layers or the distribution"
        ) from error
    wanted = list(range(1, config.num_layers + 1))
    if sorted(number for stage in stages for number in stage) != wanted:
        shown = ", ".join(str(len(stage)) for stage in stages)
        raise ConfigError(
            f"{who}: expected each of {config.num_layers} layers on one pipeline stage, got layers {shown} on "
            f"{len(stages)} stages; change num-layers, decoder-first-pipeline-num-layers, "
            "decoder-last-pipeline-num-layers or pipeline-model-parallel-size"
        )
