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
from abkd_megatron.tools import comparison, runs
from abkd_megatron.tools.env import need_plots
from abkd_megatron.tools.events import find_runs

# `data.seed` of all runs if the configuration has none.
DATA_SEED = 1234


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

    def conclude(self) -> None:
        """Read the results from the event files and write result.json."""
        (run,) = find_runs([self.directory / "tensorboard"])
        result = {"loss": self.loss, "seed": self.seed, **comparison.result_of(run)}
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
        summary, line = comparison.summarize(results, list(of.losses)), comparison.recommend(results)
        found = {"summary": summary, "recommendation": line, "differences": comparison.differences(results)}
        (out / "results.json").write_text(json.dumps({**found, "runs": results}, indent=1) + "\n")
        table = f"{comparison.table(summary)}\n{line}\n"
        (out / "table.md").write_text(table)
        comparison.draw(results, list(of.losses), out / "comparison.png")
        print(f"\n{table}\n{out / 'table.md'}\n{out / 'results.json'}\n{out / 'comparison.png'}")
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
            ]
            if config.data.seed is None:
                own.append(f"data.seed={DATA_SEED}")
            try:
                of_run = load([*settings, *own])
                if of_run.distillation.cache is None:  # a cache has no logits to diagnose
                    of_run = load([*settings, *own, "distillation.diagnostics=true"])
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
                    run.conclude()
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
        where = f"{progress.done}/{progress.total} {progress.doing}".rstrip() if progress.total else "starting"
        parts.append(f"{run.name} {where}")
        under_way += progress.done / progress.total if progress.total else 0.0
    seconds = pace.left(done + under_way, total)
    left = f", {runs.clock(seconds)} left" if seconds is not None else ""
    return f"[{done}/{total}] {runs.clock(pace.elapsed)}{left}  {';  '.join(parts)}"
