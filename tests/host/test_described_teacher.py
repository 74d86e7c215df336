"""Teachers whose checkpoint has not Megatron's arguments in it, as Megatron Bridge's import leaves it.

What describes the model is then run_config.yaml, written here by the code that Bridge writes it with, or Hugging Face's
config.json, or nothing.
"""

import dataclasses
import io
import json
import multiprocessing
import pickle
import re
import shutil
from argparse import Namespace
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from launch import Rank, launch
from megatron.core.activations import squared_relu
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.config.container import ConfigContainerBase
from megatron.training.config.yaml_utils import safe_yaml_representers

from abkd_megatron import cpu_backend
from abkd_megatron.config.load import load_config
from abkd_megatron.config.megatron_args import megatron_options
from abkd_megatron.errors import CheckpointError
from abkd_megatron.teacher.checkpoint import TeacherCheckpoint
from abkd_megatron.teacher.description import describe, of_model_config
from abkd_megatron.teacher.safe_load import read_common, read_index
from abkd_megatron.tools import dry_run

ITERATION = "iter_0000008"
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 12,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 400,
}


def put_common(checkpoint: Path, common: dict[str, Any]) -> None:
    """Write another common state in place of the checkpoint's: behind the rest of its file, and into the index."""
    blob = io.BytesIO()
    torch.save([common], blob)
    index = read_index(checkpoint)
    (there,) = [there for key, there in index.storage_data.items() if key.fqn.startswith("common_state")]
    with (checkpoint / there.relative_path).open("ab") as file:
        there.offset, there.length = file.tell(), file.write(blob.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))


@pytest.fixture(scope="session")
def saved(teacher: Path) -> Namespace:
    """Megatron's arguments in the teacher's checkpoint."""
    return read_common(teacher / ITERATION)["args"]


