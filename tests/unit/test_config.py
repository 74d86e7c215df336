"""The configuration: layers, origins, strictness, Megatron's command line, and show-config's round trip."""

import argparse
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abkd_megatron.config.load import load_config, render, to_argv
from abkd_megatron.config.schema import Config, DataConfig, DistillationConfig, TeacherConfig
from abkd_megatron.config.teachers import reads_cache
from abkd_megatron.errors import ConfigError
from abkd_megatron.losses.alpha_beta import AlphaBeta
from abkd_megatron.losses.chunks import ChunkLikelihood
from abkd_megatron.losses.hidden import HiddenLoss
from abkd_megatron.losses.mixed_sequences import SequenceMix
from abkd_megatron.losses.objective import Objective
from abkd_megatron.losses.schedule import COUNTS, Schedule
from abkd_megatron.losses.selection import TokenSelection
from abkd_megatron.losses.sources import UNKNOWN, SourceWeights
from abkd_megatron.tools import gradient_variance


def custom(text):
    return tuple(int(part) for part in text.split(","))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--num-layers", type=int)
    parser.add_argument("--seq-length", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--min-lr", type=float)
    parser.add_argument("--swiglu", action="store_true")
    parser.add_argument("--no-rope-fusion", action="store_false", dest="rope_fusion")
    parser.add_argument("--attention-softmax-in-fp32", action="store_const", const=1)
    parser.add_argument("--wandb", action=argparse.BooleanOptionalAction)
    parser.add_argument("--save-interval", "--persistent-save-interval", type=int)
    parser.add_argument("--override-opt_param-scheduler", action="store_true")
    parser.add_argument("--data-path", nargs="*")
    parser.add_argument("--tokenizer-model", type=str)
    parser.add_argument("--betas", nargs="+", type=float)
    parser.add_argument("--grid", nargs=3, type=int)
    parser.add_argument("--optimizer", choices=["adam", "sgd"])
    parser.add_argument("--window-size", type=custom)
    parser.add_argument("--onnx-safe", type=bool)
    parser.add_argument("--exp-name")
    parser.add_argument("--load")
    parser.add_argument("--ckpt-step", type=int)
    return parser


PARSER = make_parser()
OPTIONS = {
    spelling.removeprefix("--"): action
    for action in PARSER._actions
    for spelling in action.option_strings
    if spelling.startswith("--") and action.dest != "help"
}


@pytest.fixture
def load(tmp_path):
    def load(text=None, *overrides, device_defaults=lambda device: {}):
        path = None
        if text is not None:
            path = tmp_path / "run.yaml"
            path.write_text(text, encoding="utf-8")
        return load_config(path, overrides, OPTIONS, device_defaults)

    return load


def test_defaults(load):
    config = load()
    assert config.distillation == DistillationConfig().expanded()
    assert config.data == DataConfig(source=["python"])
    assert config.teacher == TeacherConfig()
    assert config.device == "cuda" and config.megatron == {}
    of_preset = {name for name, origin in config.origins.items() if origin == "preset: pretrain"}
    assert of_preset == {"distillation.divergence", "distillation.lm_weight"}
    assert set(config.origins.values()) == {"default", "preset: pretrain"}


def test_order_and_origins(load):
    config = load(
        "device: cuda\nmegatron:\n  num-layers: 2\n  seq_length: 64\n  lr: 1e-4\n"
        "teacher: {load: /t, num_layers: 8}\ndistillation:\n  alpha: 1e-1\n",
        "device=cpu",
        "megatron.num-layers=4",
        "distillation.kd-weight=2",
        "distillation.shared-vocab=400",
        "teacher.ckpt_step=10",
        device_defaults=lambda device: {"num-layers": 1, "swiglu": True, "lr": 1.0} if device == "cpu" else {},
    )
    assert config.megatron == {"num-layers": 4, "swiglu": True, "lr": 1e-4, "seq-length": 64}
    assert config.teacher == TeacherConfig(load="/t", ckpt_step=10, megatron={"num-layers": 8})
    assert (config.distillation.alpha, config.distillation.kd_weight) == (0.1, 2.0)
    assert config.distillation.shared_vocab == 400
    origins = config.origins
    assert origins["device"] == "command line"
    assert origins["megatron.num-layers"] == "command line"
    assert origins["megatron.swiglu"] == "device: cpu"
    assert origins["megatron.seq-length"] == "run.yaml:4"
    assert origins["megatron.lr"] == "run.yaml:5"
    assert origins["teacher.load"] == origins["teacher.num-layers"] == "run.yaml:6"
    assert origins["teacher.ckpt-step"] == "command line"
    assert origins["distillation.alpha"] == "run.yaml:8"
    assert origins["distillation.kd_weight"] == "command line"
    assert origins["distillation.beta"] == "default"


def test_a_later_layer_replaces_another_spelling(load):
    config = load(
        "megatron: {persistent-save-interval: 5, no-wandb: true}",
        "megatron.save-interval=7",
        "megatron.wandb=true",
        device_defaults=lambda device: {"save-interval": 1},
    )
    assert config.megatron == {"save-interval": 7, "wandb": True}
    assert "megatron.persistent-save-interval" not in config.origins


def test_values_keep_the_type_of_their_option(load):
    config = load(
        "megatron:\n  exp-name: 1.10\n  betas: [9e-1, 0.95]\n  data-path: a\n  grid: [1, 2, 3]\n"
        "  window-size: 128,0\n  num-layers: 1_000\n  tokenizer-model: no\n  swiglu: False\n"
        "  seq-length: null\n"
    )
    assert config.megatron == {
        "exp-name": "1.10",
        "betas": [0.9, 0.95],
        "data-path": ["a"],
        "grid": [1, 2, 3],
        "window-size": "128,0",
        "num-layers": 1000,
        "tokenizer-model": "no",
        "swiglu": False,
        "seq-length": None,
    }


def test_empty_sections_and_source_forms(load):
    assert load("megatron:\nteacher: {}\ndata: {source: notes.txt}\n").data.source == ["notes.txt"]
    assert load("device: cpu\n", "data.source=[python, a/*.txt]").data.source == ["python", "a/*.txt"]
    assert load("data: {dir: x}", "data.dir=").data.dir is None


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("", (), "got an empty file"),
        ("- a\n", (), "expected the sections device, megatron.*got a list"),
        ("just text", (), "got a single value"),
        ("a: [", (), "expected readable YAML"),
        ("a: \x07", (), "expected readable YAML"),
        ("a: !!python/object:os.system {}", (), "expected readable YAML"),
        ("a: 1\n---\nb: 2\n", (), "expected readable YAML"),
        ("distilation: {}\n", (), "run.yaml:1: unknown section 'distilation'; did you mean 'distillation'?"),
        (
            "distillation:\n  alhpa: 1\n",
            (),
            "run.yaml:2: unknown key of distillation 'alhpa'; did you mean 'alpha'",
        ),
        (
            "megatron:\n  num-layer: 1\n",
            (),
            "run.yaml:2: unknown Megatron argument .*did you mean 'num-layers'",
        ),
        ("teacher:\n  lod: 1\n", (), "unknown Megatron argument 'lod'; did you mean 'load'"),
        ("data: {splits: 1}", (), "unknown key of data 'splits'; known: source, dir"),
        ("device: gpu\n", (), "run.yaml:1: unknown device 'gpu'; known: cuda, cpu"),
        ("device: [cpu]\n", (), "unknown device"),
        ("megatron:\n  lr: 1\n  lr: 2\n", (), "run.yaml: 'lr' is given twice, on lines 2 and 3"),
        ("data: {vocab_size: 1,\n vocab-size: 2}", (), "'vocab-size' is given twice, on lines 1 and 2"),
        ("data: {}\ndata: {}\n", (), "'data' is given twice, on lines 1 and 2"),
        (
            "megatron:\n  save-interval: 1\n  persistent_save_interval: 2\n",
            (),
            r"run.yaml:3: 'persistent-save-interval' and 'save-interval' \(run.yaml:2\) are two spellings",
        ),
        ("megatron: {wandb: true, no-wandb: false}", (), "two spellings"),
        ("megatron: 4\n", (), "run.yaml:1: megatron: expected `key: value` lines, got '4'"),
        ("1: 2\n", (), "unknown section '1'"),
        ("? [a]\n: 2\n", (), "expected a name as key"),
        ("data: {dir: {a: 1}}", (), "data.dir: expected text, got a nested mapping"),
        ("data: {source: [a, {b: 1}]}", (), "data.source: expected text, got a nested mapping"),
        ("data: {dir: true}", (), "expected text, got the boolean true; quote it"),
        ("data: {source: null}", (), "data.source: expected text, got nothing"),
        ("data: {vocab_size: 2.5}", (), "data.vocab_size: expected a whole number, got '2.5'"),
        ("data: {vocab_size: true}", (), "expected a whole number, got the boolean true"),
        ("data: {vocab_size: 1e3}", (), "expected a whole number, got '1e3'; write it in digits"),
        ("data: {vocab_size: null}", (), "expected a whole number, got nothing"),
        ("distillation: {detach: no}", (), "expected true or false, got 'no'; write true or false, unquoted"),
        ("distillation: {detach: on}", (), "expected true or false, got 'on'"),
        ("distillation: {detach: 'true'}", (), "unquoted"),
        ("distillation: {detach: 1}", (), "expected true or false, got '1'"),
        ("distillation: {alpha: .nan}", (), "distillation.alpha: expected a finite number, got '.nan'"),
        ("distillation: {alpha: -.inf}", (), "expected a finite number"),
        ("distillation: {alpha: infinity}", (), "expected a finite number"),
        ("distillation: {alpha: true}", (), "expected a finite number, got the boolean true"),
        ("distillation: {alpha: [1]}", (), "expected a finite number"),
        ("megatron: {swiglu: 1}", (), "megatron.swiglu: expected true or false, got '1'"),
        ("megatron: {num-layers: true}", (), "megatron.num-layers: expected a value, got the boolean true"),
        ("megatron: {num-layers: 2.5}", (), "expected a whole number, got '2.5'"),
        ("megatron: {num-layers: [1]}", (), "expected one value"),
        ("megatron: {lr: fast}", (), "megatron.lr: expected a number, got 'fast'"),
        ("megatron: {betas: []}", (), "expected at least one value"),
        ("megatron: {betas: [true]}", (), "expected a value, got the boolean true"),
        ("megatron: {grid: [1, 2]}", (), "expected 3 values"),
        (
            "megatron: {optimizer: adm}",
            (),
            "unknown choice for megatron.optimizer 'adm'; did you mean 'adam'",
        ),
        ("teacher: {ckpt-step: last}", (), "teacher.ckpt-step: expected a whole number, got 'last'"),
        (None, ("megatron.lr",), "expected section.key=value or device=NAME, got 'megatron.lr'"),
        (None, ("lr=1",), "expected section.key=value"),
        (None, ("megatron.=1",), "expected section.key=value"),
        (None, ("device.name=cpu",), "expected section.key=value"),
        (None, ("megatrn.lr=1",), "command line: unknown section 'megatrn'; did you mean 'megatron'"),
        (None, ("megatron.lr=[1",), "command line: megatron.lr: expected readable YAML"),
        (None, ("megatron.lr=a: 1",), "got a nested mapping"),
        (None, ("device=tpu",), "command line: unknown device 'tpu'"),
    ],
)
def test_refused(load, text, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(text, *overrides)


def test_schedules(load):
    config = load(
        "distillation:\n"
        "  kd_weight: {schedule: linear, from: 1, to: 2e-1, start: 10, end: 1_000, by: samples}\n"
        "  alpha: {schedule: cosine, from: 0.5, to: 0.2, end: 500}\n"
        "  temperature:\n    schedule: piecewise\n    points: [[0, 4.0], [100, 2.0], [100, 1]]\n"
        "  lm_weight: {schedule: constant, value: 0.5}\n",
        "distillation.beta={schedule: linear, from: 0.7, to: 0.5, end: 6400, by: tokens}",
    )
    config.check("pretrain")
    kd = config.distillation
    assert kd.kd_weight == Schedule.linear(1.0, 0.2, start=10, end=1000, by="samples")
    assert kd.alpha == Schedule.cosine(0.5, 0.2, end=500)
    assert kd.beta == Schedule.linear(0.7, 0.5, end=6400, by="tokens")
    assert kd.temperature == Schedule.piecewise([(0, 4.0), (100, 2.0), (100, 1.0)])
    assert kd.lm_weight == Schedule("constant", ((0, 0.5),))
    assert config.origins["distillation.beta"] == "command line"
    text = render(config)
    assert "  kd_weight: {schedule: linear, from: 1.0, to: 0.2, start: 10, end: 1000, by: samples}" in text
    again = load(text)
    again.origins = config.origins
    assert again == config
    assert load(text, "distillation.alpha=0.3").distillation.alpha == 0.3, "a number takes a schedule's place"


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("{from: 1}", "run.yaml:2: distillation.kd_weight: expected a number, or a mapping with a `schedule`"),
        ("{schedule: liner}", "run.yaml:2: unknown distillation.*schedule 'liner'; did you mean 'linear'"),
        ("{schedule: [linear]}", "unknown distillation.*schedule"),
        (
            "\n    schedule: linear\n    form: 1",
            "run.yaml:4: unknown key of distillation.kd_weight 'form'; did you mean 'from'",
        ),
        ("{schedule: linear, from: 1, to: 2, points: []}", "unknown key.*'points'; known: from, to, start, end, by"),
        ("{schedule: linear, from: 1}", "distillation.kd_weight: expected to, end as well"),
        ("{schedule: piecewise}", "distillation.kd_weight: expected points as well"),
        ("{schedule: constant, value: 1, by: tokens}", "unknown key.*'by'; known: value"),
        ("{schedule: linear, from: x, to: 2, end: 3}", "kd_weight.from: expected a finite number, got 'x'"),
        ("{schedule: linear, from: true, to: 2, end: 3}", "from: expected a finite number, got the boolean true"),
        ("{schedule: linear, from: 1, to: .inf, end: 3}", "to: expected a finite number, got '.inf'"),
        ("{schedule: linear, from: 1, to: 2, end: 2.5}", "end: expected a whole number, got '2.5'"),
        ("{schedule: linear, from: 1, to: 2, end: 0}", "expected an end after the start"),
        ("{schedule: cosine, from: 1, to: 2, start: -1, end: 3}", "a count to be a whole number of at least 0"),
        ("{schedule: linear, from: 1, to: 2, end: 3, by: sample}", "by 'sample'; did you mean 'samples'"),
        ("{schedule: piecewise, points: []}", "expected points"),
        ("{schedule: piecewise, points: 3}", r"points: expected pairs \[iteration, value\]"),
        ("{schedule: piecewise, points: [[1, 2, 3]]}", "expected pairs"),
        ("{schedule: piecewise, points: [[1, 2], [0, 2]]}", r"distillation.kd_weight: .* in order, got \[1, 0\]"),
        ("{schedule: piecewise, points: [[1, null]]}", "points: expected a finite number, got nothing"),
        ("{schedule: linear, from: 1, from: 2}", "'from' is given twice"),
    ],
)
def test_schedules_refused(load, schedule, message):
    with pytest.raises(ConfigError, match=message):
        load(f"distillation:\n  kd_weight: {schedule}\n")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{select: every, n: 4}", TokenSelection("every", n=4)),
        ("{select: teacher_entropy, at_least: 1, at-most: 2.5}", TokenSelection("teacher_entropy", None, 1.0, 2.5)),
        ("{select: disagreement}", TokenSelection("disagreement")),
        ("{select: disagreement, kl_at_least: 5e-1}", TokenSelection("disagreement", kl_at_least=0.5)),
        ("null", None),
    ],
)
def test_selections(load, text, wanted):
    config = load(f"distillation:\n  tokens: {text}\n")
    config.check("pretrain")
    assert config.distillation.tokens == wanted
    again = load(render(config))
    again.origins = config.origins
    assert again == config
    assert load(None, f"distillation.tokens={text}").distillation.tokens == wanted
    assert load(f"distillation:\n  tokens: {text}\n", "distillation.tokens=null").distillation.tokens is None


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("4", "run.yaml:2: distillation.tokens: expected a mapping of select, n, .* got '4'"),
        ("{n: 4}", "distillation.tokens: expected select as well"),
        ("{select: evry, n: 4}", "run.yaml:2: distillation.tokens: .*unknown select 'evry'; did you mean 'every'"),
        ("{select: [every]}", "distillation.tokens.select: expected text"),
        ("\n    select: every\n    m: 4", "run.yaml:4: unknown key of distillation.tokens 'm'; known: select, n"),
        (
            "{select: every, n: 4, at_least: 1}",
            "run.yaml:2: distillation.tokens: expected no at_least with select: every, which takes n",
        ),
        ("{select: disagreement, kl: 1}", "unknown key .*'kl'; known: .*kl_at_least"),
        (
            "{select: every}",
            "run.yaml:2: distillation.tokens: select: every: expected n to be a whole number .* got None: leave",
        ),
        ("{select: every, n: 1}", "expected n to be a whole number of at least 2, got 1: leave the selection out"),
        ("{select: every, n: 2.5}", "distillation.tokens.n: expected a whole number, got '2.5'"),
        ("{select: teacher_entropy}", "expected at_least or at_most"),
        ("{select: teacher_entropy, at_least: nan}", "tokens.at_least: expected a finite number"),
        ("{select: teacher_entropy, at_least: 2, at_most: 1}", "expected at_least <= at_most, got 2.0 and 1.0"),
        ("{select: disagreement, kl_at_least: 0}", "kl_at_least to be a finite number above 0"),
    ],
)
def test_selections_refused(load, selection, message):
    with pytest.raises(ConfigError, match=message):
        load(f"distillation:\n  tokens: {selection}\n")


