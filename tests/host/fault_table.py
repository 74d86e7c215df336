"""What is done to a distill job, and how each of its ranks has to end."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from launch import ROOT, Rank, launch

INJECT = Path(__file__).with_name("inject.py")

TP = {"tensor-model-parallel-size": 2}
PP = {"pipeline-model-parallel-size": 2}
DP = {"use-distributed-optimizer": "true", "overlap-grad-reduce": "true"}
VALIDATED = {"eval-interval": 3}
UNHANDLED = {"exit-signal-handler": "false"}
SHORT_TIMEOUT = {"distributed-timeout-minutes": 1}

# A save after every second of six steps; with it goes a signal handler, as in the files for clusters.
SETTINGS = {"train-iters": 6, "save-interval": 2, "exit-signal-handler": "true"}
SECONDS_TO_END = 100
"""What ranks are given to end by themselves when one has failed: more than `distributed-timeout-minutes` is."""
SECONDS_FOR_THE_STOPPED = 3


@dataclass(frozen=True)
class End:
    """How a rank ends."""

    code: int | None
    """None where torchrun starts the ranks: it has one code for all."""
    says: str = ""
    """What is in its output, as a regular expression; the table shows what was found for it."""


KILLED, TERMINATED = End(-9), End(-15)
DONE = End(0, "validation loss at iteration 6 on test set|after training is done")


def lost(where: str) -> End:
    return End(1, f"ended {where} because another rank of the job has ended or cannot be reached")


def late(where: str) -> End:
    return End(1, rf"ended {where} because another rank did not answer for 1 min \(distributed-timeout-minutes\)")


def own(where: str, error: str = "RuntimeError: injected") -> End:
    return End(1, rf"ended {where} by an error on this rank \({error}; traceback above\)")


def unsaved(step: int) -> End:
    return End(1, f"ended in the save after step {step} because the checkpoint could not be written or read")


def saved(step: int, code: int | None = 0) -> tuple[End, End]:
    return (
        End(code, "exiting program after receiving SIGTERM"),
        End(code, f"after save_checkpoint for iteration {step}"),
    )


def refused(message: str) -> End:
    return End(2, f"error: {message}")


@dataclass(frozen=True, eq=False)
class Row:
    fault: str
    where: str
    ends: tuple[End, ...]
    """Of each rank."""
    saved: int | None
    """The step of the last checkpoint afterward, which loads."""
    inject: tuple[str, int, int, str] | None = None
    """Arguments of inject.py: place, step, rank (-1: all), what."""
    settings: Mapping[str, object] = field(default_factory=lambda: PP)
    teacher: str | None = None
    """How the teacher's folder was spoilt, by a name of `SPOILT`."""
    resumed: bool = False
    """Whether the job is then started again and has to come to its end."""
    torchrun: int | None = None
    """The exit code of torchrun, if that starts the ranks: it ends them all when one fails."""

    def __str__(self) -> str:
        return f"{self.fault}, {self.where}" + " (torchrun)" * (self.torchrun is not None)

    @property
    def is_asleep(self) -> bool:
        """Whether it only waits for a minute, for which others need not wait."""
        return self.inject is not None and self.inject[-1] == "SIGSTOP"


IN_3, SAVE_4 = "in step 3", "in the save after step 4"
# On whichever rank it is raised.
EARLY = (refused("ended before the first step by RuntimeError: injected"),) * 2
STEP_3 = {
    "teacher's forward": ("the teacher's forward pass", PP),
    "lane, send": ("sending the teacher's hidden states to the next stage", PP),
    "lane, receive": ("receiving the teacher's hidden states", PP),
    "loss, between collectives": ("the loss, between two collectives", TP),
    "backward": ("the backward pass", PP),
    "optimizer step": ("the optimizer step", DP),
    "data": ("reading a batch", DP),
}


def in_step_3(what: str, place: str, rank: int, end: End, **more: bool) -> Row:
    where, settings = STEP_3[place]
    ends = [lost(IN_3), lost(IN_3)]
    ends[rank] = end
    return Row(what, where, tuple(ends), 2, (place, 3, rank, what), settings, **more)


