"""Soak test for growth of memory and descriptors: python benchmarks/soak.py --minutes 8.

A student with two pipeline stages trains on two CPU ranks, with its teacher and, as a control, without. Each job
validates, saves checkpoints and logs to TensorBoard, and is repeatedly stopped and resumed in new processes. Every N
steps each rank counts, after the optimizer step:

- live tensors, their bytes, and all objects known to Python's garbage collector;
- heap in use (mallinfo2 of glibc), which includes C++ objects such as autograd graphs and excludes fragmentation;
- anonymous resident memory, open descriptors, threads;
- the teacher's messages in flight, and the maximum number of queued micro-batches.

Writes OUT/soak.json and OUT/soak.png and prints a table: values after a warm-up and at the end of each process, and the
slope of a linear fit. `tests/host/test_soak.py` checks that the same samples reveal a leak.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STUDENT = {"num-layers": 2, "hidden-size": 32, "ffn-hidden-size": 64, "num-attention-heads": 4}
TEACHER = {"num-layers": 4, "hidden-size": 48, "ffn-hidden-size": 96, "num-attention-heads": 4}
COMMON = {
    "pipeline-model-parallel-size": 2,
    "seq-length": 32,
    "max-position-embeddings": 32,
    "position-embedding-type": "rope",
    "normalization": "RMSNorm",
    "swiglu": "true",
    "disable-bias-linear": "true",
    "untie-embeddings-and-output-weights": "true",
    "use-distributed-optimizer": "true",
    "micro-batch-size": 2,
    "global-batch-size": 4,
    "train-iters": 1_000_000,
    "lr": 0.001,
    "lr-decay-style": "constant",
    "log-interval": 10,
    "eval-interval": 250,
    "eval-iters": 2,
    "save-interval": 250,
    "ckpt-format": "torch_dist",
    "mock-data": "true",
    "tokenizer-type": "NullTokenizer",
    "vocab-size": 511,
}
JOBS = {"distilled": "distill", "student alone": "pretrain"}
COUNTS = {
    "tensors": "live tensors",
    "tensor bytes": "their bytes",
    "objects": "objects of Python",
    "heap": "heap in use, bytes",
    "anonymous": "resident memory, bytes",
    "descriptors": "open descriptors",
    "threads": "threads",
    "in flight": "messages in flight",
    "waiting": "most micro-batches waiting",
}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="Train for a long time and measure growth.")
    parser.add_argument("--minutes", type=int, default=8, help="per process, with the teacher")
    parser.add_argument("--control", type=int, default=4, help="minutes per process without the teacher")
    parser.add_argument("--parts", type=int, default=2, help="consecutive processes, each resuming the last")
    parser.add_argument("--every", type=int, default=100, help="steps between two samples")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    minutes = {"distilled": arguments.minutes, "student alone": arguments.control}

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        teacher = {**COMMON, **TEACHER, "train-iters": 1, "save": scratch / "teacher", "save-interval": 1}
        run("pretrain", {**teacher, "eval-iters": 0}, {}, scratch / "samples of the teacher", every=1)
        found = {}
        for name, job in JOBS.items():
            parts = []
            for part in range(arguments.parts):
                print(f"{name}: part {part + 1} of {arguments.parts}", file=sys.stderr, flush=True)
                where = scratch / f"{job}-{part}"
                save = scratch / job
                megatron = {
                    **{**COMMON, **STUDENT, "save": save, "tensorboard-dir": save / "tensorboard"},
                    "exit-duration-in-mins": minutes[name],
                    **({"load": save} if part else {}),
                }
                beside = {"teacher.load": scratch / "teacher", **{f"teacher.{k}": v for k, v in TEACHER.items()}}
                run(job, megatron, beside if job == "distill" else {}, where, every=arguments.every)
                parts.append(read(where))
            found[name] = parts

    samples = {name: [{rank: thinned(it) for rank, it in part.items()} for part in of] for name, of in found.items()}
    summaries = {name: [{rank: summary(it) for rank, it in part.items()} for part in of] for name, of in found.items()}
    report = {
        "summary": summaries,
        "samples": samples,
        "settings": {"student": STUDENT, "teacher": TEACHER, **COMMON, "steps between samples": arguments.every},
        "torch": version("torch"),
        "megatron-core": version("megatron-core"),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "soak.json").write_text(json.dumps(report) + "\n")
    draw(samples, arguments.out / "soak.png")
    print(table(summaries))


def run(job: str, megatron: Mapping[str, Any], overrides: Mapping[str, Any], samples: Path, every: int) -> None:
    """Run a job on two ranks that write samples."""
    settings = {"device": "cpu", **{f"megatron.{key}": value for key, value in megatron.items()}, **overrides}
    log = samples.with_suffix(".log")
    with log.open("w") as sink:
        ended = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
                *(__file__, "rank", str(samples), str(every), job),
                *(f"{key}={value}" for key, value in settings.items()),
            ],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
    if ended.returncode != 0:
        sys.exit(f"{job} failed:\n{log.read_text()[-8000:]}")


# Within a rank ----------------------------------------------------------------------------------------------


def rank(arguments: Sequence[str]) -> int:
    """Run `soak.py rank SAMPLES EVERY JOB ...`: a job that also writes SAMPLES/RANK.jsonl."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from abkd_megatron.__main__ import main as command_line

    samples, every, *words = arguments
    Path(samples).mkdir(parents=True, exist_ok=True)
    # A hook of all torch optimizers; here Megatron has one per rank.
    register_optimizer_step_post_hook(Sampler(Path(samples) / f"{os.environ['RANK']}.jsonl", int(every)))
    return command_line(words)


