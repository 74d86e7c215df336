"""Acceptance run on a machine with NVIDIA GPUs: ``make gpu``, or ``python benchmarks/gpu.py``.

Each stage runs in a separate process with a time limit, so a crash, hang or out-of-memory error affects that stage
only. The run has a time budget; stages beyond it are reported as skipped.

Prints a table and writes a JSON file. Without a GPU, or with ``--dry-run``, it prints the plan only.

Exit status:
    0: all stages that can run on this machine passed, or nothing ran (no GPU, ``--dry-run``).
    1: a stage failed, timed out, or was not started for lack of time.
    2: the command line is invalid; or torch cannot be imported, or does not find an existing GPU.

This file imports neither torch nor the package, so that a broken installation can be reported. The stages are in
``gpu_stages.py``.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STAGES = Path(__file__).with_name("gpu_stages.py")
PASSED, FAILED, TIMED_OUT, SKIPPED = "passed", "failed", "timed out", "skipped"
# Seconds of the run, with one GPU and with several.
BUDGET_OF_ONE, BUDGET_OF_SEVERAL = 600.0, 1500.0
# Minimum time left to start a stage; importing torch and Megatron takes most of it.
LEAST_SECONDS = 20.0
LINES_OF_OUTPUT = 40
NO_TIME = "out of time"
PACKAGES = (
    *("torch", "triton", "megatron-core", "transformer-engine", "apex", "nvidia-modelopt", "numpy"),
    *("sentencepiece", "pytest", "abkd-megatron"),
)


@dataclass(frozen=True)
class Stage:
    """One part of the run."""

    name: str
    shows: str
    """What it tests, for the table."""
    limit: float
    """Seconds after which it is killed."""
    words: tuple[str, ...] = ()
    """Arguments of `gpu_stages.py`."""
    gpus: int = 1
    ranks: int = 1
    """Number of torchrun processes. A training stage is one process that starts torchrun itself."""
    modules: tuple[str, ...] = ()
    """Modules that must be installed."""
    after: tuple[str, ...] = ()
    """Stages that must have passed, because this one uses their output."""


@dataclass
class Outcome:
    """Outcome of a stage."""

    name: str
    shows: str
    result: str
    seconds: float = 0.0
    why: str = ""
    """Reason if it was skipped or did not pass."""
    summary: str = ""
    """Its main numbers."""
    numbers: dict[str, Any] = field(default_factory=dict)
    output: list[str] = field(default_factory=list)
    """Its last lines, if it failed or timed out."""


@dataclass(frozen=True)
class Machine:
    """Hardware of this machine."""

    device: str
    gpus: tuple[str, ...]
    """Their names."""
    problem: str = ""
    """The error, if GPUs could not be queried."""


RANKS_PER_GPU = "RANKS_PER_GPU"
"""Variable that `--ranks-per-gpu` sets for the stages."""

TRAINING = ("megatron.training", "sentencepiece", "psutil")
TE = "transformer_engine"


def stages() -> list[Stage]:
    """Return all stages, the most important first."""
    kernel = {
        name: Stage(
            f"kernel {name}",
            f"the {name} kernel equals the fp64 definition, loss and gradient, V = 128256 and 151936, bf16",
            limit,
            ("kernel", name),
            modules=modules,
        )
        for name, limit, modules in (
            ("triton", 90, ("torch", "triton")),
            ("eager", 60, ("torch",)),
            ("cpp", 150, ("torch",)),
        )
    }

    def train(name: str, shows: str, *settings: str, gpus: int = 1, spec: str = "local") -> Stage:
        modules = TRAINING if spec == "local" else (*TRAINING, TE)
        after = ("data",) if gpus == 1 else (f"train {spec}",)
        words = ("train", "--spec", spec, "--ranks", str(gpus), *settings)
        return Stage(f"train {name}", shows, 150, words, gpus=gpus, modules=modules, after=after)

    def of_teacher(**sizes: int) -> tuple[str, ...]:
        return tuple(f"teacher.{name}-model-parallel-size={size}" for name, size in sizes.items())

    tp, pp = "megatron.tensor-model-parallel-size=2", "megatron.pipeline-model-parallel-size=2"
    vpp = "megatron.num-layers-per-virtual-pipeline-stage"
    dp = tuple(
        f"megatron.{name}=true" for name in ("use-distributed-optimizer", "overlap-grad-reduce", "overlap-param-gather")
    )
    as_one = "losses and gradient norms of every step as on one GPU, within 2e-2; the head is fused"
    return [
        Stage("versions", "driver, CUDA, NCCL, GPUs, packages; every tensor operation needs them", 60, ("versions",)),
        Stage("tests", "all of tests/gpu", 240, ("tests",), modules=("torch", "pytest")),
        kernel["triton"],
        kernel["eager"],
        Stage("data", "text becomes a tokenizer and Megatron's datasets", 60, ("data",), modules=TRAINING),
        train("local", "megatron.training.pretrain with a teacher, bf16, Megatron's local layer spec: kd loss falls"),
        train("te", "the same with TransformerEngine's layer spec", spec="te"),
        train("TP 2", as_one, tp, gpus=2),
        train("PP 2", as_one, pp, gpus=2),
        train("PP 2 x VPP 2", f"interleaved schedule: {as_one}", pp, f"{vpp}=1", gpus=2),
        train("DP 2", f"distributed optimizer, overlap-param-gather: {as_one}", *dp, gpus=2),
        train("DP 2, teacher TP 2", f"independent teacher: {as_one}", *dp, *of_teacher(tensor=2), gpus=2),
        train("DP 2, teacher PP 2", f"independent teacher: {as_one}", *dp, *of_teacher(pipeline=2), gpus=2),
        train("PP 2, teacher PP 1", f"independent teacher: {as_one}", pp, *of_teacher(pipeline=1), gpus=2),
        train("TE, TP 2 + SP", f"as te: {as_one}", tp, "megatron.sequence-parallel=true", gpus=2, spec="te"),
        train(
            "TE, TP 2, hybrid teacher",
            f"a GPTModel's checkpoint as a HybridModel, as te: {as_one}",
            *(tp, "teacher.hybrid-layer-pattern=*-*-*-*-", "teacher.num-layers=null"),
            gpus=2,
            spec="te",
        ),
        train("TE, CP 2", f"as te: {as_one}", "megatron.context-parallel-size=2", gpus=2, spec="te"),
        train("TE, TP 2, int8 teacher", f"as te: {as_one}", tp, "teacher.weights=int8", gpus=2, spec="te"),
        train("TE, PP 2, teacher on the host", f"as te: {as_one}", pp, "teacher.weights=host", gpus=2, spec="te"),
        train("packed", "documents packed into rows, as te: kd loss falls", spec="packed"),
        train("packed, PP 2", f"as packed: {as_one}", pp, gpus=2, spec="packed"),
        train("TP 2 x PP 2", as_one, tp, pp, gpus=4),
        Stage(
            "kernel triton, TP 2",
            "the same over two ranks and NCCL, each with half of the vocabulary",
            90,
            ("kernel", "triton"),
            gpus=2,
            ranks=2,
            modules=("torch", "triton"),
        ),
        Stage("loss", "time and memory of the loss", 90, ("loss",), modules=("torch",)),
        Stage(
            "tiles",
            "time of each candidate tile of the Triton kernels: the rows of kernels/tiles.py for this GPU",
            120,
            ("tiles",),
            modules=("torch", "triton"),
        ),
        Stage("head", "time and memory of the fused head; its gradients", 90, ("head",), modules=("torch",)),
        Stage("step", "a distilled step beside the student's and the teacher's", 240, ("step",), modules=TRAINING),
        Stage("loss, TP 2", "the same over two ranks and NCCL", 90, ("loss",), gpus=2, ranks=2, modules=("torch",)),
        kernel["cpp"],
    ]


# ---- one stage


def run_stage(
    stage: Stage, seconds: float, work: Path, device: str, size: str, python: str = sys.executable
) -> Outcome:
    """Run a stage in a separate process group; kill the group after `seconds`."""
    outcome = Outcome(stage.name, stage.shows, FAILED)
    name = re.sub(r"\W+", "-", stage.name)
    result, log = work / f"{name}.json", work / f"{name}.log"
    result.unlink(missing_ok=True)
    command = on_ranks(stage.ranks, python) if stage.ranks > 1 else [python]
    command += [str(STAGES), *stage.words, "--device", device, "--size", size]
    command += ["--work", str(work), "--result", str(result)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        # Required by Megatron for tensor parallelism on GPUs before Blackwell.
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    start = time.monotonic()
    with log.open("wb") as file:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            kill_tree(child)  # including processes that outlive the stage
    outcome.seconds = time.monotonic() - start
    with suppress(OSError, ValueError):
        said = json.loads(result.read_text())
        outcome.summary, outcome.numbers = said["summary"], said["numbers"]
        outcome.why = "; ".join(said["problems"])
        if code == 0 and said["skipped"]:
            outcome.result, outcome.why = SKIPPED, said["skipped"]
            return outcome
        if code == 0 and not said["problems"]:
            outcome.result = PASSED
            return outcome
    if code is None:
        outcome.result, outcome.why = TIMED_OUT, f"killed after {seconds:.0f} s"
    elif not outcome.why:
        outcome.why = ended_by(code)
    outcome.output = last_lines(log.read_text(errors="replace"))
    return outcome


def on_ranks(number: int, python: str, *options: str) -> list[str]:
    """Return the words that start a Python program on several ranks of this machine, which follow them.

    Args:
        number: of ranks.
        python: the interpreter.
        options: further options of torchrun.
    """
    shared = int(os.environ.get(RANKS_PER_GPU, "1"))
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number), *options]
    if shared == 1:
        return command
    # Megatron takes the local rank as the number of the GPU.
    return [*command, "--no-python", "bash", "-c", f'LOCAL_RANK=$((LOCAL_RANK / {shared})) exec "$@"', "-", python]


def ended_by(code: int) -> str:
    """Describe an exit code."""
    if code == 0:
        return "ended without a result"
    if code < 0:
        with suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


def last_lines(log: str) -> list[str]:
    """Return the last lines of a log, without torchrun's report on failed processes."""
    own = re.split(r"^E\d{4} .* failed \(exitcode: ", log, maxsplit=1, flags=re.MULTILINE)[0]
    return own.splitlines()[-LINES_OF_OUTPUT:]