ROWS = [
    *(
        in_step_3("SIGKILL", place, rank, KILLED, resumed=resumed)
        for place, rank, resumed in (
            ("teacher's forward", 0, True),
            ("lane, receive", 1, False),
            ("loss, between collectives", 0, False),
            ("backward", 1, False),
            ("optimizer step", 1, False),
        )
    ),
    Row(
        "SIGKILL",
        "validation",
        (lost("in validation after step 3"), KILLED),
        2,
        ("validation", 3, 1, "SIGKILL"),
        PP | VALIDATED,
    ),
    Row(
        "SIGKILL", "a save, while a file is written", (lost(SAVE_4), KILLED), 2, ("save", 4, 1, "SIGKILL"), resumed=True
    ),
    Row(
        "SIGKILL",
        "a save, when all files but the index are written",
        (KILLED, lost(SAVE_4)),
        2,
        ("save, all is written", 4, 0, "SIGKILL"),
    ),
    Row(
        "SIGKILL",
        "four ranks, the loss",
        (lost(IN_3), lost(IN_3), KILLED, lost(IN_3)),
        2,
        ("loss, between collectives", 3, 2, "SIGKILL"),
        TP | PP,
    ),
    Row(
        "SIGSTOP",
        "the teacher's forward pass",
        (late(IN_3), KILLED),
        2,
        ("teacher's forward", 3, 1, "SIGSTOP"),
        PP | SHORT_TIMEOUT,
    ),
    Row(
        "SIGSTOP",
        "the loss, between two collectives",
        (KILLED, late(IN_3)),
        2,
        ("loss, between collectives", 3, 0, "SIGSTOP"),
        TP | SHORT_TIMEOUT,
    ),
    Row("slow", "the teacher's forward pass", (DONE, DONE), 6, ("teacher's forward", 3, 1, "slow")),
    Row("slow", "a save", (DONE, DONE), 6, ("save", 4, 0, "slow")),
    Row("raise", "reading the teacher's weights", EARLY, None, ("teacher is read", 0, 0, "raise")),
    Row("raise", "the checks before the first step", EARLY, None, ("preflight", 0, 1, "raise")),
    *(
        in_step_3("raise", place, rank, own(IN_3))
        for place, rank in (
            ("data", 1),
            ("teacher's forward", 1),
            ("lane, send", 0),
            ("lane, receive", 1),
            ("loss, between collectives", 1),
            ("backward", 0),
            ("optimizer step", 0),
        )
    ),
    Row(
        "raise",
        "validation",
        (lost("in validation after step 3"), own("in validation after step 3")),
        2,
        ("validation", 3, 1, "raise"),
        PP | VALIDATED,
    ),
    Row("raise", "a save", (unsaved(4), unsaved(4)), 2, ("save", 4, 0, "raise")),
    Row("full disk", "a save", (unsaved(4), unsaved(4)), 2, ("save", 4, 0, "full disk"), resumed=True),
    Row("full disk", "the first save", (unsaved(2), unsaved(2)), None, ("save", 2, 1, "full disk")),
    Row("SIGTERM", "before the first step", saved(1), 1, ("preflight", 0, 1, "SIGTERM")),
    Row("SIGTERM", "a step", saved(3), 3, ("loss, between collectives", 3, 1, "SIGTERM"), resumed=True),
    Row("SIGTERM", "validation", saved(3), 3, ("validation", 3, 0, "SIGTERM"), PP | VALIDATED),
    Row("SIGTERM", "a save", saved(5), 5, ("save", 4, 0, "SIGTERM")),
    Row(
        "SIGTERM, `exit-signal-handler: false`",
        "a step",
        (lost(IN_3), TERMINATED),
        2,
        ("teacher's forward", 3, 1, "SIGTERM"),
        PP | UNHANDLED,
    ),
    *(
        Row(fault, "the teacher's checkpoint", (refused(message), refused(message)), None, teacher=name)
        for name, fault, message in (
            (
                "truncated",
                "a file of weights is cut off",
                "the teacher's checkpoint is damaged: .* should hold .* bytes and holds",
            ),
            (
                "missing",
                "a file of weights is missing",
                "the teacher's checkpoint is damaged: .* should hold \\d+ bytes and is missing",
            ),
            (
                "flipped",
                "one bit of the weights is another",
                "the teacher's checkpoint is damaged: .* holds other bytes than were written",
            ),
            ("index", "the index is cut off", "the index of the checkpoint in .* cannot be read"),
        )
    ),
    Row(
        "SIGKILL",
        "a step",
        (End(None), End(None, r"Signal 9 \(SIGKILL\) received by PID")),  # torchrun's words
        2,
        ("teacher's forward", 3, 1, "SIGKILL"),
        PP | UNHANDLED,
        torchrun=1,
    ),
    Row(
        "raise",
        "a step",
        (End(None), End(None, own(IN_3).says)),
        2,
        ("teacher's forward", 3, 1, "raise"),
        PP | UNHANDLED,
        torchrun=1,
    ),
    Row(
        "SIGTERM to torchrun",
        "a step",
        saved(3, None),
        3,
        ("teacher's forward", 3, 1, "SIGTERM to the launcher"),
        torchrun=1,
    ),
]


