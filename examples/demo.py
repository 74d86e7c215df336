"""End-to-end distillation demo on CPU, 10 to 15 minutes: ``python examples/demo.py``.

It prepares the text that ships with Python, trains a teacher on it (two processes, data parallel), and distills a
smaller student with the preset `pretrain` (four processes, TP 2 x PP 2). It then trains the same student without a
teacher (same initial weights, batches and layout), and evaluates both students and the teacher on held-out documents.

Sizes and settings are in ``configs/tiny_cpu_teacher.yaml`` and ``configs/tiny_cpu.yaml``.

The output directory gets ``report.json`` (numbers, settings, times), ``curves.png``, a ``.log`` per stage, and the
directories ``data``, ``teacher``, ``student`` and ``student-alone`` (checkpoints and TensorBoard events). Existing
files are never overwritten or deleted.
"""

import argparse
import importlib.metadata
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import yaml
from tensorboard.backend.event_processing import event_accumulator

from abkd_megatron.errors import HostError
from abkd_megatron.tools.events import find_runs
from abkd_megatron.tools.runs import SHORT_NAMES, Line, Pace, Progress, clock, end, evaluated, last_lines, progress

matplotlib.use("Agg")
from matplotlib import pyplot  # after selecting Agg, which needs no display

ROOT = Path(__file__).resolve().parents[1]
STUDENT = "configs/tiny_cpu.yaml"
TEACHER = "configs/tiny_cpu_teacher.yaml"


class DemoError(Exception):
    """Error for the user, shown without a traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(description="Train a teacher, distill a student from it, compare.")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR")
    parser.add_argument("--fast", action="store_true", help="run only a few steps per stage")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that child processes are ended, too
    try:
        run_demo(arguments.out.expanduser().resolve(), arguments.fast)
    except (DemoError, HostError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ninterrupted; finished stages remain in {arguments.out}", file=sys.stderr)
        return 130
    return 0


def run_demo(out: Path, fast: bool) -> None:
    """Run all stages, then write table, report and figure."""
    check_output(out)
    out.mkdir(parents=True, exist_ok=True)
    print(f"writing to {out}; each stage's own output is in its .log", flush=True)
    done = [run_stage(stage, out, i) for i, stage in enumerate(training_stages(out, fast), start=1)]
    manifest = json.loads((out / "data/manifest.json").read_text())
    evaluations = evaluation_stages(out, fast, manifest["splits"]["test"]["tokens"])
    done += [run_stage(stage, out, i) for i, stage in enumerate(evaluations, start=len(done) + 1)]

    rows = make_rows(out)
    summary = verdict(rows["student alone"], rows["student distilled"])
    report = {
        "fast": fast,
        "verdict": summary,
        "test": rows,
        "stages": done,
        "settings": {path: yaml.safe_load((ROOT / path).read_text()) for path in (TEACHER, STUDENT)},
        "data": manifest,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "megatron-core")},
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    draw_curves(out, rows)
    print(f"\n{table(rows)}\n\n{out / 'report.json'}\n{out / 'curves.png'}\n\n{summary}")
    if fast:
        print("(--fast: too few steps to conclude anything)")


def check_output(out: Path) -> None:
    """Reject a directory with anything but prepared data, which `prepare` compares before reuse."""
    if out.exists() and not out.is_dir():
        raise DemoError(f"{out} is a file; choose another --out")
    found = sorted(path.name for path in out.iterdir() if path.name != "data") if out.exists() else []
    if found:
        raise DemoError(
            f"{out} is not empty (it has {', '.join(found)}), and nothing is overwritten or deleted; "
            "choose another --out, or remove these (`data` may stay)"
        )


# Stages -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One run of `python -m abkd_megatron`."""

    name: str
    """Name of the log and of the entry in report and display."""
    job: str
    config: str
    processes: int
    settings: dict[str, object]
    """Overrides of the configuration file."""

    def command(self) -> list[str]:
        """Return the command line, without the interpreter."""
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes)]
        overrides = [f"{key}={value}" for key, value in self.settings.items()]
        job = ["-m", "abkd_megatron", self.job, "--config", self.config, *overrides]
        return job if self.processes == 1 else launch + job


def training_stages(out: Path, fast: bool) -> list[Stage]:
    """Return the stages for data, teacher, and the student with and without teacher."""
    data = {"data.dir": out / "data"}
    few = {"train-iters": 4, "lr-warmup-iters": 1, "eval-interval": 2, "eval-iters": 1, "log-interval": 1}
    steps = {f"megatron.{key}": value for key, value in few.items()} if fast else {}

    def save(directory: Path) -> dict[str, object]:
        where = {"megatron.save": directory, "megatron.tensorboard-dir": directory / "tensorboard"}
        return {**data, **where, **steps}

    distilled = {**save(out / "student"), "teacher.load": out / "teacher"}
    return [
        Stage("prepare", "prepare", TEACHER, 1, {**data}),
        Stage("teacher", "pretrain", TEACHER, 2, save(out / "teacher")),
        Stage("student-distilled", "distill", STUDENT, 4, distilled),
        Stage("student-alone", "pretrain", STUDENT, 4, save(out / "student-alone")),
    ]


