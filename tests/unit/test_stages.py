"""Every way to lay layers over pipeline stages builds each layer once, or is rejected."""

import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")
from megatron.core.transformer import TransformerConfig

from abkd_megatron.config.stages import check_stages, layers_of_stages
from abkd_megatron.errors import ConfigError


def config(layers: int, stages: int, virtual: int | None = None, **how: Any) -> TransformerConfig:
    return TransformerConfig(
        num_layers=layers,
        hidden_size=8,
        num_attention_heads=2,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=virtual,
        pipeline_dtype=torch.float32,
        **how,
    )


def ways() -> list[tuple[int, int, int | None, dict[str, Any]]]:
    """Divisions that Megatron takes by itself."""
    found = []
    for layers, stages, virtual, first, last, embedding, loss in itertools.product(
        range(2, 9), (2, 3, 4), (None, 2), (None, 1, 2, 5), (None, 1, 2, 5), (False, True), (False, True)
    ):
        how: dict[str, Any] = {
            "num_layers_in_first_pipeline_stage": first,
            "num_layers_in_last_pipeline_stage": last,
            "account_for_embedding_in_pipeline_split": embedding,
            "account_for_loss_in_pipeline_split": loss,
        }
        how = {name: value for name, value in how.items() if value}
        try:
            config(layers, stages, virtual, **how)
        except (AssertionError, ValueError):
            continue
        found.append((layers, stages, virtual, how))
    return found


def test_what_is_accepted_builds_every_layer_once() -> None:
    accepted, rejected = [], []
    for layers, stages, virtual, how in ways():
        made = config(layers, stages, virtual, **how)
        try:
            check_stages(made, "student")
        except ConfigError:
            rejected.append((layers, stages, virtual, how))
            continue
        accepted.append((layers, stages, virtual, how))
        built = layers_of_stages(made)
        assert len(built) == stages
        assert sorted(itertools.chain(*built)) == list(range(1, layers + 1))
    assert (4, 2, None, {}) in accepted
    assert (4, 2, None, {"num_layers_in_first_pipeline_stage": 1}) in accepted
    assert (8, 2, 2, {}) in accepted
    assert (4, 2, None, {"num_layers_in_first_pipeline_stage": 5}) in rejected
    assert (4, 2, None, {"num_layers_in_last_pipeline_stage": 5}) in rejected
    assert (5, 2, None, {}) in rejected


@pytest.mark.parametrize(
    ("layout", "stages", "wanted"),
    [
        ("Et|tttL", 2, [(1,), (2, 3, 4)]),
        ("E|t|tt|tL", 2, [(2, 3), (1, 4)]),
        ("E|tttt|L", 3, [(), (1, 2, 3, 4), ()]),
    ],
)
def test_layouts(layout: str, stages: int, wanted: list[tuple[int, ...]]) -> None:
    made = config(4, stages, pipeline_model_parallel_layout=layout)
    check_stages(made, "teacher")
    assert layers_of_stages(made) == wanted
