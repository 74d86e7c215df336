"""`compare` as a user runs it: interrupted, continued, and told what one job says about another configuration."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch import ROOT, run_job, scalars

TODI = "ToDi: {divergence: todi, lm_weight: 0}"
ROUGE = {"compare.rouge_prompts": 4, "compare.prompt_tokens": 8, "compare.new_tokens": 8}
LOSSES = f"{{CE only: {{kd_weight: 0, lm_weight: 1}}, {TODI}}}"


def command(config: Path, teacher: Path, out: Path, **more: object) -> list[str]:
    settings = {
        "teacher.load": teacher,
        "megatron.train-iters": 6,
        "megatron.save-interval": 2,
        "megatron.eval-interval": 3,
        "megatron.eval-iters": 2,
        "compare.out": out,
        "compare.losses": LOSSES,
        "compare.seeds": "[2]",
        "compare.at_once": 2,
        "compare.launch": f"{sys.executable} {Path(__file__).with_name('quick.py')}",
        **more,
    }
    words = [f"{key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", "abkd_megatron", "compare", "--config", str(config), *words]


@pytest.fixture(scope="module")
def out(workspace: Path) -> Path:
    return workspace / "compare"


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def compared(config: Path, teacher: Path, out: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    """Interrupted once a run has saved something, and given again."""
    words = command(config, teacher, out, **ROUGE)
    first = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not any(out.glob("*/seed-2/checkpoints/latest_checkpointed_iteration.txt")):
        assert first.poll() is None and time.monotonic() < deadline, "ended, or saved nothing"
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate(timeout=100)
    assert first.returncode == 130, errors
    assert "Traceback" not in errors
    assert not list(out.glob("*/*/result.json")), "done before it could be interrupted"
    return subprocess.run(words, env=environment, capture_output=True, text=True)


def test_it_goes_on_from_checkpoints_and_ends_with_a_table(compared, out: Path) -> None:
    assert compared.returncode == 0, compared.stderr[-3000:]
    assert "2 runs, 0 " in compared.stdout
    logs = [path.read_text(errors="replace") for path in sorted(out.glob("*/seed-2/run.log"))]
    assert any("successfully loaded checkpoint" in log for log in logs)
    assert (out / "table.md").read_text() in compared.stdout
    results = json.loads((out / "results.json").read_text())
    assert [(run["loss"], run["seed"]) for run in results["runs"]] == [("CE only", 2), ("ToDi", 2)]
    assert "| ROUGE-L |" in (out / "table.md").read_text()
    assert (out / "comparison.png").stat().st_size > 10_000
    assert results["recommendation"] in compared.stdout and results["recommendation"].startswith("Recommendation: none")
    for run in results["runs"]:
        assert run["tokens per step"] == 8 * 32 and run["seconds per step"] > 0
        assert sorted(map(int, run["validation"])) == [3, 6]
        assert run["rouge"]["prompts"] == len(run["rouge"]["examples"]) == 4
        assert 0 <= run["rouge"]["greedy"]["rougeL"] <= 1
        test = run["test"]
        assert test["teacher lm loss"] == results["runs"][0]["test"]["teacher lm loss"]
        for name in ("hardness concentration", "confidence concentration", "todi weight", "calibration error"):
            assert 0 < test[name] < 1, name
        assert test["kl to teacher"] > 0 < test["reverse kl to teacher"]
    trained = [run["test"]["total loss"] for run in results["runs"]]
    assert len(set(trained)) == 2
    assert results["runs"][0]["test"]["total loss"] == results["runs"][0]["test"]["lm loss"]


def test_what_was_interrupted_equals_a_straight_run(
    compared, config: Path, teacher: Path, out: Path, workspace: Path, environment: dict[str, str]
) -> None:
    straight = workspace / "compare-straight"
    # By torchrun, which is the default.
    one = {"compare.seeds": "[1, 2]", "compare.losses": f"{{{TODI}}}", "compare.launch": "null"}
    words = command(config, teacher, straight, **one)
    ended = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    one, other = (json.loads((at / "todi/seed-2/result.json").read_text()) for at in (out, straight))
    assert one["test"] == other["test"]
    seeds = [json.loads((straight / f"todi/seed-{seed}/result.json").read_text())["test"] for seed in (1, 2)]
    assert seeds[0]["total loss"] != seeds[1]["total loss"]
    assert seeds[0]["teacher lm loss"] == seeds[1]["teacher lm loss"], "one held-out text"
    assert one["validation"] == other["validation"]


def test_what_is_done_is_not_done_again_and_not_overwritten(
    compared, config: Path, teacher: Path, out: Path, environment: dict[str, str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*/result.json")}
    again = subprocess.run(command(config, teacher, out), env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and "2 runs, 2 " in again.stdout
    other = command(config, teacher, out, **{"megatron.train-iters": 7})
    refused = subprocess.run(other, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2 and "train-iters: 6" in refused.stderr
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/*/result.json")} == before


def test_a_failing_run_is_shown(config: Path, workspace: Path, environment: dict[str, str]) -> None:
    nowhere = workspace / "no-teacher"
    ended = subprocess.run(
        command(config, nowhere, workspace / "compare-failed"), env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert "2 of 2 " in ended.stderr and str(nowhere) in ended.stderr


def test_seeds_order_the_text_and_leave_the_held_out_samples(config: Path, student: Path, workspace: Path) -> None:
    # Students from one checkpoint, which do not learn: a seed changes nothing but the samples.
    found = {}
    for seed, data_seed in ((1, 5), (2, 5), (1, 6)):
        tensorboard = workspace / "seeds" / f"{seed}-{data_seed}"
        settings = {
            "train-iters": 2,
            "eval-interval": 2,
            "lr": 1e-30,
            "load": student,
            "finetune": "true",
            "seed": seed,
        }
        overrides = {f"megatron.{name}": value for name, value in settings.items()}
        run_job("pretrain", config, {**overrides, "megatron.tensorboard-dir": tensorboard, "data.seed": data_seed})
        curves = scalars(tensorboard)
        found[seed, data_seed] = [list(curves[name]) for name in ("lm loss", "lm loss validation")]
    (train, held_out), (other_train, same), (same_train, other) = found.values()
    assert train == same_train != other_train
    assert held_out == same != other
