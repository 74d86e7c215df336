"""Comparison of several losses and seeds with one teacher: ``abkd-megatron compare``.

Each pair of loss and seed is a separate `distill` job with a directory below ``compare.out``. It holds ``config.yaml``
(the complete configuration, which `distill` accepts), ``run.log``, ``checkpoints`` and finally ``result.json``. A run
with a result is skipped; a run with a checkpoint resumes. Students with the same seed have the same initial weights
and batches. The held-out text is the same for all, by one `data.seed`.
"""

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from abkd_megatron.config.load import render
from abkd_megatron.config.schema import SECTIONS, Config
from abkd_megatron.config.teachers import reads_cache
from abkd_megatron.errors import ConfigError, HostError
from abkd_megatron.tools import comparison, gradient_variance, runs
from abkd_megatron.tools.compare_jobs import Job, run_all
from abkd_megatron.tools.env import need_plots, need_rouge
from abkd_megatron.tools.events import find_runs
from abkd_megatron.tools.rouge import Continuations, continuations
from abkd_megatron.tools.rouge import table as rouge_table

# `data.seed` of all runs if the configuration has none.
DATA_SEED = 1234


@dataclass(frozen=True)
class Run(Job):
    """One loss with one seed."""

    _: KW_ONLY
    loss: str
    seed: int
    overrides: tuple[str, ...]
    """Of the configuration that `compare` got."""

    def measure(self) -> dict[str, Any]:
        """Return the results in the event files."""
        (run,) = find_runs([self.directory / "tensorboard"])
        return {"loss": self.loss, "seed": self.seed, **comparison.result_of(run)}

    def measurements(self, load: Callable[[Sequence[str]], Config]) -> list[gradient_variance.Measurement]:
        """Return the jobs that measure the variance of its gradient; it has finished."""
        return gradient_variance.measurements(self.name, (self.loss, self.seed), self.directory, self.overrides, load)

    def continuations(self, load: Callable[[Sequence[str]], Config]) -> Continuations:
        """Return the job that continues held-out text; it has finished."""
        return continuations(self.name, (self.loss, self.seed), self.directory, self.overrides, load)


def compare(config: Config, load: Callable[[Sequence[str]], Config]) -> None:
    """Run all jobs without a result, then write ``table.md``, ``results.json`` and ``comparison.png``.

    Args:
        config: from the file and the command line.
        load: function that returns the same configuration with further overrides.

    Raises:
        ConfigError: before the first run: `distill` would reject a loss, two losses share a directory name, or a
            directory has other contents.
        HostError: before the first run: tensorboard or matplotlib is missing. After the other runs have finished and
            the table is written: a run failed.
    """
    of, out = config.compare, Path(config.compare.out).expanduser().resolve()
    if of.launch is not None and shutil.which(next(iter(shlex.split(of.launch)), "")) is None:
        raise ConfigError(
            f"compare.launch: expected a command on PATH, got {of.launch!r}; for example torchrun --standalone "
            "--nproc-per-node 8"
        )
    planned = plan(config, load)
    check_out(out)
    need_plots("compare", "tensorboard", "matplotlib")
    if of.rouge_prompts:
        need_rouge()
    for run in planned:
        run.prepare()
    jobs: list[Job] = [*planned]
    failed: list[Job] = [*run_all(planned, of.launch, of.at_once, _environment(config))]
    finished = [run for run in planned if run.result is not None]
    measured: list[gradient_variance.Measurement] = []
    continued: list[Continuations] = []
    if of.gradient_batches:
        measured = [job for run in finished for job in run.measurements(load)]
    if of.rouge_prompts:
        continued = [run.continuations(load) for run in finished]
    for job in (*measured, *continued):
        job.prepare()
    jobs += [*measured, *continued]
    failed += run_all([*measured, *continued], of.launch, of.at_once, _environment(config))
    gradients = gradient_variance.results(measured)
    rouge = {job.of: found for job in continued if (found := job.result) is not None}
    results: list[dict[str, Any]] = [result for run in planned if (result := run.result) is not None]
    if results:
        for result in results:
            place = result["loss"], result["seed"]
            if place in gradients:
                result["gradient"] = gradients[place]
            if place in rouge:
                result["rouge"] = rouge[place]
        summary, line = comparison.summarize(results, list(of.losses)), comparison.recommend(results)
        found = {"summary": summary, "recommendation": line, "differences": comparison.differences(results)}
        (out / "results.json").write_text(json.dumps({**found, "runs": results}, indent=1) + "\n")
        table = f"{comparison.table(summary)}\n{line}\n"
        if note := comparison.outgrown(summary):
            table += f"\n{note}\n"
        if variances := gradient_variance.table(results, of.gradient_batches):
            table += f"\n{variances}"
        if scores := rouge_table(results):
            table += f"\n{scores}"
        (out / "table.md").write_text(table)
        comparison.draw(results, list(of.losses), out / "comparison.png")
        print(f"\n{table}\n{out / 'table.md'}\n{out / 'results.json'}\n{out / 'comparison.png'}")
    if failed:
        named = "\n".join(f"  {run.name}: {run.log}" for run in failed)
        raise HostError(
            f"{len(failed)} of {len(jobs)} runs failed; last lines of the first log:\n"
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
            ]
            if config.data.seed is None:
                own.append(f"data.seed={DATA_SEED}")
            try:
                of_run = load([*settings, *own])
                # Diagnostics read the logits of all teachers, of the student's tokens.
                if not reads_cache(of_run) and of_run.distillation.cross_tokenizer is None:
                    of_run = load([*settings, *own, "distillation.diagnostics=true"])
                of_run.check("distill")
                gradient_variance.check(of_run)
            except ConfigError as error:
                raise ConfigError(f"compare.losses: {loss}: {error}") from error
            sections = [section for section in SECTIONS if section != "compare"]
            text = render(of_run, sections, origins=False)
            overrides = (*settings, *own)
            planned.append(Run(f"{loss}, seed {seed}", directory, text, loss=loss, seed=seed, overrides=overrides))
    return planned


def _environment(config: Config) -> dict[str, str]:
    # Each run is a separate job, whatever launched this process.
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    environment["PYTHONUNBUFFERED"] = "1"
    if config.device == "cpu":
        environment.setdefault("OMP_NUM_THREADS", "1")  # the runs share the cores
    return environment
