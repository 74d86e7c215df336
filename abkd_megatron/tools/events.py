"""What a run has written into TensorBoard: numbers by name and step, arguments, and what is wrong with the files.

Megatron writes `NAME` and `NAME vs samples` in training, `NAME validation` (or `NAME validation-SET`) in validation,
and its arguments as text. At the end of a job the test split's numbers come under validation's names, after those.
"""

import importlib.util
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent

from abkd_megatron.config.load import CONFIG_TEXT
from abkd_megatron.errors import ConfigError, HostError

Curve = dict[int, float]
"""Numbers by step, in the order of the steps; NaN and infinities are among them as they were written."""

_VALIDATION = re.compile(r"(.+?) validation(?:-(.+?))?( ppl)?")


@dataclass
class Run:
    """A run, of one job or of several that went on from each other."""

    name: str
    """Of its directory."""
    training: dict[str, Curve] = field(default_factory=dict)
    """By name."""
    validation: dict[str, dict[str, Curve]] = field(default_factory=dict)
    """By the set's name, "" for an only one, and by name."""
    test: dict[str, dict[str, tuple[int, float]]] = field(default_factory=dict)
    """The last step's number on the test split, by set and name."""
    arguments: dict[str, str] = field(default_factory=dict)
    """Megatron's, of the last job, as text."""
    config: str | None = None
    """The configuration of the last job, as `config_file.render` has it; None for jobs that are not this package's."""
    started: float = 0.0
    """Of the first event, in seconds since 1970."""
    seconds: float = 0.0
    """From each job's first event to its last."""
    samples: int | None = None
    """Sequences trained on."""
    notes: list[str] = field(default_factory=list)
    """What a reader has to know of the files."""

    def integer(self, argument: str) -> int | None:
        """One of Megatron's arguments as a whole number; None where it is none, or was not written."""
        text = self.arguments.get(argument, "")
        return int(text) if re.fullmatch(r"-?\d+", text) else int(text == "True") if text in ("True", "False") else None

    @property
    def last_step(self) -> int:
        """The last step that is known of."""
        sets = self.validation.values()
        curves = [*self.training.values(), *(curve for one in sets for curve in one.values())]
        return max((step for curve in curves for step in curve), default=0)


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in these directories, each with what all of its event files say.

    Args:
        paths: of runs, their tensorboard directories, or folders of several runs. A directory with event files in it is
            one run.

    Raises:
        ConfigError: for a path that is no directory, or has no event file or none with a number in it anywhere below.
        HostError: without tensorboard.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise HostError("expected tensorboard, to read event files, found none; pip install 'abkd-megatron[plots]'")
    found: dict[Path, list[Path]] = {}
    for path in paths:
        if not path.is_dir():
            got = "a file" if path.exists() else "nothing"
            raise ConfigError(f"{path}: expected the directory of a run, got {got}; give that of its event files")
        files = sorted(path.resolve().rglob("events.out.tfevents.*"))
        if not files:
            raise ConfigError(
                f"{path}: expected TensorBoard's event files, found none; train with megatron.tensorboard-dir, and "
                "give its directory"
            )
        for file in files:
            together = found.setdefault(file.parent, [])
            if file not in together:
                together.append(file)
    runs = [_read_run(name, found[directory]) for directory, name in _names(list(found)).items()]
    for run, directory in zip(runs, found, strict=True):
        if not run.training and not run.validation:
            notes = "; ".join(["", *run.notes])
            raise ConfigError(
                f"{directory}: expected the numbers of a run, its event files have none{notes}; wait for its first "
                "step, or leave it out"
            )
    return runs


def _names(directories: Sequence[Path]) -> dict[Path, str]:
    """What tells them apart: the last part of the path that is not `tensorboard` or `tb`, or as many as it takes."""
    parts = {it: [part for part in it.parts if part not in ("tensorboard", "tb")] or [it.name] for it in directories}
    for length in range(1, max(map(len, parts.values())) + 1):
        names = {it: "/".join(of[-length:]) for it, of in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {it: str(it) for it in directories}


# One file, of one job ---------------------------------------------------------------------------------------


@dataclass
class _File:
    scalars: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    first: float = math.inf
    last: float = -math.inf
    samples: int | None = None
    note: str | None = None

    def first_step(self) -> float:
        """Of training; infinite without any."""
        steps = [step for name, of in self.scalars.items() if not _VALIDATION.fullmatch(name) for step in of]
        return min(steps, default=math.inf)


def _read_file(path: Path) -> _File:
    from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]

    read = _File()
    for record in _records(path, read):
        event = Event.FromString(record)
        read.first, read.last = min(read.first, event.wall_time), max(read.last, event.wall_time)
        for value in event.summary.value:
            if value.metadata.plugin_data.plugin_name == "text":
                texts = value.tensor.string_val
                read.texts[value.tag.removesuffix("/text_summary")] = b"".join(texts).decode(errors="replace")
            elif value.HasField("simple_value"):
                if not value.tag.endswith(" vs samples"):
                    read.scalars.setdefault(value.tag, {}).setdefault(event.step, []).append(value.simple_value)
                elif " validation" not in value.tag:
                    read.samples = event.step
    return read


