"""Jobs of this package as child processes: termination, logs and progress."""

import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field

from abkd_megatron.errors import HostError

SHORT_NAMES = {"lm loss": "CE", "kd loss": "KD", "kl to teacher": "KL", "top-1 agreement": "top-1"}
SECONDS_BETWEEN_LINES = 10  # if the output is not a terminal


def end(child: subprocess.Popen) -> None:
    """Terminate a child if it is running. On SIGTERM the launcher ends its own processes."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(timeout=45)  # the launcher gives its processes 30 seconds
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


# Logs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """Progress of a job."""

    done: int = 0
    total: int = 0
    """0 until it is known."""
    numbers: dict[str, float] = field(default_factory=dict)
    """Losses of the last line: means since the line before. Megatron counts the first step twice."""
    doing: str = ""
    """What a job that trains does between its steps: ``saving``, or ``evaluating`` with its batches."""


_STEP = re.compile(r"^ \[[^]\n]+\] iteration +(\d+)/ *(\d+) \|(.*\|) *\n", re.MULTILINE)
_EVALUATED = re.compile(r"^Evaluating iter \d+/(\d+)\n", re.MULTILINE)
_ENCODED = re.compile(r"^encoding: (\d+)/(\d+) documents\n", re.MULTILINE)
_SAVING = re.compile(r"(successfully saved|saving) checkpoint ")
_CONCLUDED = re.compile(r"^ *validation loss at iteration \d+ on (validation|test) set \|(.*)\n", re.MULTILINE)


def last_lines(log: str) -> str:
    """Return the last 30 lines of a failed job, without the launcher's failure report."""
    own = re.split(r"^E\d{4} .* failed \(exitcode: ", log, maxsplit=1, flags=re.MULTILINE)[0]
    return "\n".join(own.splitlines()[-30:])


def numbers(line: str) -> dict[str, float]:
    """Parse one of Megatron's lines: `name: value | name: value |`."""
    found = {}
    for entry in line.split("|"):
        name, _, value = entry.rpartition(":")
        with suppress(ValueError):
            found[name.strip()] = float(value)
    return found


def progress(log: str) -> Progress:
    """Return the progress in training steps, else evaluation batches, else encoded documents."""
    step = None
    for step in _STEP.finditer(log):  # noqa: B007  (the last one)
        pass
    if step is not None:
        losses = {name: value for name, value in numbers(step[3]).items() if name in SHORT_NAMES}
        return Progress(int(step[1]), int(step[2]), losses, _between_steps(log[step.end() :]))
    if batches := _EVALUATED.findall(log):
        return Progress(len(batches), 2 * int(batches[-1]))  # the validation split, then the test split
    if documents := _ENCODED.findall(log):
        return Progress(int(documents[-1][0]), int(documents[-1][1]))
    return Progress()


def _between_steps(log: str) -> str:
    """Return what a job does after its last step."""
    batches, saves = list(_EVALUATED.finditer(log)), list(_SAVING.finditer(log))
    if batches and not (saves and saves[-1].start() > batches[-1].start()):
        return f"evaluating {len(batches)}/{2 * int(batches[-1][1])}"  # the validation split, then the test split
    return "saving" if saves and saves[-1][1] == "saving" else ""


def evaluated(log: str) -> dict[str, float]:
    """Return Megatron's final metrics on the test split, whose line also starts with `validation loss`.

    Raises:
        HostError: there is no such line.
    """
    lines = [line for split, line in _CONCLUDED.findall(log) if split == "test"]
    if not lines:
        raise HostError(
            "expected Megatron's report on the test split in the log, found none; set megatron.eval-iters above 0 and "
            "a test split with megatron.split or data.held_out"
        )
    return _values(lines[-1])


def _values(line: str) -> dict[str, float]:
    return {name.removesuffix(" value"): it for name, it in numbers(line).items() if name.endswith(" value")}


# Display ----------------------------------------------------------------------------------------------


class Line:
    """Status line, overwritten on a terminal and printed every `SECONDS_BETWEEN_LINES` elsewhere."""

    def __init__(self) -> None:
        self._printed = time.monotonic()
        self._terminal = sys.stdout.isatty()

    def show(self, text: str) -> None:
        """Show the current status."""
        now = time.monotonic()
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{text[:width]}\x1b[K", end="", flush=True)
        elif now - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = now
            print(text, flush=True)

    def finish(self, text: str) -> None:
        """Print the final status."""
        print(f"\r{text}\x1b[K" if self._terminal else text, flush=True)


class Pace:
    """Estimate of the remaining time, from the progress since the first call of `left`."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self._first: tuple[float, float] | None = None

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def left(self, done: float, total: float) -> float | None:
        """Return the remaining seconds; None before 1 % of progress."""
        now = time.monotonic()
        if not total:
            return None
        if self._first is None:
            self._first = (now, done)
        since, first = self._first
        known = done - first >= 0.01 * total and done < total
        return (now - since) / (done - first) * (total - done) if known else None


def clock(seconds: float) -> str:
    """Format as M:SS, or H:MM:SS from one hour on."""
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours}:{minutes:02}:{int(seconds) % 60:02}" if hours else f"{minutes}:{int(seconds) % 60:02}"
