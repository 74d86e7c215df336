"""A script of one's own with our three lines: without a teacher what it was, with one what the command line's job is.

`MEGATRON_LM_PRETRAIN_GPT=/path/to/Megatron-LM/pretrain_gpt.py` also runs the lines that the README has for that script,
and `MEGATRON_LM_PRETRAIN_HYBRID` does so for pretrain_hybrid.py.
"""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from launch import ROOT, Rank, launch, run_job, scalars
from matrix import run_refused
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from abkd_megatron.config.load import load_config, to_argv
from abkd_megatron.data.prepare import PreparedData
from abkd_megatron.errors import HostError

SCRIPT = ROOT / "examples" / "pretrain_gpt.py"
UPSTREAM = {name: os.environ.get(f"MEGATRON_LM_PRETRAIN_{name}") for name in ("GPT", "HYBRID")}
LAYOUT = {"tensor-model-parallel-size": 2, "pipeline-model-parallel-size": 2}
HYBRID = {"hybrid-layer-pattern": '"*-|*-"', "num-layers": "null"}
LOCAL_SPEC = ["--spec", "abkd_megatron.local_hybrid_spec", "local_hybrid_stack_spec"]
TEACHER = {"num-layers": 4, "hidden-size": 48, "ffn-hidden-size": 96}
DISTILLATION = {
    "alpha": "{schedule: linear, from: 0.5, to: 0.3, end: 4}",
    "kd_weight": "0.7",
    "temperature": "2",
    "head": "fused",
}


def command_line(config: Path, settings: Mapping[str, object]) -> list[str]:
    """Megatron's command line for what `config` says of it; what a CPU needs is left to the runner."""
    from abkd_megatron.config.megatron_args import megatron_options

    options = megatron_options()
    loaded = load_config(config, [f"megatron.{key}={value}" for key, value in settings.items()], options)
    assert loaded.data.dir is not None
    return to_argv({**PreparedData.open(loaded.data.dir).megatron_arguments(), **loaded.megatron}, options)


def kd_arguments(teacher: Path, distillation: Mapping[str, str] = DISTILLATION) -> list[str]:
    words = ["--kd-teacher-load", str(teacher), "--kd-teacher-args", *(f"{k}={v}" for k, v in TEACHER.items())]
    return [*words, *kd_words(distillation)]


def kd_words(distillation: Mapping[str, str]) -> list[str]:
    words = []
    for name, value in distillation.items():
        words += [f"--kd-{name.removeprefix('kd_').replace('_', '-')}", value]
    return words


def run_script(script: Path, words: Sequence[str], num_ranks: int = 1) -> list[Rank]:
    return launch(["-m", "abkd_megatron.cpu_backend", script, *words], num_ranks)


def train(script: Path, config: Path, out: Path, words: Sequence[str], num_ranks: int = 1, **settings: object) -> dict:
    given = {"tensorboard-dir": out / "tensorboard", **{k.replace("_", "-"): v for k, v in settings.items()}}
    for number, rank in enumerate(run_script(script, [*command_line(config, given), *words], num_ranks)):
        assert rank.code == 0, f"rank {number} ended with {rank.code}:\n{rank.output[-6000:]}"
    return scalars(out / "tensorboard")


def ours(line: str) -> bool:
    return "add_kd_arguments" in line or "distill(" in line


def saved(checkpoint: Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """The tensors of a checkpoint, and Megatron's arguments in it that do not say where it is."""
    folder = checkpoint / "iter_0000005"
    dcp_to_torch_save(folder, checkpoint / "whole.pt")
    whole = torch.load(checkpoint / "whole.pt", weights_only=False)
    common = dist_checkpointing.load_common_state_dict(str(folder))
    args = {name: value for name, value in vars(common["args"]).items() if str(checkpoint) not in str(value)}
    return {name: value for name, value in whole.items() if isinstance(value, torch.Tensor)}, args


def test_without_a_teacher_nothing_changes(workspace: Path, config: Path) -> None:
    lines = SCRIPT.read_text().splitlines(keepends=True)
    assert sum(map(ours, lines)) == 3
    plain = workspace / "plain_script.py"
    plain.write_text("".join(line for line in lines if not ours(line)))
    code = plain.read_text().split('"""', 2)[2]
    assert "abkd" not in code and "kd_" not in code

    found = {}
    for script in (SCRIPT, plain):
        out = workspace / f"off-{script.stem}"
        found[script] = train(script, config, out, [], save=out, save_interval=5), *saved(out)
    (losses, tensors, args), (plain_losses, plain_tensors, plain_args) = found.values()
    for name in ("lm loss", "grad-norm", "lm loss validation"):
        assert losses[name] == plain_losses[name] and len(losses[name]) > 0, name
    assert losses.keys() == plain_losses.keys()
    assert args == plain_args
    assert tensors.keys() == plain_tensors.keys()
    assert any(name.startswith("optimizer") for name in tensors)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, plain_tensors[name]), name