@pytest.fixture(scope="session")
def bare(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher, without Megatron's arguments."""
    copy = Path(shutil.copytree(teacher, tmp_path_factory.mktemp("bare") / "teacher"))
    common = read_common(copy / ITERATION)
    del common["args"]
    put_common(copy / ITERATION, common)
    assert "args" not in read_common(copy / ITERATION)
    return copy


@pytest.fixture
def described(bare: Path, tmp_path: Path) -> Path:
    """A copy of it, for files to be put there."""
    return Path(shutil.copytree(bare, tmp_path / "teacher"))


def provider(args: Namespace, **changes: Any) -> dict[str, Any]:
    """Bridge's run_config.yaml of a model provider: all fields in one place, functions by their dotted paths."""
    config = gpt_config_from_args(args)
    items = [(of, item.name) for of in (config.transformer, config) for item in dataclasses.fields(of)]
    fields = {
        name: ConfigContainerBase._convert_value_to_dict(getattr(of, name))
        for of, name in items
        if name not in ("transformer", "pre_wrap_hooks", "post_wrap_hooks") and not name.startswith("_")
    }
    fields |= {"vocab_size": 400, "make_vocab_size_divisible_by": 128}
    fields |= {"_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider", "hf_model_id": "nobody/nothing"}
    fields |= {"transformer_layer_spec": get_gpt_layer_local_spec, "generation_config": None, "autocast_dtype": None}
    assert not set(changes) - set(fields)
    return {"model": {**fields, **changes}, "tokenizer": {"tokenizer_model": "nobody/nothing"}, "train": None}


def builder(args: Namespace, **changes: Any) -> dict[str, Any]:
    """The same of a newer model config, with the transformer within and the activation by its name."""
    model = gpt_config_from_args(args).as_dict()
    model["transformer"]["activation_func"] = "silu"
    for name, value in {"vocab_size": 400, **changes}.items():
        (model if name in model else model["transformer"])[name] = value
    return {"model": model, "tokenizer": None}


def write_run_config(checkpoint: Path, content: Mapping[str, Any]) -> None:
    with safe_yaml_representers():
        (checkpoint / ITERATION / "run_config.yaml").write_text(yaml.safe_dump(content, default_flow_style=False))


class Case(NamedTuple):
    """What is beside a teacher's weights, what is configured, and what is found."""

    write: Callable[[Path, Namespace], object]
    """Called with the checkpoint, which has no arguments, and the arguments that it had."""
    settings: tuple[str, ...]
    named: str
    """What is said, which is a refusal unless it is in parentheses."""


def bridge(**changes: Any) -> Callable[[Path, Namespace], object]:
    return lambda checkpoint, saved: write_run_config(checkpoint, provider(saved, **changes))


def newer_bridge(checkpoint: Path, saved: Namespace) -> None:
    write_run_config(checkpoint, builder(saved))


def hugging_face(place: str = ".", **changes: Any) -> Callable[[Path, Namespace], object]:
    content = {name: value for name, value in {**LLAMA, **changes}.items() if value is not None}

    def write(checkpoint: Path, _: Namespace) -> None:
        (checkpoint / place).mkdir(exist_ok=True)
        (checkpoint / place / "config.json").write_text(json.dumps(content))

    return write


def nothing(checkpoint: Path, _: Namespace) -> None:
    pass


def text(content: str) -> Callable[[Path, Namespace], object]:
    return lambda checkpoint, _: (checkpoint / ITERATION / "run_config.yaml").write_text(content)


def with_numbers_as_text(checkpoint: Path, saved: Namespace) -> None:
    write_run_config(checkpoint, provider(saved))
    file = checkpoint / ITERATION / "run_config.yaml"
    assert "layernorm_epsilon: 1.0e-05" in file.read_text()
    file.write_text(file.read_text().replace("1.0e-05", "1e-5"))


def with_payloads(checkpoint: Path, saved: Namespace) -> None:
    write_run_config(checkpoint, provider(saved))
    mark = checkpoint / "ran"
    with (checkpoint / ITERATION / "run_config.yaml").open("a") as file:
        file.write(
            f"other: !!python/object/apply:os.system ['touch {mark}']\n"
            f"another: {{_target_: os.system, _args_: ['touch {mark}'], _call_: true}}\n"
            "window: !!python/tuple [1, 2]\nodd: !anything {a: 1}\nmore: !!python/name:os.system ''\n"
        )


part = text("model: {rotary_base: 777}")


def of_rows(
    rows: int, write: Callable[[Path, Namespace], object] = nothing, names: tuple[str, ...] = VOCABULARY
) -> Callable[[Path, Namespace], object]:
    """Weights of so many tokens, as the index has it."""

    def change(checkpoint: Path, saved: Namespace) -> None:
        index = read_index(checkpoint / ITERATION)
        for name in names:
            index.state_dict_metadata[name].size = torch.Size((rows, 48))
        (checkpoint / ITERATION / ".metadata").write_bytes(pickle.dumps(index))
        write(checkpoint, saved)

    return change


def with_arguments(checkpoint: Path, saved: Namespace) -> None:
    put_common(checkpoint / ITERATION, {"args": saved, "iteration": 8})


OTHER_SETTINGS = {
    "rotary-base=777": "rotary-base",
    "rotary-percent=0.5": "rotary-percent",
    "num-attention-heads=2": "num-attention-heads",
    "norm-epsilon=1e-3": "layernorm-epsilon",
    "normalization=LayerNorm": "normalization",
    "apply-layernorm-1p=true": "layernorm-zero-centered-gamma",
    "swiglu=false": "swiglu",
    "window-size='(7,0)'": "window-size",
    "position-embedding-type=learned_absolute": "position-embedding-type",
    "untie-embeddings-and-output-weights=false": "untie-embeddings-and-output-weights",
    "num-experts=2": "num-experts",
}
OTHER_RUN_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"rotary_base": 500000}, "rotary-base"),
    ({"num_query_groups": 2}, "group-query-attention"),
    ({"rope_scaling": True, "rope_scaling_factor": 32.0}, "use-rope-scaling"),
    ({"seq_len_interpolation_factor": 2.0}, "rotary-seq-len-interpolation-factor"),
    ({"layernorm_epsilon": 1e-6}, "layernorm-epsilon"),
    ({"softmax_scale": 0.5}, "softmax-scale"),
    ({"activation_func": torch.relu}, "relu with a gate"),
    ({"activation_func": squared_relu}, "activation-func"),
    ({"no_rope_freq": [0, 0, 0, 1]}, "no-rope-freq"),
    ({"window_size": (7, 0)}, "window-size"),
    ({"share_embeddings_and_output_weights": True}, "untie-embeddings"),
    ({"qk_l2_norm": True}, "qk-l2-norm"),
    ({"softmax_type": "off-by-one"}, "softmax-type"),
    ({"use_mup": True}, "use-mup"),
    ({"vocab_size": 300}, "vocabulary of 300"),
    ({"vocab_size": 500}, "vocabulary of 500"),
    ({"vocab_size": 701}, "512 tokens, and its description a vocabulary of 701"),
]
SAME_RUN_CONFIGS: list[dict[str, Any]] = [
    {},
    {"moe_layer_freq": [1, 1, 1, 1]},
    {"kv_channels": None, "num_query_groups": None, "softmax_scale": 12**-0.5},
    {"rotary_base": 10000.0, "rope_scaling_factor": 1.0, "seq_len_interpolation_factor": None},
    {"window_size": (31, 0), "recompute_granularity": "full"},
    {"vocab_size": 404},  # rows of no token, as Hugging Face's models have
]
OTHER_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rotary-base"),
    ({"num_key_value_heads": 2}, "group-query-attention"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "use-rope-scaling"),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rotary-seq-len-interpolation-factor"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "position-embedding-type"),
    ({"rope_scaling": {"type": "longrope"}}, "rope-scaling-type"),
    ({"rms_norm_eps": 1e-6}, "layernorm-epsilon"),
    ({"hidden_act": "relu2"}, "swiglu"),
    ({"sliding_window": 16}, "window-size"),
    ({"tie_word_embeddings": True}, "untie-embeddings"),
    ({"num_local_experts": 8, "num_experts_per_tok": 2}, "num-experts"),
    ({"final_logit_softcapping": 30.0}, "final-logit-softcapping"),
    ({"vocab_size": 300}, "vocabulary of 300"),
]
SIZES = ("num-layers=4", "hidden-size=48", "ffn-hidden-size=96")
MIXTURE = ("megatron.num-experts=4", "megatron.moe-layer-freq='[0,1]'")
DECLARED = "teacher.declared=true"

