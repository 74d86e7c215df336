"""Comparison of several losses and seeds with one teacher: ``abkd-megatron compare``.

Each pair of loss and seed is a separate `distill` job with a directory below ``compare.out``. It holds ``config.yaml``
(the complete configuration, which `distill` accepts), ``run.log``, ``checkpoints`` and finally ``result.json``. A run
with a result is skipped; a run with a checkpoint resumes. Students with the same seed have the same initial weights and
batches.
"""

import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abkd_megatron.config.load import render
from abkd_megatron.config.schema import SECTIONS, Config
from abkd_megatron.errors import ConfigError, HostError
from abkd_megatron.tools import runs
from abkd_megatron.tools.env import need_plots
from abkd_megatron.vocab_parallel.diagnostics import calibration_error

# Columns of the table: (title, name in the report, format).
_COLUMNS = (
    ("cross entropy", "lm loss", "{:.3f}"),
    ("KL(teacher, student)", "kl to teacher", "{:.3f}"),
    ("KL(student, teacher)", "reverse kl to teacher", "{:.3f}"),
    ("top-1 agreement", "top-1 agreement", "{:.3f}"),
    ("calibration error", "calibration error", "{:.4f}"),
    ("entropy", "student entropy", "{:.3f}"),
)

_CURVES = (
    ("lm loss", "Cross entropy, nats per token"),
    ("kl to teacher", "KL(teacher, student), nats per token"),
    ("hardness concentration", "Hardness concentration"),
    ("confidence concentration", "Confidence concentration"),
    ("todi weight", "ToDi weight, mean over the vocabulary"),
    ("todi weight of teacher", "ToDi weight, mean over the teacher"),
)


@dataclass(frozen=True)
class Run:
    """One loss with one seed."""

    loss: str
    seed: int
    directory: Path
    config: str
    """The complete configuration, as YAML."""

    @property
    def name(self) -> str:
        """Name for the terminal."""
        return f"{self.loss}, seed {self.seed}"

    @property
    def log(self) -> Path:
        """Output of the job, of all attempts."""
        return self.directory / "run.log"

    @property
    def result(self) -> dict[str, Any] | None:
        """Content of result.json; None until the run has finished."""
        path = self.directory / "result.json"
        return json.loads(path.read_text()) if path.exists() else None

    def command(self, launch: str | None) -> list[str]:
        """Return the command line, which resumes if there is a checkpoint."""
        one_process = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
        launcher = shlex.split(launch) if launch else one_process
        here = self.directory / "checkpoints"
        resume = [f"megatron.load={here}"] if (here / "latest_checkpointed_iteration.txt").exists() else []
        job = ["-m", "abkd_megatron", "distill", "--config", str(self.directory / "config.yaml"), *resume]
        return [*launcher, *job]

    def prepare(self) -> None:
        """Create the directory, or check that an existing one has the same configuration.

        Raises:
            ConfigError: the directory has another configuration or is not writable.
        """
        path = self.directory / "config.yaml"
        if not path.exists():
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                path.write_text(self.config)
            except OSError as error:
                raise ConfigError(
                    f"compare.out: expected a writable directory, got: {error}; choose another compare.out"
                ) from error
        elif (found := path.read_text()) != self.config:
            there, here = set(found.splitlines()), set(self.config.splitlines())
            differ = "; ".join(sorted(line.strip() for line in there ^ here)[:6])
            raise ConfigError(
                f"compare.out: {self.directory} has a run with another configuration ({differ}); choose another "
                "compare.out, or remove the directory"
            )

    def conclude(self, seconds: float) -> None:
        """Read the results from the log and write result.json."""
        log = self.log.read_text(errors="replace")
        result = {
            "loss": self.loss,
            "seed": self.seed,
            "seconds": round(seconds, 1),
            "test": _with_calibration(runs.evaluated(log)),
            "validation": {step: _with_calibration(of) for step, of in runs.validations(log).items()},
        }
        temporary = self.directory / "result.json.part"
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        temporary.rename(self.directory / "result.json")