class Sampler:
    """Optimizer hook that writes a line of JSON every `every` steps."""

    def __init__(self, path: Path, every: int) -> None:
        self._path, self._every = path, every
        self._steps, self._since = 0, time.perf_counter()

    def __call__(self, *_: object) -> None:
        """Count after an optimizer step."""
        self._steps += 1
        if self._steps % self._every:
            return
        seconds = (time.perf_counter() - self._since) / self._every
        with self._path.open("a") as file:
            file.write(json.dumps({"step": self._steps, "seconds": seconds, **counts()}) + "\n")
        self._since = time.perf_counter()


def counts() -> dict[str, int]:
    """Return the counts of this process, after a garbage collection."""
    import psutil
    import torch

    from abkd_megatron.student.attach import Attachment

    gc.collect()
    objects = gc.get_objects()
    # type(), because isinstance() would load lazy objects of other libraries.
    tensors = [it for it in objects if issubclass(type(it), torch.Tensor)]
    attachments = [it for it in objects if type(it) is Attachment]
    process = psutil.Process()
    memory = process.memory_info()
    return {
        "tensors": len(tensors),
        "tensor bytes": sum(it.nbytes for it in tensors),
        "objects": len(objects),
        "heap": heap_in_use(),
        "anonymous": memory.rss - memory.shared,
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
        "in flight": sum(it.num_in_flight for it in attachments),
        "waiting": max((it.max_queued_microbatches for it in attachments), default=0),
    }


class _Mallinfo2(ctypes.Structure):
    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names.split())


def heap_in_use() -> int:
    """Return the bytes allocated by malloc in all arenas; needs glibc >= 2.33."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    found = mallinfo2()
    return int(found.uordblks + found.hblkhd)


# Results ----------------------------------------------------------------------------------------------------


def read(folder: Path) -> dict[str, list[dict[str, float]]]:
    """Return {rank: samples ordered by step}."""
    return {path.stem: [json.loads(line) for line in path.open()] for path in sorted(folder.glob("*.jsonl"))}


def summary(samples: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return the values after the warm-up and at the end, and the slope per 1000 steps."""
    after = warmed_up(samples)
    steps = [it["step"] for it in after]
    found = {"steps": {"start": steps[0], "end": steps[-1]}}
    times = [it["seconds"] for it in after]
    third = max(1, len(times) // 3)
    found["seconds"] = {"start": statistics.median(times[:third]), "end": statistics.median(times[-third:])}
    for name in COUNTS:
        values = [it[name] for it in after]
        slope = statistics.linear_regression(steps, values).slope * 1000 if len(steps) > 1 else 0.0
        found[name] = {"start": values[0], "end": values[-1], "slope": slope}
    return found


def warmed_up(samples: Sequence[Mapping[str, float]]) -> Sequence[Mapping[str, float]]:
    """Drop the first fifth, which includes validation and checkpoints."""
    return samples[len(samples) // 5 :]


def thinned(samples: Sequence[Mapping[str, float]], most: int = 100) -> list[Mapping[str, float]]:
    """Return evenly spaced samples, including the last."""
    every = -(-len(samples) // most)
    return list(samples[::-1][::every][::-1])


def table(summaries: Mapping[str, Any]) -> str:
    """Format all processes as Markdown: after the warm-up -> at the end, and the slopes in KiB."""
    head = [
        "process",
        "steps",
        "ms per step",
        *(COUNTS[key] for key in _PLAIN),
        "heap in use, MiB",
        "KiB per 1000 steps",
    ]
    rows = [[*head, "resident, MiB", "KiB per 1000 steps"], ["---"] * (len(head) + 2)]
    for name, parts in summaries.items():
        for number, part in enumerate(parts, start=1):
            for which, of in part.items():
                row = [f"{name}, process {number}, rank {which}", _change(of["steps"], 1, ",.0f")]
                row += [_change(of["seconds"], 1e-3, ".0f"), *(_change(of[key], 1, ",.0f") for key in _PLAIN)]
                for key in ("heap", "anonymous"):
                    row += [_change(of[key], 2**20, ".2f"), f"{of[key]['slope'] / 1024:+.0f}"]
                rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


_PLAIN = ("tensors", "objects", "descriptors", "threads", "in flight", "waiting")


def _change(of: Mapping[str, float], unit: float, format: str) -> str:
    start, end = (f"{of[when] / unit:{format}}" for when in ("start", "end"))
    return start if start == end else f"{start} -> {end}"


def draw(samples: Mapping[str, Any], path: Path) -> None:
    """Draw the counts of each process over its steps, relative to the end of its warm-up."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {"tensors": 1, "descriptors": 1, "heap": 2**20, "anonymous": 2**20}
    figure, axes = pyplot.subplots(1, len(shown), figsize=(18, 4.5), layout="constrained")
    for axis, (key, unit) in zip(axes, shown.items(), strict=True):
        for color, (name, parts) in zip(("tab:blue", "tab:orange"), samples.items(), strict=True):
            for number, part in enumerate(parts):
                for style, (which, of) in zip("-:", part.items(), strict=True):
                    after = warmed_up(of)
                    label = f"{name}, rank {which}" if number == 0 else None
                    held = [(it[key] - after[0][key]) / unit for it in after]
                    axis.plot([it["step"] for it in after], held, style, color=color, label=label)
        axis.set(
            title=COUNTS[key].replace(", bytes", ", MiB"), xlabel="step of the process", ylabel="since the warm-up"
        )
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        sys.exit(rank(sys.argv[2:]))
    main()