def ramp(first, last, end=10, by="iteration"):
    return f"{{schedule: linear, from: {first}, to: {last}, end: {end}, by: {by}}}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"temperature": ramp(1, 0)},
            "command line: distillation.temperature: .* got 0.0",
        ),
        ({"kd_weight": ramp(1, -0.1)}, "distillation.kd_weight: .* got -0.1"),
        ({"scale": ramp(1, -1), "divergence": "todi"}, "distillation.scale: .* got -1.0"),
        (
            {"scale": ramp(1, 2)},
            "distillation.scale: expected no value with divergence: alpha_beta, .* got {schedule",
        ),
        (
            {"beta": ramp(1, 2), "divergence": "todi"},
            "distillation.beta: expected no value with divergence: todi, .* got {schedule",
        ),
        ({"kd_weight": ramp(1, 0), "head": "fused"}, "distillation.head: .* kd_weight 0"),
        ({"kd_weight": ramp(1, 0), "lm_weight": 0}, "distillation.kd_weight: .* both .* at iteration 10"),
        ({"kd_weight": ramp(1, 0), "lm_weight": ramp(1, 0, 20)}, "distillation.kd_weight: .* both .* at iteration 20"),
        (
            {"kd_weight": ramp(1, 0), "lm_weight": ramp(0, 1, by="tokens")},
            "at some step: one counts iteration, the other",
        ),
        ({"kd_weight": ramp(1, 0, by="fraction"), "preset": "pruned"}, r"fractions of the run from 0 to 1, got 10.0"),
        ({"kd_weight": ramp(1, 0, 1, by="fraction"), "preset": "finetune"}, "both .* at fraction 1.0"),
    ],
)
def test_check_looks_at_all_a_schedule_takes(load, settings, message):
    with pytest.raises(ConfigError, match=message):
        load(None, *(f"distillation.{name}={value}" for name, value in settings.items())).check("pretrain")