def compare(config: Config, load: Callable[[Sequence[str]], Config]) -> None:
    """Run all jobs without a result, then write ``table.md``, ``results.json`` and ``comparison.png``.

    Args:
        config: from the file and the command line.
        load: function that returns the same configuration with further overrides.

    Raises:
        ConfigError: before the first run: `distill` would reject a loss, two losses share a directory name, or a
            directory has other contents.
        HostError: matplotlib is missing; or a run failed, after the other runs have finished and the table is written.
    """
    need_plots("compare", "matplotlib")
    of, out = config.compare, Path(config.compare.out).expanduser().resolve()
    if of.launch is not None and shutil.which(next(iter(shlex.split(of.launch)), "")) is None:
        raise ConfigError(
            f"compare.launch: expected a command on PATH, got {of.launch!r}; for example torchrun --standalone "
            "--nproc-per-node 8"
        )
    planned = plan(config, load)
    check_out(out)
    for run in planned:
        run.prepare()
    failed = _run_all(planned, of.launch, of.at_once, _environment(config))
    results = [result for run in planned if (result := run.result) is not None]
    if results:
        summary = summarize(results, list(of.losses))
        (out / "results.json").write_text(json.dumps({"summary": summary, "runs": results}, indent=1) + "\n")
        (out / "table.md").write_text(table(summary))
        draw(results, list(of.losses), out / "comparison.png")
        print(f"\n{table(summary)}\n{out / 'table.md'}\n{out / 'results.json'}\n{out / 'comparison.png'}")
    if failed:
        named = "\n".join(f"  {run.name}: {run.log}" for run in failed)
        raise HostError(
            f"{len(failed)} of {len(planned)} runs failed; last lines of the first log:\n"
            f"{runs.last_lines(failed[0].log.read_text(errors='replace'))}\n{named}\n"
            "fix the cause and run the same command again; finished runs are kept"
        )


def check_out(out: Path) -> None:
    """Reject an output folder with result files that `compare` did not write.

    Raises:
        ConfigError: with their names.
    """
    found = [name for name in ("results.json", "table.md", "comparison.png") if (out / name).exists()]
    try:
        ours = {"summary", "runs"} <= json.loads((out / "results.json").read_text()).keys()
    except (OSError, ValueError, AttributeError):
        ours = False
    if found and not ours:
        raise ConfigError(
            f"compare.out: expected a folder without {', '.join(found)}, or an earlier comparison, got {out}; choose "
            "another compare.out"
        )


def plan(config: Config, load: Callable[[Sequence[str]], Config]) -> list[Run]:
    """Return all runs ordered by seed, so that an interrupted comparison has complete seeds.

    Raises:
        ConfigError: see `compare`.
    """
    out = Path(config.compare.out).expanduser().resolve()
    slugs: dict[str, str] = {}
    for loss in config.compare.losses:
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", loss).strip("-").lower() or "loss"
        if slug in slugs.values():
            raise ConfigError(f"compare.losses: '{loss}' and another loss share the directory {slug}; rename one")
        slugs[loss] = slug
    planned = []
    for seed in config.compare.seeds:
        for loss, settings in config.compare.losses.items():
            directory = out / slugs[loss] / f"seed-{seed}"
            own = [
                f"megatron.seed={seed}",
                f"megatron.save={directory / 'checkpoints'}",
                f"megatron.tensorboard-dir={directory / 'tensorboard'}",
                "distillation.diagnostics=true",
            ]
            try:
                of_run = load([*settings, *own])
                of_run.check("distill")
            except ConfigError as error:
                raise ConfigError(f"compare.losses: {loss}: {error}") from error
            sections = [section for section in SECTIONS if section != "compare"]
            planned.append(Run(loss, seed, directory, render(of_run, sections, origins=False)))
    return planned


def _environment(config: Config) -> dict[str, str]:
    # Each run is a separate job, whatever launched this process.
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    environment["PYTHONUNBUFFERED"] = "1"
    if config.device == "cpu":
        environment.setdefault("OMP_NUM_THREADS", "1")  # the runs share the cores
    return environment