CASES: dict[str, Case] = {
    **{f"bridge {list(it.items())}": Case(bridge(**it), (), "(run_config.yaml") for it in SAME_RUN_CONFIGS},
    "newer bridge": Case(newer_bridge, (), "(run_config.yaml"),
    **{
        f"{writer} {setting}": Case(write, (f"teacher.{setting}",), f"{name}: {writer} has")
        for writer, write in {"run_config.yaml": newer_bridge, "config.json": hugging_face()}.items()
        for setting, name in OTHER_SETTINGS.items()
        if writer != "config.json" or name not in ("rotary-percent", "layernorm-zero-centered-gamma")
    },
    **{f"bridge {named} {list(it)}": Case(bridge(**it), (), named) for it, named in OTHER_RUN_CONFIGS},
    "numbers that YAML takes for text": Case(with_numbers_as_text, (), "(run_config.yaml"),
    "payloads": Case(with_payloads, (), "(run_config.yaml"),
    **{
        f"config.json in {place}": Case(hugging_face(place), (), "(config.json")
        for place in (".", "hf", ITERATION, f"{ITERATION}/hf")
    },
    **{f"hugging face {it}": Case(hugging_face(**it), (), named) for it, named in OTHER_CONFIGS},
    "a window as wide as a sequence": Case(hugging_face(sliding_window=32), (), "(config.json"),
    "nothing": Case(nothing, (), DECLARED),
    "nothing, declared": Case(nothing, (DECLARED,), "(compared with nothing"),
    "known and declared": Case(bridge(), (DECLARED, "teacher.rotary-base=777"), "rotary-base"),
    "a part of run_config.yaml": Case(part, (), "run_config.yaml without num-layers, hidden-size, "),
    "a part of run_config.yaml, declared": Case(part, (DECLARED,), "rotary-base: run_config.yaml has 777"),
    "a config.json without a rotary base": Case(
        hugging_face(model_type="mine", rope_theta=None), (), "without rotary-b"
    ),
    "a config.json of no model": Case(hugging_face(num_hidden_layers=None), (), DECLARED),
    **{f"run_config.yaml is {it!r}": Case(text(it), (), "run_config.yaml") for it in ("{", "[1]", "model: [", "\x00")},
    # what a student has and its teacher has not
    "a dense teacher": Case(
        bridge(),
        MIXTURE,
        "num-experts: run_config.yaml has None, the configuration 4, inherited from the student; set ",
    ),
    "a dense teacher, as told": Case(bridge(), (*MIXTURE, "teacher.num-experts=null"), "(run_config.yaml"),
    "a dense teacher with a bias": Case(
        bridge(add_bias_linear=True), (), "inherited from the student; set teacher.disable-bias-linear=false"
    ),
    "a student of the same": Case(
        bridge(rotary_base=777),
        (*(f"megatron.{name}" for name in SIZES), "megatron.pretrained-checkpoint=FOLDER", "teacher.rotary-base=777"),
        "(run_config.yaml",
    ),
    "a teacher of experts": Case(
        bridge(num_moe_experts=4, moe_layer_freq=[0, 1, 1, 1]),
        (*MIXTURE, "megatron.moe-layer-freq=2"),
        "set teacher.moe-layer-freq='[0,1,1,1]'",
    ),
    "a teacher of experts, as told": Case(
        bridge(num_moe_experts=4, moe_layer_freq=[0, 1, 1, 1]),
        (*MIXTURE, "megatron.moe-layer-freq=2", "teacher.moe-layer-freq='[0,1,1,1]'"),
        "(run_config.yaml",
    ),
    # rows of embedding and output layer
    "padded": Case(of_rows(512), (DECLARED,), "(compared"),
    "not padded": Case(of_rows(400), (DECLARED,), "(compared"),
    "fewer rows": Case(of_rows(300), (DECLARED,), "300 tokens"),
    "more rows": Case(of_rows(701), (DECLARED,), "teacher.vocab-size"),
    "more rows, declared": Case(of_rows(701), (DECLARED, "teacher.vocab-size=400"), "(compared"),
    "another vocabulary, declared": Case(of_rows(512), (DECLARED, "teacher.vocab-size=500"), "vocabulary of 500"),
    "fewer rows than declared": Case(of_rows(300), (DECLARED, "teacher.vocab-size=400"), "300 tokens"),
    "fewer rows, all shared": Case(of_rows(300), (DECLARED, "distillation.shared_vocab=300"), "(compared"),
    "fewer rows than shared": Case(of_rows(300), (DECLARED, "distillation.shared_vocab=301"), "shared_vocab is 301"),
    "a smaller model": Case(of_rows(300, hugging_face(vocab_size=300)), (), "vocabulary of 300"),
    "a larger model": Case(of_rows(701, hugging_face(vocab_size=701)), (), "vocabulary of 701"),
    "a larger model, partly shared": Case(
        of_rows(701, hugging_face(vocab_size=701)), ("distillation.shared_vocab=400",), "(compared"
    ),
    "more padding": Case(of_rows(701, hugging_face()), (), "(compared"),
    "fewer rows than the config says": Case(of_rows(300, hugging_face()), (), "300 tokens"),
    "fewer rows than the arguments say": Case(of_rows(300, with_arguments, VOCABULARY[1:]), (), "300 tokens"),
}


