"""Time and memory of a step that trains from a cache, in Megatron on a CPU rank: python benchmarks/cached.py.

For each case a teacher is saved and a cache written. Then these jobs run in turn for several rounds: the student only,
distillation with the live teacher, and distillation from the cache. A step's time is the rank's CPU time, data loading
included, which other processes of the machine change less than the clock's; the median over iterations after a warm-up.
The ratio to the student only is taken within a round. Memory is that of all tensors at the peak of a step, from one
more run of each job.

Writes OUT/cached.json and prints a table.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import estimate
from step import COMMON, ROOT, WARM_UP, run

# {name: (vocabulary - 1, student, teacher, `distillation` settings)}; a step has 16 samples of 128 tokens.
CASES: dict[str, tuple[int, dict[str, int], dict[str, int], dict[str, Any]]] = {
    f"vocabulary {vocab}, hidden size {hidden}{', fused head' if head else ''}": (
        vocab - 1,
        {"num-layers": layers, "hidden-size": hidden, "ffn-hidden-size": 2 * hidden, "num-attention-heads": 4},
        {"num-layers": 8, "hidden-size": 384, "ffn-hidden-size": 768, "num-attention-heads": 8},
        {"head": "fused" if head else "materialized"},
    )
    for vocab, layers, hidden, head in (
        (400, 2, 128, False),
        (2048, 2, 256, False),
        (8192, 2, 256, False),
        (32768, 2, 512, False),
        (32768, 2, 512, True),
    )
}
JOBS = ("alone", "live", "cached")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="Time steps of a student only, with a live teacher, and from a cache.")
    parser.add_argument("--iterations", type=int, default=8, help="per job, after the warm-up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    results = {}
    for name in CASES:
        if arguments.cases in name:
            with tempfile.TemporaryDirectory() as scratch:
                results[name] = measure(name, Path(scratch), arguments)
            print_row(name, results[name])
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = {
        "jobs": results,
        "top-k": arguments.top_k,
        "iterations": arguments.iterations,
        "torch": version("torch"),
        "megatron-core": version("megatron-core"),
    }
    (arguments.out / "cached.json").write_text(json.dumps(report, indent=1) + "\n")


def measure(name: str, scratch: Path, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return, for each job, seconds per step of each round and the peak of its tensors in bytes."""
    vocab, student, theirs, distillation = CASES[name]
    common = {**COMMON, "vocab-size": vocab, "train-iters": WARM_UP + arguments.iterations, "eval-iters": 0}
    teacher, cache = scratch / "teacher", scratch / "cache"
    run("pretrain", {**common, **theirs, "train-iters": 1, "save": teacher, "save-interval": 1}, {}, num_ranks=1)
    training = {**common, **student}
    live = {"teacher.load": teacher, **{f"teacher.{key}": value for key, value in theirs.items()}}
    run("cache", training, {**live, "cache.dir": cache, "cache.top_k": arguments.top_k}, num_ranks=1)
    loss = {"distillation.divergence": "forward_kl"}
    loss |= {f"distillation.{key}": value for key, value in distillation.items()}
    jobs: dict[str, tuple[str, dict[str, Any]]] = {
        "alone": ("pretrain", {}),
        "live": ("distill", {**loss, **live}),
        "cached": ("distill", {**loss, "distillation.cache": cache}),
    }
    found: dict[str, dict[str, Any]] = {job: {"seconds": []} for job in jobs}
    for _ in range(arguments.rounds):
        for job, (kind, overrides) in jobs.items():
            run_rank_of(__file__, kind, training, overrides, scratch)
            times = json.loads((scratch / "times.json").read_text())[WARM_UP:]
            found[job]["seconds"].append(statistics.median(times))
    for job, (kind, overrides) in jobs.items():
        if not arguments.no_memory:
            run_rank_of(estimate.__file__, kind, training, overrides, scratch)
            found[job]["bytes"] = estimate.read(scratch, 1)[0]["peak"]
    return found


def run_rank_of(program: str, job: str, megatron: dict[str, Any], overrides: dict[str, Any], scratch: Path) -> None:
    """Run a job in a program that measures its rank: this one, or estimate.py."""
    settings = {"device": "cpu", **{f"megatron.{key}": value for key, value in megatron.items()}, **overrides}
    words = [f"{key}={value}" for key, value in settings.items()]
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    ended = subprocess.run(
        [*started, program, "--rank", str(scratch), job, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    if ended.returncode != 0:
        sys.exit(f"{job} failed:\n{ended.stdout[-8000:]}{ended.stderr[-8000:]}")


def run_rank(out: Path, words: list[str]) -> int:
    """Run a job on this rank and write its CPU seconds per step to OUT/times.json."""
    from megatron.training import training

    from abkd_megatron.__main__ import main as command_line

    step, found = training.train_step, []

    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = time.process_time()
        result = step(*args, **kwargs)
        found.append(time.process_time() - begin)
        return result

    with mock.patch.object(training, "train_step", timed):
        code = command_line(words)
    (out / "times.json").write_text(json.dumps(found))
    return code


def print_row(name: str, jobs: dict[str, dict[str, Any]]) -> None:
    """Print a case: time alone, and the ratios of the others to it."""
    alone = jobs["alone"]
    cells = [f"{name:44}{statistics.median(alone['seconds']) * 1e3:7.0f} ms"]
    for job in JOBS[1:]:
        ratios = [a / b for a, b in zip(jobs[job]["seconds"], alone["seconds"], strict=True)]
        cells.append(f"{job} {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
    if "bytes" in alone:
        cells += [f"{job} {of['bytes'] / estimate.MIB:.0f} MiB" for job, of in jobs.items()]
    print("  ".join(cells), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        sys.exit(run_rank(Path(sys.argv[2]), sys.argv[3:]))
    main()
