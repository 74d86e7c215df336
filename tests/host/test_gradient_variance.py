"""The variance that `compare` reports: that of the gradients themselves, in every layout, at a run's start and end."""

import re
from pathlib import Path

import pytest
import torch
from gradients import whole
from launch import run_job

from abkd_megatron import cpu_backend
from abkd_megatron.config.load import load_config
from abkd_megatron.config.megatron_args import megatron_options
from abkd_megatron.tools import gradient_variance
from abkd_megatron.tools.gradient_variance import Measurement

BATCHES = 4
TIED = {
    "megatron.untie-embeddings-and-output-weights": "false",
    "teacher.untie-embeddings-and-output-weights": "true",
}
LAYOUTS = {
    "TP 2": {"megatron.tensor-model-parallel-size": 2, "megatron.sequence-parallel": "true"},
    "PP 2": {"megatron.pipeline-model-parallel-size": 2},
    "DP 2": {"megatron.use-distributed-optimizer": "true", "distillation.head": "fused"},
}


@pytest.fixture(scope="module")
def run(workspace: Path, config: Path, teacher: Path) -> dict[str, object]:
    """A run of a few steps with tied embeddings, which two pipeline stages hold, and a schedule."""
    settings = {
        **TIED,
        "teacher.load": teacher,
        "megatron.global-batch-size": 4,
        "megatron.train-iters": 3,
        "megatron.save-interval": 3,
        "megatron.save": workspace / "varied/checkpoints",
        "megatron.seed": 3,
        "megatron.lr-warmup-iters": 1,
        "distillation.divergence": "alpha_beta",
        "distillation.alpha": "{schedule: linear, from: 0.9, to: 0.3, end: 4}",
        "distillation.lm_weight": 0,
    }
    run_job("distill", config, settings)
    return settings


@pytest.fixture(scope="module")
def measurements(workspace: Path, config: Path, run: dict[str, object]) -> list[Measurement]:
    def load(overrides):
        words = [f"{key}={value}" for key, value in {**run, "compare.gradient_batches": BATCHES}.items()]
        options, defaults = megatron_options(), lambda device: cpu_backend.MEGATRON_DEFAULTS
        return load_config(config, [*words, *overrides], options, defaults)

    found = gradient_variance.measurements("one", ("one", 3), workspace / "varied", [], load)
    for job in found:
        job.prepare()
    return found


@pytest.fixture(scope="module")
def twin(workspace: Path, measurements: list[Measurement]) -> dict[tuple[str, str], dict[str, float]]:
    """From all gradients of the batches on one rank."""
    program, found = Path(__file__).with_name("every_gradient.py"), {}
    for job in measurements:
        if job.steps == 1:
            continue
        folder = workspace / "gradients" / job.directory.name
        run_job(job.kind, job.directory / "config.yaml", program=[program, folder])
        job.conclude()
        steps = [whole([file]) for file in sorted(folder.glob("step-*.pt"))]
        assert len(steps) == BATCHES
        vectors = torch.stack([torch.cat([it[name].flatten() for name in sorted(it)]) for it in steps]).double()
        mean = vectors.mean(dim=0)
        spread, squared = ((vectors - mean) ** 2).sum() / (BATCHES - 1), (mean**2).sum()
        place = job.point, job.gradient_of
        found[place] = {
            "variance": spread.item(),
            "squared norm": squared.item(),
            "relative": (spread / squared).item(),
        }
    return found


def test_norms_give_the_variance_of_the_gradients(twin, measurements: list[Measurement]) -> None:
    for job in measurements:
        if job.steps == 1:
            run_job(job.kind, job.directory / "config.yaml")
            job.conclude()
    measured = gradient_variance.results(measurements)["one", 3]
    assert twin.keys() == {(point, loss) for point in ("start", "end") for loss in ("distilled", "text")}
    for (point, loss), expected in twin.items():
        assert measured[point][loss] == pytest.approx(expected, rel=1e-3), (point, loss)
        assert expected["relative"] > 1e-3
    assert len({of["variance"] for of in twin.values()}) == 4


@pytest.mark.parametrize("name", LAYOUTS)
def test_in_every_layout(twin, measurements: list[Measurement], workspace: Path, name: str) -> None:
    norms = {}
    for job in measurements:
        if (job.point, job.gradient_of) == ("end", "distilled"):
            tensorboard = workspace / "variance" / name / str(job.steps)
            settings = {**LAYOUTS[name], "megatron.tensorboard-dir": tensorboard}
            run_job(job.kind, job.directory / "config.yaml", settings, num_ranks=2)
            norms[job.steps] = gradient_variance.norms_in(tensorboard)
    found = gradient_variance.variance(norms[BATCHES], *norms[1])
    assert found == pytest.approx(twin["end", "distilled"], rel=1e-3)


def test_schedules_stand_at_the_point(measurements: list[Measurement]) -> None:
    for job in measurements:
        (alpha,) = re.findall(r"\n  alpha: (.*)\n", job.config)
        assert float(alpha) == pytest.approx({"start": 0.9, "end": 0.9 - 0.6 * 2 / 4}[job.point])
