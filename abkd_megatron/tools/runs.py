"""Jobs of this package as child processes: ending them, reading their logs, showing how far they are."""

import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field

from abkd_megatron.errors import HostError

SHORT_NAMES = {"lm loss": "CE", "kd loss": "KD", "kl to teacher": "KL", "top-1 agreement": "top-1"}
SECONDS_BETWEEN_LINES = 10  # where the output is not a terminal


def end(child: subprocess.Popen) -> None:
    """End a child that still runs; the launcher ends its own processes when it is told to."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(timeout=45)  # the launcher gives its processes 30 seconds
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


# What a log says ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """How far a job is."""

    done: int = 0
    total: int = 0
    """0 as long as nothing is known."""
    numbers: dict[str, float] = field(default_factory=dict)
    """The losses of the last line, to be shown while it runs: means since the line before, the first step twice."""


_STEP = re.compile(r"^ \[[^]\n]+\] iteration +(\d+)/ *(\d+) \|(.*\|) *\n", re.MULTILINE)
_EVALUATED = re.compile(r"^Evaluating iter \d+/(\d+)\n", re.MULTILINE)
_ENCODED = re.compile(r"^encoding: (\d+)/(\d+) documents\n", re.MULTILINE)
_VALIDATED = re.compile(r"^ *validation loss at iteration (\d+) \|(.*)\n", re.MULTILINE)
_CONCLUDED = re.compile(r"^ *validation loss at iteration \d+ on (validation|test) set \|(.*)\n", re.MULTILINE)


def last_lines(log: str) -> str:
    """The last 30 lines of a failed job, without the launcher's own long farewell after them."""
    own = re.split(r"^E\d{4} .* failed \(exitcode: ", log, maxsplit=1, flags=re.MULTILINE)[0]
    return "\n".join(own.splitlines()[-30:])


def numbers(line: str) -> dict[str, float]:
    """The numbers of one of Megatron's lines: `name: value | name: value |`."""
    found = {}
    for entry in line.split("|"):
        name, _, value = entry.rpartition(":")
        with suppress(ValueError):
            found[name.strip()] = float(value)
    return found


def progress(log: str) -> Progress:
    """How far a log has come: training steps, else evaluation batches, else encoded documents."""
    if steps := _STEP.findall(log):
        done, total, line = steps[-1]
        return Progress(int(done), int(total), {k: v for k, v in numbers(line).items() if k in SHORT_NAMES})
    if batches := _EVALUATED.findall(log):
        return Progress(len(batches), 2 * int(batches[-1]))  # the validation split, then the test split
    if documents := _ENCODED.findall(log):
        return Progress(int(documents[-1][0]), int(documents[-1][1]))
    return Progress()


def validations(log: str) -> dict[int, dict[str, float]]:
    """What Megatron reports on the validation split, by iteration; no means, as losses of training are."""
    return {int(iteration): _values(line) for iteration, line in _VALIDATED.findall(log)}


def evaluated(log: str) -> dict[str, float]:
    """What Megatron reports at the end on the test split; its line says `validation loss` for that one too.

    Raises:
        HostError: if there is no such line.
    """
    lines = [line for split, line in _CONCLUDED.findall(log) if split == "test"]
    if not lines:
        raise HostError(
            "expected Megatron's report on the test split in the log, found none; give `megatron.split` (or "
            "data.held_out) a test split, and megatron.eval-iters above 0"
        )
    return _values(lines[-1])


def _values(line: str) -> dict[str, float]:
    return {name.removesuffix(" value"): it for name, it in numbers(line).items() if name.endswith(" value")}


# How it is shown --------------------------------------------------------------------------------------


class Line:
    """One line that is rewritten on a terminal, and printed anew every few seconds elsewhere."""

    def __init__(self) -> None:
        self._printed = time.monotonic()
        self._terminal = sys.stdout.isatty()

    def show(self, text: str) -> None:
        """Show how far it is."""
        now = time.monotonic()
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{text[:width]}\x1b[K", end="", flush=True)
        elif now - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = now
            print(text, flush=True)

    def finish(self, text: str) -> None:
        """Leave the last state standing."""
        print(f"\r{text}\x1b[K" if self._terminal else text, flush=True)


class Pace:
    """How long it takes still, from how far it has come since it was first asked; from a hundredth of the way on."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self._first: tuple[float, float] | None = None

    @property
    def elapsed(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self.started

    def left(self, done: float, total: float) -> float | None:
        """Seconds, or None as long as nothing is known."""
        now = time.monotonic()
        if not total:
            return None
        if self._first is None:
            self._first = (now, done)
        since, first = self._first
        known = done - first >= 0.01 * total and done < total
        return (now - since) / (done - first) * (total - done) if known else None


def clock(seconds: float) -> str:
    """Minutes and seconds; hours, if there are any."""
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours}:{minutes:02}:{int(seconds) % 60:02}" if hours else f"{minutes}:{int(seconds) % 60:02}"
