"""Bad input ends every rank before the first step, with one clear message and an exit code that is not 0."""

from pathlib import Path

import pytest
from launch import launch
from matrix import check_refused, run_refused

PIPELINE = "megatron.pipeline-model-parallel-size=2"

# name: (job, overrides, what the message must say). {other} is a vocabulary of another size, {teacher} a good teacher.
CASES: dict[str, tuple[str, list[str], str]] = {
    "unknown key": ("distill", ["distillation.alhpa=0.3"], r"alhpa.*alpha"),
    "unknown Megatron argument": ("distill", ["megatron.num-layer=3"], r"num-layer.*num-layers"),
    "alpha is no number": ("distill", ["distillation.alpha=much"], r"alpha.*much"),
    "alpha is NaN": ("distill", ["distillation.alpha=nan"], r"alpha.*nan"),
    "temperature 0": ("distill", ["distillation.temperature=0"], r"temperature.*0"),
    "both weights 0": ("distill", ["distillation.kd_weight=0", "distillation.lm_weight=0"], r"kd_weight.*lm_weight"),
    "no teacher": ("distill", ["teacher.load=null"], r"teacher\.load"),
    "missing teacher": ("distill", ["teacher.load={workspace}/nowhere"], r"nowhere.*no such folder"),
    "empty teacher": ("distill", ["teacher.load={workspace}/empty"], r"latest_checkpointed_iteration\.txt"),
    "truncated teacher": ("distill", ["teacher.load={workspace}/truncated"], r"damaged.*should hold \d+ bytes"),
    "teacher without its index": ("distill", ["teacher.load={workspace}/headless"], r"index.*cannot be read"),
    "wrong-size teacher": ("distill", ["teacher.hidden-size=64"], r"hidden-size: the checkpoint has 48.* 64"),
    "teacher with other heads": ("distill", ["teacher.num-attention-heads=2"], r"num-attention-heads.* 4.* 2"),
    "teacher of another vocabulary": ("distill", ["data.dir={other}"], r"400 tokens.*420.*tokenizer.*shared_vocab=N"),
    "more shared than the teacher has": (
        "distill",
        ["data.dir={other}", "distillation.shared_vocab=401"],
        r"shared_vocab is 401; the teacher.* 400 tokens, the student one of 420; give at most the smaller",
    ),
    "unknown selection": (
        "distill",
        ["distillation.tokens={{select: evry, n: 2}}"],
        r"command line: unknown distillation.tokens.select 'evry'; did you mean 'every'",
    ),
    "selection that takes every token": (
        "distill",
        ["distillation.tokens={{select: every, n: 1}}"],
        r"command line: distillation.tokens: expected n to be 2 or more .* got 1; leave the selection out",
    ),
    "selection over a part of the vocabulary": (
        "distill",
        ["distillation.shared_vocab=399", "distillation.tokens={{select: every, n: 2}}"],
        r"select: every, n: 2\) is not supported with shared_vocab 399 of the student's 400.*leave the selection out",
    ),
    "student layers do not divide": ("distill", [PIPELINE, "megatron.num-layers=3"], r"student: 3 layers.*2 pipeline"),
    "teacher layers do not divide": ("distill", [PIPELINE, "teacher.num-layers=5"], r"teacher: 5 layers.*2 pipeline"),
    "teacher that cannot split the vocabulary": (
        "distill",
        ["megatron.make-vocab-size-divisible-by=401", "teacher.tensor-model-parallel-size=2"],
        r"padded to 401 columns, which 2 tensor-parallel ranks.*make-vocab-size-divisible-by a multiple of 2",
    ),
    "teacher that cannot split the sequence": (
        "distill",
        ["megatron.seq-length=31", "teacher.tensor-model-parallel-size=2", "teacher.sequence-parallel=true"],
        r"sequences of 31 tokens.*2 tensor-parallel ranks.*sequence-parallel=false",
    ),
    "teacher with attention masks in a layout of its own": (
        "distill",
        ["megatron.no-create-attention-mask-in-dataloader=false", "teacher.tensor-model-parallel-size=2"],
        r"sent tokens, not attention masks; give megatron.no-create-attention-mask-in-dataloader=true",
    ),
    "teacher over more ranks than there are": (
        "distill",
        [PIPELINE, "teacher.tensor-model-parallel-size=2", "teacher.pipeline-model-parallel-size=1"],
        r"spans 2 data-parallel ranks of the student, whose 1 it does not divide",
    ),
    "teacher of another tokenizer": ("distill", ["data.dir={workspace}/other-text"], r"got another one, .*other-text"),
    "data not prepared": ("distill", ["data.dir={workspace}/unprepared"], r"unprepared.*prepare"),
    "Megatron's own refusal": (
        "pretrain",
        ["megatron.num-attention-heads=5"],
        r"Megatron refuses.*num-attention-heads is 5",
    ),
    # The last one, since it is found when Megatron has built the models, and on the last pipeline stage alone.
    "fused head over a part of the vocabulary": (
        "distill",
        [PIPELINE, "distillation.shared_vocab=399", "distillation.head=fused"],
        r"head: fused is not possible \(shared_vocab 399 of the student's 400 tokens",
    ),
}


@pytest.fixture(scope="module")
def ended(workspace: Path, config: Path, teacher: Path, spoilt: Path) -> list[dict[str, tuple[int, str]]]:
    """How each case ended, on each rank of one job."""
    cases = {
        name: [job, "--config", str(config), f"teacher.load={teacher}"]
        + [setting.format(workspace=workspace, other=spoilt) for setting in overrides]
        for name, (job, overrides, _) in CASES.items()
    }
    return run_refused(cases, 2, workspace)


@pytest.mark.parametrize("name", CASES)
def test_every_rank_says_what_is_wrong(ended: list[dict[str, tuple[int, str]]], name: str) -> None:
    job, _, message = CASES[name]
    check_refused(ended, name, job, message)


def test_the_process_ends_with_that_code(config: Path) -> None:
    (rank,) = launch(["-m", "abkd_megatron", "pretrain", "--config", config, "device=cuda"], 1)
    assert rank.code == 2
    assert "error: expected an NVIDIA GPU, found none; set `device: cpu`" in rank.output