def evaluation_stages(out: Path, fast: bool, test_tokens: int) -> list[Stage]:
    """Return the evaluations of both students against the teacher, on all whole batches of the test split."""
    megatron = yaml.safe_load((ROOT / STUDENT).read_text())["megatron"]
    batches = (test_tokens - 1) // int(megatron["seq-length"]) // int(megatron["global-batch-size"])
    settings = {
        "data.dir": out / "data",
        "teacher.load": out / "teacher",
        "megatron.skip-train": "true",
        "megatron.no-load-optim": "true",
        "megatron.no-load-rng": "true",
        "megatron.save": "null",
        "megatron.tensorboard-dir": "null",
        "megatron.eval-iters": 2 if fast else batches,
        "distillation.preset": "pretrain",
    }
    return [
        Stage(f"evaluate-{name}", "distill", STUDENT, 4, {**settings, "megatron.load": out / directory})
        for name, directory in (("distilled", "student"), ("alone", "student-alone"))
    ]


def run_stage(stage: Stage, out: Path, number: int) -> dict[str, Any]:
    """Run a stage to completion and show its progress; return its entry in the report."""
    # One thread per process, because they share the cores; no GPU; unbuffered, for the log.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    log, started = out / f"{stage.name}.log", time.monotonic()
    display = Display(f"[{number}/6] {stage.name:18}")
    with log.open("x") as sink:
        child = subprocess.Popen(
            [sys.executable, *stage.command()],
            stdout=sink,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches only this process, which ends the child in order
        )
    try:
        while child.poll() is None:
            time.sleep(1)
            display.show(progress(log_of(out, stage.name)))
    finally:
        end(child)
    seconds = round(time.monotonic() - started, 1)
    if child.returncode != 0:
        failure = f"stage {stage.name} failed (exit code {child.returncode}); full log: {log}"
        raise DemoError(f"{last_lines(log_of(out, stage.name))}\n\n{failure}")
    display.finish(progress(log_of(out, stage.name)))
    return {"name": stage.name, "seconds": seconds, "processes": stage.processes, "command": stage.command()}


def log_of(out: Path, stage: str) -> str:
    """Read the log of a stage, as far as it is written."""
    return (out / f"{stage}.log").read_text(errors="replace")


class Display:
    """Progress line of a stage."""

    def __init__(self, title: str) -> None:
        self._title, self._line, self._pace = title, Line(), Pace()

    def show(self, progress: Progress) -> None:
        """Update the line."""
        self._line.show(self._text(progress))

    def finish(self, progress: Progress) -> None:
        """Print the final state."""
        self._line.finish(self._text(progress))

    def _text(self, progress: Progress) -> str:
        elapsed, seconds = clock(self._pace.elapsed), self._pace.left(progress.done, progress.total)
        if not progress.total:
            return f"{self._title} {elapsed} starting"
        left = f", {clock(seconds)} left" if seconds is not None else ""
        losses = "".join(f"  {SHORT_NAMES[name]} {value:.3f}" for name, value in progress.numbers.items())
        return f"{self._title} {elapsed}{left}  {progress.done}/{progress.total}{losses}"


# Results ----------------------------------------------------------------------------------------------------


def make_rows(out: Path) -> dict[str, dict[str, float]]:
    """Read the three models' results on the test split."""
    distilled, alone = (evaluated(log_of(out, f"evaluate-{name}")) for name in ("distilled", "alone"))
    if distilled["teacher lm loss"] != alone["teacher lm loss"]:
        raise DemoError("the teacher's cross entropy differs between the two evaluations: they used different batches")

    def row(of: dict[str, float], directory: str) -> dict[str, float]:
        return {
            "cross entropy": of["lm loss"],
            "kl to teacher": of["kl to teacher"],
            "top-1 agreement": of["top-1 agreement"],
            "entropy": of["student entropy"],
            "parameters": count_parameters(out / directory),
            "seconds per step": seconds_per_step(out / directory),
        }

    teacher = {
        "lm loss": alone["teacher lm loss"],
        "kl to teacher": 0.0,
        "top-1 agreement": 1.0,
        "student entropy": alone["teacher entropy"],
    }
    return {
        "teacher": row(teacher, "teacher"),
        "student alone": row(alone, "student-alone"),
        "student distilled": row(distilled, "student"),
    }


def seconds_per_step(directory: Path) -> float:
    """Return a training run's median time per step, without validation and checkpoints; 0.0 if it was not logged."""
    return statistics.median([pace for run in find_runs([directory]) for pace in run.paces] or [0.0])