@pytest.fixture(scope="module")
def found(
    config: Path, bare: Path, saved: Namespace, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[str, str]]:
    """What `check` says of the teacher's checkpoint in each case, and the folder; all in one process."""
    folder = tmp_path_factory.mktemp("described")
    cases, folders = {}, {}
    for number, (name, case) in enumerate(CASES.items()):
        folders[name] = Path(shutil.copytree(bare, folder / str(number)))
        case.write(folders[name], saved)
        settings = [setting.replace("FOLDER", str(folders[name])) for setting in case.settings]
        cases[name] = [str(config), f"teacher.load={folders[name]}", *settings, "--world-size", "1"]
    (folder / "cases.json").write_text(json.dumps(cases))
    (rank,) = launch([Path(__file__).with_name("checked.py"), folder / "cases.json"], 1)
    assert rank.code == 0, rank.output[-6000:]
    ended: dict[str, tuple[int, str, str]] = json.loads(rank.output.splitlines()[-1])
    return {name: (ended[name][1], str(folders[name])) for name in CASES}


@pytest.mark.parametrize("name", CASES, ids=list(CASES))
def test_a_teacher_is_compared_with_what_is_beside_its_weights(found: dict[str, tuple[str, str]], name: str) -> None:
    stdout, folder = found[name]
    said = re.search(r"^(ok|rejected) +teacher's checkpoint: .*(?:\n  .*)*", stdout, re.MULTILINE)
    assert said, stdout
    named = CASES[name].named
    assert said[1] == ("ok" if named.startswith("(") else "rejected"), said[0]
    assert named.removeprefix("(") in said[0]
    assert not Path(folder, "ran").exists()


