"""A loss that is NaN, infinite or huge: the term, the rank and the step are named, and all ranks end or go on alike."""

import json
import re
from pathlib import Path

import pytest
import torch
from launch import Rank, launch, run_job, scalars

from abkd_megatron.student.loss_guard import statistics
from abkd_megatron.student.report import LossChecks, Report, masked_loss


def run_faulty(config: Path, teacher: Path, out: Path, fault: str, **settings: object) -> list[Rank]:
    given = {"save": out, "save-interval": 100, "tensorboard-dir": out / "tensorboard"}
    given |= {name.replace("_", "-"): value for name, value in settings.items()}
    words = [f"megatron.{name}={value}" for name, value in given.items()]
    words += [f"teacher.load={teacher}", f"distillation.losses=[{{name: faulty.Faulty, {fault}}}]"]
    return launch(["-m", "abkd_megatron", "distill", "--config", config, *words], 2)


def told(ranks: list[Rank]) -> list[list[str]]:
    """What each rank says itself of what was found."""
    return [re.findall(r"rank \d, iteration \d+: .* in a micro-batch; its sums.*", rank.output) for rank in ranks]


NAN = "step: 3, rank: 0"


@pytest.fixture(scope="module")
def ended(workspace: Path, config: Path, teacher: Path) -> tuple[Path, list[Rank]]:
    """A run with NaN on one of two ranks."""
    out = workspace / "fault-nan"
    return out, run_faulty(config, teacher, out, NAN)


def test_nan_on_one_rank_ends_all_and_is_named(ended: tuple[Path, list[Rank]]) -> None:
    out, ranks = ended
    assert [rank.code for rank in ranks] == [16, 16], ranks[0].output[-6000:]
    (said,), others = told(ranks)
    assert others == [], "another rank has nothing to say"
    assert re.match(r"rank 0, iteration 3: kd loss is NaN .* lm loss \d\S+, kd loss nan, teacher lm loss \d", said), (
        said
    )
    assert "found NaN in the kd loss of a micro-batch" in ranks[0].output, "Megatron's own line"
    # The step was done twice and nothing was stepped.
    assert (out / "latest_checkpointed_iteration.txt").read_text() == "2"
    (file,) = out.glob("fault_*")
    assert file.name == "fault_iter_0000003_rank_0.json" and str(file) in said
    found = json.loads(file.read_text())
    assert (found["rank"], found["iteration"], found["found"]) == (0, 3, "kd loss is NaN")
    assert found["sums"]["kd loss"] == "nan" and found["sums"]["lm loss"] > 0
    tensors = found["tensors"]
    assert tensors["kd loss"] | {"min": None} == {
        **{"shape": [2, 32], "min": None, "max": None, "mean": None},
        **{"not finite": 64, "first not finite": [0, 0]},
    }
    assert tensors["student hidden states"]["shape"] == [32, 2, 32]
    assert tensors["teacher hidden states"]["shape"] == [32, 2, 48]
    for name in ("lm loss", "teacher lm loss", "student hidden states", "teacher hidden states"):
        assert tensors[name]["not finite"] == 0 and tensors[name]["first not finite"] is None
        assert tensors[name]["min"] < tensors[name]["mean"] < tensors[name]["max"]


def test_megatron_can_do_the_step_again_from_its_checkpoint(
    config: Path, teacher: Path, ended: tuple[Path, list[Rank]]
) -> None:
    out, _ = ended
    (file,) = out.glob("fault_*")
    written = file.stat().st_mtime_ns
    ranks = run_faulty(config, teacher, out, NAN, load=out)
    assert [rank.code for rank in ranks] == [16, 16], ranks[0].output[-6000:]
    assert "Got rescheduled on the same GPU" in ranks[0].output
    assert told(ranks) == [[], []] and file.stat().st_mtime_ns == written, "it was told the first time"


def test_the_first_step_is_looked_at_too(workspace: Path, config: Path, teacher: Path) -> None:
    """Megatron begins with the second."""
    out = workspace / "fault-first"
    ranks = run_faulty(config, teacher, out, "step: 1, rank: 1, number: 1.0e+39")
    assert ranks[1].code == 2 and ranks[0].code != 0
    assert "error: kd loss is Inf in a micro-batch of the first step; nothing was trained or saved" in ranks[1].output
    (said,) = told(ranks)[1]
    assert said.startswith("rank 1, iteration 1: kd loss is Inf")
    assert [path.name for path in out.iterdir() if "fault" in path.name] == ["fault_iter_0000001_rank_1.json"]
    assert not (out / "latest_checkpointed_iteration.txt").exists()


def test_a_spike_is_told_and_the_run_goes_on(workspace: Path, config: Path, teacher: Path) -> None:
    out = workspace / "fault-spike"
    settings = {"train_iters": 53, "check_for_spiky_loss": "true", "log_interval": 1}
    ranks = run_faulty(config, teacher, out, "step: 52, rank: 1, number: 1000", **settings)
    assert [rank.code for rank in ranks] == [0, 0], ranks[1].output[-6000:]
    none, (said,) = told(ranks)
    assert none == [] and said.startswith("rank 1, iteration 52: kd loss is more than 10 times what it was")
    assert len(scalars(out / "tensorboard")["kd loss"]) == 53


def test_an_overflow_of_scaled_gradients_is_no_fault(workspace: Path, config: Path, teacher: Path) -> None:
    out = workspace / "fault-fp16"
    settings = {"fp16": "true", "initial-loss-scale": 2**40, "hysteresis": 1, "train-iters": 3}
    given = {f"megatron.{name}": value for name, value in {**settings, "tensorboard-dir": out}.items()}
    (rank,) = run_job("distill", config, {**given, "teacher.load": teacher})
    assert re.search(r"number of skipped iterations: +1", rank.output)
    assert told([rank]) == [[]]


def test_of_several_terms_the_one_at_fault_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)  # Megatron's error names the device
    fine, bad = torch.ones(1, 3), torch.tensor([[1.0, torch.nan, 1.0]])
    report = {"lm loss": fine, "teacher lm loss": fine, "kd loss": bad, "akl loss": fine, "pearson loss": bad}
    with pytest.raises(RuntimeError, match="NaN in the pearson loss"):
        masked_loss(
            fine, bad, Report(report, tensors={"student hidden states": bad}), LossChecks(save=tmp_path / "new")
        )
    (file,) = (tmp_path / "new").iterdir()
    tensors = json.loads(file.read_text())["tensors"]
    assert tensors.keys() == {*report, "student hidden states"}
    assert tensors["pearson loss"]["first not finite"] == [0, 1]
    masked_loss(torch.tensor([[1.0, 0.0, 1.0]]), bad, Report(report))  # that token does not count


def test_statistics() -> None:
    tensor = torch.tensor([[1.0, torch.nan, 3.0], [-torch.inf, 0.0, 4.0]], dtype=torch.bfloat16)
    assert statistics(tensor) == {
        "shape": [2, 3],
        "min": 0.0,
        "max": 4.0,
        "mean": pytest.approx(2.0),
        "not finite": 2,
        "first not finite": [0, 1],
    }
    assert statistics(torch.full((2,), torch.nan))["mean"] is None
    assert statistics(torch.zeros(0))["not finite"] == 0
