"""Time of a complete training step with and without a teacher, in Megatron on CPU ranks: python benchmarks/step.py.

For each layout (tensor, pipeline or data parallelism of 2) these jobs run in turn for several rounds: the student only,
the teacher's forward pass only (Megatron's evaluation), distillation, and distillation with another teacher layout. The
overhead of the plugin is the time of the distilled step minus the first two: second logits, loss, communication,
report.

Times are measured by Megatron: the median over iterations after a warm-up, then over rounds. Writes OUT/step.json and
prints a table. The models are small, so only ratios are meaningful.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TP, PP = "tensor-model-parallel-size", "pipeline-model-parallel-size"
# {name: (student layout, {name: other teacher layout})}.
LAYOUTS: dict[str, tuple[dict[str, int], dict[str, dict[str, int]]]] = {
    "TP 2": ({TP: 2}, {}),
    "PP 2": ({PP: 2}, {"teacher PP 1": {PP: 1}}),
    "DP 2": ({}, {"teacher TP 2": {TP: 2}, "teacher PP 2": {PP: 2}}),
}
WARM_UP = 3

STUDENT = {"num-layers": 4, "hidden-size": 256, "ffn-hidden-size": 512, "num-attention-heads": 8}
TEACHER = {"num-layers": 8, "hidden-size": 512, "ffn-hidden-size": 1024, "num-attention-heads": 8}
COMMON = {
    "seq-length": 128,
    "max-position-embeddings": 128,
    "position-embedding-type": "rope",
    "normalization": "RMSNorm",
    "swiglu": "true",
    "disable-bias-linear": "true",
    "untie-embeddings-and-output-weights": "true",
    "micro-batch-size": 4,
    "global-batch-size": 16,
    "lr": 0.0001,
    "log-interval": 1,
    "eval-interval": 1000,
    "ckpt-format": "torch_dist",
    "mock-data": "true",
    "tokenizer-type": "NullTokenizer",
}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="Time whole training steps with and without a teacher.")
    parser.add_argument("--vocab", type=int, default=8191, help="true vocabulary size")
    parser.add_argument("--iterations", type=int, default=12, help="per job, after the warm-up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    common = {**COMMON, "vocab-size": arguments.vocab}

    with tempfile.TemporaryDirectory() as scratch:
        teacher = Path(scratch) / "teacher"
        settings = {**common, **TEACHER, "train-iters": 1, "save": teacher, "save-interval": 1, "eval-iters": 0}
        run("pretrain", settings, {}, num_ranks=1)
        results = {
            name: measure(name, {**common, **layout}, own, teacher, arguments)
            for name, (layout, own) in LAYOUTS.items()
        }

    arguments.out.mkdir(parents=True, exist_ok=True)
    report = {
        "seconds a step": results,
        "settings": {"student": STUDENT, "teacher": TEACHER, **common},
        "rounds": arguments.rounds,
        "iterations": arguments.iterations,
        "torch": version("torch"),
        "megatron-core": version("megatron-core"),
    }
    (arguments.out / "step.json").write_text(json.dumps(report, indent=2, default=str) + "\n")
    print_table(results)


def measure(
    name: str,
    layout: dict[str, Any],
    own: dict[str, dict[str, int]],
    teacher: Path,
    arguments: argparse.Namespace,
) -> dict[str, list[float]]:
    """Return the seconds per step of the jobs in one layout, one number per round."""
    steps = WARM_UP + arguments.iterations
    training = {**layout, **STUDENT, "train-iters": steps, "eval-iters": 0}
    evaluation = {**layout, **TEACHER, "load": teacher, "skip-train": "true", "train-iters": 1, "eval-iters": steps}
    overrides = {"teacher.load": teacher, **{f"teacher.{key}": value for key, value in TEACHER.items()}}
    distilled = {"distilled": {}, **{f"distilled, {where}": sizes for where, sizes in own.items()}}
    found: dict[str, list[float]] = {job: [] for job in ("student alone", "teacher forward", *distilled)}
    for number in range(arguments.rounds):
        print(f"{name}: round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
        found["student alone"].append(step_seconds(run("pretrain", training, {})))
        found["teacher forward"].append(evaluation_seconds(run("pretrain", evaluation, {}), steps))
        for job, sizes in distilled.items():
            beside = {**overrides, **{f"teacher.{size}": value for size, value in sizes.items()}}
            found[job].append(step_seconds(run("distill", training, beside)))
    return found


def run(job: str, megatron: dict[str, Any], overrides: dict[str, Any], num_ranks: int = 2) -> str:
    """Run a job on `num_ranks` processes and return its output."""
    settings = {"device": "cpu", **{f"megatron.{key}": value for key, value in megatron.items()}, **overrides}
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)),
            *("-m", "abkd_megatron", job),
            *(f"{key}={value}" for key, value in settings.items()),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if ended.returncode != 0:
        sys.exit(f"{job} failed:\n{ended.stdout[-8000:]}")
    return ended.stdout


def step_seconds(output: str) -> float:
    """Return the median of Megatron's times per iteration after the warm-up."""
    times = [float(found) for found in re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", output)]
    return statistics.median(times[WARM_UP:]) / 1000


def evaluation_seconds(output: str, steps: int) -> float:
    """Return Megatron's time per evaluation step: the shortest of the splits, because the first one warms up."""
    times = re.findall(r"evaluate \.+: \([\d.]+, ([\d.]+)\)", output)
    return min(map(float, times)) / 1000 / steps


def print_table(results: dict[str, dict[str, list[float]]]) -> None:
    """Print the medians with their ranges, and the plugin's share."""
    print(f"{'':8}{'job':26}{'ms/step':>10}{'min':>9}{'max':>9}")
    for layout, jobs in results.items():
        for job, times in jobs.items():
            numbers = (statistics.median(times), min(times), max(times))
            print(f"{layout:8}{job:26}{numbers[0] * 1e3:10.0f}{numbers[1] * 1e3:9.0f}{numbers[2] * 1e3:9.0f}")
        alone, forward, distilled, *_ = (statistics.median(jobs[job]) for job in jobs)
        own = distilled - alone - forward
        print(f"{layout:8}the plugin's own: {own * 1e3:.0f} ms, {own / distilled:.0%} of the distilled step")


if __name__ == "__main__":
    main()