def of_command_line(config: Path, teacher: Path, out: Path, model: Mapping[str, str]) -> tuple[dict, dict]:
    """What the command line's own job of these settings writes to TensorBoard, and to its log."""
    settings = {f"megatron.{name}": value for name, value in {**LAYOUT, **model}.items()}
    settings |= {f"distillation.{name}": value for name, value in DISTILLATION.items()}
    settings |= {"megatron.tensorboard-dir": out / "tensorboard", "teacher.load": teacher}
    settings |= {f"teacher.{name}": value for name, value in TEACHER.items()} if model else {}
    ranks = run_job("distill", config, settings, num_ranks=4)
    return scalars(out / "tensorboard"), logged(ranks)


@pytest.fixture(scope="module")
def job(workspace: Path, config: Path, teacher: Path) -> tuple[dict[str, list[float]], dict[str, list[str]]]:
    return of_command_line(config, teacher, workspace / "stock-job", {})


def logged(ranks: Sequence[Rank]) -> dict[str, list[str]]:
    """Megatron's log of the training steps, as printed."""
    names = ("lm loss", "kd loss", "total loss", "kl to teacher", "top-1 agreement", "alpha", "grad norm")
    return {name: re.findall(rf"\| {name}: (\S+) \|", ranks[-1].output) for name in names}


def test_with_a_teacher_it_is_the_command_lines_job(workspace: Path, config: Path, teacher: Path, job) -> None:
    out = workspace / "stock-on"
    found = train(SCRIPT, config, out, kd_arguments(teacher), 4, **LAYOUT)
    assert len(found["kd loss"]) == 5
    wanted, _ = job
    compared = [name for name in wanted if "loss" in name or "teacher" in name or name in ("grad-norm", "alpha")]
    compared = [name for name in compared if not name.startswith("teacher seconds")]
    assert {"lm loss", "kd loss", "total loss", "kl to teacher", "kd loss validation", "alpha"} <= set(compared)
    for name in compared:
        assert found[name] == wanted[name], name
    for seconds in (found["teacher seconds"], wanted["teacher seconds"]):
        assert len(seconds) == 5 and all(it > 0 for it in seconds)


def test_its_steps_on_own_text_are_the_command_lines(workspace: Path, config: Path, teacher: Path) -> None:
    layout, out = {"pipeline-model-parallel-size": 2}, workspace / "stock-own-text"
    own = {"divergence": "reverse_kl", "on_policy": "{share: 0.5, prompt_tokens: 8, new_tokens: 20, seed: 10}"}
    found = train(SCRIPT, config, out, kd_arguments(teacher, own), 2, **layout)
    settings = {f"megatron.{name}": value for name, value in layout.items()}
    settings |= {f"distillation.{name}": value for name, value in own.items()}
    settings |= {"megatron.tensorboard-dir": out / "job", "teacher.load": teacher}
    run_job("distill", config, settings, num_ranks=2)
    wanted = scalars(out / "job")
    assert len(found["own text kd loss"]) == 3
    for name in (name for name in wanted if "loss" in name or name in ("own text length", "grad-norm")):
        assert found[name] == wanted[name], name
    refused = [*command_line(config, {"dataloader-inter-document-masking": "true"}), *kd_arguments(teacher, own)]
    (rank,) = run_script(SCRIPT, refused)
    assert rank.code != 0 and "on_policy with packed data" in rank.output, rank.output[-3000:]


