"""Layer patterns of a HybridModel: what is rejected, what a teacher inherits, and how they are written."""

import argparse
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.training")
from megatron.core.transformer import TransformerConfig
from test_inherited import BASE

from abkd_megatron.config.load import load_config
from abkd_megatron.config.megatron_args import megatron_options
from abkd_megatron.config.pattern import check_pattern, layers_of_pattern, pattern_of
from abkd_megatron.config.stages import check_stages, layers_of_stages
from abkd_megatron.errors import CheckpointError, ConfigError
from abkd_megatron.teacher.compatibility import differences
from abkd_megatron.teacher.description import Description, of_hugging_face
from abkd_megatron.teacher.inherited import teacher_settings
from abkd_megatron.teacher.model import check_gpt_source
from abkd_megatron.tools.dry_run import megatron_arguments

OPTIONS = megatron_options()
DEFAULTS = {action.dest: action.default for action in OPTIONS.values() if action.dest != "help"}


def arguments(pattern: str | None, **given: Any) -> Namespace:
    fields = {"position_embedding_type": "rope", "hybrid_layer_pattern": pattern, **given}
    return Namespace(**(DEFAULTS | fields))


def test_layers() -> None:
    assert layers_of_pattern("M-|*E|G/*-/*-") == "M-*EG"
    assert pattern_of(arguments(None)) is None
    assert pattern_of(arguments(None, hybrid_override_pattern="M*")) == "M*"
    assert pattern_of(Namespace()) is None


@pytest.mark.parametrize(
    ("pattern", "given", "message"),
    [
        ("*-", {"use_rope_scaling": True}, "use-rope-scaling"),
        ("*-", {"rotary_interleaved": True}, "rotary-interleaved"),
        ("*-", {"position_embedding_type": "mrope"}, "position-embedding-type"),
        ("*E", {}, "num-experts"),
        ("*-*", {"pipeline_model_parallel_size": 2}, "3 layers"),
        ("*-", {"fine_grained_activation_offloading": True}, "fine-grained-activation-offloading"),
    ],
)
def test_what_a_hybrid_model_does_not_have_is_rejected(pattern: str, given: dict[str, Any], message: str) -> None:
    check_pattern(arguments(None, **given), "student")
    check_pattern(arguments("*-"), "student")
    with pytest.raises(ConfigError, match=f"student: .*{message}"):
        check_pattern(arguments(pattern, **given), "student")


@pytest.mark.parametrize(
    ("pattern", "message"), [("*-|*-|*-|*-", "virtual pipeline stages.*2 segments"), ("*-|*-/*-", "multi-token")]
)
def test_what_a_teacher_cannot_have_is_rejected(pattern: str, message: str) -> None:
    check_pattern(arguments(pattern, pipeline_model_parallel_size=2), "student")
    with pytest.raises(ConfigError, match=f"teacher: {message}"):
        check_pattern(arguments(pattern, pipeline_model_parallel_size=2), "teacher")


@pytest.mark.parametrize(
    ("pattern", "stages", "virtual", "wanted"),
    [
        ("M-*-", 2, None, [(1, 2), (3, 4)]),
        ("M|-*-/*-", 2, None, [(1,), (2, 3, 4)]),
        ("M|-|*|-", 2, 2, [(1, 3), (2, 4)]),
        ("M-*-", 1, None, [(1, 2, 3, 4)]),
    ],
)
def test_layers_of_stages(pattern: str, stages: int, virtual: int | None, wanted: list[tuple[int, ...]]) -> None:
    config = TransformerConfig(
        num_layers=4,
        hidden_size=8,
        num_attention_heads=2,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=virtual,
        pipeline_dtype="fp32",
    )
    assert layers_of_stages(config, pattern) == wanted
    check_stages(config, "student", pattern)


@pytest.mark.parametrize("written", ["*-*-", '"*-*-"', "'*-*-'"])
def test_a_pattern_on_the_command_line(written: str) -> None:
    config = load_config(None, [f"megatron.hybrid-layer-pattern={written}"], OPTIONS)
    assert config.megatron["hybrid-layer-pattern"] == "*-*-"


@pytest.mark.parametrize("written", ["*-*-", "*-|*-", "*"])
def test_an_unquoted_pattern_in_a_file_is_explained(tmp_path: Path, written: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"megatron:\n  hybrid-layer-pattern: {written}\n")
    with pytest.raises(ConfigError, match="quotes"):
        load_config(file, [], OPTIONS)
    file.write_text(f'megatron:\n  hybrid-layer-pattern: "{written}"\n')
    assert load_config(file, [], OPTIONS).megatron["hybrid-layer-pattern"] == written


GPT = {"num-layers": 4, "spec": ["layers", "gpt"], "use-rope-scaling": True, "position-embedding-type": "rope"}
MAMBA = {"hybrid-layer-pattern": "M-*-", "num-layers": 9, "spec": ["layers", "hybrid"], "mamba-head-dim": 16}


@pytest.mark.parametrize(
    ("student", "teacher", "kept", "dropped"),
    [
        (GPT, {"hybrid-layer-pattern": "M-*-"}, set(), {"num-layers", "spec", "use-rope-scaling"}),
        (MAMBA, {"num-layers": 4}, set(), {"hybrid-layer-pattern", "spec", "mamba-head-dim"}),
        (
            MAMBA,
            {"hybrid-override-pattern": "M*"},
            {"spec", "mamba-head-dim"},
            {"hybrid-layer-pattern", "num-layers"},
        ),
        (GPT, {}, {"num-layers", "spec", "use-rope-scaling"}, set()),
        (
            {"hybrid-override-pattern": "M*", "mtp-hybrid-override-pattern": "*"},
            {"num-layers": 2},
            set(),
            {"hybrid-override-pattern", "mtp-hybrid-override-pattern"},
        ),
    ],
)
def test_what_a_teacher_inherits(student: dict, teacher: dict, kept: set[str], dropped: set[str]) -> None:
    found = teacher_settings(student, teacher, OPTIONS)
    assert teacher.items() <= found.items()
    assert kept <= found.keys()
    assert not dropped & found.keys() - teacher.keys()