def _run_all(planned: Sequence[Run], launch: str | None, at_once: int, environment: Mapping[str, str]) -> list[Run]:
    """Run all jobs without a result and return the failed ones."""
    waiting = [run for run in planned if run.result is None]
    total, done, failed = len(planned), len(planned) - len(waiting), []
    print(f"{total} runs, {done} already done; at most {at_once} at a time", flush=True)
    succeeded = done > 0
    active: dict[Run, tuple[subprocess.Popen, float]] = {}
    line, pace = runs.Line(), runs.Pace()
    try:
        while waiting or active:
            while waiting and len(active) < at_once:
                run = waiting.pop(0)
                active[run] = _start(run, launch, environment), time.monotonic()
            time.sleep(1)
            for run, (child, started) in list(active.items()):
                if child.poll() is None:
                    continue
                del active[run]
                if child.returncode == 0:
                    run.conclude(time.monotonic() - started)
                    succeeded = True
                else:
                    failed.append(run)
                    if not succeeded:  # the others would probably fail too
                        waiting.clear()
                done += 1
                state = "done" if child.returncode == 0 else f"FAILED (exit code {child.returncode}), {run.log}"
                line.finish(f"[{done}/{total}] {run.name}: {state} in {runs.clock(time.monotonic() - started)}")
            line.show(_state(active, done, total, pace))
    finally:
        for child, _ in active.values():
            runs.end(child)
    return failed