@pytest.mark.parametrize(
    "settings",
    [
        {"kd_weight": ramp(0, 1)},
        {"kd_weight": ramp(0, 1), "lm_weight": ramp(1, 0)},
        {"kd_weight": ramp(1, 0.5), "lm_weight": ramp(0, 1, by="tokens")},
        {"temperature": ramp(1, 2), "alpha": ramp(0.2, 0.3), "kernel": "triton"},
    ],
)
def test_check_lets_schedules_pass(load, settings):
    load(None, *(f"distillation.{name}={value}" for name, value in settings.items())).check("pretrain")


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match=r"readable YAML"):
        load_config(tmp_path / "none.yaml", [], OPTIONS)
    with pytest.raises(ConfigError, match="readable YAML"):
        load_config(tmp_path, [], OPTIONS)
    (tmp_path / "latin.yaml").write_bytes(b"data: {dir: \xe9}")
    with pytest.raises(ConfigError, match=r"UTF-8"):
        load_config(tmp_path / "latin.yaml", [], OPTIONS)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (
            "distillation",
            {"temperature": 0.0},
            "^default: distillation.temperature: .* above 0, got 0.0",
        ),
        ("distillation", {"kd_weight": -1.0}, "distillation.kd_weight: .* got -1.0"),
        ("distillation", {"lm_weight": -1.0}, "distillation.lm_weight"),
        ("distillation", {"kernel": "tritton"}, r"unknown distillation.kernel 'tritton'.*'triton'"),
        ("distillation", {"scale": -1.0}, "distillation.scale"),
        ("distillation", {"kd_weight": 0.0, "lm_weight": 0.0}, "distillation.kd_weight: .*lm_weight .* both"),
        ("distillation", {"divergence": "alpha-beta"}, "did you mean 'alpha_beta'?"),
        ("distillation", {"beta": math.nan}, "distillation.beta: .* finite number, got nan"),
        ("distillation", {"temperature": math.inf}, "distillation.temperature: .* finite number"),
        ("distillation", {"shared_vocab": 0}, "distillation.shared_vocab: .* at least 1, got 0"),
        ("data", {"vocab_size": 299}, "data.vocab_size: expected 300 or more"),
        ("data", {"held_out": 0.0}, "data.held_out: expected a fraction between 0 and 0.5"),
        ("data", {"held_out": 0.5}, "data.held_out"),
        ("data", {"source": []}, "data.source: expected at least one source"),
    ],
)
def test_check_of_one_section(section, values, message):
    config = Config(teacher=TeacherConfig(load="/t"))
    config.check("distill")
    setattr(config, section, replace(getattr(config, section), **values))
    with pytest.raises(ConfigError, match=message):
        config.check("distill")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{divergence: jensenshannon}", r"run.yaml:1: distillation.divergence: .*did you mean 'jensen_shannon'\?"),
        ("{divergence: jensen-shannon, mixture: 0.2}", "did you mean 'jensen_shannon'"),
        (
            "{divergence: todi, alpha: 0.2}",
            "run.yaml:1: distillation.alpha: expected no value with divergence: todi, which takes scale, detach here",
        ),
        ("{skew: 0.1}", "distillation.skew: expected no value with divergence: forward_kl, which takes no parameters"),
        (
            "{divergence: jeffreys, mixture: 0.3}",
            "with divergence: jeffreys, which takes no parameters here, got 0.3",
        ),
        (
            "{divergence: jensen_shannon, mixture: 1}",
            "distillation.mixture: .* between 0 and 1, both excluded, got 1.0",
        ),
        ("{divergence: skew_reverse_kl, skew: 0}", "distillation.skew: .* between 0 and 1, both excluded, got 0.0"),
        ("{divergence: nowhere.to_be.Found}", "distillation.divergence: nowhere.to_be.Found: .*check PYTHONPATH"),
        ("{divergence: todi, losses: [{name: todi}]}", "distillation.divergence: expected no value with .*losses"),
        ("{alpha: 0.3, losses: [{name: todi}]}", "distillation.alpha: expected no value with distillation.losses"),
        ("{losses: [{name: alpha_beta}]}", "distillation.losses: alpha_beta: missing a required argument: 'alpha'"),
        ("{losses: [{name: todi, skew: 0.1}]}", "distillation.losses: todi: got an unexpected .*'skew'"),
        ("{losses: [{weight: 1}]}", "distillation.losses: unknown divergence ''"),
        ("{losses: [{name: todi, weight: 0}]}", "distillation.losses: WeightedSum: expected a weight above 0, got 0.0"),
        ("{losses: [{name: todi, weight: .nan}]}", "expected weight to be a finite number, got '.nan'"),
        ("{losses: [{name: todi, scale: [1]}]}", "distillation.losses: expected a scalar for scale, got"),
        ("{divergence: preference, beta: 0.1}", "with divergence: preference, which takes no parameters here"),
        ("{divergence: clipped_kl}", "distillation.divergence: clipped_kl: expected either top_k or mass"),
        ("{losses: [{name: akl, weight: 0}]}", "distillation.losses: .*AdaptiveKL.* above 0, got 0.0"),
        ("{losses: [{name: akl, mu: 1}]}", "distillation.losses: akl: expected mu between 0 and 1"),
        (
            "{losses: [{name: todi}, {name: akl}], head: fused}",
            "distillation.head: .* no logits for akl",
        ),
        ("{losses: [todi]}", r"distillation.losses: expected a list of \{name: .*got 'todi'"),
    ],
)
def test_check_refuses_divergences_that_cannot_be(load, settings, message):
    with pytest.raises(ConfigError, match=message):
        load(f"distillation: {settings}").check("pretrain" if "nowhere" not in settings else "distill")