def test_a_script_of_a_hybrid_model(workspace: Path, config: Path, teacher: Path) -> None:
    """As Megatron-LM's pretrain_hybrid.py makes its model config, with the same three lines."""
    script, out = workspace / "pretrain_hybrid.py", workspace / "hybrid-script"
    text = SCRIPT.read_text().replace("gpt_config_from_args", "hybrid_config_from_args")
    assert text.count("hybrid_config_from_args(args)") == 1
    script.write_text(text)
    pattern = {"hybrid-layer-pattern": "*-|*-", "pipeline-model-parallel-size": 2}
    spec = ["--spec", "abkd_megatron.local_hybrid_spec", "local_hybrid_stack_spec"]
    found = train(script, config, out, [*spec, *kd_arguments(teacher)], 2, **pattern)
    settings = {f"megatron.{name}": value for name, value in pattern.items()}
    settings |= {f"distillation.{name}": value for name, value in DISTILLATION.items()}
    settings |= {"megatron.tensorboard-dir": out / "job", "teacher.load": teacher}
    run_job("distill", config, settings, num_ranks=2)
    wanted = scalars(out / "job")
    assert len(found["kd loss"]) == 5
    for name in ("lm loss", "kd loss", "total loss", "teacher lm loss", "kd loss validation", "grad-norm"):
        assert found[name] == wanted[name], name
    # Without layers that can be built here.
    (rank,) = run_script(script, [*command_line(config, {"hybrid-layer-pattern": "*-*-"}), *kd_arguments(teacher)])
    assert rank.code != 0 and "--spec abkd_megatron.local_hybrid_spec" in rank.output, rank.output[-3000:]


CACHED = {"divergence": "reverse_kl", "lm_weight": "0.5", "head": "fused"}


@pytest.fixture(scope="module")
def cache(workspace: Path, config: Path, teacher: Path) -> Path:
    """Records of the first four of five batches."""
    found = workspace / "stock-cache"
    given = {"teacher.load": teacher, "cache.dir": found, "cache.top_k": 16, "megatron.train-iters": 4}
    run_job("cache", config, given)
    return found


@pytest.fixture(scope="module")
def cached_script(workspace: Path) -> Path:
    """The example with one more change."""
    script, text = workspace / "cached_script.py", SCRIPT.read_text()
    provider = "        train_valid_test_datasets_provider,\n"
    assert text.count(provider) == 1
    text = text.replace(provider, "        cached(train_valid_test_datasets_provider),\n")
    script.write_text(text.replace("import add_kd_arguments, distill", "import add_kd_arguments, cached, distill"))
    return script


@pytest.mark.parametrize(
    "layout",
    [{}, {"tensor-model-parallel-size": 2, "sequence-parallel": "true"}, LAYOUT],
    ids=["data", "tensor", "both"],
)
def test_with_a_cache_it_is_the_command_lines_job(
    workspace: Path, config: Path, cache: Path, cached_script: Path, layout: dict, request: pytest.FixtureRequest
) -> None:
    out = workspace / f"cached-{request.node.callspec.id}"
    words = ["--kd-cache", str(cache), "--kd-on-miss", "lm", *kd_words(CACHED)]
    ranks = 4 if layout is LAYOUT else 2
    found = train(cached_script, config, out, words, ranks, **layout)
    alone = workspace / "stock-alone.yaml"
    text = config.read_text()
    before, _, after = text.partition("teacher:\n")
    alone.write_text(before + after[after.index("distillation:") :])
    settings = {f"megatron.{name}": value for name, value in layout.items()}
    settings |= {f"distillation.{name}": value for name, value in CACHED.items()}
    settings |= {"distillation.cache": cache, "distillation.on_miss": "lm", "megatron.tensorboard-dir": out / "job"}
    run_job("distill", alone, settings, num_ranks=ranks)
    wanted = scalars(out / "job")
    assert found["cached share"] == [1.0] * 4 + [0.0]
    assert found["kd loss"][0] > 0 and len(found["kd loss validation"]) > 0
    for name in wanted:
        if "loss" in name or "teacher" in name or name in ("grad-norm", "cached share"):
            assert found[name] == wanted[name], name


def test_a_script_without_what_a_cache_needs(config: Path, cache: Path, cached_script: Path) -> None:
    words = [*command_line(config, {}), "--kd-cache", str(cache), *kd_words(CACHED)]
    for rank in run_script(SCRIPT, [*words, "--kd-on-miss", "lm"], 2):
        assert rank.code != 0 and "from abkd_megatron import cached" in rank.output, rank.output[-3000:]
    for rank in run_script(cached_script, [*words, "--dataloader-inter-document-masking"], 2):  # of two rows
        assert rank.code != 0 and "packed data needs micro-batches of one row" in rank.output, rank.output[-3000:]
    for rank in run_script(cached_script, words, 2):  # the last batch is not there
        assert rank.code != 0 and "on_miss=lm" in rank.output, rank.output[-3000:]
    for rank in run_script(cached_script, [*words, "--kd-teacher-load", str(cache)], 2):
        assert rank.code != 0 and "a cache or a live teacher, got both" in rank.output, rank.output[-3000:]