def count_parameters(directory: Path) -> int:
    """Count the parameters of the model in a checkpoint; replicated ones count once."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    step = int((directory / "latest_checkpointed_iteration.txt").read_text())
    stored = FileSystemReader(directory / f"iter_{step:07}").read_metadata().state_dict_metadata
    tensors = {k: v for k, v in stored.items() if isinstance(v, TensorStorageMetadata)}
    return sum(v.size.numel() for k, v in tensors.items() if not k.startswith("optimizer."))


def table(rows: dict[str, dict[str, float]]) -> str:
    """Format the comparison."""
    lines = [f"{'':18}{'cross entropy':>15}{'KL to teacher':>15}{'top-1 agreement':>17}{'parameters':>12}{'s/step':>9}"]
    for name, row in rows.items():
        lines.append(
            f"{name:18}{row['cross entropy']:15.4f}{row['kl to teacher']:15.4f}"
            f"{row['top-1 agreement']:17.1%}{row['parameters']:12,}{row['seconds per step']:9.2f}"
        )
    return "\n".join([*lines, "on held-out text; cross entropy and KL in nats per token"])


def verdict(alone: dict[str, float], distilled: dict[str, float]) -> str:
    """Summarize the comparison in a sentence."""

    def compare(key: str, lower: str, higher: str) -> str:
        ours, theirs = distilled[key], alone[key]
        word = "the same" if ours == theirs else lower if ours < theirs else higher
        return f"{ours:.3f} against {theirs:.3f} ({word})"

    gain = alone["cross entropy"] - distilled["cross entropy"]
    return (
        f"The distilled student against the student alone, after as many steps: held-out cross entropy "
        f"{compare('cross entropy', f'{gain:.3f} better', f'{-gain:.3f} worse')}, KL to the teacher "
        f"{compare('kl to teacher', 'closer', 'farther')}, "
        f"{distilled['seconds per step']:.2f} against {alone['seconds per step']:.2f} seconds per step."
    )


def draw_curves(out: Path, rows: dict[str, dict[str, float]]) -> None:
    """Write curves.png: cross entropy of both students, and divergence and agreement of the distilled one."""
    colors = {"student alone": "tab:orange", "student distilled": "tab:blue", "teacher": "black"}
    alone, distilled = (read_events(out / name / "tensorboard") for name in ("student-alone", "student"))
    figure, axes = pyplot.subplots(1, 3, figsize=(16, 5), layout="constrained")

    draw_curve(axes[0], alone, "lm loss", "student alone", colors["student alone"])
    draw_curve(axes[0], distilled, "lm loss", "student distilled", colors["student distilled"])
    axes[0].set(title="Cross entropy on the text", ylabel="nats per token")
    draw_curve(axes[1], distilled, "kd loss", "training divergence", "tab:green")
    draw_curve(axes[1], distilled, "kl to teacher", "KL", colors["student distilled"])
    axes[1].set(title="Divergence of the distilled student from the teacher", ylabel="nats per token")
    draw_curve(axes[2], distilled, "top-1 agreement", "student distilled", colors["student distilled"])
    axes[2].set(title="Top-1 agreement with the teacher", ylabel="share of tokens")

    for axis, column in zip(axes, ("cross entropy", "kl to teacher", "top-1 agreement"), strict=True):
        if axis is not axes[2]:  # cut off the much higher values of the first steps
            axis.set_ylim(top=np.quantile(np.concatenate([line.get_ydata() for line in axis.lines]), 0.93))
        for name in colors if column == "cross entropy" else ("student alone", "student distilled"):
            label = f"{name}, test" if axis is not axes[1] else f"KL of the {name}, test"
            axis.axhline(rows[name][column], color=colors[name], linestyle=":", label=label)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(out / "curves.png", dpi=120)
    pyplot.close(figure)


def read_events(directory: Path) -> Any:
    """Read all TensorBoard events of a training run."""
    return event_accumulator.EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()


def draw_curve(axis: Any, events: Any, scalar: str, name: str, color: str) -> None:
    """Draw a training curve, faint per step and bold as a mean over ten, with its validation points."""
    steps, values = np.array([(event.step, event.value) for event in events.Scalars(scalar)]).T
    axis.plot(steps, values, color=color, linewidth=0.8, alpha=0.25)
    width = min(10, len(values))
    means = np.convolve(values, np.ones(width) / width, "valid")
    axis.plot(steps[width - 1 :], means, color=color, label=f"{name}, training")
    # At the last step Megatron also writes test results under this name, after validation: keep the first.
    validation = {event.step: event.value for event in reversed(events.Scalars(f"{scalar} validation"))}
    axis.plot(*zip(*sorted(validation.items()), strict=True), "o", color=color, label=f"{name}, validation")


if __name__ == "__main__":
    sys.exit(main())
