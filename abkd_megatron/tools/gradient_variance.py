"""Variance of the gradient between batches, of the distilled loss and of the text's.

Safaryan et al. (NeurIPS 2023, arXiv 2305.17581) describe distillation as partial variance reduction: a teacher changes
the noise of the gradient. With N batches of the run's size and gradients g_1 .. g_N at fixed weights,

    variance = sum_i |g_i - mean|^2 / (N - 1) = N / (N - 1) (mean_i |g_i|^2 - |mean|^2),

summed over all weights, and it is reported relative to |mean|^2, the squared norm of their mean. All of it comes from
norms, and these are Megatron's own: one job of N steps at a learning rate that changes no weight logs each |g_i|, and
one step on the same samples as one batch logs |mean|. Megatron reduces a norm over model-parallel ranks and counts
shared weights once, so that this holds in every layout.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from abkd_megatron.config.load import render
from abkd_megatron.config.schema import SCHEDULED, SECTIONS, Config
from abkd_megatron.config.teachers import reads_cache
from abkd_megatron.errors import ConfigError, HostError
from abkd_megatron.losses.schedule import Progress, Schedule
from abkd_megatron.tools.compare_jobs import Job, check_checkpoint
from abkd_megatron.tools.events import TRAINING, find_runs

POINTS = ("start", "end")
# Names of both losses, and their jobs.
LOSSES = {"distilled": "distill", "text": "pretrain"}

# Settings of Megatron that the measuring jobs do without.
_LEFT_OUT = (
    *("save", "save-interval", "train-samples", "rampup-batch-size", "min-lr", "decoupled-lr", "decoupled-min-lr"),
    *("lr-warmup-iters", "lr-warmup-samples", "lr-warmup-fraction", "lr-warmup-init"),
    *("lr-decay-iters", "lr-decay-samples", "lr-wsd-decay-style", "lr-wsd-decay-iters", "lr-wsd-decay-samples"),
)
# Losses are means over micro-batches, so that the mean of the batches' gradients is that of all samples.
_FIXED = {"lr": "1e-30", "lr-decay-style": "constant", "eval-iters": "0", "calculate-per-token-loss": "false"}
# Any; the start has the run's, which its initial weights come from. Batches of the end are those of another seed, since
# the run has trained on its own.
_SEED_OF_END = 4321


@dataclass(frozen=True)
class Measurement(Job):
    """Gradient norms of one loss at one point of a run: of several batches, or of all their samples as one batch."""

    _: KW_ONLY
    of: tuple[str, int]
    """Loss and seed of the run."""
    point: str
    gradient_of: str
    steps: int

    def measure(self) -> dict[str, Any]:
        """Return the gradient norms of the steps.

        Raises:
            HostError: a step has no finite norm.
        """
        norms = norms_in(self.directory / "tensorboard")
        if len(norms) != self.steps or not all(map(math.isfinite, norms)):
            raise HostError(
                f"{self.name}: expected {self.steps} finite gradient norms, got {norms}; with fp16 set "
                "megatron.loss-scale, so that no step is skipped"
            )
        return {"norms": norms}


def norms_in(tensorboard: Path) -> list[float]:
    """Return the gradient norms of a run's steps."""
    (run,) = find_runs([tensorboard])
    return list(run.splits[TRAINING].get("grad-norm", {}).values())


def check(config: Config) -> None:
    """Reject a run whose batch size is not known, or one from a cache, which lacks the samples of other batches.

    Raises:
        ConfigError: naming the setting.
    """
    if not config.compare.gradient_batches:
        return
    if reads_cache(config):
        raise ConfigError(
            "compare.gradient_batches: expected live teachers, got a cache, which has the samples of its own run only; "
            "set gradient_batches to 0, or give load in place of the cache"
        )
    if not isinstance(config.megatron.get("global-batch-size"), int):
        raise ConfigError(
            "compare.gradient_batches: expected megatron.global-batch-size, the size of these batches, got none; set it"
        )


