"""A student's checkpoint says what it was distilled with; a run that would go on with something else is told."""

import io
import re
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from launch import Rank, launch, run_job, scalars
from matrix import check_refused, run_refused
from megatron.core import dist_checkpointing
from test_stock_script import SCRIPT, command_line, kd_arguments, run_script

from abkd_megatron.errors import ConfigError

ALPHA = "{schedule: linear, from: 0.5, to: 0.3, end: 4}"
RECORD = "abkd_distillation"


def saved_args(checkpoint: Path, iteration: int) -> Namespace:
    return dist_checkpointing.load_common_state_dict(str(checkpoint / f"iter_{iteration:07d}"))["args"]


@pytest.fixture(scope="module")
def begun(workspace: Path, config: Path, teacher: Path) -> Path:
    """A student of four steps, and of two."""
    out = workspace / "provenance"
    start = {"megatron.train-iters": 4, "megatron.save": out, "megatron.save-interval": 2}
    run_job("distill", config, {**start, "teacher.load": teacher, "distillation.alpha": ALPHA})
    return out


@pytest.fixture(scope="module")
def teachers(workspace: Path, teacher: Path) -> tuple[Path, Path]:
    """A copy of the teacher, and one with other weights in the same shapes."""
    copied, changed = workspace / "teacher-copied", workspace / "teacher-changed"
    for path in (copied, changed):
        shutil.copytree(teacher, path)
    file = max(changed.rglob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return copied, changed


def test_what_is_recorded(begun: Path, teacher: Path) -> None:
    record = getattr(saved_args(begun, 2), RECORD)
    buffer = io.BytesIO()
    torch.save(record, buffer)
    assert torch.load(io.BytesIO(buffer.getvalue()), weights_only=True) == record, "plain values"
    assert record["distillation"] == {
        "divergence": "alpha_beta",
        "alpha": "{schedule: linear, from: 0.5, to: 0.3, start: 0, end: 4, by: iteration}",
        **{"beta": "0.7", "losses": "[]", "temperature": "1.0", "kd_weight": "1.0", "lm_weight": "1.0"},
        **{
            "temperature_squared": "false",
            "shared_vocab": "null",
            "tokens": "null",
            "hidden_losses": "[]",
            "sources": "[]",
            "mix": "null",
            "cross_tokenizer": "null",
            "mtp_weight": "0.0",
            "on_policy": "null",
        },
    }
    assert record["teacher"]["path"] == str((teacher / "iter_0000008").resolve())
    assert record["teacher"]["iteration"] == 8 and re.fullmatch("[0-9a-f]{64}", record["teacher"]["sha256"])
    assert record["last step"]["progress"] == {"iteration": 1, "samples": 8, "tokens": 8 * 32, "fraction": 0.25}
    assert record["last step"]["scheduled"] == {"alpha": pytest.approx(0.45)}


CASES = {
    "another loss": (
        ["distillation.kd_weight=0.5", "distillation.alpha=0.5"],
        r"resume from \S*iter_0000004.*\n  distillation\.alpha: \{schedule: linear.*\} in the checkpoint, 0\.5 in this"
        r".*\n  distillation\.kd_weight: 1\.0 in the checkpoint, 0\.5 in.*on_change=warn.*megatron\.finetune=true",
    ),
    "another divergence": (["distillation.divergence=todi"], r"divergence: alpha_beta in the checkpoint, todi in this"),
    "another teacher": (
        ["teacher.load={changed}", f"distillation.alpha={ALPHA}"],
        r"teacher or loss than it was trained with:\n"
        r"  teacher: \S*teacher/iter_0000008 \(iteration 8, sha256 \w{12}\) in the checkpoint, \S*teacher-changed/",
    ),
}


@pytest.fixture(scope="module")
def ended(workspace: Path, config: Path, teacher: Path, teachers: tuple[Path, Path], begun: Path) -> list[dict]:
    folder = workspace / "provenance-refused"
    folder.mkdir()
    common = ["distill", "--config", str(config), f"megatron.load={begun}", f"teacher.load={teacher}"]
    cases = {
        name: common + [it.replace("{changed}", str(teachers[1])) for it in settings]
        for name, (settings, _) in CASES.items()
    }
    script = [str(SCRIPT), *command_line(config, {"load": begun}), *kd_arguments(teacher, {"alpha": "0.5"})]
    return run_refused({**cases, "script": script}, 2, folder)


@pytest.mark.parametrize("name", CASES)
def test_going_on_with_something_else_is_refused(ended: list[dict], name: str) -> None:
    check_refused(ended, name, "distill", CASES[name][1])


def test_so_does_a_script_of_ones_own(ended: list[dict]) -> None:
    for rank in ended:
        code, message = rank["script"]
        assert code == 1
        assert re.search(r"ConfigError: this run would resume.*alpha: .* 0\.5 in this run", message, re.DOTALL), message


def test_check_says_so_without_ranks(config: Path, teacher: Path, begun: Path) -> None:
    words = [f"megatron.load={begun}", f"teacher.load={teacher}", "distillation.alpha=0.5"]
    (rank,) = launch(["-m", "abkd_megatron", "check", config, *words], 1)
    assert rank.code == 2, rank.output
    assert "resume" in rank.output and "0.5 in this run" in " ".join(rank.output.split())


@pytest.fixture(scope="module")
def gone_on(workspace: Path, config: Path, teachers: tuple[Path, Path], begun: Path) -> tuple[Path, list[Rank]]:
    """Two steps more, from a copy of the teacher, with another temperature and leave to have one."""
    out = workspace / "provenance-on"
    settings = {
        "megatron.load": begun,
        "megatron.ckpt-step": 2,
        "megatron.save": out,
        "megatron.save-interval": 4,
        "megatron.train-iters": 4,
        "megatron.tensorboard-dir": out / "tensorboard",
        "teacher.load": teachers[0],
        "distillation.alpha": ALPHA,
        "distillation.temperature": 2,
        "distillation.on_change": "warn",
    }
    return out, run_job("distill", config, settings)


def test_going_on_with_leave_warns_and_keeps_what_was(gone_on: tuple[Path, list[Rank]], begun: Path) -> None:
    out, (rank,) = gone_on
    _, warned, said = rank.output.partition("WARNING: this run would resume")
    assert warned and "distillation.temperature: 1.0 in the checkpoint, 2.0 in this run" in said
    assert "teacher: " not in said.split("distilling with")[0].split("\n\n")[0][:600]
    assert len(scalars(out / "tensorboard")["kd loss"]) == 2
    before, after = getattr(saved_args(begun, 2), RECORD), getattr(saved_args(out, 4), RECORD)
    assert after["before"] == [before]
    assert after["distillation"]["temperature"] == "2.0"
    assert after["teacher"]["sha256"] == before["teacher"]["sha256"] and "copied" in after["teacher"]["path"]


ALONE = r"WARNING: this run resumes from \S*iter_0000002, which was distilled from \S*iter_0000008 .* without a teacher"


def test_going_on_without_a_teacher_is_warned_of(config: Path, begun: Path) -> None:
    settings = {"megatron.load": begun, "megatron.ckpt-step": 2, "megatron.train-iters": 4}
    for rank in run_job("pretrain", config, settings, num_ranks=2)[:1]:
        assert re.search(ALONE, rank.output), rank.output[-6000:]


def test_so_is_a_script_of_ones_own(config: Path, begun: Path) -> None:
    settings = {"load": begun, "ckpt-step": 2, "train-iters": 4}
    (rank,) = run_script(SCRIPT, command_line(config, settings))
    assert rank.code == 0, rank.output[-6000:]
    assert re.search(ALONE + r".*give --kd-teacher-load", rank.output), rank.output[-6000:]


@pytest.mark.parametrize("given", [{"finetune": True}, {"skip_train": True}, {}], ids=str)
def test_begun_anew_or_evaluated_nothing_is_compared(begun: Path, given: dict) -> None:
    from abkd_megatron.preflight.run_record import check_resumed

    plain = {
        "skip_train": False,
        "load": str(begun),
        "finetune": False,
        "pretrained_checkpoint": None,
        "ckpt_step": None,
    }
    now = {"distillation": {}, "teacher": {"path": "", "iteration": 1, "sha256": ""}}
    if given:
        assert check_resumed(Namespace(**plain | given), now, "refuse") is None
    else:
        with pytest.raises(ConfigError, match="would resume"):
            check_resumed(Namespace(**plain), now, "refuse")