def test_only_distilling_imports_a_divergence_of_ones_own():
    config = Config(distillation=DistillationConfig(divergence="nowhere.to_be.Found"))
    config.check("pretrain")


def test_a_divergence_on_the_command_line_leaves_the_parameters_of_the_files_behind(load):
    text = "distillation: {divergence: alpha_beta, alpha: 0.3, kd_weight: 2}"
    same = load(text, "distillation.divergence=alpha_beta")
    assert same.distillation.alpha == 0.3
    other = load(text, "distillation.divergence=skew_forward_kl", "distillation.skew=0.2")
    assert other.distillation == DistillationConfig(divergence="skew_forward_kl", skew=0.2, kd_weight=2.0).expanded()
    other.check("pretrain")
    losses = load(text, "distillation.losses=[{name: forward_kl}, {name: todi, weight: 0.5, detach: false}]")
    assert losses.distillation.losses == [{"name": "forward_kl"}, {"name": "todi", "weight": 0.5, "detach": False}]
    losses.check("pretrain")
    back = load("distillation: {losses: [{name: todi}]}", "distillation.divergence=alpha_beta")
    assert back.distillation == DistillationConfig(divergence="alpha_beta").expanded()


GLIDE = {"alpha": Schedule.linear(1.0, 0.2, start=0.5, end=1.0, by="fraction")}
GLIDE["beta"] = Schedule.linear(0.0, 0.7, start=0.5, end=1.0, by="fraction")
NONE = {"divergence": "alpha_beta", "alpha": 0.2, "beta": 0.7, "temperature": 1.0, "kd_weight": 1.0, "lm_weight": 1.0}
RISING = {"lm_weight": Schedule.linear(0.0, 1.0, start=0.0, end=1.0, by="fraction")}
ANNEALED, PRETRAIN = NONE | GLIDE | {"lm_weight": 0.0}, NONE | {"divergence": "forward_kl"} | RISING