@pytest.mark.parametrize(
    ("student", "teacher", "kinds"),
    [
        ({"num-layers": 4}, {"hybrid-layer-pattern": "M-*-*-"}, (None, "M-*-*-")),
        ({"hybrid-layer-pattern": "M-*-"}, {"num-layers": 4}, ("M-*-", None)),
        ({"hybrid-override-pattern": "*-*-"}, {"hybrid-layer-pattern": "M-"}, ("*-*-", "M-")),
    ],
)
def test_arguments_of_a_pair(student: dict, teacher: dict, kinds: tuple[str | None, str | None]) -> None:
    shared = {name: value for name, value in BASE.items() if name != "num-layers"}
    given = [f"megatron.{name}={value}" for name, value in (shared | student).items()]
    given += [f"teacher.{name}={value}" for name, value in teacher.items()]
    ours, theirs = megatron_arguments(load_config(None, ["device=cuda", *given], OPTIONS), 1)
    assert theirs is not None
    assert (ours.hybrid_layer_pattern, theirs.hybrid_layer_pattern) == kinds
    assert theirs.num_layers == teacher.get("num-layers", len(kinds[1] or ""))


def test_a_teacher_of_a_hybrid_student_needs_its_own_layers() -> None:
    from abkd_megatron.teacher.args import _check_layers_given

    _check_layers_given({"num_layers": 4}, OPTIONS)
    _check_layers_given({"hybrid-layer-pattern": "M*"}, OPTIONS)
    with pytest.raises(ConfigError, match=r"teacher\.hybrid-layer-pattern.*teacher\.num-layers"):
        _check_layers_given({"hidden-size": 4, "num-layers": None}, OPTIONS)


def test_layers_that_a_gpt_checkpoint_has() -> None:
    assert check_gpt_source("*-|*-", "teacher") == 2
    assert check_gpt_source("M*E-".replace("-", "*E"), "student") == 2
    for pattern, message in (
        ("M*-", "Mamba"),
        ("*-*", "equal"),
        ("G-*-", "G"),
        ("*-*E", "mixes"),
        ("*-/*-", "MTP"),
    ):
        with pytest.raises(CheckpointError, match=f"teacher: .*{message}"):
            check_gpt_source(pattern, "teacher")
    assert check_gpt_source("M*-", "student") == 1


def compared(theirs: argparse.Namespace, ours: argparse.Namespace) -> list[str]:
    return differences(Description("the checkpoint", theirs), ours)[1]


def test_checkpoints_are_compared_by_pattern() -> None:
    hybrid = arguments("M-|*-/*-", num_layers=4, mamba_head_dim=64)
    assert not compared(hybrid, arguments("M-*-", num_layers=4, mamba_head_dim=64))
    assert not compared(arguments(None, hybrid_override_pattern="M-*-", num_layers=4), arguments("M-*-", num_layers=4))
    (pattern,) = compared(hybrid, arguments("MM*-", num_layers=4, mamba_head_dim=64))
    assert "M-*-" in pattern and "MM*-" in pattern
    (size,) = compared(hybrid, arguments("M-*-", num_layers=4, mamba_head_dim=32))
    assert size.startswith("mamba-head-dim")
    # Of a transformer, whose layers are two each.
    gpt = arguments(None, num_layers=2)
    assert not compared(gpt, arguments("*-*-", num_layers=4))
    assert not compared(gpt, arguments(None, num_layers=2, mamba_head_dim=32))
    (layers,) = compared(gpt, arguments("*-*-*-", num_layers=6))
    assert layers.startswith("num-layers: the checkpoint has 2, the configuration 3")
    assert any(line.startswith("hybrid-layer-pattern") for line in compared(hybrid, arguments(None, num_layers=4)))


def test_linear_attention_settings_count_with_its_layers() -> None:
    delta = arguments("G-", num_layers=2, linear_key_head_dim=16)
    (line,) = compared(delta, arguments("G-", num_layers=2, linear_key_head_dim=32))
    assert line.startswith("linear-key-head-dim")
    assert not compared(
        arguments("*-", num_layers=2, linear_key_head_dim=16), arguments("*-", num_layers=2, linear_key_head_dim=32)
    )


def test_a_hugging_face_description() -> None:
    """Nemotron-H's."""
    found = of_hugging_face(
        {
            "model_type": "nemotron_h",
            "num_hidden_layers": 4,
            "hidden_size": 64,
            "hybrid_override_pattern": "M-*-",
            "mamba_head_dim": 16,
            "mamba_num_heads": 8,
            "n_groups": 2,
            "ssm_state_size": 8,
            "mlp_hidden_act": "relu2",
        }
    )
    assert (found["hybrid_layer_pattern"], found["mamba_num_groups"], found["mamba_state_dim"]) == ("M-*-", 2, 8)
    assert found["squared_relu"] and found["normalization"] == "RMSNorm"


def test_a_hugging_face_description_lists_layers_and_what_it_does_not_use() -> None:
    layers = ["mamba", "mlp", "full_attention", "linear_attention"]
    of = {"hidden_size": 64, "layers_block_type": layers, "rope_theta": 10000, "n_routed_experts": 8}
    found = of_hugging_face({"model_type": "nemotron_h", **of})
    assert (found["hybrid_layer_pattern"], found["num_layers"]) == ("M-*M", 4)
    assert found["position_embedding_type"] == "none" and found["num_experts"] is None