def test_a_students_checkpoint_is_compared_too(found: dict[str, tuple[str, str]]) -> None:
    stdout, _ = found["a student of the same"]
    assert re.search(r"^warning +student's checkpoint: .*rotary-base: run_config.yaml has 777", stdout, re.MULTILINE), (
        stdout
    )


# ---- tokenizers


def test_a_tokenizer_beside_the_weights_is_compared(described: Path, tmp_path: Path) -> None:
    def write(folder: Path, words: list[str], special: str) -> Path:
        folder.mkdir()
        vocab = {word: number for number, word in enumerate(words)}
        content = {"added_tokens": [{"id": 9, "content": special}], "model": {"type": "BPE", "vocab": vocab}}
        (folder / "tokenizer.json").write_text(json.dumps(content))
        return folder

    write(described / ITERATION / "tokenizer", ["a", "b"], "<x>")
    checkpoint = TeacherCheckpoint.open(described)
    assert checkpoint.check_tokenizer(str(write(tmp_path / "same", ["a", "b"], "<y>")))
    assert not checkpoint.check_tokenizer("nobody/nothing")
    with pytest.raises(CheckpointError, match="another one"):
        checkpoint.check_tokenizer(str(write(tmp_path / "other", ["b", "a"], "<x>")))


# ---- of what Megatron makes of arguments, the way back


def test_a_model_config_is_described_as_its_arguments_are(config: Path) -> None:
    # In a process of its own, which gets the stand-in for a GPU for good.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(not_described, config).result() == []