@pytest.mark.parametrize(
    ("text", "overrides", "preset", "wanted"),
    [
        ("", [], "pretrain", PRETRAIN),
        ("kd_weight: 2", [], "pretrain", PRETRAIN | {"kd_weight": 2.0}),
        ("preset: annealed", ["alpha=0.3"], "annealed", ANNEALED | {"alpha": 0.3}),
        ("preset: pretrain\n  lm_weight: 0.1", [], "pretrain", PRETRAIN | {"lm_weight": 0.1}),
        ("preset: pruned", [], "pruned", PRETRAIN | {"lm_weight": 1.0}),
        ("preset: annealed", [], "annealed", ANNEALED),
        ("preset: finetune", [], "finetune", NONE | {"lm_weight": 0.0}),
        ("preset: none", [], "none", NONE),
        # A divergence replaces the preset's with its schedules; its weights and temperature stay.
        ("preset: annealed\n  divergence: alpha_beta", [], "annealed", NONE | {"lm_weight": 0.0}),
        ("preset: pretrain", ["divergence=todi"], "pretrain", NONE | {"divergence": "todi"} | RISING),
        ("preset: finetune", ["losses=[{name: todi}]"], "finetune", NONE | {"lm_weight": 0.0}),
        # Without a preset, what names its loss is as it was before there were presets.
        ("divergence: alpha_beta", [], "none", NONE),
        ("divergence: todi", ["kd_weight=2"], "none", NONE | {"divergence": "todi", "kd_weight": 2.0}),
        ("losses: [{name: todi}]", [], "none", NONE),
        ("alpha: 0.2", [], "none", NONE),
        ("beta: 0.3", ["divergence=alpha_beta"], "none", NONE | {"beta": 0.3}),
        ("kd_weight: 0", [], "none", NONE | {"kd_weight": 0.0}),
        # A preset of a later layer replaces the keys of earlier ones.
        ("divergence: todi\n  lm_weight: 0.5", ["preset=pruned"], "pruned", PRETRAIN | {"lm_weight": 1.0}),
        ("preset: pretrain\n  kd_weight: 3", ["preset=none", "alpha=0.4"], "none", NONE | {"alpha": 0.4}),
    ],
)
def test_presets(load, text, overrides, preset, wanted):
    config = load(f"distillation:\n  {text}\n" if text else None, *(f"distillation.{it}" for it in overrides))
    config.check("pretrain")
    kd = config.distillation
    assert kd.preset == preset and {name: getattr(kd, name) for name in wanted} == wanted
    assert kd.expanded() == kd
    kd.make_objective()
    shown = render(config)
    again = load(shown)
    assert again.distillation == kd and f"preset: {preset} " in shown
    again.check("pretrain")


def test_cross_tokenizer(load):
    text = "teacher:\n  load: t\n  tokenizer-model: m\ndistillation:\n  cross_tokenizer: {temperature: 40}\n"
    config = load(text)
    config.check("distill")
    assert config.distillation.make_objective().objective.cross_tokenizer == ChunkLikelihood(40.0)
    assert load(render(config, origins=False)).distillation.cross_tokenizer == ChunkLikelihood(40.0)
    assert load(text, "distillation.cross_tokenizer={}").distillation.cross_tokenizer == ChunkLikelihood(100.0)
    for override, message in {
        "distillation.cross_tokenizer={temperature: 0}": "temperature.* above 0, got 0",
        "distillation.cross_tokenizer=40": "mapping of temperature",
        "distillation.temperature=2": "cross_tokenizer.*temperature 2",
        "teacher.tokenizer-model=null": "expected teacher.tokenizer-model as well",
        "distillation.gradient_in_place=true": "gradient_in_place",
        "distillation.divergence=akl": "losses akl",
        "distillation.on_policy={share: 0.5, prompt_tokens: 8, new_tokens: 8}": "on_policy.* own text is not aligned",
    }.items():
        with pytest.raises(ConfigError, match=f"distillation.cross_tokenizer.*{message}"):
            load(text, override).check("distill")
    load(text).check("compare")
    with pytest.raises(ConfigError, match=r"cross_tokenizer.*job `cache`"):
        load(text, "cache.dir=c").check("cache")


def test_mixed_sequences(load):
    text = "distillation:\n  lm_weight: 0\n  mix: {alpha: 0.4}\n"
    config = load(text)
    config.check("pretrain")
    assert config.distillation.mix == SequenceMix(0.4) == config.distillation.make_objective().objective.mix
    assert load(render(config)).distillation == config.distillation
    for override in (
        "distillation.lm_weight=1",
        "distillation.preset=pretrain",
        "distillation.preset=pruned",
        "distillation.shared_vocab=10",
        "distillation.sources=[{source: 0, kd_weight: 2}]",
        "distillation.mix={alpha: -1}",
        "distillation.mix={}",
    ):
        with pytest.raises(ConfigError, match="mix"):
            load(text, override).check("pretrain")