def _start(run: Run, launch: str | None, environment: Mapping[str, str]) -> subprocess.Popen:
    with run.log.open("a") as sink:
        # In a new session Ctrl-C does not reach the children; this process ends them.
        return subprocess.Popen(
            run.command(launch), stdout=sink, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def _state(active: Mapping[Run, Any], done: int, total: int, pace: runs.Pace) -> str:
    parts, under_way = [], 0.0
    for run in active:
        progress = runs.progress(run.log.read_text(errors="replace"))
        parts.append(f"{run.name} {progress.done}/{progress.total}" if progress.total else f"{run.name} starting")
        under_way += progress.done / progress.total if progress.total else 0.0
    seconds = pace.left(done + under_way, total)
    left = f", {runs.clock(seconds)} left" if seconds is not None else ""
    return f"[{done}/{total}] {runs.clock(pace.elapsed)}{left}  {';  '.join(parts)}"


# Results ------------------------------------------------------------------------------------------


def _with_calibration(report: dict[str, float]) -> dict[str, float]:
    kept = {name: value for name, value in report.items() if not name.startswith("calibration gap")}
    return {**kept, "calibration error": calibration_error(report)}


def summarize(results: Sequence[Mapping[str, Any]], losses: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return statistics over the seeds, per loss and for the teacher.

    An entry has the number of ``seeds``, and per column title:

    - ``mean``;
    - ``std``: sample standard deviation over the seeds;
    - ``std within seeds``: the same after subtracting the mean over the losses at each seed, as in a repeated-measures
      design. This removes effects of batches, test sample and initial weights that all losses share. None unless there
      are at least two losses and two seeds, and every loss has every seed.
    """
    by_loss: dict[str, dict[int, Mapping[str, float]]] = {loss: {} for loss in losses}
    for result in results:
        by_loss[result["loss"]][result["seed"]] = result["test"]
    by_loss = {loss: tests for loss, tests in by_loss.items() if tests}
    seeds = {seed for tests in by_loss.values() for seed in tests}
    complete = len(seeds) > 1 < len(by_loss) and all(set(tests) == seeds for tests in by_loss.values())
    # Subtracting the mean over the losses also removes a part of each loss's own spread (Morey, 2008).
    correction = (len(by_loss) / (len(by_loss) - 1)) ** 0.5 if complete else 0.0
    summary: dict[str, dict[str, Any]] = {loss: {"seeds": len(tests)} for loss, tests in by_loss.items()}
    for title, name, _ in _COLUMNS:
        common = _common(by_loss, name) if complete else {}
        for loss, tests in by_loss.items():
            values = [test[name] for test in tests.values()]
            within = [test[name] - common[seed] for seed, test in tests.items()] if complete else []
            summary[loss][title] = {
                "mean": statistics.fmean(values),
                "std": statistics.stdev(values) if len(values) > 1 else None,
                "std within seeds": correction * statistics.stdev(within) if complete else None,
            }
    names = {"cross entropy": "teacher lm loss", "entropy": "teacher entropy"}
    first = next(iter(by_loss.values())).values()
    summary["teacher"] = {title: {"mean": statistics.fmean(it[name] for it in first)} for title, name in names.items()}
    return summary


def _common(by_loss: Mapping[str, Mapping[int, Mapping[str, float]]], name: str) -> dict[int, float]:
    """Return the mean over the losses, by seed."""
    seeds = next(iter(by_loss.values()))
    return {seed: statistics.fmean(tests[seed][name] for tests in by_loss.values()) for seed in seeds}


def table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the comparison as Markdown."""
    within = all(entry[_COLUMNS[0][0]]["std within seeds"] is not None for entry in _losses(summary).values())

    def cell(entry: Mapping[str, float | None] | None, form: str) -> str:
        if entry is None:
            return ""
        spread = entry.get("std within seeds" if within else "std")
        return form.format(entry["mean"]) + (f" ± {form.format(spread)}" if spread is not None else "")

    titles = [title for title, _, _ in _COLUMNS]
    lines = ["| " + " | ".join(["loss", *titles]) + " |", "|---" * (len(titles) + 1) + "|"]
    for loss, entry in summary.items():
        lines.append("| " + " | ".join([loss, *(cell(entry.get(title), form) for title, _, form in _COLUMNS)]) + " |")
    counts = sorted({entry["seeds"] for entry in _losses(summary).values()})
    of_seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    spread = "after subtracting each seed's mean over the losses" if within else "over the seeds"
    return "\n".join(
        [
            *lines,
            "",
            f"Test split, temperature 1; cross entropy, KL and entropy in nats per token. Mean over {of_seeds} seeds "
            f"± standard deviation {spread}.",
            "",
        ]
    )


def _losses(summary: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {loss: entry for loss, entry in summary.items() if loss != "teacher"}


def draw(results: Sequence[Mapping[str, Any]], losses: Sequence[str], path: Path) -> None:
    """Draw the test results as dots, and the validation curves as means over seeds.

    A small dot is one seed. If every loss has every seed, each seed's mean over the losses is subtracted, as in the
    table.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    losses = [loss for loss in losses if any(result["loss"] == loss for result in results)]
    palette = pyplot.get_cmap("tab20" if len(losses) > 10 else "tab10")
    colors = {loss: palette(index % palette.N) for index, loss in enumerate(losses)}
    figure, axes = pyplot.subplots(2, len(_COLUMNS), figsize=(4.2 * len(_COLUMNS), 9), layout="constrained")
    by_loss = {
        loss: {result["seed"]: result["test"] for result in results if result["loss"] == loss} for loss in losses
    }
    complete = len({frozenset(tests) for tests in by_loss.values()}) == 1
    for axis, (title, name, _) in zip(axes[0], _COLUMNS, strict=True):
        common = _common(by_loss, name) if complete else {}
        overall = statistics.fmean(common.values()) if complete else 0.0
        for row, (loss, tests) in enumerate(by_loss.items()):
            values = [test[name] - common.get(seed, 0.0) + overall for seed, test in tests.items()]
            axis.plot(values, [row] * len(values), ".", color=colors[loss], alpha=0.5)
            axis.plot(statistics.fmean(values), row, "o", color=colors[loss], markersize=9)
        axis.set_title(f"{title}, test")
        axis.set_yticks(range(len(losses)), losses if axis is axes[0][0] else [""] * len(losses))
        axis.invert_yaxis()
        axis.grid(axis="x", alpha=0.3)
    for axis, (name, title) in zip(axes[1], _CURVES, strict=True):
        for loss in losses:
            curves = [result["validation"] for result in results if result["loss"] == loss]
            steps = sorted(set.intersection(*({int(step) for step in curve} for curve in curves)))
            means = [statistics.fmean(curve[str(step)][name] for curve in curves) for step in steps]
            axis.plot(steps, means, ".-", color=colors[loss], label=loss)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes[1][-1].legend(fontsize="small")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
