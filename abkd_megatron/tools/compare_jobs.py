"""Jobs of a comparison: one child process each, with a directory for its configuration, log and result."""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abkd_megatron.errors import ConfigError
from abkd_megatron.tools import runs


@dataclass(frozen=True)
class Job:
    """A training job that a comparison starts."""

    name: str
    """For the terminal."""
    directory: Path
    config: str
    """The complete configuration, as YAML."""
    kind: str = "distill"
    """``distill``, ``pretrain`` or ``rouge``."""

    @property
    def log(self) -> Path:
        """Output of the job, of all attempts."""
        return self.directory / "run.log"

    @property
    def result(self) -> dict[str, Any] | None:
        """Content of result.json; None until the job has finished."""
        path = self.directory / "result.json"
        return json.loads(path.read_text()) if path.exists() else None

    def command(self, launch: str | None) -> list[str]:
        """Return the command line, which resumes if there is a checkpoint."""
        one_process = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
        launcher = shlex.split(launch) if launch else one_process
        here = self.directory / "checkpoints"
        resume = [f"megatron.load={here}"] if (here / "latest_checkpointed_iteration.txt").exists() else []
        job = ["-m", "abkd_megatron", self.kind, "--config", str(self.directory / "config.yaml"), *resume]
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

    def measure(self) -> dict[str, Any]:
        """Return the result of the finished job."""
        raise NotImplementedError

    def conclude(self) -> None:
        """Write result.json."""
        temporary = self.directory / "result.json.part"
        temporary.write_text(json.dumps(self.measure(), indent=1) + "\n")
        temporary.rename(self.directory / "result.json")


def check_checkpoint(checkpoints: Path, key: str) -> Path:
    """Return the file with the iteration of a run's last checkpoint.

    Args:
        checkpoints: of the run.
        key: of the setting that needs it.

    Raises:
        ConfigError: there is none.
    """
    tracker = checkpoints / "latest_checkpointed_iteration.txt"
    if not tracker.exists():
        raise ConfigError(
            f"{key}: expected a checkpoint of the finished run in {checkpoints}, found none; set "
            f"megatron.save-interval, or {key} to 0"
        )
    return tracker


def run_all[J: Job](planned: Sequence[J], launch: str | None, at_once: int, environment: Mapping[str, str]) -> list[J]:
    """Run all jobs without a result and return the failed ones."""
    waiting = [run for run in planned if run.result is None]
    total, done, failed = len(planned), len(planned) - len(waiting), []
    print(f"{total} runs, {done} already done; at most {at_once} at a time", flush=True)
    succeeded = done > 0
    active: dict[J, tuple[subprocess.Popen, float]] = {}
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


def _start(run: Job, launch: str | None, environment: Mapping[str, str]) -> subprocess.Popen:
    with run.log.open("a") as sink:
        # In a new session Ctrl-C does not reach the children; this process ends them.
        return subprocess.Popen(
            run.command(launch), stdout=sink, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def _state(active: Mapping[Any, Any], done: int, total: int, pace: runs.Pace) -> str:
    parts, under_way = [], 0.0
    for run in active:
        progress = runs.progress(run.log.read_text(errors="replace"))
        where = f"{progress.done}/{progress.total} {progress.doing}".rstrip() if progress.total else "starting"
        parts.append(f"{run.name} {where}")
        under_way += progress.done / progress.total if progress.total else 0.0
    seconds = pace.left(done + under_way, total)
    left = f", {runs.clock(seconds)} left" if seconds is not None else ""
    return f"[{done}/{total}] {runs.clock(pace.elapsed)}{left}  {';  '.join(parts)}"