def measurements(
    name: str,
    of: tuple[str, int],
    directory: Path,
    overrides: Sequence[str],
    load: Callable[[Sequence[str]], Config],
    points: Sequence[str] = POINTS,
) -> list[Measurement]:
    """Return the jobs that measure both losses of a run.

    Args:
        name: of the run.
        of: its loss and seed.
        directory: of the run. Its end needs a checkpoint.
        overrides: of the run's configuration.
        load: function that returns the comparison's configuration with further overrides.
        points: some of `POINTS`.

    Raises:
        ConfigError: there is no checkpoint of the end.
    """
    config = load(overrides)
    batches, size = config.compare.gradient_batches, config.megatron["global-batch-size"]
    assert isinstance(size, int)
    found = []
    for point in points:
        at = _at_start(config) if point == "start" else _at_end(config, directory / "checkpoints")
        for gradient_of, job in LOSSES.items():
            for steps, batch in ((batches, size), (1, batches * size)):
                here = directory / f"gradients-{batches}" / f"{point}-{gradient_of}-{steps}"
                own = [f"megatron.{key}=null" for key in _LEFT_OUT if key in config.megatron]
                own += [f"megatron.{key}={value}" for key, value in _FIXED.items()]
                own += [f"megatron.train-iters={steps}", f"megatron.global-batch-size={batch}"]
                own += ["megatron.log-interval=1", "megatron.tensorboard-log-interval=1", "megatron.clip-grad=1.0"]
                own += [f"megatron.tensorboard-dir={here / 'tensorboard'}"]
                of_job = load([*overrides, *at, *own])
                of_job.check(job)
                text = render(of_job, [section for section in SECTIONS if section != "compare"], origins=False)
                found.append(
                    Measurement(
                        f"{name}, gradients of the {gradient_of} loss at the {point}",
                        *(here, text, job),
                        of=of,
                        point=point,
                        gradient_of=gradient_of,
                        steps=steps,
                    )
                )
    return found


def _at_start(config: Config) -> list[str]:
    """Return the overrides of a run's first step."""
    kd = config.distillation
    schedules = {name: it for name in SCHEDULED if isinstance(it := getattr(kd, name), Schedule)}
    return [f"distillation.{name}={schedule(Progress(fraction=0.0))}" for name, schedule in schedules.items()]


def _at_end(config: Config, checkpoints: Path) -> list[str]:
    """Return the overrides of a run's last step: its weights, and its schedules' values as they are saved with them."""
    from abkd_megatron.preflight.run_record import RECORD
    from abkd_megatron.teacher.safe_load import read_common

    tracker = check_checkpoint(checkpoints, "compare.gradient_batches")
    own = [f"megatron.{key}=null" for key in ("ckpt-step", "pretrained-checkpoint") if key in config.megatron]
    own += [f"megatron.load={checkpoints}", "megatron.finetune=true", f"megatron.seed={_SEED_OF_END}"]
    if any(isinstance(getattr(config.distillation, name), Schedule) for name in SCHEDULED):
        common = read_common(checkpoints / f"iter_{int(tracker.read_text()):07d}")
        last = getattr(common["args"], RECORD)["last step"]["scheduled"]
        own += [f"distillation.{name}={value}" for name, value in last.items()]
    return own


def variance(norms: Sequence[float], norm_of_mean: float) -> dict[str, float]:
    """Return the variance of gradients from their norms, see the module.

    Args:
        norms: |g_i| of N >= 2 batches.
        norm_of_mean: of the mean of these gradients.

    Returns:
        ``variance``, ``squared norm`` of the mean, and ``relative``, their quotient.
    """
    count, squared = len(norms), norm_of_mean**2
    mean_of_squares = math.fsum(norm**2 for norm in norms) / count
    found = max(count / (count - 1) * (mean_of_squares - squared), 0.0)
    return {"variance": found, "squared norm": squared, "relative": found / squared}


def results(measured: Sequence[Measurement]) -> dict[tuple[str, int], dict[str, dict[str, dict[str, float]]]]:
    """Return {(loss, seed): {point: {`LOSSES`: `variance`}}} of the measurements that have finished."""
    norms: dict[tuple[tuple[str, int], str, str], dict[bool, list[float]]] = {}
    for job in measured:
        if (result := job.result) is not None:
            norms.setdefault((job.of, job.point, job.gradient_of), {})[job.steps == 1] = result["norms"]
    found: dict[tuple[str, int], dict[str, dict[str, dict[str, float]]]] = {}
    for (of, point, gradient_of), both in norms.items():
        if len(both) == 2:
            found.setdefault(of, {}).setdefault(point, {})[gradient_of] = variance(both[False], both[True][0])
    return found


def table(runs: Sequence[Mapping[str, Any]], batches: int) -> str:
    """Return the relative variances as Markdown, means over the seeds; empty if nothing was measured.

    Args:
        runs: of results.json, with `results` as ``gradient``.
        batches: number of batches of each.
    """
    places = [(point, loss) for point in POINTS for loss in LOSSES]
    heads = ["gradient variance", *(f"{point}: {loss} loss" for point, loss in places)]
    lines = []
    for loss in dict.fromkeys(run["loss"] for run in runs):
        of_loss = [run["gradient"] for run in runs if run["loss"] == loss and "gradient" in run]
        cells = [
            _cell([it[point][gradient_of]["relative"] for it in of_loss if gradient_of in it.get(point, {})])
            for point, gradient_of in places
        ]
        if any(cells):
            lines.append("| " + " | ".join([loss, *cells]) + " |")
    if not lines:
        return ""
    note = (
        f"Variance of a training step's gradient over {batches} batches, divided by the squared norm of their mean; "
        "mean over seeds ± standard deviation."
    )
    return "\n".join(["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|", *lines, "", note, ""])


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3g}{spread}"