def run(row: Row, config: Path, teacher: Path, save: Path) -> list[Rank]:
    """Run the job, with the fault in it."""
    words = job(config, teacher, save, row.settings)
    words = ["-m", "abkd_megatron", *words] if row.inject is None else [INJECT, *row.inject, "--", *words]
    if row.torchrun is not None:
        return run_by_torchrun(words, len(row.ends), save.with_name(f"{save.name}-logs"))
    seconds = SECONDS_FOR_THE_STOPPED if row.is_asleep else SECONDS_TO_END
    return launch(words, len(row.ends), seconds_after_failure=seconds)


def job(config: Path, teacher: Path, save: Path, settings: Mapping[str, object], **more: object) -> list[object]:
    given = {**SETTINGS, "save": save, **settings, **more}
    return [
        "distill",
        config,
        f"teacher.load={teacher}",
        *(f"megatron.{name}={value}" for name, value in given.items()),
    ]


def run_by_torchrun(words: Sequence[object], num_ranks: int, logs: Path) -> list[Rank]:
    """The same under torchrun; each rank has torchrun's exit code and, behind its own output, torchrun's."""
    options = ["--standalone", "--nproc-per-node", num_ranks, "--log-dir", logs, "--redirects", 3]
    command = [str(word) for word in (sys.executable, "-m", "torch.distributed.run", *options, *words)]
    # A busy machine may take longer to save than torchrun waits.
    mark = {"FAULT_TABLE_LOGS": str(logs), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **mark}
    agent = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    ended = time.time()
    for process in psutil.process_iter():  # what a killed rank has left behind, as in launch()
        with suppress(psutil.Error):
            if mark.items() <= process.environ().items():
                process.kill()
    outputs = [
        "".join(file.read_text() for file in logs.glob(f"*/attempt_0/{rank}/*.log")) for rank in range(num_ranks)
    ]
    return [Rank(agent.returncode, output + agent.stderr, ended) for output in outputs]


def _largest(teacher: Path) -> Path:
    return max(teacher.rglob("*.distcp"), key=lambda file: file.stat().st_size)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


SPOILT: dict[str, Callable[[Path], object]] = {
    "truncated": lambda teacher: _cut(_largest(teacher)),
    "missing": lambda teacher: _largest(teacher).unlink(),
    "flipped": lambda teacher: _flip(_largest(teacher)),
    "index": lambda teacher: _cut(next(teacher.rglob(".metadata"))),
}


def spoil(teacher: Path, how: str, to: Path) -> Path:
    """A copy of a teacher's folder with one fault."""
    shutil.copytree(teacher, to)
    SPOILT[how](to)
    return to
