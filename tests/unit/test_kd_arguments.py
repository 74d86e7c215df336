"""The `--kd-` arguments: one for each setting, no trace where none is given; and command lines read back."""

from argparse import ArgumentParser, Namespace
from dataclasses import fields

import pytest

pytest.importorskip("megatron.training")

from abkd_megatron.config.load import from_argv, to_argv
from abkd_megatron.config.megatron_args import megatron_options
from abkd_megatron.config.schema import DistillationConfig
from abkd_megatron.errors import ConfigError
from abkd_megatron.hosts.script import _settings, add_kd_arguments, distill

OPTIONS = megatron_options()


@pytest.fixture
def parser() -> ArgumentParser:
    return add_kd_arguments(ArgumentParser(allow_abbrev=False))


def test_each_setting_has_one_and_its_docstring(parser: ArgumentParser) -> None:
    actions = {action.dest: action for action in parser._actions}
    text = " ".join(parser.format_help().split())
    assert "abkd_megatron.losses.registry" in text and "(default: the preset's)" in text
    for item in fields(DistillationConfig):
        action = actions.pop(f"kd_{item.name.removeprefix('kd_')}")
        assert action.help and "(default: " in action.help
        assert _settings()[action.dest.removeprefix("kd_")] == f"distillation.{item.name}"
    ours = {"load", "step", "declared", "expected_loss", "weights", "args"}
    assert actions.keys() == {"help", *(f"kd_teacher_{name}" for name in ours)}
    assert not set(OPTIONS) & {
        option.removeprefix("--") for action in parser._actions for option in action.option_strings if "kd" in option
    }


def test_what_is_not_given_leaves_no_trace(parser: ArgumentParser) -> None:
    assert parser.parse_args([]) == Namespace()
    given = parser.parse_args(
        ["--kd-weight", "0.5", "--kd-diagnostics", "--kd-teacher-args", "num-layers=4", "bf16=true"]
    )
    assert given == Namespace(kd_weight="0.5", kd_diagnostics="true", kd_teacher_args=["num-layers=4", "bf16=true"])


def test_without_a_teacher_the_forward_step_is_the_same_object() -> None:
    def forward_step() -> None: ...

    args = Namespace(seed=1, skip_train=False, load=None, finetune=False, pretrained_checkpoint=None)
    assert distill(args, None, forward_step) is forward_step
    assert args == Namespace(seed=1, skip_train=False, load=None, finetune=False, pretrained_checkpoint=None)
    with pytest.raises(ConfigError, match="--kd-alpha, --kd-teacher-args"):
        distill(Namespace(kd_alpha="1", kd_teacher_args=["num-layers=4"]), None, forward_step)


def test_a_command_line_is_read_back() -> None:
    """Every argument of Megatron's, with a value that its action takes."""
    values: dict = {}
    for name, action in OPTIONS.items():
        if name in ("help", "-h"):
            continue
        one = next(iter(action.choices)) if action.choices else None
        one = getattr(one, "name", one) if one is not None else {int: 3, float: 0.25}.get(action.type, "text")
        count = action.nargs if isinstance(action.nargs, int) else 2
        values[name] = (
            True if action.nargs == 0 or action.type is bool else one if action.nargs is None else [one] * count
        )
    for name, value in values.items():
        argv = to_argv({name: value}, OPTIONS)
        assert to_argv(from_argv(["--mine", "5", *argv, "--kd-alpha", "-1"], OPTIONS), OPTIONS) == argv, name
    assert len(values) > 500


def test_of_an_argument_given_twice_the_last_counts() -> None:
    twice = ["--lr", "1e-3", "--no-rl-partial-rollouts", "--rl-partial-rollouts", "--lr=1e-4"]
    assert from_argv(twice, OPTIONS) == {"lr": "1e-4", "rl-partial-rollouts": True}
