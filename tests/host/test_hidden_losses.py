"""Losses between layers: exact gradients, projectors that are trained, saved and resumed, and never exported."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hidden_states import CASES, LAYERS, PAIRS
from launch import launch, run_job, scalars
from matrix import HIDDEN_LOSSES, check_refused, overrides, run_refused
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

NAMES = ("hidden loss 1-2", "hidden loss 1-1", "hidden loss 2-4")
KEYS = {f"distillation_projectors.{name.removeprefix('hidden loss ')}.weight" for name in NAMES}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    references = tmp_path_factory.mktemp("hidden") / "references.pt"
    jobs: dict[int, dict[str, Any]] = {}

    def found(num_ranks: int) -> dict[str, Any]:
        if num_ranks not in jobs:
            if num_ranks > 1:
                found(1)  # which leaves the references
            jobs[num_ranks] = {}  # a job that fails is not run again for each of its cases
            ranks = launch([Path(__file__).with_name("hidden_states.py"), references], num_ranks)
            for number, rank in enumerate(ranks):
                assert rank.code == 0, f"rank {number} of {num_ranks}:\n{rank.output[-6000:]}"
            (line,) = [line for line in ranks[0].output.splitlines() if line.startswith("FOUND ")]
            jobs[num_ranks] = json.loads(line.removeprefix("FOUND "))
        return jobs[num_ranks]

    return found


@pytest.mark.parametrize(("num_ranks", "case"), [(ranks, case) for ranks, cases in CASES.items() for case in cases])
def test_losses_and_every_gradient_are_those_of_the_definition(found, num_ranks: int, case: str) -> None:
    errors = found(num_ranks)["errors"][case]
    pairs = [f"{ours}-{theirs}" for ours, theirs, *_ in PAIRS]
    assert errors.keys() >= {"lm loss", "kd loss", "total loss", *(f"hidden loss {pair}" for pair in pairs)}
    gradients = {name.removeprefix("gradient of ") for name in errors if name.startswith("gradient of ")}
    projectors = set() if "no projector" in case else {f"distillation_projectors.{pair}.weight" for pair in pairs}
    assert gradients >= projectors and len(gradients - projectors) == LAYERS * 10 + 3
    assert all(worst <= 2e-5 for worst in errors.values()), errors


WANTED = {
    "number of micro-batches": r"number of micro-batches.*init_num_microbatches_calculator",
    "student's layer": "hidden loss 5-1: expected a layer of the student, 1 to 4, got 5",
    "teacher's layer": "hidden loss 1-9: expected a layer of the teacher, 1 to 8, got 9",
    "stages": "the student's 4 on stage 1 and the teacher's 4 on stage 0; give one of the teacher's "
    r"layers on stage 1 \(5, 6, 7, 8\)",
    "sizes": "hidden loss 1-1: projector: false takes equal hidden sizes, got 16 of the student and 24 of the teacher",
    "no projectors": r"hidden loss 1-1 has a projector, which the student lacks.*add_projectors\(\) in a pre_wrap_hook",
    "projector of another size": r"expected a projector of \(24, 16\), got \(7, 16\)",
    "sequence-parallel teacher": "compare layers on one rank.*remove its tensor-model-parallel-size",
    "projectors twice": r"projectors already; call add_projectors\(\) once",
    "no loss mask": r"expected the loss mask of the micro-batch, got none; pass loss_mask= to the model",
}


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_what_cannot_be_trained_is_refused_on_every_rank(found, num_ranks: int) -> None:
    said = found(num_ranks)["refused"]
    assert len(said) == num_ranks
    for of_rank in said:
        # One rank has one stage, and two ranks are not run on.
        for name in WANTED.keys() - {"stages" if num_ranks == 1 else "no loss mask"}:
            assert re.search(WANTED[name], of_rank[name]), (name, of_rank[name])


@pytest.fixture(scope="module")
def distill(workspace: Path, config: Path, teacher: Path):
    """Trains on two data-parallel ranks; what TensorBoard then shows."""

    def distill(name: str, num_ranks: int = 2, job: str = "distill", **settings: object) -> dict[str, list[float]]:
        tensorboard = workspace / "hidden" / f"{name}-tensorboard"
        given = {key if "." in key else key.replace("_", "-"): value for key, value in settings.items()}
        if job == "distill":
            given = {"teacher.load": teacher, **HIDDEN_LOSSES, **given}
        given |= {"use-distributed-optimizer": "true", "tensorboard-dir": tensorboard}
        run_job(job, config, overrides(given), num_ranks=num_ranks)
        return scalars(tensorboard)

    return distill


@pytest.fixture(scope="module")
def saved(workspace: Path) -> Path:
    return workspace / "hidden" / "saved"


@pytest.fixture(scope="module")
def straight(distill, saved: Path):
    return distill("straight", train_iters=4, save=saved, save_interval=2)


def test_projectors_learn_and_are_saved(straight, saved: Path) -> None:
    for name in NAMES:
        assert straight[name][-1] < straight[name][0], name
    weights = (0.5, 1.0, 2.0)
    for step in range(4):
        hidden = sum(weight * straight[name][step] for name, weight in zip(NAMES, weights, strict=True))
        wanted = straight["lm loss"][step] + straight["kd loss"][step] + hidden
        assert straight["total loss"][step] == pytest.approx(wanted, rel=1e-6)
    half, whole = tensors(saved, 2), tensors(saved, 4)
    for key in KEYS:
        assert whole[key].shape == (48, 32)
        assert not torch.equal(half[key], whole[key])


def test_a_resumed_run_repeats_the_straight_one(distill, straight, saved: Path, workspace: Path) -> None:
    again = workspace / "hidden" / "resumed"
    resumed = distill("resumed", train_iters=4, load=saved, ckpt_step=2, save=again, save_interval=2)
    for name in ("lm loss", "kd loss", "total loss", "grad-norm", *NAMES):
        assert len(straight[name]) == 4
        assert resumed[name] == straight[name][2:], name
    wanted, got = tensors(saved, 4), tensors(again, 4)
    assert wanted.keys() == got.keys() > KEYS
    for key, tensor in wanted.items():
        assert torch.equal(got[key], tensor), key


def test_projectors_leave_the_rest_of_the_run_as_it_was(distill, straight) -> None:
    """Neither the student's first weights nor what the teacher says of them depend on there being projectors."""
    without = distill("without", train_iters=1, **{"distillation.hidden_losses": "[]"})
    for name in ("lm loss", "kd loss", "teacher lm loss", "kl to teacher"):
        assert without[name][0] == straight[name][0], name
    assert without["grad-norm"][0] != straight["grad-norm"][0]
    assert not any("hidden loss" in name for name in without)