def test_weights_by_source(load):
    text = (
        "distillation:\n  sources:\n    - {source: 1, kd_weight: 0}\n    - {source: 0, lm_weight: 0.1, kd-weight: 2}\n"
    )
    config = load(text, "distillation.preset=none")
    assert config.distillation.sources == [SourceWeights(1, kd_weight=0.0), SourceWeights(0, 2.0, 0.1)]
    config.check("pretrain")
    assert load(render(config)).distillation == config.distillation
    objective = config.distillation.make_objective().objective
    kd_weight, lm_weight = objective.weights(torch.tensor([0, 1, 2, UNKNOWN]))
    assert (kd_weight.tolist(), lm_weight.tolist()) == ([2.0, 0.0, 1.0, 1.0], [0.1, 1.0, 1.0, 1.0])
    assert objective.weights(None) == (1.0, 1.0)
    by_path = load("distillation:\n  sources: [{path: data/code, kd_weight: 2}]\n", "distillation.preset=none")
    assert by_path.distillation.sources == [SourceWeights(path="data/code", kd_weight=2.0)]
    assert load(render(by_path)).distillation == by_path.distillation
    for wrong in ("{kd_weight: 2}", "{source: 1, path: data/code, kd_weight: 2}"):
        with pytest.raises(ConfigError, match="expected source, the position of a dataset, or path"):
            load(None, f"distillation.sources=[{wrong}]")
    with pytest.raises(ConfigError, match=r"distillation.sources: source 1: .* must not both be 0, but are always"):
        load(text, "distillation.preset=finetune").check("pretrain")  # which has no cross entropy
    late = "distillation.lm_weight={schedule: linear, from: 1, to: 0, end: 9}"
    with pytest.raises(ConfigError, match=r"distillation.sources: source 1: .* are at iteration 9"):
        load(text, "distillation.preset=none", late).check("pretrain")


TEACHERS = (
    "teacher:\n  load: runs/base\n  num-layers: 4\n  weights: host\n"
    "teachers:\n  - {sources: [1, data/code], load: runs/code, ckpt_step: 8, num_layers: 6}\n"
    "  - sources: 2\n    load: runs/math\n    weights: int8\n"
)


def test_teachers_by_source(load):
    config = load(TEACHERS)
    config.check("distill")
    code, math = config.teachers
    assert (code.sources, code.load, code.ckpt_step, code.weights) == ((1, "data/code"), "runs/code", 8, None)
    assert math.sources == (2,) and config.origins["teachers"] == "run.yaml:5"
    assert load(render(config)).teachers == config.teachers
    of_code, of_math = (config.with_teacher(of).teacher for of in config.teachers)
    assert (of_code.megatron, of_code.weights) == ({"num-layers": 6}, "host")
    assert (of_math.megatron, of_math.weights, of_math.load) == ({"num-layers": 4}, "int8", "runs/math")
    assert load(TEACHERS, "teachers=[{sources: [0], load: runs/x}]").teachers[0].load == "runs/x"
    assert load(TEACHERS, "teachers=null").teachers == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("teachers=[runs/x]", r"teachers: expected a list of \{sources"),
        ("teachers=[{sources: [0], lod: runs/x}]", "unknown Megatron argument 'lod'; did you mean 'load'"),
        ("teachers=[{sources: [0], load: runs/x, num-layers: a}]", r"teachers\.0\.num-layers: expected a whole number"),
        ("teachers=[{load: runs/x}]", "teachers: expected sources of each teacher, got none of runs/x"),
        ("teachers=[{sources: [3]}]", "teacher of source 3: expected load, .*, or cache, .* got neither"),
        ("teachers=[{sources: [3], load: x, cache: y}]", "teacher of source 3: expected load, .* got both"),
        (
            "teachers=[{sources: [3], cache: y, num-layers: 2, weights: host}]",
            "teacher of source 3: expected no more keys than sources and cache, .* got weights, num-layers",
        ),
        (
            "teachers=[{sources: [3], load: x}, {sources: [3, 4], load: y}]",
            "one teacher per source, got 2 entries for 3",
        ),
        ("teachers=[{sources: [3], load: x, weights: disk}]", "expected weights device, int8, host, got 'disk'"),
        ("teachers.load=x", r"expected section\.key=value"),
        ("distillation.cache=runs/cache", r"distillation\.cache: expected none with the list `teachers`"),
        ("distillation.mtp_weight=1", r"distillation\.mtp_weight: expected none with the list"),
        (
            "distillation.on_policy={share: 0.5, prompt_tokens: 8, new_tokens: 4}",
            r"on_policy: expected none with the list `teachers`",
        ),
        ("teacher.expected-loss=2", r"teacher\.expected-loss: expected none with the list"),
        (
            "distillation.hidden_losses=[{student_layer: 1, teacher_layer: 1, loss: mse}]",
            r"distillation\.hidden_losses: expected none with the list",
        ),
    ],
)
def test_wrong_teachers_by_source(load, setting, message):
    with pytest.raises(ConfigError, match=message):
        for problem in load(TEACHERS, setting).problems("distill"):
            if "teachers" in str(problem):
                raise problem


def test_the_job_of_one_teacher(load):
    with pytest.raises(ConfigError, match="teachers: expected none in the job `cache`, which is of one teacher"):
        load(TEACHERS, "cache.dir=runs/cache", "teacher.weights=host").check("cache")


def test_a_cached_teacher_by_source(load):
    setting = "teachers=[{sources: [1], cache: runs/records}, {sources: [2], load: runs/x}]"
    config = load(TEACHERS, setting)
    config.check("distill")
    config.check("compare")
    cached, live = map(config.with_teacher, config.teachers)
    assert (cached.distillation.cache, cached.teacher.load, cached.teacher.megatron) == ("runs/records", None, {})
    assert live.distillation.cache is None and reads_cache(config) and not reads_cache(live)
    assert load(render(config)).teachers == config.teachers
    with pytest.raises(ConfigError, match=r"distillation\.diagnostics: expected false with a cache in the list"):
        load(TEACHERS, setting, "distillation.diagnostics=true").check("distill")
    with pytest.raises(ConfigError, match=r"compare\.gradient_batches: expected live teachers, got a cache"):
        gradient_variance.check(load(TEACHERS, setting, "compare.gradient_batches=2"))