def _records(path: Path, read: _File) -> Iterator[bytes]:
    """TensorBoard's reader ends at the first record that is not sound without a word; here that is noted."""
    from tensorboard.backend.event_processing.event_file_loader import (  # type: ignore[import-untyped]
        RawEventFileLoader,
    )

    framing = struct.calcsize("<QII")  # length, checksum of the length, checksum of the record
    try:
        size, taken = path.stat().st_size, 0
        for record in RawEventFileLoader(str(path)).Load():
            taken += len(record) + framing
            yield record
    except OSError as error:
        read.note = f"{path.name} cannot be read ({error.strerror}) and is left out"
        return
    if taken < size:
        read.note = f"{path.name} is damaged or was being written: what comes after byte {taken} of {size} is left out"


# Several files, in their order ---------------------------------------------------------------------------------


def _read_run(name: str, paths: Sequence[Path]) -> Run:
    run = Run(name)
    files = sorted(zip(map(_read_file, paths), paths, strict=True), key=lambda it: (it[0].first, it[1].name))
    run.notes += [file.note for file, _ in files if file.note]
    started = [file for file, _ in files if file.first < math.inf]
    run.started = started[0].first if started else 0.0
    for file in started:
        run.seconds += file.last - file.first
        run.samples = file.samples if file.samples is not None else run.samples
        if file.texts and (file.scalars or not run.arguments):  # not of a job that only evaluates
            run.arguments = {key: text for key, text in file.texts.items() if key != CONFIG_TEXT}
            run.config = dedent(file.texts[CONFIG_TEXT]) if CONFIG_TEXT in file.texts else None
        _forget_from(run, file.first_step())
        _add(run, file)
    for curves in (run.training, *run.validation.values()):
        for key, curve in curves.items():
            curves[key] = dict(sorted(curve.items()))
    return run


def _forget_from(run: Run, step: float) -> None:
    """What a job had trained beyond the checkpoint that the next one went on from is not of this run."""
    beyond = run.last_step
    if beyond < step:
        return
    if run.training:
        run.notes.append(
            f"steps {step:.0f} to {beyond} were trained before and again by a later job, whose numbers are shown"
            if step < beyond
            else f"step {beyond} was trained twice; the later job's numbers are shown"
        )
    for curves in (run.training, *run.validation.values()):
        for key, curve in list(curves.items()):
            curves[key] = {at: value for at, value in curve.items() if at < step}
            if not curves[key]:
                del curves[key]
    run.validation = {name: curves for name, curves in run.validation.items() if curves}


def _add(run: Run, file: _File) -> None:
    if file.scalars:
        run.test = {}  # it is of the last job alone: the others were not at their end
    for tag, values in file.scalars.items():
        if not (match := _VALIDATION.fullmatch(tag)):
            run.training.setdefault(tag, {}).update({step: numbers[-1] for step, numbers in values.items()})
            continue
        name, of_set, perplexity = match.groups()
        if perplexity:
            continue
        of_set, last = of_set or "", max(values)
        curve = run.validation.setdefault(of_set, {}).setdefault(name, {})
        curve.update({step: numbers[0] for step, numbers in values.items()})
        if _ends_with_test(run, file, last, len(values[last])):
            run.test.setdefault(of_set, {})[name] = (last, values[last][-1])


def _ends_with_test(run: Run, file: _File, step: int, times: int) -> bool:
    """Whether the last of so many numbers of the last step is the test split's: one more than validation has."""
    interval, trained = run.integer("eval_interval"), file.first_step() <= step
    while_training = bool(interval and step % interval == 0 and trained)
    validates, tests = run.integer("do_valid"), run.integer("do_test")
    return bool(tests) and times == (while_training + 1 if validates else 0) + 1


def known(curve: Mapping[int, float]) -> Curve:
    """Without NaN and infinities."""
    return {step: value for step, value in curve.items() if math.isfinite(value)}


def numbers_missing(curve: Mapping[int, float]) -> list[tuple[int, int, str]]:
    """Where a curve has no number: (first step, last step, "NaN" or "infinite"), neighbors together."""
    found: list[tuple[int, int, str]] = []
    before: str | None = None
    for step, value in curve.items():
        what = None if math.isfinite(value) else "NaN" if math.isnan(value) else "infinite"
        if what is not None and what == before:
            found[-1] = (found[-1][0], step, what)
        elif what is not None:
            found.append((step, step, what))
        before = what
    return found