def kill_tree(child: subprocess.Popen) -> None:
    """Kill a child and its descendants; torchrun's ranks are in other sessions."""
    for pid in [*descendants(child.pid), child.pid]:
        if pid == child.pid and child.poll() is not None:
            continue
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def descendants(pid: int) -> list[int]:
    """Return the descendants of a process from /proc; none without /proc."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            # The name, in parentheses, may have any characters.
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(status.parent.name))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


# ---- all of them


def why_not(stage: Stage, machine: Machine, done: dict[str, str], chosen: Collection[str]) -> str:
    """Return the reason why a stage cannot run here; empty if it can.

    Args:
        stage: the stage.
        machine: this machine.
        done: results of earlier stages, by name.
        chosen: names of all stages of this run.
    """
    if stage.gpus > len(machine.gpus) * int(os.environ.get(RANKS_PER_GPU, "1")):
        return f"needs {stage.gpus} GPUs, found {len(machine.gpus)}"
    if absent := [name for name in stage.modules if not is_installed(name)]:
        return f"needs {', '.join(absent)}, not installed"
    for name in stage.after:
        if name in chosen and done.get(name, PASSED) != PASSED:
            return f"needs {name}, which {'was ' if done[name] == SKIPPED else ''}{done[name]}"
    return ""


def is_installed(module: str) -> bool:
    """Return whether a module can be found; imports its parents only."""
    try:
        return importlib.util.find_spec(module) is not None
    except Exception:  # a broken parent
        return False


def run_all(
    chosen: Sequence[Stage],
    machine: Machine,
    budget: float,
    work: Path,
    size: str,
    after_each: Callable[[list[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """Run stages in order for at most `budget` seconds."""
    end = time.monotonic() + budget
    outcomes: list[Outcome] = []
    for number, stage in enumerate(chosen, 1):
        done = {outcome.name: outcome.result for outcome in outcomes}
        left = end - time.monotonic()
        why = why_not(stage, machine, done, [other.name for other in chosen])
        if not why and left < min(LEAST_SECONDS, stage.limit):
            why = f"{NO_TIME}: {max(left, 0):.0f} of {budget:.0f} s were left"
        if why:
            outcomes.append(Outcome(stage.name, stage.shows, SKIPPED, why=why))
        else:
            say(f"[{number}/{len(chosen)}] {stage.name}: at most {min(stage.limit, left):.0f} s")
            try:
                outcomes.append(run_stage(stage, min(stage.limit, left), work, machine.device, size))
            except OSError as error:
                outcomes.append(Outcome(stage.name, stage.shows, FAILED, why=f"could not be started: {error}"))
        one = outcomes[-1]
        say(f"[{number}/{len(chosen)}] {one.name}: {one.result}" + (f" ({one.why})" if one.why else ""))
        after_each(outcomes)
    return outcomes


def exit_status(outcomes: Sequence[Outcome]) -> int:
    """Return the exit status, see the module."""
    bad = [one for one in outcomes if one.result in (FAILED, TIMED_OUT) or one.why.startswith(NO_TIME)]
    return 1 if bad else 0


# ---- output


def say(text: str) -> None:
    """Print progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def table(rows: Sequence[tuple[str, str, str, str]], titles: tuple[str, str, str, str], width: int = 120) -> str:
    """Format four columns; the last one is wrapped."""
    widths = [max(len(row[index]) for row in [titles, *rows]) for index in range(3)]
    indent = sum(widths) + 2 * 3
    lines = []
    for row in [titles, *rows]:
        head = "".join(f"{cell:<{of}}  " for cell, of in zip(row, widths, strict=False))
        wrapped = textwrap.wrap(row[3], max(width - indent, 30), break_long_words=False) or [""]
        lines += [(head + wrapped[0]).rstrip(), *(" " * indent + more for more in wrapped[1:])]
    lines.insert(1, "-" * width)
    return "\n".join(lines)