def test_presets_in_python():
    """As with Megatron Bridge, whose containers hold these objects."""
    default = DistillationConfig().make_objective()
    assert default.objective == Objective(AlphaBeta(1, 0), lm_weight=0.0) and default.schedules == RISING
    assert DistillationConfig(preset="annealed").make_objective().schedules == GLIDE
    named = DistillationConfig(divergence="alpha_beta", alpha=0.2, beta=0.7).make_objective()
    assert named.objective == Objective(AlphaBeta(0.2, 0.7)) and not named.schedules
    weighted = DistillationConfig(preset="finetune", lm_weight=1.0).make_objective()
    assert weighted.objective == Objective(AlphaBeta(0.2, 0.7)) and not weighted.schedules


def test_an_unknown_preset_is_rejected(load):
    with pytest.raises(ConfigError, match=r"command line: unknown distillation.preset 'pretrian'.*'pretrain'"):
        load(None, "distillation.preset=pretrian").check("pretrain")


@pytest.mark.parametrize(
    "settings",
    [
        "{divergence: jensen_shannon, mixture: 0.3}",
        "{divergence: todi}",
        "{losses: [{name: reverse_kl, weight: 1e-7}, {name: my.Own, mode: a b, on: true}]}",
        "{divergence: todi, alpha: 0.3}",
    ],
)
def test_render_leaves_out_what_the_divergence_does_not_take(load, settings):
    config = load(f"distillation: {settings}")
    text = render(config)
    assert ("\n  alpha:" in text) == ("alpha" in settings) and "\n  skew:" not in text
    again = load(text)
    again.origins = config.origins
    assert again == config
    if "alpha" not in settings:
        load(text).check("pretrain")


def test_check_names_the_origin(load):
    with pytest.raises(ConfigError, match=r"^run.yaml:2: distillation.temperature"):
        load("distillation:\n  temperature: 0").check("pretrain")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{head: fast}", r"unknown distillation.head 'fast'; known: auto, fused, materialized"),
        ("{chunk_tokens: 0}", r"distillation.chunk_tokens: .* at least 1, got 0"),
        ("{head: fused, kd_weight: 0}", r"distillation.head: .* kd_weight 0"),
    ],
)
def test_check_refuses_heads_that_cannot_be(load, settings, message):
    with pytest.raises(ConfigError, match=message):
        load(f"distillation: {settings}").check("pretrain")


def test_check_refuses_triton_on_a_cpu(load):
    load("distillation: {kernel: triton}").check("pretrain")
    with pytest.raises(ConfigError, match=r"distillation\.kernel: .*got triton"):
        load("device: cpu\ndistillation: {kernel: triton}").check("pretrain")


def test_check_by_job(load):
    config = load("data: {dir: /d}\n")
    config.check("prepare")
    config.check("pretrain")
    with pytest.raises(ConfigError, match=r"teacher\.load"):
        config.check("distill")
    with pytest.raises(ConfigError, match=r"data\.dir"):
        Config().check("prepare")


def test_check_refuses_data_twice(load):
    config = load("data: {dir: /d}\nmegatron:\n  tokenizer-model: m\n  data-path: null\n")
    with pytest.raises(ConfigError, match=r"data.dir \(run.yaml:1\).*megatron.tokenizer-model \(run.yaml:3\)"):
        config.check("pretrain")
    load("megatron: {tokenizer-model: m, data-path: [x]}").check("pretrain")


@pytest.mark.parametrize(
    ("values", "argv", "parsed"),
    [
        ({"num-layers": 4}, ["--num-layers", "4"], {"num_layers": 4}),
        ({"seq_length": "8"}, ["--seq-length", "8"], {"seq_length": 8}),
        ({"lr": 1e-4}, ["--lr", "0.0001"], {"lr": 1e-4}),
        ({"lr": -1e-5}, ["--lr=-1e-05"], {"lr": -1e-5}),
        ({"swiglu": True}, ["--swiglu"], {"swiglu": True}),
        ({"swiglu": False}, [], {}),
        ({"no-rope-fusion": True}, ["--no-rope-fusion"], {"rope_fusion": False}),
        ({"no-rope-fusion": False}, [], {}),
        (
            {"attention-softmax-in-fp32": True},
            ["--attention-softmax-in-fp32"],
            {"attention_softmax_in_fp32": 1},
        ),
        ({"wandb": True}, ["--wandb"], {"wandb": True}),
        ({"wandb": False}, ["--no-wandb"], {"wandb": False}),
        ({"no-wandb": True}, ["--no-wandb"], {"wandb": False}),
        ({"no-wandb": False}, ["--wandb"], {"wandb": True}),
        (
            {"override-opt-param-scheduler": True},
            ["--override-opt_param-scheduler"],
            {"override_opt_param_scheduler": True},
        ),
        ({"num-layers": None, "wandb": None}, [], {}),
        (
            {"data-path": ["0.5", "a", "0.5", "b"]},
            ["--data-path", "0.5", "a", "0.5", "b"],
            {"data_path": ["0.5", "a", "0.5", "b"]},
        ),
        ({"data-path": []}, ["--data-path"], {"data_path": []}),
        ({"betas": [-1e-7, 0.5]}, ["--betas", "-0.0000001", "0.5"], {"betas": [-1e-7, 0.5]}),
        ({"grid": [-1, 2, 3]}, ["--grid", "-1", "2", "3"], {"grid": [-1, 2, 3]}),
        ({"window-size": "-1,0"}, ["--window-size=-1,0"], {"window_size": (-1, 0)}),
        ({"exp-name": "--lr"}, ["--exp-name=--lr"], {"exp_name": "--lr"}),
        ({"exp-name": ""}, ["--exp-name="], {"exp_name": ""}),
        ({"exp-name": 5}, ["--exp-name", "5"], {"exp_name": "5"}),
        ({"onnx-safe": True}, ["--onnx-safe=True"], {"onnx_safe": True}),
        ({"onnx-safe": False}, ["--onnx-safe="], {"onnx_safe": False}),
        ({"optimizer": "sgd"}, ["--optimizer", "sgd"], {"optimizer": "sgd"}),
    ],
)
def test_argv_says_what_was_meant(values, argv, parsed):
    assert to_argv(values, OPTIONS) == argv
    assert vars(PARSER.parse_args(argv)) == {**vars(PARSER.parse_args([])), **parsed}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num-layer": 1}, "unknown Megatron argument 'num-layer'; did you mean 'num-layers'"),
        ({"swiglu": "yes"}, "expected true or false, got 'yes'"),
        ({"num-layers": False}, "expected a value, got the boolean false"),
        ({"optimizer": "addam"}, "did you mean 'adam'"),
        ({"data-path": ["a", "-b"]}, "expected values without a leading dash, got '-b'"),
    ],
)
def test_argv_refuses(values, message):
    with pytest.raises(ConfigError, match=message):
        to_argv(values, OPTIONS)


