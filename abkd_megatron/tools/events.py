"""Metrics and arguments of runs, read from Megatron's TensorBoard event files.

Megatron writes `NAME` and `NAME vs samples` in training, and `NAME validation` (or `NAME validation-SET`) in
validation. It writes its arguments as text. At the end of a job the numbers of the test split follow those from
validation under the same names.
"""

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from textwrap import dedent

from abkd_megatron.config.load import CONFIG_TEXT
from abkd_megatron.errors import ConfigError

Curve = dict[int, float]
"""{step: value}, ascending; may have NaN and infinities."""

TRAINING = "training"
_VALIDATION = re.compile(r"(.+?) validation(?:-(.+?))?( ppl)?")
_FRAMING = 16  # bytes of a record's length and checksums


@dataclass
class Run:
    """One job, or several in one directory that resumed each other."""

    name: str
    splits: dict[str, dict[str, Curve]] = field(default_factory=lambda: {TRAINING: {}})
    """Curves by split and name. Splits are `training`, `validation` and `test`, the last two followed by the set's
    name if there are several."""
    arguments: dict[str, str] = field(default_factory=dict)
    """Megatron's arguments of the last job that trained."""
    config: str = ""
    """Its YAML configuration; empty for other scripts."""
    started: float = math.inf
    """Time of the first event, in seconds since 1970."""
    seconds: float = 0.0
    """Sum over jobs of the time from first to last event."""
    paces: list[float] = field(default_factory=list)
    """Seconds per step between consecutive logged steps, in the order of training."""
    samples: int = 0
    """Sequences trained on."""
    notes: list[str] = field(default_factory=list)
    """Damaged files, and steps that were trained twice."""

    def integer(self, argument: str) -> int:
        """Return a Megatron argument as an integer; 0 if it was not written or is not an integer."""
        text = self.arguments.get(argument, "")
        return int(text) if text.isdecimal() else int(text == "True")

    @property
    def last_step(self) -> int:
        """The last step with a value; 0 without values."""
        return max((step for curves in self.splits.values() for curve in curves.values() for step in curve), default=0)


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """Read all runs in these directories. Each directory with event files is a run. Needs tensorboard.

    Args:
        paths: directories of runs, their tensorboard directories, or folders of several runs.

    Raises:
        ConfigError: a path has no event files, or a run has no numbers.
    """
    found: dict[Path, dict[Path, None]] = {}
    for path in paths:
        files = sorted(path.resolve().rglob("events.out.tfevents.*")) if path.is_dir() else []
        if not files:
            raise ConfigError(
                f"{path}: expected TensorBoard event files, found none; train with megatron.tensorboard-dir and pass "
                "that directory"
            )
        for file in files:
            found.setdefault(file.parent, {})[file] = None
    places = {of: of.parent if of.name in ("tensorboard", "tb") else of for of in found}
    root = os.path.commonpath([it.parent for it in places.values()])
    runs = []
    for directory, files_of in found.items():
        run = _merge(str(places[directory].relative_to(root)), map(_read_job, files_of))
        if not any(run.splits.values()):
            raise ConfigError(
                f"{directory}: expected numbers in the event files, found none{'; '.join(['', *run.notes])}; wait for "
                "the first step, or omit this directory"
            )
        runs.append(run)
    return runs


def _read_job(path: Path) -> Run:
    from tensorboard.backend.event_processing.event_file_loader import (
        LegacyEventFileLoader,
    )

    job, taken = Run(path.name), 0
    logged: dict[int, float] = {}
    numbers: dict[str, dict[int, list[float]]] = {}
    try:
        size = path.stat().st_size
        for event in LegacyEventFileLoader(str(path)).Load():
            taken += event.ByteSize() + _FRAMING
            job.started = min(job.started, event.wall_time)
            job.seconds = max(job.seconds, event.wall_time - job.started)
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "text":
                    text = b"".join(value.tensor.string_val).decode(errors="replace")
                    job.arguments[value.tag.removesuffix("/text_summary")] = text
                elif value.tag.endswith(" vs samples"):
                    job.samples = job.samples if " validation" in value.tag else event.step
                elif value.HasField("simple_value"):
                    numbers.setdefault(value.tag, {}).setdefault(event.step, []).append(value.simple_value)
                    if not _VALIDATION.fullmatch(value.tag):
                        logged.setdefault(event.step, event.wall_time)
        if taken < size:  # TensorBoard's reader ends at a damaged record without an error
            job.notes.append(f"{path.name} is damaged or was being written: bytes {taken} to {size} are ignored")
    except OSError as error:
        job.notes.append(f"{path.name} cannot be read ({error.strerror}) and is ignored")
    job.config = dedent(job.arguments.pop(CONFIG_TEXT, ""))
    job.paces = [
        (logged[after] - logged[before]) / (after - before) for before, after in pairwise(logged) if after > before
    ]
    training = {tag: found for tag, found in numbers.items() if not _VALIDATION.fullmatch(tag)}
    job.splits[TRAINING] = {tag: {step: it[-1] for step, it in found.items()} for tag, found in training.items()}
    for tag, found in numbers.items():
        if (match := _VALIDATION.fullmatch(tag)) and not match[3]:
            of_set = f" {match[2]}" if match[2] else ""
            curves = job.splits.setdefault(f"validation{of_set}", {})
            curves[match[1]] = {step: it[0] for step, it in found.items()}
            step = max(found)
            if _ends_with_test(job, step, len(found[step])):
                job.splits.setdefault(f"test{of_set}", {})[match[1]] = {step: found[step][-1]}
    return job


def _ends_with_test(job: Run, step: int, count: int) -> bool:
    """Return whether the last of `count` numbers at the last step is from the test split.

    Before it there may be one validation during training and one after training.
    """
    interval, trained = job.integer("eval_interval"), bool(job.splits[TRAINING])
    while_training = trained and interval > 0 and step % interval == 0
    validations = while_training + 1 if job.integer("do_valid") else 0
    return job.integer("do_test") > 0 and count == validations + 1


def _merge(name: str, jobs: Iterable[Run]) -> Run:
    """Merge the jobs of a directory into one run. For steps trained twice, keep the later job's numbers."""
    run = Run(name)
    for job in sorted(jobs, key=lambda it: it.started):
        first = min((step for curve in job.splits[TRAINING].values() for step in curve), default=math.inf)
        if run.splits[TRAINING] and first <= run.last_step:
            run.notes.append(f"steps {first} to {run.last_step} were trained twice; the later job's numbers are shown")
        for split in {**run.splits, **job.splits}:
            before, after = run.splits.get(split, {}), job.splits.get(split, {})
            curves = {
                key: {step: value for step, value in before.get(key, {}).items() if step < first} | after.get(key, {})
                for key in {**before, **after}
            }
            run.splits[split] = {key: dict(sorted(curve.items())) for key, curve in curves.items() if curve}
        if job.arguments and (first < math.inf or not run.arguments):
            run.arguments, run.config = job.arguments, job.config
        run.started = min(run.started, job.started)
        run.seconds += job.seconds
        run.paces += job.paces
        run.samples = job.samples or run.samples
        run.notes += job.notes
    return run