def test_cached_datasets_without_a_cache_are_the_scripts_own(
    workspace: Path, config: Path, cached_script: Path
) -> None:
    found = train(cached_script, config, workspace / "cached-off", [], train_iters=2)
    wanted = train(SCRIPT, config, workspace / "cached-plain", [], train_iters=2)
    assert found.keys() == wanted.keys() and found["lm loss"] == wanted["lm loss"]


SHAPE = (
    *("num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "seq-length", "max-position-embeddings"),
    *("position-embedding-type", "normalization", "swiglu", "disable-bias-linear"),
    "untie-embeddings-and-output-weights",
)


def test_a_student_whose_checkpoint_has_its_shape(workspace: Path, config: Path, teacher: Path, student: Path) -> None:
    """With --use-checkpoint-args the command line has no shape that the teacher could inherit."""
    given: dict[str, object] = {"load": student, "finetune": "true", "train_iters": 2}
    out, words = workspace / "stock-shape", kd_arguments(teacher)
    wanted = train(SCRIPT, config, out / "given", words, **given)
    shape = {**dict.fromkeys(SHAPE, "null"), "use-checkpoint-args": "true"}
    found = train(SCRIPT, config, out / "loaded", words, **given, **shape)
    assert found["kd loss"] == wanted["kd loss"] and len(found["kd loss"]) == 2


def documented_lines() -> list[str]:
    """The three lines that the README has for Megatron-LM's own script."""
    (block,) = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [line[1:] for line in block.splitlines() if line.startswith("+")]


@pytest.mark.parametrize("name", UPSTREAM)
def test_the_documented_lines_serve_megatron_lms_own_script(
    name: str, tmp_path: Path, config: Path, teacher: Path, job
) -> None:
    source = UPSTREAM[name]
    if source is None:
        pytest.skip(f"MEGATRON_LM_PRETRAIN_{name} does not name Megatron-LM's script")
    for helper in ("gpt_builders.py", "hybrid_builders.py", "model_provider.py"):  # where there are such
        if (beside := Path(source).with_name(helper)).is_file():
            (tmp_path / helper).write_text(beside.read_text())
    original = Path(source).read_text().splitlines(keepends=True)
    imported, provider, call = (f"{line}\n" for line in documented_lines())
    changed: list[str] = []
    for line in original:
        if line.startswith("def get_batch("):
            changed.append(imported)
        elif line.startswith("    pretrain("):
            changed.append(call)
        changed.append(provider if "extra_args_provider=" in line else line)
    edits = [line[0] for line in difflib.ndiff(original, changed) if line[0] in "+-"]
    assert sorted(edits) == ["+", "+", "+", "-"]
    script = tmp_path / Path(source).name
    script.write_text("".join(changed))
    model = HYBRID if name == "HYBRID" else {}
    words = [*command_line(config, {**LAYOUT, **model}), *(LOCAL_SPEC if model else []), *kd_arguments(teacher)]
    # It does not flush TensorBoard's writer, whose thread ends with the process; the log has all steps.
    ranks = run_script(script, words, 4)
    for number, rank in enumerate(ranks):
        assert rank.code == 0, f"rank {number} ended with {rank.code}:\n{rank.output[-6000:]}"
    _, wanted = of_command_line(config, teacher, tmp_path / "job", model) if model else job
    assert all(len(values) == 5 for values in wanted.values())
    assert logged(ranks) == wanted


# name: (arguments, what the message must say). {teacher} is a good teacher of other sizes, {args} are these.
GOOD = ["--kd-teacher-load", "{teacher}", "--kd-teacher-args", *(f"{name}={value}" for name, value in TEACHER.items())]
PIPELINE = ["--pipeline-model-parallel-size", "2"]
CASES: dict[str, tuple[list[str], str]] = {
    "no teacher": (["--kd-alpha", "0.3"], r"ConfigError: expected --kd-teacher-load.*got only --kd-alpha.*remove"),
    "arguments of no teacher": (
        ["--kd-teacher-args", "num-layers=4"],
        r"expected --kd-teacher-load.*kd-teacher-args",
    ),
    "empty teacher": (["--kd-teacher-load", ""], r"teacher\.load: expected the path"),
    "missing teacher": (["--kd-teacher-load", "{teacher}/nowhere"], r"CheckpointError: .*no such folder"),
    "missing step": ([*GOOD, "--kd-teacher-step", "3"], r"CheckpointError: expected iteration 3"),
    "teacher of other sizes": (GOOD[:2], r"CheckpointError: .*hidden-size: the checkpoint has 48.* 32"),
    "unknown argument of the teacher": ([*GOOD, "num-layer=4"], r"num-layer.*num-layers"),
    "checkpoint among the arguments": ([*GOOD, "load=x"], r"got load=x; its checkpoint is given by --kd-teacher-load"),
    "alpha is no number": ([*GOOD, "--kd-alpha", "much"], r"distillation\.alpha: expected .*much.*--kd-NAME"),
    "temperature 0": ([*GOOD, "--kd-temperature", "0"], r"distillation\.temperature.*above 0"),
    "parameter of another divergence": ([*GOOD, "--kd-divergence", "todi", "--kd-alpha", "1"], r"divergence: todi"),
    "logits on disk": ([*GOOD, "--logits-load-dir", "logits"], r"student: Megatron's distillation from logits on disk"),
    "teacher over more ranks than there are": (
        [*GOOD, *("tensor-model-parallel-size=2", "pipeline-model-parallel-size=1"), *PIPELINE],
        r"tensor parallelism 2.*data-parallel size divisible by 2, got 1",
    ),
    "tokens the teacher cannot read": (
        [*GOOD, "--kd-shared-vocab", "399", *PIPELINE],
        r"shared_vocab 399 of the student's 400 tokens.*set pipeline-model-parallel-size to 1",
    ),
    "losses between layers without a mask": (
        [*GOOD, "--kd-hidden-losses", "[{{student_layer: 1, teacher_layer: 2, loss: mse}}]", *PIPELINE],
        r"hidden_losses need the loss mask.*set pipeline-model-parallel-size to 1",
    ),
    "weights by source": (
        [*GOOD, "--kd-sources", "[{{source: 0, kd_weight: 0.5}}]"],
        r"sources need the dataset of each sequence.*remove --kd-sources",
    ),
    "a teacher of another tokenizer": (
        [*GOOD, "tokenizer-model=other.model", "--kd-cross-tokenizer", "{{temperature: 100}}"],
        r"cross_tokenizer needs the text of each sample.*remove --kd-cross-tokenizer",
    ),
}


@pytest.fixture(scope="module")
def ended(workspace: Path, config: Path, teacher: Path) -> list[dict[str, tuple[int, str]]]:
    """How each case ended, on each rank of one job."""
    folder = workspace / "stock-refused"
    folder.mkdir()
    common = [str(SCRIPT), *command_line(config, {})]
    cases = {name: common + [word.format(teacher=teacher) for word in words] for name, (words, _) in CASES.items()}
    return run_refused(cases, 2, folder)


@pytest.mark.parametrize("name", CASES)
def test_every_rank_says_what_is_wrong(ended: list[dict[str, tuple[int, str]]], name: str) -> None:
    for rank in ended:
        code, message = rank[name]
        assert code == 1
        assert re.search(CASES[name][1], message, re.DOTALL), message


def test_a_step_that_keeps_its_loss_mask_to_itself_is_told(tmp_path: Path, config: Path, teacher: Path) -> None:
    script = tmp_path / "pretrain_gpt.py"
    text = SCRIPT.read_text()
    assert text.count('        loss_mask=batch["loss_mask"],\n') == 1
    script.write_text(text.replace('        loss_mask=batch["loss_mask"],\n', ""))
    (rank,) = run_script(script, [*command_line(config, {}), *kd_arguments(teacher, {})])
    assert rank.code != 0
    assert "gives the model its loss mask" in rank.output and "loss_mask=loss_mask" in rank.output


def test_a_model_without_the_hook_is_told() -> None:
    from abkd_megatron.hosts.add_teacher import MegatronHost
    from abkd_megatron.student.step import DistilledStep

    step = DistilledStep(lambda *_: pytest.fail("was run"), MegatronHost())
    with pytest.raises(HostError, match="pretrain\\(\\)"):
        step(None, torch.nn.Linear(1, 1))


def test_a_script_that_is_not_there_is_told() -> None:
    (rank,) = launch(["-m", "abkd_megatron.cpu_backend", "nowhere.py"], 1)
    assert rank.code == 2 and "no such script: 'nowhere.py'" in rank.output