def test_render_shows_origins_and_loads_again(load):
    config = load(
        "megatron: {num-layers: 2, data-path: ['a b', \"c, d\"], exp-name: 'no # comment'}\n"
        "distillation: {alpha: 1e-7}\n",
        "teacher.load=/t",
        "teacher.exp-name=null",
        device_defaults=lambda device: {"swiglu": True, "lr": math.inf},
    )
    text = render(config)
    assert "  swiglu: true" in text and "# device: cuda" in text
    lines = [line for line in text.splitlines() if "# " in line]
    assert len({line.rindex("  # ") for line in lines}) == 1
    again = load(text)
    again.origins = config.origins
    assert again == config


texts = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=12)


@settings(deadline=None)
@given(
    name=texts,
    paths=st.lists(texts, max_size=3),
    lr=st.floats(allow_nan=False),
    alpha=st.floats(allow_nan=False, allow_infinity=False),
    layers=st.integers() | st.none(),
    points=st.lists(st.tuples(st.integers(0), st.floats(allow_nan=False, allow_infinity=False)), min_size=1),
    by=st.sampled_from(COUNTS[:3]),
)
def test_render_round_trip(tmp_path_factory, name, paths, lr, alpha, layers, points, by):
    scheduled = Schedule.piecewise(sorted(points), by=by)
    config = Config(
        megatron={"exp-name": name, "data-path": paths, "lr": lr, "num-layers": layers},
        distillation=DistillationConfig(alpha=alpha, temperature=scheduled).expanded(),
        data=DataConfig(dir=name, source=["x", *paths]),
    )
    path = tmp_path_factory.mktemp("render") / "run.yaml"
    path.write_bytes(render(config).encode())
    again = load_config(path, [], OPTIONS)
    again.origins = {}
    assert again == config


def test_importing_leaves_megatron_alone():
    code = "import sys, abkd_megatron.config.load, abkd_megatron.data.prepare; print('megatron' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_with_megatrons_own_parser(tmp_path):
    arguments = pytest.importorskip("megatron.training.arguments")
    parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    options = {s.removeprefix("--"): a for a in parser._actions for s in a.option_strings if s.startswith("--")}
    path = tmp_path / "run.yaml"
    path.write_text(
        "megatron:\n  num-layers: 4\n  swiglu: true\n  lr: 1e-4\n  attention_backend: local\n"
        "  window-size: (128,0)\n  moe-layer-freq: ([0]*1+[1]*3)\n  train-data-path: [0.5, a, 0.5, b]\n"
        "  no-rope-fusion: true\n  override-opt-param-scheduler: true\n"
    )
    config = load_config(path, [], options)
    args = parser.parse_args(to_argv(config.megatron, options))
    assert (args.num_layers, args.swiglu, args.lr, args.window_size) == (4, True, 1e-4, (128, 0))
    assert args.attention_backend.name == "local" and args.moe_layer_freq == [0, 1, 1, 1]
    assert args.train_data_path == ["0.5", "a", "0.5", "b"]
    assert args.apply_rope_fusion is False and args.override_opt_param_scheduler is True
    with pytest.raises(ConfigError, match="attention-backend 'locl'; did you mean 'local'"):
        load_config(path, ["megatron.attention-backend=locl"], options)


def test_hidden_losses(load):
    text = (
        "distillation:\n  hidden_losses:\n"
        "  - {student_layer: 1, teacher-layer: 2, loss: mse, weight: 5e-1, projector: false}\n"
        "  - {student_layer: 2, teacher_layer: 4, loss: cosine}"
    )
    config = load(text)
    config.check("pretrain")
    assert config.distillation.hidden_losses == [HiddenLoss(1, 2, "mse", 0.5, False), HiddenLoss(2, 4, "cosine")]
    assert all(type(loss.student_layer) is int for loss in config.distillation.hidden_losses)
    again = load(render(config))
    assert again.distillation == config.distillation
    assert DistillationConfig().hidden_losses == []


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ("{student_layer: 1, teacher_layer: 2}", "expected loss as well"),
        ("{student_layer: 1, teacher_layer: 2, loss: mse, layer: 3}", " 'layer'; .*student_layer"),
        ("{student_layer: 0, teacher_layer: 2, loss: mse}", "student_layer to be a whole number of at least 1, got 0"),
        (
            "{student_layer: 1, teacher_layer: 1.5, loss: mse}",
            "teacher_layer: expected a whole number, got '1.5'",
        ),
        ("{student_layer: last, teacher_layer: 1, loss: mse}", "student_layer: expected a whole number, got 'last'"),
        ("{student_layer: 1, teacher_layer: 2, loss: l1}", "expected loss to be one of cosine, mse, got 'l1'"),
        (
            "{student_layer: 1, teacher_layer: 2, loss: mse, weight: 0}",
            "expected weight to be a finite number above 0, got 0",
        ),
        (
            "{student_layer: 1, teacher_layer: 2, loss: mse, weight: inf}",
            "weight: expected a finite number, got 'inf'",
        ),
        ("{student_layer: 1, teacher_layer: 2, loss: mse, projector: 1}", "projector: expected true or false, got '1'"),
        ("[{student_layer: 1, teacher_layer: 2, loss: mse}, 3]", "expected a mapping of student_layer, .*got '3'"),
        (
            "[{student_layer: 1, teacher_layer: 2, loss: mse}, {student_layer: 1, teacher_layer: 2, loss: cosine}]",
            "expected each pair of layers once, got 1-2 2 times; remove all but one",
        ),
    ],
)
def test_hidden_losses_that_cannot_be(load, losses, message):
    with pytest.raises(ConfigError, match=r"distillation.hidden_losses.*" + message):
        load(f"distillation: {{hidden_losses: {losses}}}").check("pretrain")


def test_temperature_squared_reaches_the_objective() -> None:
    for squared, scale in ((False, 1.0), (True, 4.0)):
        config = DistillationConfig(temperature=2.0, temperature_squared=squared)
        assert config.make_objective().objective.distillation_scale == scale