def result_table(outcomes: Sequence[Outcome]) -> str:
    """Format the outcomes of the stages."""
    rows = []
    for one in outcomes:
        text = "; ".join(filter(None, [one.why, one.summary])) or one.shows
        rows.append((one.name, one.result, f"{one.seconds:.0f} s" if one.seconds else "", text))
    return table(rows, ("stage", "result", "time", "what was found"))


def plan_table(chosen: Sequence[Stage]) -> str:
    """Format the plan for a machine with GPUs, with the modules that are missing here."""
    rows = []
    for stage in chosen:
        absent = [name for name in stage.modules if not is_installed(name)]
        needs = f"{stage.gpus} GPU{'s' if stage.gpus > 1 else ''}"
        shows = stage.shows + (f" (here without {', '.join(absent)})" if absent else "")
        rows.append((stage.name, needs, f"{stage.limit:.0f} s", shows))
    return table(rows, ("stage", "needs", "at most", "what it shows"))


def versions() -> dict[str, str]:
    """Return the versions of Python and of installed packages."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def look(device: str) -> Machine:
    """Return the GPUs that torch finds, queried in a separate process because a broken driver may crash it."""
    if device == "cpu":
        return Machine("cpu", ("cpu rank", "cpu rank"))
    code = "import torch; print([torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())])"
    try:
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return Machine("cuda", (), "torch did not answer within 120 s")
    if ended.returncode != 0:
        lines = ended.stderr.strip().splitlines()
        return Machine("cuda", (), f"torch: {lines[-1] if lines else ended_by(ended.returncode)}")
    names = tuple(re.findall(r"'([^']*)'", ended.stdout.strip().splitlines()[-1]))
    hidden = "" if names or os.environ.get("CUDA_VISIBLE_DEVICES") == "" else listed_by_driver()
    return Machine("cuda", names, f"torch finds none, nvidia-smi lists {hidden}" if hidden else "")


def listed_by_driver() -> str:
    """Return the GPUs that nvidia-smi lists; empty without any."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        said = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ", ".join(re.findall(r"^GPU \d+: (.*?)(?: \(UUID|$)", said, re.MULTILINE))


def choose(names: Sequence[str] | None) -> list[Stage]:
    """Return the named stages and their dependencies; all stages without names.

    Raises:
        ValueError: a name is unknown.
    """
    every = {stage.name: stage for stage in stages()}
    if not names:
        return list(every.values())
    wanted: set[str] = set()

    def add(name: str) -> None:
        if name not in every:
            raise ValueError(f"no stage {name!r}; there are: {'; '.join(every)}")
        wanted.add(name)
        for before in every[name].after:
            add(before)

    for name in names:
        add(name)
    return [stage for stage in every.values() if stage.name in wanted]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: benchmarks/results/gpu.json")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="this stage and those it needs; may be repeated"
    )
    parser.add_argument("--budget-seconds", type=float, metavar="N", help="default: 600 with one GPU, 1500 with more")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where to leave logs, data and checkpoints")
    parser.add_argument(
        "--ranks-per-gpu", type=int, default=1, metavar="N", help="run the stages of several GPUs on fewer; NCCL 2.30"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and end")
    # For the tests of this script: the same stages on CPU ranks, tiny.
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    try:
        chosen = choose(given.only)
    except ValueError as error:
        parser.error(str(error))
    if given.ranks_per_gpu > 1:
        os.environ |= {RANKS_PER_GPU: str(given.ranks_per_gpu), "NCCL_MULTI_RANK_GPU_ENABLE": "1"}
    machine = look(given.device)
    budget = given.budget_seconds or (BUDGET_OF_SEVERAL if len(machine.gpus) > 1 else BUDGET_OF_ONE)
    if given.dry_run or not machine.gpus:
        if machine.problem:
            print(f"Nothing was run: {machine.problem}.")
        elif not machine.gpus:
            print("No NVIDIA GPU was found on this machine, so nothing was run.")
        found = f"; found: {', '.join(machine.gpus)}" if machine.gpus else ""
        print(f"What would run, within {budget:.0f} seconds{found}:\n")
        print(plan_table(chosen))
        return 2 if machine.problem else 0

    out = given.out or Path(__file__).parent / "results" / "gpu.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    work = given.work or Path(tempfile.mkdtemp(prefix="abkd_gpu_"))
    work.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()

    def write(outcomes: list[Outcome]) -> None:
        report = {
            "device": machine.device,
            "gpus": machine.gpus,
            "ranks per GPU": given.ranks_per_gpu,
            "versions": versions(),
            "budget seconds": budget,
            "seconds": round(time.monotonic() - start, 1),
            "stages": [asdict(one) for one in outcomes],
            "complete": len(outcomes) == len(chosen),
        }
        # Atomic, because the run may be interrupted at any time.
        partial = out.with_suffix(".partial")
        partial.write_text(json.dumps(report, indent=1) + "\n")
        partial.replace(out)

    try:
        outcomes = run_all(chosen, machine, budget, work, given.size, write)
    finally:
        if given.work is None:
            shutil.rmtree(work, ignore_errors=True)
    for one in outcomes:
        if one.output:
            print(f"---- {one.name}, last lines\n" + "\n".join(one.output) + "\n")
    print(f"{', '.join(machine.gpus)}; {', '.join(f'{name} {version}' for name, version in versions().items())}\n")
    print(result_table(outcomes))
    print(f"\nwritten: {out}")
    return exit_status(outcomes)


if __name__ == "__main__":
    sys.exit(main())