def not_described(config: Path) -> list[str]:
    """Kinds of models whose configuration is described otherwise than their arguments."""
    wrong = []
    more = {
        "moe": ["num-experts=4", "moe-layer-freq='[0,1]'", "moe-router-topk=1", "moe-router-score-function=sigmoid"],
        "groups": ["group-query-attention=true", "num-query-groups=2", "qk-layernorm=true"],
        "relu": ["swiglu=false", "squared-relu=true"],
        "gelu": ["swiglu=false"],
        "quick": ["swiglu=false", "quick-geglu=true"],
        "scaled": ["use-rope-scaling=true", "rotary-seq-len-interpolation-factor=2"],
        "windows": ["window-size='(7,0)'", "window-attn-skip-freq=2", "no-rope-freq=2"],
        "latent": ["multi-latent-attention=true", "kv-lora-rank=8", "q-lora-rank=8"],
    }
    defaults = {**cpu_backend.MEGATRON_DEFAULTS, "num-layers": 4}
    for name, settings in more.items():
        student, _ = dry_run.megatron_arguments(
            load_config(config, [f"megatron.{it}" for it in settings], megatron_options(), lambda _: defaults), 1
        )
        model = gpt_config_from_args(student)
        found = of_model_config({**vars(model.transformer), **vars(model), "vocab_size": 400})
        checkpoint = TeacherCheckpoint(Path(name), {"args": Namespace(**found)}, read_index_of_nothing())
        if "settings" not in checkpoint.check_arguments(student, 400):
            wrong.append(name)
    return wrong


def read_index_of_nothing() -> Any:
    from torch.distributed.checkpoint.metadata import Metadata

    return Metadata({})


# ---- jobs


def distill(config: Path, teacher: Path, *settings: str) -> list[Rank]:
    return launch(["-m", "abkd_megatron", "distill", "--config", config, f"teacher.load={teacher}", *settings], 2)


def test_a_job_says_the_same(config: Path, bare: Path) -> None:
    for rank in distill(config, bare):
        assert rank.code == 2 and "teacher.declared=true" in rank.output, rank.output[-3000:]


def test_the_expected_loss_is_compared_in_the_first_step(config: Path, described: Path, saved: Namespace) -> None:
    write_run_config(described, provider(saved))
    settings = ("megatron.train-iters=1", "distillation.skip_preflight=[teacher_loss]")
    ranks = distill(config, described, "teacher.expected-loss=4.9", *settings)
    got = [re.search(r"teacher.expected-loss 4.9000 within 2%, got (\d\.\d+)", rank.output) for rank in ranks]
    for rank, number in zip(ranks, got, strict=True):
        assert rank.code == 2 and number, rank.output[-3000:]
        assert not re.search(r"iteration +1/", rank.output)
    assert got[0] and 4 < float(got[0][1]) < 4.8
    ranks = distill(config, described, f"teacher.expected-loss={1.01 * float(got[0][1])}", *settings)
    assert all(rank.code == 0 for rank in ranks), ranks[0].output[-3000:]
    assert "compared with run_config.yaml" in ranks[0].output


def test_a_dense_teacher_of_a_student_with_experts(config: Path, bare: Path) -> None:
    settings = [
        "teacher.declared=true",
        *MIXTURE,
        "megatron.train-iters=1",
        "megatron.moe-token-dispatcher-type=alltoall",
    ]
    words = ["-m", "abkd_megatron", "distill", "--config", config, f"teacher.load={bare}", *settings]
    (rank,) = launch(words, 1)
    assert rank.code == 2, rank.output[-3000:]
    assert re.search(r"router.weight: missing(.*\n)*inherited from the student.*num-experts=4", rank.output)
    (rank,) = launch([*words, "teacher.num-experts=null"], 1)
    assert rank.code == 0, rank.output[-3000:]


def test_what_is_read_first(described: Path, saved: Namespace) -> None:
    (described / "config.json").write_text(json.dumps(LLAMA))
    write_run_config(described, provider(saved))
    assert describe(described / ITERATION, saved).source == "the checkpoint"
    assert describe(described / ITERATION, None).source == "run_config.yaml"
    (described / ITERATION / "run_config.yaml").unlink()
    assert describe(described / ITERATION, None).source == "config.json"
    (described / "config.json").write_text(json.dumps({"vocab_size": 400}))  # of no model
    assert describe(described / ITERATION, None) is None