def test_megatron_loads_the_student_and_forgets_the_projectors(distill, straight, saved: Path, workspace: Path) -> None:
    plain = workspace / "hidden" / "plain"
    distill("plain", job="pretrain", load=saved, finetune="true", train_iters=1, lr=0, save=plain, save_interval=1)
    wanted, got = tensors(saved, 4), tensors(plain, 1)
    assert got.keys() == wanted.keys() - KEYS
    for key, tensor in got.items():
        assert torch.equal(tensor, wanted[key]), key


def test_another_distillation_begins_with_the_saved_projectors(distill, straight, saved: Path, workspace: Path) -> None:
    """Of the model's part of the checkpoint, for the optimizer is left behind."""
    further = workspace / "hidden" / "further"
    distill("further", load=saved, finetune="true", train_iters=1, lr=0, save=further, save_interval=1)
    wanted, got = tensors(saved, 4), tensors(further, 1)
    assert got.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(got[key], tensor), key


def test_every_rank_says_what_is_wrong(workspace: Path, config: Path, teacher: Path, student: Path) -> None:
    def settings(value: str) -> list[str]:
        return [f"distillation.hidden_losses={value}"]

    pipeline = ["megatron.pipeline-model-parallel-size=2"]
    cases = {
        "unknown loss": (
            settings("[{student_layer: 1, teacher_layer: 1, loss: l1}]"),
            "distillation.hidden_losses: expected loss to be",
        ),
        "resuming without projectors": (
            [*settings("[{student_layer: 1, teacher_layer: 1, loss: mse}]"), f"megatron.load={student}"],
            r"expected the projectors of the hidden losses 1-1 in .*student.*give megatron.finetune=true",
        ),
        # The last one, since it is found when Megatron has built the models.
        "two stages": (
            [*settings("[{student_layer: 2, teacher_layer: 2, loss: mse}]"), *pipeline],
            r"teacher's 2 on stage 0; give one of the teacher's layers on stage 1 \(3, 4\)",
        ),
    }
    commands = {
        name: ["distill", "--config", str(config), f"teacher.load={teacher}", *words]
        for name, (words, _) in cases.items()
    }
    folder = workspace / "hidden-refused"
    folder.mkdir()
    ended = run_refused(commands, 2, folder)
    for name, (_, message) in cases.items():
        check_refused(ended, name, "distill", message)


def tensors(checkpoint: Path, iteration: int) -> dict[str, torch.Tensor]:
    """All weights, whole. (The distributed optimizer's are one flat buffer, with anything between them.)"""
    reader = FileSystemReader(checkpoint / f"iter_{iteration:07d}")
    found = {
        key: torch.empty(item.size, dtype=item.properties.dtype)
        for key, item in reader.read_metadata().state_dict_metadata.items()
        if isinstance(item, TensorStorageMetadata) and not key.startswith("optimizer.")
    }
    torch.distributed.checkpoint.load(found, storage_reader=reader, no_dist=True)
    return found
